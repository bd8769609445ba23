# SPDX-License-Identifier: Apache-2.0
"""Puts models of other packages through jlora; `make test-foreign`.

python -m tests.foreign --out=docs/foreign.md
"""

import argparse
import os
import re
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "KERAS_BACKEND": "jax",
  "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
warnings.simplefilter("ignore")

from tests.foreign.checks import LIMITS, examine, faults  # noqa: E402
from tests.foreign.models import MODELS, Row  # noqa: E402

PACKAGES = (
  "jax", "flax", "equinox", "dm-haiku", "google-tunix", "qwix", "penzai",
  "keras",
)  # fmt: skip


def main(words: list[str] | None = None) -> int:
  """Examines all models and prints their rows; 1 if a promise is broken."""
  parser = argparse.ArgumentParser(prog="python -m tests.foreign")
  parser.add_argument("--only", default=".*", help="A regex of whole names.")
  parser.add_argument("--out", type=Path, help="A page of Markdown to write.")
  asked = parser.parse_args(words)
  if asked.out:
    asked.out.parent.mkdir(parents=True, exist_ok=True)
  cells, broken = [], []
  for model in MODELS:
    if not re.fullmatch(asked.only, model.name):
      continue
    started = time.monotonic()
    mine, bad = row_of(model)
    cells.append(mine)
    broken += [f"{model.name}: {text}" for text in bad]
    said = f"{mine} {time.monotonic() - started:.0f} s"
    print("\n".join([said, *bad]), flush=True)
  if asked.out:
    asked.out.write_text(page(cells), encoding="utf-8")
  print("\n".join(broken) or "all is well")
  return int(bool(broken))


def row_of(model: Row) -> tuple[str, list[str]]:
  """A model's row of the table, and what is wrong with it."""
  if not model.is_here:
    missing = f"{' or '.join(model.packages)} is not installed"
    return f"| {model.name} | {missing} |", [missing]
  try:
    found = examine(model.make())
  except Exception as error:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"| {model.name} | {said} |", [said]
  cells = [model.name, f"{found['matrices']}", f"{len(found['left'])}"]
  cells += [_figure(name, found.get(name)) for name in LIMITS]
  operations = {
    name for text in found["dense"] for name in re.findall(r"(\w+) \(of ", text)
  }
  cells.append(", ".join(sorted(operations)) or "none")
  return f"| {' | '.join(cells)} |", faults(found)


def page(rows: list[str]) -> str:
  """The whole page."""
  versions = []
  for name in PACKAGES:
    try:
      versions.append(f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
      versions.append(f"{name} not installed")
  names = ["model", "matrices", "left", *LIMITS, "dense sums"]
  return "\n".join(
    [
      "# Models of other packages",
      "",
      "Small models of packages that nobody here wrote, each as a function of"
      " its parameters. Which matrices they have is read from their programs"
      " (`views_from`). Written by `python -m tests.foreign"
      " --out=docs/foreign.md` (`make test-foreign` checks it);"
      f" {', '.join(versions)}.",
      "",
      "- left: parameters of two axes or more that the program multiplies"
      " nothing with: stacked biases, heads' biases, tables that are added"
      " whole.",
      "- full: extracted at full rank and applied, against the finetune. rank"
      " 4: the error over the least possible, by NumPy's SVD.",
      "- value, gradient (of every factor and parameter), rows (a batch in"
      " which each row has its own adapter or none), training (five steps of"
      " gradient descent): beside the weights, against the same with merged"
      " weights.",
      "- bfloat16: the error of value and gradients against float32, over that"
      " of merged weights in bfloat16; models that compute in float32 have"
      " none.",
      "- dense sums: operations that adapt has no rule for.",
      "",
      f"| {' | '.join(names)} |",
      "|---" * len(names) + "|",
      *rows,
      "",
    ]
  )


def _figure(name: str, value: float | None) -> str:
  """A ratio to one as it is, a distance by its size."""
  if value is None:
    return "-"
  return f"{value:.2f}" if LIMITS[name] >= 1 else f"{value:.0e}"


if __name__ == "__main__":
  sys.exit(main())
