# SPDX-License-Identifier: Apache-2.0
"""Which merges can be made piece by piece, and what they are told for it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jlora.merging.averages import linear, nearswap, passthrough
from jlora.merging.spherical import products_of, slerp
from jlora.merging.task_vectors import task_arithmetic


class Sums(NamedTuple):
  """Numbers of a whole tensor, added up from those of its pieces.

  Attributes:
    setting: the method's argument that takes them.
    of: (n, ...) float32, a piece of n models -> (k,) float32. Zeros add none.
  """

  setting: str
  of: Callable[[Any], Any]


# An entry of the result depends on nothing but that entry of the models and of
# the base, and on the sums where there are some; whatever the method's options.
PIECEWISE = frozenset([linear, nearswap, passthrough, slerp, task_arithmetic])
SUMS: Mapping[Callable[..., Any], Sums] = {slerp: Sums("products", products_of)}
