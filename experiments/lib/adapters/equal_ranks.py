# SPDX-License-Identifier: Apache-2.0
"""Merges of two adapters into one of a given rank, all called alike.

A method is `(loras, weights, base=None, *, key, rank) -> Lora`, as in
`jlora.merging`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.factoring import svd
from jlora.loras import Lora, dense, from_factors
from jlora.merging import (
  core_space,
  dare,
  given_units,
  knots,
  lego,
  singular_units,
  svd_merge,
  ties,
  tsv,
)

DENSITY = 0.5
RESTARTS = 16
#: Scales of what was merged, of which one is chosen on validation.
SCALES = (0.75, 1.0, 1.25, 1.5, 2.0)


def through_dense(
  loras: Sequence[Lora],
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  rank: int,
  method: Callable[..., Any],
  **settings: Any,
) -> Lora:
  """Merges dense changes by a method for arrays, and truncates the result.

  Args:
    loras: n Loras of one parameter.
    weights: (n,).
    base: unused.
    key: of the method.
    rank: of the result.
    method: of arrays.
    **settings: of the method.

  Returns:
    Lora of scale 1.
  """
  del base
  stack = jnp.stack([dense(x) for x in loras])
  none = jnp.zeros_like(stack[0])
  merged = method(stack, weights, none, key=key, **settings)
  return from_factors(svd(merged, rank))


def equalised(
  loras: Sequence[Lora],
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  rank: int,
) -> Lora:
  """Truncates the sum to a rank, then makes its singular values equal.

  Iso-C at a rank below that of the sum: cut after the values are equal, what is
  kept would be arbitrary.

  Args:
    loras: n Loras of one parameter.
    weights: (n,).
    base: unused.
    key: unused.
    rank: of the result.

  Returns:
    Lora of scale 1, the mean of its singular values kept.
  """
  found = svd_merge(loras, weights, base, key=key, rank=rank)
  s = jnp.sum(found.a**2, axis=-1, keepdims=True)
  factor = jnp.sqrt(jnp.mean(s) / jnp.maximum(s, 1e-12))
  return Lora(factor * found.a, factor * found.b, found.scale)


def at_random(
  found: Lora, loras: Sequence[Lora], rng: np.random.Generator
) -> Lora:
  """Replaces clusters of singular units by random ones of the same sizes.

  Sizes are those of the units that are nearest to each of the results.

  Args:
    found: what `lego` made of singular units.
    loras: what it was made of, NumPy's.
    rng: generator.

  Returns:
    Lora of NumPy arrays, scale 1, of the same rank.
  """
  pairs = [singular_units(x.a, np.asarray(x.scale) * x.b) for x in loras]
  units = np.concatenate([np.concatenate(x, axis=1) for x in pairs])
  means = np.concatenate([found.a, found.b], axis=1)
  norms = np.maximum(np.linalg.norm(means, axis=1), 1e-12)
  nearest = np.abs(units @ means.T / norms[None]).argmax(axis=1)
  mixed = rng.permutation(nearest)
  own = [_centroid(units[mixed == i]) for i in range(len(means))]
  rows: Any = np.stack(own)
  width = found.a.shape[1]
  one: Any = np.float32(1)
  return Lora(rows[:, :width], rows[:, width:], one)


def _centroid(units: np.ndarray) -> np.ndarray:
  """Averages units, signs aligned, and keeps their mean length."""
  if not len(units):
    return np.zeros(units.shape[1], np.float32)
  _, _, vt = np.linalg.svd(units, full_matrices=False)
  signs = np.where(units @ vt[0] < 0, -1, 1)
  mean = (signs[:, None] * units).mean(axis=0)
  length = np.linalg.norm(units, axis=1).mean()
  mean = mean * (length / max(np.linalg.norm(mean), 1e-12))
  return mean.astype(np.float32)


class Merge(NamedTuple):
  """A row: a name, and the method.

  Attributes:
    name: in tables.
    call: the method.
    then: (result, loras, generator) -> Lora that is put in its place.
  """

  name: str
  call: Callable[..., Lora]
  then: Callable[..., Lora] | None = None


_part = functools.partial
_CORE = _part(core_space, method=ties, density=DENSITY)
_LEGO = _part(lego, restarts=RESTARTS)
MERGES = (
  Merge("SVD of the sum", svd_merge),
  Merge("TIES, then SVD", _part(through_dense, method=ties, density=DENSITY)),
  Merge("DARE, then SVD", _part(through_dense, method=dare, density=DENSITY)),
  Merge("KnOTS with TIES", _part(knots, density=DENSITY)),
  Merge("TIES in Core Space", _CORE),
  Merge("TSV in Core Space", _part(core_space, method=tsv)),
  Merge("SVD of the sum, then Iso-C", equalised),
  Merge("LEGO, singular units", _LEGO),
  Merge("LEGO, given units", _part(lego, units=given_units, restarts=RESTARTS)),
  Merge("LEGO, clusters at random", _LEGO, at_random),
)
#: Those that are compared at several ranks.
UNITS = (
  MERGES[0],
  Merge("LEGO, singular units", lego),
  Merge("LEGO, given units", _part(lego, units=given_units)),
  Merge("LEGO, clusters at random", lego, at_random),
)
