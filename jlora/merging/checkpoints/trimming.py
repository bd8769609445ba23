# SPDX-License-Identifier: Apache-2.0
"""Finds one threshold for each model of a merge: TIES as in its paper."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from jlora.merging.checkpoints.planning import (
  InputTensor,
  MergePlan,
  plan_merge,
)
from jlora.merging.checkpoints.reading import read_by_token
from jlora.merging.checkpoints.recipes import Recipe
from jlora.numerics.kth_largest import kth_of_pieces
from jlora.pairing.pairs import Rows, read_side
from jlora.runs.fingerprints import name_of
from jlora.selection import is_floating

_PIECE = 2**22  # entries in work at a time


def trim_models(recipe: Recipe, density: float) -> Recipe:
  """Adds to a recipe a threshold that trims each model as a whole.

      t_i = the magnitude that a share `density` of all of δ_i reaches

  A matrix that changed little then loses more entries than one that changed
  much. This is the trim of the TIES paper; `ties` by its density trims each
  tensor by itself.

  Args:
    recipe: a recipe with a base, of `ties` or another method that takes a
      `threshold`.
    density: share of each model's changes to keep, in (0, 1].

  Returns:
    The recipe with a `threshold` among the settings of each input, for
    `merge_checkpoints`; densities then have no effect. The threshold is exact:
    a first pass counts values by their high bits, a second one those of the bin
    that matters by their low bits. Reads all models twice and holds one tensor
    at a time. Tied weights and repeated layers count once; tensors that are not
    merged and rows that a model lacks do not count.

  Raises:
    ValueError: no base, a density out of range, a method without `threshold`,
      or models that `merge_checkpoints` would refuse.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> from jlora.merging import Input, Slice, ties
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   base, tuned = (f"{tmp}/{name}.safetensors" for name in "ab")
    ...   write_safetensors(base, {n: np.zeros(2, np.float32) for n in "vw"})
    ...   write_safetensors(tuned, {"v": np.float32([4, -3]),
    ...                             "w": np.float32([1, 2])})
    ...   recipe = Recipe(ties, (Slice((Input(tuned),)),), base=base)
    ...   trim_models(recipe, 0.5).slices[0].inputs[0].settings
    {'threshold': 3.0}

  References:
    Yadav et al. (2023), prateeky2806/ties-merging.
  """
  if not 0 < density <= 1:
    raise ValueError(f"density is {density}; it lies above 0, up to 1.")
  if "threshold" not in inspect.signature(recipe.method).parameters:
    name = name_of(recipe.method)
    raise ValueError(f"{name} takes no threshold; ties does.")
  if recipe.base is None:
    raise ValueError("Changes are trimmed: the recipe needs a base.")
  plan = plan_merge(recipe)
  inputs = {one.model for part in recipe.slices for one in part.inputs}
  found = {
    name: kth_of_pieces(functools.partial(_magnitudes, plan, name), density)
    for name in inputs - {recipe.base}
  }
  slices = tuple(
    part._replace(
      inputs=tuple(
        one._replace(settings={**one.settings, "threshold": found[one.model]})
        if one.model in found
        else one
        for one in part.inputs
      )
    )
    for part in recipe.slices
  )
  return recipe._replace(slices=slices)


def _read(plan: MergePlan, source: InputTensor) -> np.ndarray:
  """Reads an input as the merge does, without rows that it lacks at the end."""
  if isinstance(source.side, Rows):
    return read_by_token(plan.models, source)
  return read_side(plan.models[source.model], source.side)


def _magnitudes(plan: MergePlan, model: str) -> Iterator[np.ndarray]:
  """Yields |δ| of a model's tensors, each tensor once, in pieces.

  Rows that either side lacks are at the end, and not counted.
  """
  seen: set[Any] = set()
  for job in plan.jobs:
    for source in job.sources:
      key = str((source, job.base))
      if source.model != model or job.base is None or key in seen:
        continue
      seen.add(key)
      own, under = (_read(plan, one) for one in (source, job.base))
      if is_floating(own.dtype):
        own, under = (np.reshape(x, -1) for x in (own, under))
        for start in range(0, min(own.size, under.size), _PIECE):
          piece = slice(start, min(start + _PIECE, own.size, under.size))
          new, old = (x[piece].astype(np.float32) for x in (own, under))
          yield np.abs(new - old)
