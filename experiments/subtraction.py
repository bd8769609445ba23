# SPDX-License-Identifier: Apache-2.0
"""Subtracting checkpoints in bfloat16, as other tools do: what does it cost?

  python -m experiments.subtraction [--effect=RANK] [--cache=FOLDER] [--smoke]

Three changes of every matrix: of the float32 models; of their bfloat16 copies,
upcast and then subtracted; of the copies, subtracted in bfloat16. The second
less the first is what storing in bfloat16 did, the third less the second what
the tool did. Where a weight changed by less than half of itself the subtraction
is exact (Sterbenz's lemma), whatever the format: expect no error of the tool.

`--effect` measures what storing costs instead, in the change and in what the
model says: the finetune rounded to bfloat16, and adapters of that rank of the
true change and of the stored one (both files rounded), on the float32 base.

Each takes under 2 minutes on two loaded cores.
"""

import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import app, flags

import jlora
from experiments.lib.adapters import ladders, teachers
from experiments.lib.data import smollm2, texts
from experiments.lib.models import finetunes
from jlora import models
from jlora.commands import keep_compilations
from jlora.evaluation import recovered
from jlora.extraction import module_type
from jlora.numerics import norm_of

BF16 = ml_dtypes.bfloat16


def measure_matrix(base: np.ndarray, finetuned: np.ndarray) -> dict[str, float]:
  """Computes squared norms of a change, and of storage's and the tool's errors.

  Args:
    base: float32.
    finetuned: the same shape.

  Returns:
    `change`, `storage`, `tool`: squared norms; `inexact`: entries where the
    bfloat16 difference is not the difference; `size`: entries.

  Example:
    >>> found = measure_matrix(np.ones(2, np.float32),
    ...                        np.array([1.0078125, -3.015625], np.float32))
    >>> found["inexact"], found["storage"]
    (1.0, 0.0)
  """
  left, right = base.astype(BF16), finetuned.astype(BF16)
  true = finetuned.astype(np.float64) - base
  upcast = right.astype(np.float32) - left.astype(np.float32)
  rounded = np.subtract(right, left).astype(np.float32)
  square = lambda x: float(np.sum(np.square(x, dtype=np.float64)))  # noqa: E731
  return {
    "change": square(true),
    "storage": square(upcast - true),
    "tool": square(rounded - upcast),
    "inexact": float(np.sum(rounded != upcast)),
    "size": float(base.size),
  }


def measure_pair(base: str, finetuned: str) -> dict[str, dict[str, float]]:
  """Sums up `measure_matrix` by module type.

  Args:
    base: a checkpoint.
    finetuned: its finetune.

  Returns:
    Type -> sums; "all" last.
  """
  left, right = jlora.open_checkpoint(base), jlora.open_checkpoint(finetuned)
  groups: dict[str, dict[str, float]] = {}
  for name, spec in left.spec.items():
    if len(spec.shape) != 2 or name not in right.spec:
      continue
    found = measure_matrix(
      *(np.asarray(side[name], np.float32) for side in (left, right))
    )
    if found["change"]:
      for group in (module_type(name), "all"):
        sums = groups.setdefault(group, dict.fromkeys(found, 0.0))
        for key, value in found.items():
          sums[key] += value
  return {
    **{k: v for k, v in groups.items() if k != "all"},
    "all": groups["all"],
  }


def measure_effect(
  model: Any, base: Any, finetuned: Any, tokens: np.ndarray, rank: int
) -> list[dict[str, Any]]:
  """Measures what rounding and truncation lose, in change and in effect.

  Args:
    model: `(params, tokens) -> logits`.
    base: its parameters, nested dict of float32.
    finetuned: the same structure.
    tokens: (rows, time), held out.
    rank: of the adapters.

  Returns:
    Rows: `what`, `error` (of the change that is left against the true one, all
    matrices as one vector, relative), `kl` and `kl_error` (of the finetune to
    what is served), `kept` (1 - kl / KL(finetuned ‖ base)).
  """
  before, after = (
    jax.tree.map(lambda x: np.asarray(x).astype(BF16).astype(np.float32), tree)
    for tree in (base, finetuned)
  )
  true = ladders.build_ladder(model, base, finetuned, rank)
  stored = ladders.build_ladder(model, before, after, rank)
  whole = jax.tree.map(lambda x, y, z: x + (z - y), base, before, after)
  cuts = [ladders.with_loras(base, x.loras) for x in (true, stored)]
  served = {
    "the base": (base, base),
    "the finetune, both stored in bfloat16": (before, after),
    "base + the stored change": (base, whole),
    f"base + rank {rank} of the stored change": (base, cuts[1]),
    f"base + rank {rank} of the true change": (base, cuts[0]),
  }
  teacher = teachers.listen(model, finetuned, tokens)
  rows: list[dict[str, Any]] = []
  for what, (left, right) in served.items():
    kl, error = teachers.distance_from(teacher, right)
    rows.append(
      {
        "what": what,
        "error": _missed(true, left, right),
        "kl": kl,
        "kl_error": error,
        "kept": recovered(kl, rows[0]["kl"] if rows else kl),
      }
    )
  return rows


def _missed(ladder: ladders.Ladder, before: Any, after: Any) -> float:
  """Computes the relative error of another change of the same matrices."""
  base, tuned, left, right = map(
    jlora.paths.flatten, (ladder.base, ladder.finetuned, before, after)
  )
  lost2 = 0.0
  for path in ladder.loras:
    true = np.asarray(tuned[path]) - np.asarray(base[path])
    lost2 += norm_of(true - (right[path] - left[path])) ** 2
  return float(lost2 / sum(x**2 for x in ladder.norms.values())) ** 0.5


def effect_table(rows: list[dict[str, Any]]) -> str:
  """Formats the rows of `measure_effect` as a Markdown table.

  Args:
    rows: as it gives them.

  Returns:
    Lines.

  Example:
    >>> row = {"what": "x", "error": 0.5, "kl": 0.01, "kl_error": 0.001,
    ...        "kept": 0.98}
    >>> effect_table([row]).splitlines()[-1]
    '| x | 0.5000 | 0.01000 ± 0.00100 | 98.00% |'
  """
  lines = [
    "| what is served | change missed | KL, nats | effect kept |",
    "|---|---|---|---|",
  ]
  for row in rows:
    lines.append(
      f"| {row['what']} | {row['error']:.4f} | {row['kl']:.5f} ± "
      f"{row['kl_error']:.5f} | {row['kept']:.2%} |"
    )
  return "\n".join(lines)


def as_table(groups: Mapping[str, Mapping[str, Any]]) -> str:
  """Formats the groups as a Markdown table, norms relative to the change.

  Args:
    groups: as `measure_pair` gives them.

  Returns:
    Lines.

  Example:
    >>> sums = dict(change=4.0, storage=1.0, tool=0.04, inexact=1.0, size=4.0)
    >>> as_table({"q": sums}).splitlines()[-1]
    '| q | 0.5000 | 0.100000 | 25.000% |'
  """
  lines = [
    "| type | stored in bfloat16 | subtracted in bfloat16 | inexact entries |",
    "|---|---|---|---|",
  ]
  for name, sums in groups.items():
    storage, tool = (
      (sums[key] / sums["change"]) ** 0.5 for key in ("storage", "tool")
    )
    lines.append(
      f"| {name} | {storage:.4f} | {tool:.6f} | "
      f"{sums['inexact'] / sums['size']:.3%} |"
    )
  return "\n".join(lines)


def main(_: list[str]) -> None:
  """Prints one of the tables and writes it as JSON."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  with tempfile.TemporaryDirectory() as work:
    if values.smoke:
      pair = finetunes.tiny_pair(work, jax.random.key(0))
      text, encode = texts.split(texts.pydoc())[1], texts.encode_bytes
    else:
      pair = finetunes.kjv_pair(values.cache)
      text = texts.parts("kjv", values.cache)[1]
      encode = smollm2.tokenizer(pair[0])
    if values.effect:
      tokens = texts.excerpts(text, encode, rows=values.rows, length=127)
      (model, base), (same, tuned) = map(models.load, pair)
      assert same is model
      found: Any = measure_effect(model, base, tuned, tokens, values.effect)
      print(effect_table(found))
    else:
      found = measure_pair(*map(str, pair))
      print(as_table(found))
  if values.out:
    pathlib.Path(values.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_integer("effect", None, "Instead: what storing costs; a rank.")
  flags.DEFINE_integer("rows", 8, "Held-out rows of 128 tokens.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "JSON file.")
  flags.DEFINE_bool("smoke", False, "The tiny pair, in seconds.")
  app.run(main)
