# SPDX-License-Identifier: Apache-2.0
"""Who does what: the modules of a run dealt to processes, longest first."""

import heapq
import math
from collections.abc import Sequence

# Entries of the Krylov space's blocks a module is multiplied with: 11 products
# of rank + 16 rows each. A short side below that many is multiplied once.
_PRODUCTS, _OVERSAMPLE = 11, 16
# Operations of a product that take as long as reading an entry of both tensors
# and all that is done to it once. Only the ratio matters, and only roughly.
_PER_ENTRY = 160


def deal(costs: Sequence[int], hands: int) -> list[list[int]]:
  """Which item goes to whom, so that the last is done soon.

  The longest processing time first: items in descending order, each to whoever
  has least so far; ties go to the earlier item and the earlier hand. The
  largest load is at most `4/3 - 1/(3 hands)` times the smallest possible.

  Args:
    costs: of every item, integers of any unit.
    hands: how many there are to deal to.

  Returns:
    For every hand the positions of its items, in the order they were dealt;
    every item is in one hand. The same costs give the same hands everywhere.

  Raises:
    ValueError: fewer than one hand, or a negative cost.

  Example:
    >>> deal([3, 5, 4, 4], 2)
    [[1, 0], [2, 3]]

  References:
    Graham (1969), bounds on multiprocessing timing anomalies.
  """
  if hands < 1:
    raise ValueError(f"There must be a hand to deal to, got {hands}.")
  if any(cost < 0 for cost in costs):
    raise ValueError(f"Costs must not be negative, got {min(costs)}.")
  dealt: list[list[int]] = [[] for _ in range(hands)]
  loads = [(0, hand) for hand in range(hands)]
  for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
    load, hand = loads[0]
    dealt[hand].append(item)
    heapq.heapreplace(loads, (load + costs[item], hand))
  return dealt


def cost_of(shape: Sequence[int], rank: int) -> int:
  """What a tensor of a pair costs a run, roughly, for `deal`.

  Args:
    shape: (..., in, out) of a module; of what is not factored any shape.
    rank: triplets to find; 0: the tensor is only read.

  Returns:
    Operations of matrix products that would take as long.

  Example:
    >>> cost_of((4096, 4096), 64) > 10 * cost_of((4096, 4096), 0)
    True
  """
  entries = math.prod(shape)
  if not rank:
    return entries * _PER_ENTRY
  rows = min(_PRODUCTS * (rank + _OVERSAMPLE), *shape[-2:])
  return entries * (_PER_ENTRY + 2 * rows)
