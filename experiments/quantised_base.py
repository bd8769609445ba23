# SPDX-License-Identifier: Apache-2.0
"""How much of a quantised base's error does an adapter repair?

  python -m experiments.quantised_base [--cache=FOLDER] [--every=N] [--smoke]

Of every matrix: base w, finetuned f, and q, the base quantised and brought
back. The plain adapter is the best one of rank r for f - w, the partner the
best for f - q. Both are rounded to bfloat16 and added to q; what is missing of
f is measured over all matrices as one vector. A plain adapter of full rank
would leave the quantisation error ||w - q||.

Takes 14 minutes on two loaded cores. Expect rank 64 to repair a fifth of it.
"""

import json
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import jlora
from experiments.lib.models import finetunes
from pallas_kernels.lora_dot import dequantise, quantise_int8, quantise_nf4

HOW = {"int8": quantise_int8, "nf4": quantise_nf4}
RANKS = (16, 64)

Sums = dict[str, float]


def measure_matrix(base: np.ndarray, finetuned: np.ndarray) -> Sums:
  """Computes squared norms and bytes of one matrix and its adapters.

  Args:
    base: (out, in) float32.
    finetuned: the same shape.

  Returns:
    `size`, in numbers; squared norms `finetuned`, `change`, `q error` (w - q),
    `q without` (f - q), `q plain r`, `q partner r`, and bytes `q bytes`,
    for each q of `HOW` and r of `RANKS`.

  Example:
    >>> one = np.eye(2, dtype=np.float32)
    >>> measure_matrix(one, one)["int8 error"]
    0.0
  """
  change = finetuned - base
  found = {
    "size": float(base.size),
    "finetuned": _square(finetuned),
    "change": _square(change),
  }
  plain = jlora.factoring.gram(change, RANKS[-1])
  for name, how in HOW.items():
    held = how(jnp.asarray(base.T))
    near = np.asarray(dequantise(held)).T
    missing = finetuned - near
    partner = jlora.factoring.gram(missing, RANKS[-1])
    found[f"{name} bytes"] = sum(t.nbytes for t in jax.tree.leaves(held))
    found[f"{name} error"] = _square(base - near)
    found[f"{name} without"] = _square(missing)
    for rank in RANKS:
      for kind, factors in (("plain", plain), ("partner", partner)):
        off = missing - _adapter(factors, rank)
        found[f"{name} {kind} {rank}"] = _square(off)
  for rank in RANKS:
    found[f"adapter {rank}"] = 2.0 * rank * sum(base.shape)
  return found


def _adapter(factors, rank):
  """Returns an adapter's change, its factors rounded to bfloat16."""
  u, s, vt = factors
  rounded = lambda t: t.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
  left = rounded(jnp.asarray(u[:, :rank] * s[:rank]))
  return np.asarray(left @ rounded(jnp.asarray(vt[:rank])))


def _square(t: np.ndarray) -> float:
  """Computes the squared norm."""
  return float(np.sum(np.square(t, dtype=np.float64)))


def measure_pair(base: str, finetuned: str, every: int = 1) -> Sums:
  """Sums up `measure_matrix` over the matrices of layers.

  Args:
    base: a checkpoint.
    finetuned: its finetune.
    every: layers 0, every, 2 every and so on.

  Returns:
    Name -> sum. Embeddings and what did not change are left out.

  Raises:
    ValueError: no matrix of a layer changed.
  """
  left, right = jlora.open_checkpoint(base), jlora.open_checkpoint(finetuned)
  total: Sums = {}
  for name, spec in left.spec.items():
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if len(spec.shape) != 2 or not layer or int(layer[1]) % every:
      continue
    sides = (np.asarray(side[name], np.float32) for side in (left, right))
    for key, value in measure_matrix(*sides).items():
      total[key] = total.get(key, 0.0) + value
  if not total.get("change"):
    raise ValueError(f"no matrix of a layer differs: {base}, {finetuned}.")
  return total


def as_table(sums: Mapping[str, Any]) -> str:
  """Formats the sums as a Markdown table, relative to the finetuned weights.

  Args:
    sums: as `measure_pair` gives them.

  Returns:
    Lines. `repaired` is 1 - partner / quantisation error: of norms.
  """
  error = lambda key: (sums[key] / sums["finetuned"]) ** 0.5  # noqa: E731
  lines = [
    "| base | bytes | quantisation error | no adapter | rank | adapter bytes "
    "| plain adapter | its partner | repaired |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name in HOW:
    for rank in RANKS:
      partner, off = error(f"{name} partner {rank}"), error(f"{name} error")
      lines.append(
        f"| {name} | {sums[f'{name} bytes'] / 2**20:.1f} MiB | {off:.5f} "
        f"| {error(f'{name} without'):.5f} | {rank} "
        f"| {sums[f'adapter {rank}'] / 2**20:.1f} MiB "
        f"| {error(f'{name} plain {rank}'):.5f} | {partner:.5f} "
        f"| {1 - partner / off:.1%} |"
      )
  return "\n".join(lines)


def main(_: list[str]) -> None:
  """Prints the table, and what it is relative to."""
  values = flags.FLAGS
  with tempfile.TemporaryDirectory() as work:
    pair = (
      finetunes.tiny_pair(work, jax.random.key(0))
      if values.smoke
      else finetunes.kjv_pair(values.cache)
    )
    base, finetuned = map(str, pair)
    sums = measure_pair(base, finetuned, values.every)
  print(as_table(sums))
  change = (sums["change"] / sums["finetuned"]) ** 0.5
  print(
    f"{sums['size'] / 1e6:.1f}M weights, {sums['size'] * 2 / 2**20:.1f} MiB in "
    f"bfloat16; the finetune's change is {change:.5f}"
  )
  if values.out:
    pathlib.Path(values.out).write_text(json.dumps(sums, indent=1) + "\n")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "JSON file.")
  flags.DEFINE_integer("every", 1, "Layers 0, every, 2 every and so on.")
  flags.DEFINE_bool("smoke", False, "The tiny pair, in seconds.")
  app.run(main)
