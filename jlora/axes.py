# SPDX-License-Identifier: Apache-2.0
"""The axes of a network's parameters: what they are made of, and how long.

An axis is a sum of parts, and a part a product of factors, each the units of
one permutation: `kv.3 group.3 value.3`, or queries, keys and values of one
product side by side.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jlora.messages import name_some
from jlora.symmetries import FIXED

#: Names of the factors of each part.
Names = tuple[tuple[str, ...], ...]


class Factor(NamedTuple):
  """A factor of an axis: the permutation's name, `-` for none, and its size."""

  name: str
  size: int


Part = tuple[Factor, ...]
Axis = tuple[Part, ...]


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
