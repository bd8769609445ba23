# SPDX-License-Identifier: Apache-2.0
"""Matches all permutations of a network, one at a time, until none moves."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.alignment.assignments import Matched, match_family, tensors_of
from jlora.alignment.layouts import UnitLayout, lay_out_units, length
from jlora.alignment.permutations import (
  Permutations,
  compose,
  identity,
  permuted,
)
from jlora.alignment.symmetries import Symmetry
from jlora.messages import name_some
from jlora.numerics.backends import library_of, words_of
from jlora.numerics.sums import inner_product
from jlora.paths import check_same_paths


def descend(
  left: Mapping[str, Any],
  right: Mapping[str, Any],
  layout: UnitLayout,
  found: Permutations,
  key: Any,
  sweeps: int,
  tol: float,
) -> tuple[Permutations, tuple[float, ...]]:
  """Improves permutations one at a time, the others held, until none moves.

  Args:
    left: path -> array.
    right: the network whose units are reordered, `found` already applied.
    layout: of both networks.
    found: all of the layout's permutations, as applied to `right` so far.
    key: PRNG key of the order in which a sweep visits the permutations.
    sweeps: maximal number of sweeps.
    tol: as for `match_weights`.

  Returns:
    Permutations that include `found`, and the score before the first sweep and
    after each.
  """
  families = {
    root: (inner, paths)
    for root, inner in layout.families().items()
    if (paths := _touched(layout, {root, *inner}))
  }
  right, scores = dict(right), [agreement_of(left, right)]
  rng = np.random.default_rng(words_of(key))
  order = _anchored_first(layout, families)
  for _ in range(sweeps):
    gained = False
    for root in order:
      inner, paths = families[root]
      step = _match(left, right, layout, root, inner, paths, tol)
      if step.gain > 0:
        gained = True
        right |= permuted(
          {path: right[path] for path in paths}, step.permutations, layout
        )
        found = compose({**identity(layout), **step.permutations}, found,
                        layout)  # fmt: skip
    scores.append(agreement_of(left, right))
    if not gained:
      break
    order = [str(name) for name in rng.permutation(order)]
  return found, tuple(scores)


def _match(left, right, layout, root, inner, paths, tol) -> Matched:
  """Matches one permutation and those inside it."""
  pairs = tensors_of(left, right, layout, root, inner, paths)
  sizes = {name: layout.sizes[name] for name in (root, *inner)}
  return match_family(pairs, root, inner, sizes, tol)


def _anchored_first(layout: UnitLayout, families) -> list[str]:
  """Sorts permutations by how many numbers they alone permute.

  Those numbers can be compared while the other permutations are still unknown.
  """
  alone = {}
  for root, (inner, paths) in families.items():
    own = {root, *inner}
    alone[root] = sum(
      math.prod(map(length, place.axes))
      for place in map(layout.places.__getitem__, paths)
      if place.names() <= own
    )
  return sorted(families, key=lambda root: -alone[root])


def _touched(layout: UnitLayout, names: set[str]) -> list[str]:
  """Returns the paths that any of the named permutations acts on."""
  return [p for p, place in layout.places.items() if place.names() & names]


def _dot(x, y) -> float:
  """Computes the inner product of two arrays, in float32."""
  x, y = (z.astype(np.float32).reshape(-1) for z in (x, y))
  if library_of(x) is np:
    return inner_product(x, y)
  return float(library_of(x).vdot(x, y, precision="highest"))


def agreement_of(left: Mapping[str, Any], right: Mapping[str, Any]) -> float:
  """Computes the inner product of two networks' parameters.

  Within an array float32 sums of blocks, added in float64 for NumPy's arrays.

  Example:
    >>> agreement_of({"w": np.ones(3)}, {"w": np.ones(3)})
    3.0
  """
  return sum((_dot(left[path], right[path]) for path in left), 0.0)


def layout_of_pair(
  left: Mapping[str, Any], right: Mapping[str, Any], symmetry: Symmetry
) -> UnitLayout:
  """Returns the layout of two networks of equal shapes and finite entries.

  Raises:
    ValueError: paths or shapes differ, NaN or infinity, or as `lay_out_units`.
  """
  check_alike(left, right)
  return lay_out_units(symmetry, left)


def check_alike(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
  """Raises unless arrays have the same paths and shapes and are finite.

  Args:
    left: path -> array, called `a` in errors.
    right: path -> array, called `b` in errors.

  Raises:
    ValueError: what differs, or is NaN or infinite; names up to three.

  Example:
    >>> check_alike({"w": np.ones(2)}, {"w": np.ones(3)})
    Traceback (most recent call last):
    ...
    ValueError: 1 shapes differ: w (2,) and (3,). Units can be matched only
    one to one.
  """
  check_same_paths(left, right, "a", "b")
  wrong = [
    f"{path} {left[path].shape} and {right[path].shape}"
    for path in left
    if left[path].shape != right[path].shape
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} shapes differ: {name_some(wrong)}. Units can be matched "
      "only one to one."
    )

  wrong = [
    f"{path} of {name}"
    for name, side in (("a", left), ("b", right))
    for path, leaf in side.items()
    if not bool(library_of(leaf).isfinite(leaf).all())
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} arrays hold NaN or infinity: {name_some(wrong)}."
    )
