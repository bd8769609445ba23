# SPDX-License-Identifier: Apache-2.0
"""Writes strings and what two operations make of them, one after the other.

    [operation, operation, x_1 ... x_6, =, y_1 ... y_6]

An operation moves positions or substitutes symbols. Operation 0 does neither.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LENGTH = 6
SYMBOLS = 8
#: Tokens of a text: two operations, a string, an equals sign, the answer.
TOKENS = 2 + LENGTH + 1 + LENGTH


class Operations(NamedTuple):
  """What each operation does.

  Attributes:
    moves: (n, LENGTH), where each position takes its symbol from.
    codes: (n, SYMBOLS), what each symbol becomes.
    known: numbers of those that a base learns.
    mover: number of one that moves positions and is new to it.
    coder: number of one that substitutes symbols and is new to it.
  """

  moves: np.ndarray
  codes: np.ndarray
  known: np.ndarray
  mover: int
  coder: int


def draw_operations(seed: int, moving: int, coding: int) -> Operations:
  """Draws operations at random, all different.

  Args:
    seed: of the draw.
    moving: number of known ones that move positions.
    coding: number of known ones that substitute symbols.

  Returns:
    Operations: nothing, those that move, those that substitute, and two new.

  Example:
    >>> found = draw_operations(0, 2, 1)
    >>> found.known.tolist(), found.mover, found.coder
    ([0, 1, 2, 3], 4, 5)
  """
  rng = np.random.default_rng([seed, 0])
  moves = _different(rng, LENGTH, moving + 1)
  codes = _different(rng, SYMBOLS, coding + 1)
  known = 1 + moving + coding
  total = known + 2
  found = Operations(
    np.tile(np.arange(LENGTH), (total, 1)),
    np.tile(np.arange(SYMBOLS), (total, 1)),
    np.arange(known),
    known,
    known + 1,
  )
  found.moves[1 : moving + 1] = moves[:-1]
  found.codes[moving + 1 : known] = codes[:-1]
  found.moves[found.mover] = moves[-1]
  found.codes[found.coder] = codes[-1]
  return found


def vocabulary(operations: Operations) -> int:
  """Counts the tokens: symbols, operations and the equals sign."""
  return SYMBOLS + len(operations.moves) + 1


def write(
  rng: np.random.Generator,
  operations: Operations,
  pairs: Sequence[tuple[int, int]],
  shape: tuple[int, ...],
) -> np.ndarray:
  """Writes texts of strings and operations drawn evenly.

  Args:
    rng: generator.
    operations: what each does.
    pairs: operations to draw from, in the order in which they act.
    shape: of the texts.

  Returns:
    (*shape, TOKENS) int32.

  Example:
    >>> found = draw_operations(0, 1, 1)
    >>> text = write(np.random.default_rng(0), found, [(0, 0)], (1,))[0]
    >>> (text[2:8] == text[9:]).all()
    np.True_
  """
  chosen = np.asarray(pairs)[rng.integers(0, len(pairs), shape)]
  given = rng.integers(0, SYMBOLS, (*shape, LENGTH))
  answer = given
  for turn in (0, 1):
    own = chosen[..., turn]
    answer = np.take_along_axis(answer, operations.moves[own], -1)
    answer = np.take_along_axis(operations.codes[own], answer, -1)
  equals = np.full((*shape, 1), vocabulary(operations) - 1)
  parts = (chosen + SYMBOLS, given, equals, answer)
  return np.concatenate(parts, axis=-1).astype(np.int32)


def known_pairs(operations: Operations) -> list[tuple[int, int]]:
  """Returns pairs of a known move and a known code, in either order.

  Args:
    operations: which are known; nothing counts as either.

  Returns:
    Pairs.

  Example:
    >>> known_pairs(draw_operations(0, 1, 0))
    [(0, 0), (1, 0), (0, 1)]
  """
  return _in_both_orders(_moves(operations), _codes(operations))


def move_pairs(operations: Operations) -> list[tuple[int, int]]:
  """Returns pairs of the new move and a known code, in either order."""
  return _in_both_orders([operations.mover], _codes(operations))


def code_pairs(operations: Operations) -> list[tuple[int, int]]:
  """Returns pairs of a known move and the new code, in either order."""
  return _in_both_orders(_moves(operations), [operations.coder])


def new_pairs(operations: Operations) -> list[tuple[int, int]]:
  """Returns the pairs of the new move and the new code.

  Example:
    >>> new_pairs(draw_operations(0, 1, 1))
    [(3, 4), (4, 3)]
  """
  return _in_both_orders([operations.mover], [operations.coder])


def _moves(operations: Operations) -> list[int]:
  """Returns known operations that substitute nothing."""
  plain = np.arange(SYMBOLS)
  return [x for x in operations.known.tolist()
          if np.array_equal(operations.codes[x], plain)]  # fmt: skip


def _codes(operations: Operations) -> list[int]:
  """Returns known operations that move nothing."""
  plain = np.arange(LENGTH)
  return [x for x in operations.known.tolist()
          if np.array_equal(operations.moves[x], plain)]  # fmt: skip


def _in_both_orders(
  first: Sequence[int], second: Sequence[int]
) -> list[tuple[int, int]]:
  """Returns all pairs of both, each once."""
  pairs = [(x, y) for x in first for y in second]
  return list(dict.fromkeys(pairs + [(y, x) for x, y in pairs]))


def _different(rng, size: int, count: int) -> np.ndarray:
  """Draws permutations that differ, none of them the identity."""
  found = [np.arange(size)]
  while len(found) <= count:
    drawn = rng.permutation(size)
    if not any(np.array_equal(drawn, x) for x in found):
      found.append(drawn)
  return np.stack(found[1:])
