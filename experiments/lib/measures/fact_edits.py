# SPDX-License-Identifier: Apache-2.0
"""Measures what an edit of a fact does to its answers and to other text."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.lib.adapters.edits import Model
from experiments.lib.data.facts import NEIGHBOURS, Fact, encode_prompts
from jlora.evaluation import divergence_of
from jlora.numerics import norm_of

Row = dict[str, float]
_COLUMNS = {
  "new": "new answer",
  "old": "old answer",
  "asked_new": "paraphrases: new",
  "asked_old": "paraphrases: old",
  "right": "neighbours: right",
  "bleed": "neighbours: new",
  "kl": "KL, nats",
  "norm": "norm",
  "score": "score",
}
#: Tokens of each held-out text.
_LENGTH = 32


class Measure:
  """A base model on fixed prompts and text, to measure edits against."""

  def __init__(self, model: Model, held: np.ndarray, multiple: int):
    """Computes the base's logits on the first tokens of held-out text."""
    self.model, self.multiple = model, multiple
    self.rows = [jnp.asarray(row[None, :_LENGTH]) for row in held]
    self.base = [_logits(model.apply, model.params, row) for row in self.rows]

  def __call__(self, facts: Sequence[Fact], loras: jlora.Loras) -> list[Row]:
    """Measures an adapter: probabilities for each fact, KL on other text."""
    params = jlora.apply(self.model.params, loras)
    change = [norm_of(np.asarray(jlora.loras.dense(x))) for x in loras.values()]
    shared = {
      "kl": self.divergence(params),
      "norm": float(np.linalg.norm(change)),
    }
    return [self.probabilities(fact, params) | shared for fact in facts]

  def probabilities(self, fact: Fact, params: Any) -> Row:
    """Returns the probabilities of answers: own, paraphrased, neighbours'."""
    asked = [
      (fact.prompt, fact.old),
      *((p, fact.old) for p in fact.paraphrases),
    ]
    asked += [(prompt, right) for prompt, right in NEIGHBOURS]
    encode = self.model.encode
    prompts = encode_prompts(
      [(prompt, "", prompt) for prompt, _ in asked], encode, self.multiple
    )
    said = _first(self.model.apply, params, prompts.tokens, prompts.ends)
    said = np.asarray(said)
    own = said[range(len(said)), [encode(answer)[0] for _, answer in asked]]
    new = said[:, encode(fact.new)[0]]
    part = slice(1, 1 + len(fact.paraphrases))
    return {
      "new": float(new[0]),
      "old": float(own[0]),
      "asked_new": float(new[part].mean()),
      "asked_old": float(own[part].mean()),
      "right": float(own[part.stop :].mean()),
      "bleed": float(new[part.stop :].mean()),
    }

  def divergence(self, params: Any) -> float:
    """Computes KL(base ‖ edited) on held-out text."""
    found = [
      _diverge(self.model.apply, params, row, logits)
      for row, logits in zip(self.rows, self.base, strict=True)
    ]
    return float(np.mean(found))


def mean_row(rows: Sequence[Mapping[str, float]]) -> Row:
  """Averages every figure over rows.

  Example:
    >>> mean_row([{"kl": 1.0}, {"kl": 2.0}])
    {'kl': 1.5}
  """
  return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def harmonic(row: Mapping[str, float], base: Mapping[str, float]) -> float:
  """Scores an edit in [0, 1]: told, told in other words, and nothing else.

  It is the harmonic mean of the new answer's probability, of that on
  paraphrases, and of the share of their probability that the neighbours' right
  answers keep.

  Example:
    >>> row = {"new": 1.0, "asked_new": 0.5, "right": 0.4}
    >>> harmonic(row, {"right": 0.4})
    0.75
  """
  kept = min(1.0, row["right"] / base["right"])
  parts = np.array([row["new"], row["asked_new"], kept])
  return float(3 / np.sum(1 / np.maximum(parts, 1e-9)))


def as_table(rows: Mapping[str, Mapping[str, float]], first: str) -> str:
  """Formats rows by name as a Markdown table.

  Example:
    >>> print(as_table({"a": {"kl": 0.5}, "b": {"kl": 1, "new": 0.25}}, "edit"))
    | edit | new answer | KL, nats |
    |---|---|---|
    | a |  | 0.5000 |
    | b | 0.250 | 1.0000 |
  """
  used = [key for key in _COLUMNS if any(key in row for row in rows.values())]
  lines = [f"| {first} | {' | '.join(_COLUMNS[key] for key in used)} |"]
  lines.append("|---" * (len(used) + 1) + "|")
  digits = {"kl": 4, "norm": 2}
  for name, row in rows.items():
    cells = [
      f"{row[key]:.{digits.get(key, 3)}f}" if key in row else "" for key in used
    ]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply, params, tokens):
  """Computes logits, compiled."""
  return apply(params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _diverge(apply, params, tokens, base):
  """Computes the mean divergence from the base on one row."""
  return divergence_of(base, apply(params, tokens))[0].mean()


@functools.partial(jax.jit, static_argnums=0)
def _first(apply, params, tokens, ends):
  """Computes what follows the prompts, (rows, vocab) probabilities."""
  logits = apply(params, tokens)
  picked = jnp.take_along_axis(logits, ends[:, None, None], axis=1)[:, 0]
  return jax.nn.softmax(picked.astype(jnp.float32))
