# SPDX-License-Identifier: Apache-2.0
"""Carries a recipe out and compares every tensor of the result."""

import io
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from jlora.merging import merge_checkpoints, read_recipe
from tests.merges import models
from tests.merges.recipes import Case


def read(folder):
  """All tensors of a folder, floating ones in float64, and their dtypes."""
  found, kinds = {}, {}
  for file in sorted(Path(folder).glob("*.safetensors")):
    with safe_open(file, "np") as opened:
      for name in opened.keys():  # noqa: SIM118
        array = opened.get_tensor(name)
        kinds[name] = array.dtype
        is_exact = np.issubdtype(array.dtype, np.integer)
        found[name] = array if is_exact else array.astype(np.float64)
  return found, kinds


def write_recipe(case: Case, folder: Path) -> Path:
  """Writes the models and the recipe of a case; returns the recipe's file."""
  if not (folder / "o").exists():
    models.write_models(folder, case.family)
  file = folder / "recipe.yml"
  file.write_text(case.text.replace("$", str(folder)))
  return file


def run(case: Case, folder: Path):
  """Carries a recipe out; returns the report."""
  file = write_recipe(case, folder)
  return merge_checkpoints(read_recipe(file), folder / "out", log=io.StringIO())


def distances(case: Case, folder: Path, out: Path):
  """How far each tensor is from the reference, over its largest entry.

  Less what rounding to the stored dtype takes, half a step of each entry.
  """
  inputs = {name: read(folder / name)[0] for name in "oab"}
  found, kinds = read(out)
  far = {}
  for name, array in found.items():
    want = case.want(inputs, name)
    off = np.abs(array - want) - _half_steps(want, kinds[name])
    far[name] = float(off.max() / (np.abs(want).max() or 1.0))
  return far


def _half_steps(want, kind):
  """Half the distance of neighbouring numbers of a dtype."""
  if kind == np.float32:
    return 0.0
  return np.abs(want) * float(ml_dtypes.finfo(kind).eps) / 2 * (1 + 1e-6)


def faults(case: Case, folder: Path) -> list[str]:
  """What is wrong of a case: numbers, names, or how transformers loads it."""
  run(case, folder)
  out = folder / "out"
  far = distances(case, folder, out)
  found = [f"{n} is {d:.1e} off" for n, d in far.items() if not d <= case.close]
  found += models.keys_not_loaded(out)
  config = json.loads((out / "config.json").read_text())
  text = config.get("text_config", config)
  own = json.loads((folder / "a" / "config.json").read_text())
  if "layer_range" not in case.text:
    lacking = read(folder / "a")[0].keys() ^ far.keys()
    found += [f"{name} is in one of the two" for name in sorted(lacking)]
    if text.keys() != own.get("text_config", own).keys():
      found.append("config.json has other keys")
  return found
