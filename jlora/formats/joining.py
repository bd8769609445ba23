# SPDX-License-Identifier: Apache-2.0
"""Changes of modules that another model keeps as one: joined and cut, exactly.

    [W_1; W_2] + [B_1 A_1; B_2 A_2]  =  W + diag(B_1, B_2) [A_1; A_2]

Joined along the outputs, A is stacked and B block diagonal, at the sum of the
ranks; where all parts read by the same A it stays as it is. Cut, every part
gets the rows of A that its rows of B use. Nothing is ever added up.
"""

from collections.abc import Sequence

import numpy as np


def cut(
  a: np.ndarray, b: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the factors of some of a change's outputs.

  Args:
    a: (r, in).
    b: (out, r).
    start: the first output.
    stop: one past the last.

  Returns:
    (k, in) and (stop - start, k): the units that these outputs use; k is 0
    where nothing is changed.
  """
  part = b[start:stop]
  used = np.flatnonzero(np.any(part != 0, axis=0))
  if len(used) == len(a):
    return a, part
  return a[used], part[:, used]


def join(
  parts: Sequence[tuple[np.ndarray, np.ndarray] | None], sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Joins the changes of modules that become one, along their outputs.

  Args:
    parts: (r_i, in) and (out_i, r_i) of each, None where nothing is changed.
    sizes: out_i of each.

  Returns:
    (r, in) and (Σ out_i, r), r the sum of the ranks, or the rank of each where
    all have the same A.
  """
  given = [part for part in parts if part is not None]
  first = given[0]
  if len(given) == len(parts) and all(
    a.shape == first[0].shape and np.array_equal(a, first[0]) for a, _ in given
  ):
    return first[0], np.concatenate([b for _, b in given])
  rank = sum(len(a) for a, _ in given)
  joined = np.zeros((sum(sizes), rank), np.result_type(first[1]))
  row = column = 0
  for part, size in zip(parts, sizes, strict=True):
    if part is not None:
      b = part[1]
      joined[row : row + size, column : column + b.shape[1]] = b
      column += b.shape[1]
    row += size
  return np.concatenate([a for a, _ in given]), joined


def halves_exchanged(x: np.ndarray) -> np.ndarray:
  """Returns an array whose first axis has its second half first.

  Args:
    x: (2n, ...).
  """
  half = len(x) // 2
  return np.concatenate([x[half:], x[:half]])
