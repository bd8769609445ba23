# SPDX-License-Identifier: Apache-2.0
"""Names for the axes of a product, so that einsum can be told of them."""

from collections.abc import Sequence
from typing import NamedTuple


class Labels(NamedTuple):
  """Labels of a product's axes: w's axes are 0, 1, ..., x's own come after.

  Attributes:
    x: of each axis of x.
    out: of each axis of the result.
    contracted: of the axes that are summed over, in the product's order.
  """

  x: tuple[int, ...]
  out: tuple[int, ...]
  contracted: tuple[int, ...]

  @property
  def rows(self) -> tuple[int, ...]:
    """The axes of x that are not summed over, in x's order."""
    return tuple(name for name in self.x if name not in self.contracted)


def label(
  ndim: int, x_ndim: int, numbers: Sequence, *, is_left: bool
) -> Labels:
  """Labels the axes of a `dot_general` of a parameter w and x.

  Args:
    ndim: number of axes of w.
    x_ndim: number of axes of x.
    numbers: the product's dimension_numbers.
    is_left: w is the first operand.

  Example:
    >>> label(2, 3, (((2,), (0,)), ((), ())), is_left=False)
    Labels(x=(2, 3, 0), out=(2, 3, 1), contracted=(0,))
  """
  contracted, batched = numbers
  own, others = (0, 1) if is_left else (1, 0)
  shared = dict(
    zip(
      (*contracted[others], *batched[others]),
      (*contracted[own], *batched[own]),
      strict=True,
    )
  )
  free = iter(range(ndim, ndim + x_ndim))
  x = [shared[i] if i in shared else next(free) for i in range(x_ndim)]
  taken = {*contracted[own], *batched[own]}
  left_over = [i for i in range(ndim) if i not in taken]
  of_x = [name for name in x if name >= ndim]
  both = (left_over, of_x) if is_left else (of_x, left_over)
  out = (*batched[own], *both[0], *both[1])
  return Labels(tuple(x), out, tuple(contracted[own]))
