# SPDX-License-Identifier: Apache-2.0
"""Permutations of hidden units, and networks and Loras reordered by them.

Permutations are a dictionary `{name: array}`. An outermost permutation is (n,);
one inside the units of another is (outer, n), with a row for each outer unit of
the result. Unit k of the result is unit p[k] of the source, and its channel d
is channel c[k, d] of that unit.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.alignment.layouts import Place, UnitLayout, lay_out_units, length
from jlora.alignment.symmetries import FIXED, Symmetry
from jlora.loras import Lora, Loras, check_loras
from jlora.messages import name_some
from jlora.numerics.backends import library_of
from jlora.paths import flatten, unflatten
from jlora.views import MatrixView, ViewRule, view_of

Permutations = dict[str, np.ndarray]


def identity(layout: UnitLayout) -> Permutations:
  """Returns the permutations that move nothing, int64.

  Example:
    >>> identity(UnitLayout({}, {"head": 2, "value": 3}, {"value": "head"}))
    {'head': array([0, 1]), 'value': array([[0, 1, 2],
           [0, 1, 2]])}
  """
  found = {}
  for name, size in layout.sizes.items():
    row = np.arange(size)
    if name in layout.outer:
      row = np.tile(row, (layout.sizes[layout.outer[name]], 1))
    found[name] = row
  return found


def compose(
  second: Permutations, first: Permutations, layout: UnitLayout
) -> Permutations:
  """Returns the permutations that do what `first` does and then `second`.

      p[k] = first[second[k]],   c[k, d] = first_c[second[k], second_c[k, d]]

  Example:
    >>> layout = UnitLayout({}, {"unit": 3}, {})
    >>> turn = {"unit": np.array([1, 2, 0])}
    >>> compose(turn, turn, layout)["unit"]
    array([2, 0, 1])
  """
  found = {}
  for name in layout.sizes:
    if name in layout.outer:
      rows = first[name][second[layout.outer[name]]]
      found[name] = np.take_along_axis(rows, second[name], axis=1)
    else:
      found[name] = first[name][second[name]]
  return found


def inverse(permutations: Permutations, layout: UnitLayout) -> Permutations:
  """Returns the permutations that undo the given ones.

  Example:
    >>> inverse({"u": np.array([1, 2, 0])}, UnitLayout({}, {"u": 3}, {}))["u"]
    array([2, 0, 1])
  """
  found = {}
  for name in layout.sizes:
    back = np.argsort(permutations[name], axis=-1)
    if name in layout.outer:
      back = back[np.argsort(permutations[layout.outer[name]])]
    found[name] = back
  return found


def check_permutations(permutations: Permutations, layout: UnitLayout) -> None:
  """Raises unless all given permutations fit a layout; some may be missing.

  Raises:
    ValueError: a name that the layout lacks, or an array that is not a
      permutation of the right size; names up to three.

  Example:
    >>> layout = UnitLayout({}, {"u": 2}, {})
    >>> check_permutations({"u": np.array([0, 0])}, layout)
    Traceback (most recent call last):
    ...
    ValueError: 1 of 1 are no permutations of this network: u (2,) for (2,).
  """
  shapes = {name: whole.shape for name, whole in identity(layout).items()}
  wrong = [
    f"{name} {np.shape(given)} for {shapes.get(name, 'nothing')}"
    for name, given in permutations.items()
    if name not in shapes
    or np.shape(given) != shapes[name]
    or (np.sort(given, axis=-1) != np.arange(shapes[name][-1])).any()
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} of {len(permutations)} are no permutations of this "
      f"network: {name_some(wrong)}."
    )


def is_identity(permutations: Permutations) -> bool:
  """Returns whether the permutations move nothing."""
  return all(
    (given == np.arange(given.shape[-1])).all()
    for given in permutations.values()
  )


def permute(params: Any, permutations: Permutations, symmetry: Symmetry) -> Any:
  """Reorders the hidden units of a network without changing its function.

      w[i, ..., j]  ←  w[p[i], ..., q[j]]      on every axis that has one

  Args:
    params: a pytree of arrays, NumPy's or JAX's.
    permutations: from `match_weights`; a name that is absent moves nothing.
    symmetry: of the network.

  Returns:
    The pytree. It computes the same function up to rounding, because sums run
    in another order. Copies what moves, one array at a time; permuting a
    sharded axis moves data between its devices.

  Raises:
    ValueError: as `lay_out_units`; an array that is not a permutation of the
      right size.

  Example:
    >>> from jlora.alignment import chain
    >>> w = {"a/kernel": np.array([[1, 2]]), "b/kernel": np.array([[3], [4]])}
    >>> permute(w, {"unit.0": np.array([1, 0])}, chain(["a", "b"]))
    {'a/kernel': array([[2, 1]]), 'b/kernel': array([[4],
           [3]])}
  """
  flat = flatten(params)
  layout = lay_out_units(symmetry, flat)
  check_permutations(permutations, layout)
  return unflatten(permuted(flat, permutations, layout), params)


def permuted(
  flat: Mapping[str, Any],
  permutations: Permutations,
  layout: UnitLayout,
) -> dict[str, Any]:
  """Applies permutations to {path: array} whose layout is known, unchecked.

  Args:
    flat: path -> array; of a stack, all arrays.
    permutations: as for `permute`.
    layout: from `lay_out_units`.
  """
  found = {}
  for path in flat:
    place = layout.places[path]
    leaf = flat[_source(path, place, permutations)]
    for i, axis in enumerate(place.axes):
      order = _order(axis, place, permutations, layout)
      if order is not None:
        leaf = library_of(leaf).take(leaf, order, axis=i)
    found[path] = leaf
  return found


def permute_loras(
  loras: Loras, permutations: Permutations, symmetry: Symmetry, like: Any
) -> Loras:
  """Reorders Loras so that they fit a network reordered by `permute`.

      a ← a P_inᵀ,   b ← b P_outᵀ;   the rank axis stays as it is

  so that `apply(permute(base), permute_loras(loras))` is
  `permute(apply(base, loras))`.

  Args:
    loras: path -> Lora, of any of the parameters.
    permutations: as for `permute`.
    symmetry: of the network.
    like: its parameters, or anything of their shapes; kernels are read by
      `symmetry.views`.

  Returns:
    path -> Lora. Where experts change places, their Loras do too. Costs a copy
    of the factors.

  Raises:
    ValueError: as `permute`; a Lora that does not fit its parameter.

  Example:
    >>> from jlora.alignment import chain
    >>> w = {"a/kernel": np.ones((1, 2)), "b/kernel": np.ones((2, 1))}
    >>> lora = Lora(np.ones((1, 1)), np.array([[3, 4]]), np.float32(1))
    >>> swap = {"unit.0": np.array([1, 0])}
    >>> found = permute_loras({"a/kernel": lora}, swap, chain(["a", "b"]), w)
    >>> found["a/kernel"].b
    array([[4, 3]])
  """
  check_loras(loras)
  flat = flatten(like)
  layout = lay_out_units(symmetry, flat)
  check_permutations(permutations, layout)
  views = _views_of(loras, flat, symmetry.views)
  found = {}
  for path in layout.places:
    place = layout.places[path]
    source = _source(path, place, permutations)
    if source in loras:
      lora, view = loras[source], views[source]
      sides = []
      for factor, axes in ((lora.a, view.inputs), (lora.b, view.outputs)):
        order = _orders([place.axes[i] for i in axes], place, permutations,
                        layout)  # fmt: skip
        take = library_of(factor).take
        sides.append(factor if order is None else take(factor, order, axis=-1))
      found[path] = Lora(sides[0], sides[1], lora.scale)
  return found


def _source(path: str, place: Place, permutations) -> str:
  """Returns the path of the array that moves to this path."""
  if place.stack not in permutations:
    return path
  return place.peers[permutations[place.stack][place.index]]


def _order(axis, place, permutations, layout) -> np.ndarray | None:
  """Returns where each entry of an axis comes from; None if none moves."""
  if not any(f.name in permutations for part in axis for f in part):
    return None
  orders, start = [], 0
  for part in axis:
    shape = tuple(f.size for f in part)
    at = np.indices(shape, sparse=True)
    coordinates = []
    for k, (name, _) in enumerate(part):
      given = None if name == FIXED else permutations.get(name)
      if given is None:
        coordinates.append(at[k])
      elif name not in layout.outer:
        coordinates.append(given[at[k]])
      else:
        names = [f.name for f in part]
        outer = layout.outer[name]
        row = at[names.index(outer)] if outer in names else place.index
        coordinates.append(given[row, at[k]])
    whole = np.broadcast_arrays(*coordinates)
    orders.append(start + np.ravel_multi_index(whole, shape).ravel())
    start += orders[-1].size
  return np.concatenate(orders)


def _orders(axes, place, permutations, layout) -> np.ndarray | None:
  """Does the same as `_order` for several axes that are flattened into one."""
  orders = [_order(axis, place, permutations, layout) for axis in axes]
  if all(order is None for order in orders):
    return None
  sizes = [length(axis) for axis in axes]
  grids = np.meshgrid(
    *(np.arange(n) if o is None else o
      for o, n in zip(orders, sizes, strict=True)),
    indexing="ij",
  )  # fmt: skip
  return np.ravel_multi_index(grids, sizes).ravel()


def _views_of(
  loras: Loras, flat, rules: tuple[ViewRule, ...]
) -> dict[str, MatrixView]:
  """Returns how each Lora's parameter is read; raises if one does not fit."""
  found, wrong = {}, []
  for path, lora in loras.items():
    shape = flat[path].shape if path in flat else ()
    view = view_of(path, shape, rules)
    given = lora.a.shape[-1], lora.b.shape[-1]
    if view is None or view.shape(shape)[-2:] != given:
      wrong.append(f"{path}: a {lora.a.shape}, b {lora.b.shape}")
    else:
      found[path] = view
  if wrong:
    raise ValueError(
      f"{len(wrong)} Loras fit no matrix of the network: {name_some(wrong)}."
    )
  return found
