# SPDX-License-Identifier: Apache-2.0
"""A finetune that was a LoRA: does extraction give it back?

  python -m experiments.lora_recovery [--cache=FOLDER] [--smoke]

A LoRA is trained on SmolLM2, merged, and saved in float32 and in bfloat16 as
its base is; both pairs are taken apart at the LoRA's rank and at four times it.

Takes 13 minutes on two loaded cores. Expect all of it back in float32, and in
bfloat16 all but what rounding hides, more at the LoRA's own rank.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import app, flags
from flax import traverse_util

import jlora
from experiments.lib.adapters import ladders
from experiments.lib.data import smollm2, texts
from experiments.lib.models import finetunes
from jlora import models
from jlora.commands import keep_compilations
from jlora.factoring import survey


def train_lora(
  apply: Callable[..., jax.Array],
  params: Any,
  tokens: np.ndarray,
  *,
  rank: int,
  steps: int,
  learning_rate: float = 1e-3,
) -> jlora.Loras:
  """Trains a LoRA on every matrix of the layers.

  Args:
    apply: `(params, tokens) -> logits`.
    params: the base, nested dict; stays.
    tokens: (rows, time + 1), 4 rows a step.
    rank: of every module.
    steps: updates.
    learning_rate: Adam's largest.

  Returns:
    path -> Lora; b begins at zero, a as random rows of length about 1.
  """
  flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
  paths = [p for p in flat if p.endswith("/kernel") and p.startswith("layers")]
  factors = {}
  for seed, path in enumerate(paths):
    m, n = flat[path].shape
    a = jax.random.normal(jax.random.key(seed), (rank, m)) / m**0.5
    factors[path.replace("/", ".")] = {"a": a, "b": jnp.zeros((rank, n))}

  def loras_of(factors):
    """Makes Loras of trained factors."""
    return {
      name.replace(".", "/"): jlora.Lora(x["a"], x["b"], jnp.float32(1))
      for name, x in factors.items()
    }

  def adapted(tree, tokens):
    """Runs the base with the LoRA applied."""
    return apply(jlora.apply(tree["base"], loras_of(tree["loras"])), tokens)

  trained = finetunes.finetune(
    adapted,
    {"base": params, "loras": factors},
    texts.batches(tokens, 4),
    steps=steps,
    learning_rate=learning_rate,
    train=lambda path: path.startswith("loras/"),
  )
  return jax.tree.map(np.asarray, loras_of(trained["loras"]))


def measure_recovery(
  base: Any, merged: Any, loras: Mapping[str, jlora.Lora], dtype: Any, rank: int
) -> dict[str, float]:
  """Measures how much of a LoRA extraction misses, stored in a dtype.

  Args:
    base: nested dict of float32.
    merged: the same with the LoRA.
    loras: the LoRA.
    dtype: in which both are stored.
    rank: at which the pair is taken apart.

  Returns:
    `missed`: norm of the LoRA's change less the extracted one, over its own;
    `error`: relative error of the extracted against the stored change;
    `rounding`: expected norm of the rounding noise of both files, over the
    LoRA's change.
  """
  left, right = (
    jax.tree.map(lambda x: np.asarray(x).astype(dtype), tree)
    for tree in (base, merged)
  )
  ladder = ladders.build_ladder(None, left, right, rank)
  flat, other = (
    dict[str, Any](traverse_util.flatten_dict(tree, sep="/"))
    for tree in (left, right)
  )
  missed2 = true2 = error2 = stored2 = noise2 = 0.0
  for path, lora in loras.items():
    true = np.asarray(lora.a).T @ np.asarray(lora.b)
    stored = np.float32(other[path]) - np.float32(flat[path])
    found = ladder.loras.get(path)
    change = np.zeros_like(true) if found is None else found.a.T @ found.b
    missed2 += float(np.sum(np.square(true - change), dtype=np.float64))
    error2 += float(np.sum(np.square(stored - change), dtype=np.float64))
    stored2 += float(np.sum(np.square(stored), dtype=np.float64))
    true2 += float(np.sum(np.square(true), dtype=np.float64))
    for side in (flat[path], other[path]):
      noise2 += float(survey(side, side, dtype)[1].noise_std) ** 2 * true.size
  return {
    "missed": (missed2 / true2) ** 0.5,
    "error": (error2 / stored2) ** 0.5,
    "rounding": (noise2 / true2) ** 0.5,
  }


def as_table(rows: list[dict[str, Any]]) -> str:
  """Formats the rows as a Markdown table.

  Args:
    rows: dtype, rank, and figures of `measure_recovery`.

  Returns:
    Lines.

  Example:
    >>> as_table([{"dtype": "float32", "rank": 4, "missed": 0.5, "error": 0.25,
    ...            "rounding": 0.1}]).splitlines()[-1]
    '| float32 | 4 | 5.00e-01 | 2.50e-01 | 1.00e-01 |'
  """
  lines = [
    "| stored in | rank | LoRA missed | stored change missed | rounding |",
    "|---|---|---|---|---|",
  ]
  for row in rows:
    figures = " | ".join(
      f"{row[key]:.2e}" for key in ("missed", "error", "rounding")
    )
    lines.append(f"| {row['dtype']} | {row['rank']} | {figures} |")
  return "\n".join(lines)


def main(_: list[str]) -> None:
  """Trains the LoRA, prints the table and writes it as JSON."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  rank, steps = values.rank, values.steps
  if values.smoke:
    apply, params = models.init(finetunes.TINY, jax.random.key(0))
    text, encode = texts.pydoc(), texts.encode_bytes
  else:
    folder = smollm2.fetch(values.cache)
    apply, params = models.load(folder)
    text, encode = smollm2.kjv(values.cache), smollm2.tokenizer(folder)
  tokens = texts.excerpts(
    texts.split(text)[0], encode, rows=4 * steps, length=128
  )
  loras = train_lora(apply, params, tokens, rank=rank, steps=steps)
  merged = ladders.with_loras(params, loras)
  rows = [
    {
      "dtype": np.dtype(dtype).name,
      "rank": at,
      **measure_recovery(params, merged, loras, dtype, at),
    }
    for dtype in (np.float32, ml_dtypes.bfloat16)
    for at in (rank, 4 * rank)
  ]
  print(as_table(rows))
  if values.out:
    pathlib.Path(values.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_integer("rank", 16, "Of the LoRA.")
  flags.DEFINE_integer("steps", 15, "Of training, 4 x 128 tokens each.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "JSON file.")
  flags.DEFINE_bool("smoke", False, "A tiny model, in seconds.")
  app.run(main)
