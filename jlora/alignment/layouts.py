# SPDX-License-Identifier: Apache-2.0
"""The axes of a network's parameters: what they are made of, and how long.

An axis is a sum of parts, and a part a product of factors, each the units of
one permutation: `kv.3 group.3 value.3`, or queries, keys and values of one
product side by side.
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


def length(axis: Axis) -> int:
  """How long an axis is.

  Args:
    axis: its parts.

  Returns:
    int.

  Example:
    >>> length(((Factor("head", 2), Factor("-", 3)), (Factor("-", 4),)))
    10
  """
  return sum(math.prod(size for _, size in part) for part in axis)


def solve_sizes(
  axes: Sequence[tuple[str, Names, int]], known: Mapping[str, int]
) -> dict[str, int]:
  """The size of every permutation, from axes with one unknown.

  Args:
    axes: path of the parameter, names, how long the axis is.
    known: name -> units, where they are given.

  Returns:
    name -> units, those that are known too.

  Raises:
    ValueError: sizes that do not agree, or that nothing tells.

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
  """An axis whose factors have sizes; `-` takes what is left of its part.

  Args:
    axis: names of the factors.
    total: how long it is.
    sizes: name -> units; all but `-`.

  Returns:
    Axis.

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
  """Adds the size of the axis's only unknown, where it has just one."""
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
  try:
    return length(give_sizes(axis, total, sizes)) == total
  except KeyError:
    return any(n not in sizes and n != FIXED for part in axis for n in part)


def _text(axis, sizes: Mapping[str, int] | None = None) -> str:
  if sizes is None:
    return " + ".join(" ".join(part) for part in axis)
  return " + ".join(
    " x ".join(str(sizes.get(name, name)) for name in part) for part in axis
  )


class Place(NamedTuple):
  """How one parameter is permuted.

  Attributes:
    axes: of each axis the parts, of each part the factors.
    stack: the permutation that exchanges it with its peers, or "".
    index: which of them it is.
    peers: their paths in order; its own alone where there is no stack.
  """

  axes: tuple[Axis, ...]
  stack: str
  index: int
  peers: tuple[str, ...]

  def names(self) -> set[str]:
    """All permutations that act on it."""
    found = {f.name for axis in self.axes for part in axis for f in part}
    return (found | {self.stack}) - {FIXED, ""}


class UnitLayout(NamedTuple):
  """A symmetry laid over the parameters of one network.

  Attributes:
    places: path -> Place.
    sizes: permutation -> units.
    outer: permutation -> the one in whose units it is.
  """

  places: dict[str, Place]
  sizes: dict[str, int]
  outer: dict[str, str]

  def families(self) -> dict[str, tuple[str, ...]]:
    """Permutations that stand by themselves, each with those inside it."""
    return {
      name: tuple(n for n, out in self.outer.items() if out == name)
      for name in self.sizes
      if name not in self.outer
    }


def lay_out_units(symmetry: Symmetry, shapes: Mapping[str, Any]) -> UnitLayout:
  """Which permutation acts on which axis of which parameter, and its size.

  Args:
    symmetry: the tables.
    shapes: path -> array, or anything with a shape.

  Returns:
    Layout. Sizes are those the axes tell, beside those that are given.

  Raises:
    ValueError: parameters without a row, sizes that do not agree or that
      nothing tells, a permutation on two axes of one array (to match it would
      be a quadratic problem), one inside another that does not act there.

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
  """Names of a path's axes; its stack, number and key in it. None: no row."""
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
  return name.split(".")[0]


def _names_of(read) -> list[str]:
  axes, stack, *_ = read
  names = [name for axis in axes for part in axis for name in part]
  return [name for name in [*names, stack] if name not in (FIXED, "")]


def _outer_of(symmetry: Symmetry, found) -> dict[str, str]:
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
  """No name on two axes of an array; none without the one it is inside."""
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
  """The size of every permutation: those of stacks, given ones, and others."""
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
  """Key of a stack -> its paths in order, if none is missing."""
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
