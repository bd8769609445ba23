# SPDX-License-Identifier: Apache-2.0
"""One threshold for each model of a merge from disk: TIES as in its paper."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from jlora.merging.checkpoints.planning import MergePlan, plan_merge
from jlora.merging.checkpoints.recipes import Recipe
from jlora.numerics.kth_largest import kth_of_pieces
from jlora.pairing.pairs import read_side
from jlora.runs.fingerprints import name_of
from jlora.selection import is_floating

_PIECE = 2**22  # entries in work at a time


def trim_models(recipe: Recipe, density: float) -> Recipe:
  """A recipe whose models are trimmed as wholes, not tensor by tensor.

      t_i = the magnitude that a share `density` of all of δ_i reaches

  so that a matrix that changed little loses more than one that changed much:
  TIES' own trim, where `ties` by its density trims each tensor.

  Args:
    recipe: of `ties`, or another method that takes a `threshold`; with a base.
    density: share of each model's changes to keep, in (0, 1].

  Returns:
    The recipe with a `threshold` among the settings of each input, for
    `merge_checkpoints`: densities then say nothing. Exact: the values are
    counted by their high bits, then those of the bin that counts by their low
    ones. Reads all models twice and holds one tensor; tied weights and layers
    that are repeated count once, what is not merged and rows that a model lacks
    never.

  Raises:
    ValueError: no base, a density out of range, a method without `threshold`,
      or as `plan_merge`.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints.safetensors import write_safetensors
    >>> from jlora.merging import ties
    >>> from jlora.merging import Input, Slice
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


def _magnitudes(plan: MergePlan, model: str) -> Iterator[np.ndarray]:
  """Yields |δ| of a model's tensors, each tensor once, in pieces.

  Rows that one of both lacks are at the end, and not counted.
  """
  seen: set[Any] = set()
  for job in plan.jobs:
    for source in job.sources:
      key = str((source, job.base))
      if source.model != model or job.base is None or key in seen:
        continue
      seen.add(key)
      own = read_side(plan.models[model], source.side)
      under = read_side(plan.models[job.base.model], job.base.side)
      if is_floating(own.dtype):
        own, under = (np.reshape(x, -1) for x in (own, under))
        for start in range(0, min(own.size, under.size), _PIECE):
          piece = slice(start, min(start + _PIECE, own.size, under.size))
          new, old = (x[piece].astype(np.float32) for x in (own, under))
          yield np.abs(new - old)
