# SPDX-License-Identifier: Apache-2.0
"""Lays a symmetry over a network: which permutation acts on which axis.

An axis is a concatenation of parts (such as queries, keys and values side by
side). A part is a product of factors (such as `kv.3 group.3 value.3`), and each
factor counts the units of one permutation. `lay_out_units` finds all of them
and their sizes from the parameters' shapes.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jlora.alignment.symmetries import FIXED, Row, Symmetry
from jlora.messages import name_some

#: Names of the factors of each part.
Names = tuple[tuple[str, ...], ...]


class Factor(NamedTuple):
  """A factor of an axis: the permutation's name, `-` for none, and its size."""

  name: str
  size: int


AxisPart = tuple[Factor, ...]
Axis = tuple[AxisPart, ...]


class Place(NamedTuple):
  """The permutations that act on one parameter, axis by axis.

  Attributes:
    axes: for each axis its parts, for each part its factors.
    stack: the permutation that exchanges this array with its peers (such as the
      other experts'), or "".
    index: its number among the peers.
    peers: the peers' paths in order; only its own path without a stack.
  """

  axes: tuple[Axis, ...]
  stack: str
  index: int
  peers: tuple[str, ...]

  def names(self) -> set[str]:
    """Returns the names of all permutations that act on the parameter."""
    found = {f.name for axis in self.axes for part in axis for f in part}
    return (found | {self.stack}) - {FIXED, ""}


class UnitLayout(NamedTuple):
  """A symmetry laid over the parameters of one network.

  Attributes:
    places: path -> Place.
    sizes: permutation -> units.
    outer: inner permutation -> the permutation whose units it lies inside.
  """

  places: dict[str, Place]
  sizes: dict[str, int]
  outer: dict[str, str]

  def families(self) -> dict[str, tuple[str, ...]]:
    """Returns each outermost permutation with those inside it."""
    return {
      name: tuple(n for n, out in self.outer.items() if out == name)
      for name in self.sizes
      if name not in self.outer
    }


def lay_out_units(symmetry: Symmetry, shapes: Mapping[str, Any]) -> UnitLayout:
  """Finds which permutation acts on which axis of each parameter, and its size.

  Args:
    symmetry: of the network.
    shapes: path -> array, or anything with a shape.

  Returns:
    UnitLayout. Sizes come from `symmetry.sizes` or from the axes' lengths.

  Raises:
    ValueError: a parameter has no row; sizes contradict each other or cannot be
      determined; a permutation acts on two axes of one array (matching it would
      be a quadratic problem); an inner permutation acts on an axis where its
      outer one does not.

  Example:
    >>> import numpy as np
    >>> from jlora.alignment import chain
    >>> w = {"in/kernel": np.ones((3, 5)), "out/kernel": np.ones((5, 2))}
    >>> lay_out_units(chain(["in", "out"]), w).sizes
    {'unit.0': 5}
  """
  found, lost = {}, []
  for path, leaf in shapes.items():
    read = _read(symmetry.rows, path, len(leaf.shape))
    if read is None:
      lost.append(f"{path} {tuple(leaf.shape)}")
    else:
      found[path] = read
  if lost:
    raise ValueError(
      f"{len(lost)} parameters have no row in the symmetry: {name_some(lost)}. "
      "Add rows; '-' is an axis that is not permuted."
    )
  outer = _outer_of(symmetry, found)
  _check_once(found, outer)
  sizes = _solve(symmetry, found, shapes)
  peers = _peers_of(found, sizes)
  places = {
    path: Place(
      tuple(
        give_sizes(axis, shapes[path].shape[i], sizes)
        for i, axis in enumerate(axes)
      ),
      stack,
      index,
      peers.get(key, (path,)),
    )
    for path, (axes, stack, index, key) in found.items()
  }
  return UnitLayout(places, sizes, outer)


def _read(rows: Iterable[Row], path: str, count: int):
  """Returns a path's axes, stack, number and stack key; None without a row."""
  for pattern, text, stack in rows:
    if not (match := re.fullmatch(pattern, path)):
      continue
    fill = lambda name, match=match: name.format(*match.groups())  # noqa: E731
    axes = [
      tuple(tuple(part.split()) for part in axis.split("+"))
      for axis in fill(text).split(",")
    ]
    fixed = [((FIXED,),)] * max(count - len(axes), 0)
    axes = tuple((fixed + axes)[len(fixed) + len(axes) - count :])
    if not stack:
      return axes, "", 0, path
    last = match.lastindex or 0
    key = path[: match.start(last)] + "*" + path[match.end(last) :]
    return axes, fill(stack), int(match[last]), key
  return None


def _kind(name: str) -> str:
  """Returns the kind of a permutation, the part of its name before the dot."""
  return name.split(".")[0]


def _names_of(read) -> list[str]:
  """Returns the permutations that act on a parameter."""
  axes, stack, *_ = read
  names = [name for axis in axes for part in axis for name in part]
  return [name for name in [*names, stack] if name not in (FIXED, "")]


def _outer_of(symmetry: Symmetry, found) -> dict[str, str]:
  """Returns the outer permutation of every inner one."""
  inside = symmetry.inside
  if deep := sorted(set(inside) & set(inside.values())):
    raise ValueError(
      f"inside: {name_some(deep)} are inside others and have others inside; "
      "one level is all there is."
    )
  outer = {}
  for read in found.values():
    for name in _names_of(read):
      kind = _kind(name)
      if kind in inside:
        outer[name] = inside[kind] + name[len(kind) :]
  return outer


def _check_once(found, outer) -> None:
  """Raises if a name acts twice on an array, or without its outer one."""
  twice, apart = [], []
  for path, (axes, stack, *_) in found.items():
    seen: set[str] = {stack} - {""}
    for axis in axes:
      here = set()
      for part in axis:
        names = [name for name in part if name != FIXED]
        again = {n for n in names if n in seen or names.count(n) > 1}
        twice += [f"{name} in {path}" for name in sorted(again)]
        apart += [
          f"{n} in {path}"
          for n in names
          if n in outer and outer[n] not in (*names, stack)
        ]
        here |= set(names)
      seen |= here
  if twice:
    raise ValueError(
      f"{len(twice)} permutations act twice on one array: {name_some(twice)}. "
      "Matching needs each on one axis of an array at most."
    )
  if apart:
    raise ValueError(
      f"{len(apart)} permutations are inside another that does not act on the "
      f"same axis: {name_some(apart)}."
    )


def _solve(symmetry: Symmetry, found, shapes) -> dict[str, int]:
  """Computes all sizes from the stacks, the symmetry and the axes."""
  stacked: dict[str, set[int]] = {}
  for _, stack, index, _ in found.values():
    stacked.setdefault(stack, set()).add(index)
  known = {name: len(numbers) for name, numbers in stacked.items() if name}
  names = list(
    dict.fromkeys(n for read in found.values() for n in _names_of(read))
  )
  for name in names:
    if _kind(name) in symmetry.sizes:
      known.setdefault(name, symmetry.sizes[_kind(name)])
  axes = [
    (path, axis, shapes[path].shape[i])
    for path, (all_axes, *_) in found.items()
    for i, axis in enumerate(all_axes)
  ]
  sizes = solve_sizes(axes, known)
  return {name: sizes[name] for name in names}


def _peers_of(found, sizes) -> dict[str, tuple[str, ...]]:
  """Returns each stack key's paths in order; raises if one is missing."""
  members: dict[str, dict[int, str]] = {}
  stacks = {}
  for path, (_, stack, index, key) in found.items():
    if stack:
      members.setdefault(key, {})[index] = path
      stacks[key] = stack
  wrong = [
    f"{key} ({sorted(group)} for {sizes[stacks[key]]})"
    for key, group in members.items()
    if sorted(group) != list(range(sizes[stacks[key]]))
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} stacks lack arrays: {name_some(wrong)}. They are numbered "
      "from 0, one for each unit."
    )
  return {
    key: tuple(group[i] for i in range(len(group)))
    for key, group in members.items()
  }


def length(axis: Axis) -> int:
  """Returns how long an axis is.

  Example:
    >>> length(((Factor("head", 2), Factor("-", 3)), (Factor("-", 4),)))
    10
  """
  return sum(math.prod(size for _, size in part) for part in axis)


def solve_sizes(
  axes: Sequence[tuple[str, Names, int]], known: Mapping[str, int]
) -> dict[str, int]:
  """Computes the size of every permutation from the lengths of the axes.

  Repeatedly solves axes that have a single unknown size.

  Args:
    axes: for each axis the parameter's path, the factors' names, the length.
    known: name -> units, where they are given.

  Returns:
    name -> units, including the known ones.

  Raises:
    ValueError: sizes that contradict each other or cannot be determined.

  Example:
    >>> solve_sizes([("w", (("head", "value"),), 6)], {"head": 2})
    {'head': 2, 'value': 3}
  """
  sizes = dict(known)
  while True:
    before = len(sizes)
    for _, axis, total in axes:
      _solve_axis(axis, total, sizes)
    if len(sizes) == before:
      break
  wrong = [
    f"{path}: {_text(axis)} is {_text(axis, sizes)}, the axis has {total}"
    for path, axis, total in axes
    if not _fits(axis, total, sizes)
  ]
  names = [name for _, axis, _ in axes for part in axis for name in part]
  unknown = [n for n in dict.fromkeys(names) if n not in sizes and n != FIXED]
  if wrong or unknown:
    raise ValueError(
      f"{len(wrong) + len(unknown)} sizes do not agree or are not told: "
      f"{name_some(wrong + unknown)}. Give sizes, or other rows."
    )
  return sizes


def give_sizes(axis: Names, total: int, sizes: Mapping[str, int]) -> Axis:
  """Returns an axis with its factors' sizes; `-` takes the rest of its part.

  Args:
    axis: names of the factors.
    total: length of the axis.
    sizes: name -> units, for all names but `-`.

  Example:
    >>> give_sizes((("head", "-"),), 6, {"head": 2})
    ((Factor(name='head', size=2), Factor(name='-', size=3)),)
  """
  share = total // len(axis)
  return tuple(
    tuple(
      Factor(
        name,
        sizes[name]
        if name != FIXED
        else share // math.prod(sizes[n] for n in part if n != FIXED),
      )
      for name in part
    )
    for part in axis
  )


def _solve_axis(axis, total, sizes) -> None:
  """Adds an axis's unknown size to `sizes`, if it has exactly one."""
  unknown = {name for part in axis for name in part if name not in sizes}
  if len(unknown) != 1 or FIXED in unknown:
    return
  (name,) = unknown
  known = sum(
    math.prod(sizes[n] for n in part) for part in axis if name not in part
  )
  times = sum(
    math.prod(sizes[n] for n in part if n != name)
    for part in axis
    if name in part
  )
  if total > known and (total - known) % times == 0:
    sizes[name] = (total - known) // times


def _fits(axis, total, sizes) -> bool:
  """Returns whether the sizes explain an axis's length, or some are unknown."""
  try:
    return length(give_sizes(axis, total, sizes)) == total
  except KeyError:
    return any(n not in sizes and n != FIXED for part in axis for n in part)


def _text(axis, sizes: Mapping[str, int] | None = None) -> str:
  """Formats an axis for an error, with its sizes where they are given."""
  if sizes is None:
    return " + ".join(" ".join(part) for part in axis)
  return " + ".join(
    " x ".join(str(sizes.get(name, name)) for name in part) for part in axis
  )
