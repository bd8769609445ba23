# SPDX-License-Identifier: Apache-2.0
"""Permutations of hidden units: none, one after another, and back.

`{name: array}`: of a permutation that stands by itself (n,), of one inside the
units of another (outer, n), a row for each unit's place in the result. The
result's unit k is the source's p[k]; its channel d is channel c[k, d] of that.
"""

import numpy as np

from jlora.layouts import Layout
from jlora.messages import name_some

Permutations = dict[str, np.ndarray]


def identity(layout: Layout) -> Permutations:
  """The permutations that move nothing.

  Args:
    layout: of `lay_out`.

  Returns:
    Permutations, int64.

  Example:
    >>> identity(Layout({}, {"head": 2, "value": 3}, {"value": "head"}))
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
  second: Permutations, first: Permutations, layout: Layout
) -> Permutations:
  """The permutations that do what one set does, and then another.

      p[k] = first[second[k]],   c[k, d] = first_c[second[k], second_c[k, d]]

  Args:
    second: done last.
    first: done first.
    layout: of `lay_out`.

  Returns:
    Permutations.

  Example:
    >>> layout = Layout({}, {"unit": 3}, {})
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


def inverse(permutations: Permutations, layout: Layout) -> Permutations:
  """The permutations that take back what others do.

  Args:
    permutations: of one layout.
    layout: that.

  Returns:
    Permutations.

  Example:
    >>> inverse({"u": np.array([1, 2, 0])}, Layout({}, {"u": 3}, {}))["u"]
    array([2, 0, 1])
  """
  found = {}
  for name in layout.sizes:
    back = np.argsort(permutations[name], axis=-1)
    if name in layout.outer:
      back = back[np.argsort(permutations[layout.outer[name]])]
    found[name] = back
  return found


def check_permutations(permutations: Permutations, layout: Layout) -> None:
  """Nothing, if these are permutations of a layout's units.

  Args:
    permutations: any of the layout's.
    layout: of `lay_out`.

  Raises:
    ValueError: names the layout lacks, or arrays that are no permutations of
      the size; up to three named.

  Example:
    >>> check_permutations({"u": np.array([0, 0])}, Layout({}, {"u": 2}, {}))
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
  """Whether nothing is moved.

  Args:
    permutations: any.

  Returns:
    bool.

  Example:
    >>> is_identity({"unit": np.array([0, 1])})
    True
  """
  return all(
    (given == np.arange(given.shape[-1])).all()
    for given in permutations.values()
  )
