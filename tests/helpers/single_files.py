# SPDX-License-Identifier: Apache-2.0
"""Tiny image models by diffusers' names, and the same as the original's files.

Names are turned by the rows that the library reads by; that these rows are
right is for `test_names.py` and, in diffusers itself, `test_consumers.py`.
"""

import numpy as np

from jlora.formats.name_rows import OPEN_CLIP, OPEN_CLIP_PARAMETERS, Plan
from jlora.formats.names import (
  FAMILIES,
  find_ours,
  is_exchanged,
  names_of,
  original_of,
)
from tests.helpers import image_adapters

PREFIX = {
  "unet": "model.diffusion_model.",
  "transformer": "model.diffusion_model.",
  "text_encoder": "cond_stage_model.transformer.",
  "text_encoder_2": "conditioner.embedders.1.model.",
}


def tensors_of(family, seed=0, size=1.0):
  """{parameter: array} of a family's modules, with biases."""
  rng = np.random.default_rng(seed)
  found = {}
  for module, shape in image_adapters.FAMILIES[family].items():
    found[f"{module}.weight"] = rng.standard_normal(shape, np.float32) * size
    found[f"{module}.bias"] = rng.standard_normal(shape[0], np.float32) * size
  return found


def plan_of(family):
  return Plan(2, FAMILIES[family].attended)


def as_original(tensors, family, prefixes=PREFIX):
  """The tensors of a single file; what the original joins is complete."""
  rows, plan = FAMILIES[family].rows, plan_of(family)
  found = {}
  for name in tensors:
    component, _, rest = name.partition(".")
    module, _, leaf = rest.rpartition(".")
    is_open = component == "text_encoder_2"
    apart = OPEN_CLIP_PARAMETERS if is_open else FAMILIES[family].parameters
    if row := find_ours(rest, apart):
      array = tensors[name].T if row.row.transposed else tensors[name]
      found[prefixes[component] + original_of(row, plan)] = array
      continue
    own = OPEN_CLIP if is_open else rows
    row = find_ours(module, own)
    if row is None:
      found[prefixes[component] + rest] = tensors[name]
      continue
    parts = [
      tensors[f"{component}.{part}.{leaf}"]
      for part in names_of(row)
    ]  # fmt: skip
    whole = np.concatenate(parts)
    weight = tensors[f"{component}.{module}.weight"].shape
    if is_exchanged(row.row, weight):
      whole = np.concatenate(np.split(whole, 2)[::-1])
    dot = "_" if row.row.theirs.endswith("in_proj") else "."
    key = f"{prefixes[component]}{original_of(row, plan)}{dot}{leaf}"
    found[key] = whole
  return found


def split_components(tensors):
  """{component: {parameter: array}}."""
  found = {}
  for name, array in tensors.items():
    component, _, rest = name.partition(".")
    found.setdefault(component, {})[rest] = array
  return found
