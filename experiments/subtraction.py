# SPDX-License-Identifier: Apache-2.0
"""Subtracting checkpoints in bfloat16, as other tools do: what does it cost?

  python -m experiments.subtraction [--cache=FOLDER] [--smoke]

Three changes of every matrix: of the float32 models; of their bfloat16 copies,
upcast and then subtracted; of the copies, subtracted in bfloat16. The second
less the first is what storing in bfloat16 did, the third less the second what
the tool did. Where a weight changed by less than half of itself the subtraction
is exact (Sterbenz's lemma), whatever the format.
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
from experiments import finetune
from jlora.extraction import module_type

BF16 = ml_dtypes.bfloat16


def measure_matrix(base: np.ndarray, finetuned: np.ndarray) -> dict[str, float]:
  """Squared norms of a change, of storage's part in it and of the tool's.

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
  """The sums of `measure_matrix` by module type.

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


def as_table(groups: Mapping[str, Mapping[str, Any]]) -> str:
  """The groups as a Markdown table of norms relative to the change.

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
  """Prints the table."""
  values = flags.FLAGS
  with tempfile.TemporaryDirectory() as work:
    pair = (
      finetune.tiny_pair(work, jax.random.key(0))
      if values.smoke
      else finetune.kjv_pair(values.cache)
    )
    groups = measure_pair(*map(str, pair))
  print(as_table(groups))
  if values.out:
    pathlib.Path(values.out).write_text(json.dumps(groups, indent=1) + "\n")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "JSON file.")
  flags.DEFINE_bool("smoke", False, "The tiny pair, in seconds.")
  app.run(main)
