# SPDX-License-Identifier: Apache-2.0
"""Reading both tensors of a pair, and telling whether they are the same."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.numerics.backends import library_of, wide_dtype
from jlora.pairing.pairs import (
  Pair,
  Rows,
  Side,
  TensorPart,
  names_of,
  read_side,
)

_COMPARED = 2**18  # bytes of a tensor to compare at a time


def read_pair(
  pair: Pair,
  base: Mapping[str, Any],
  finetuned: Mapping[str, Any],
  rooms: Sequence[Callable[[int], np.ndarray]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Reads the base's and the finetuned tensor of a pair.

  Unless the pair is kept whole, both have the base's shape: rows that the
  finetune lacks (a smaller vocabulary) are filled with the base's, so their
  change is zero.

  Args:
    pair: which tensors.
    base: the base, name -> array.
    finetuned: the finetune, name -> array.
    rooms: for each side a `room` as for `read_side`.

  Example:
    >>> pair = Pair("w", (2,), TensorPart("w"),
    ...             TensorPart("w", (slice(0, 1),)))
    >>> read_pair(pair, {"w": np.zeros(2)}, {"w": np.ones(1)})[1]
    array([1., 0.])
  """
  one, two = rooms or (None, None)
  left, right = (
    read_side(base, pair.base, one),
    read_side(finetuned, pair.finetuned, two),
  )
  if isinstance(pair.finetuned, Rows):
    lacking = np.asarray(pair.finetuned.rows, int) < 0
    right[lacking] = left[lacking].astype(right.dtype)
  if not pair.whole and right.shape[:1] < left.shape[:1]:
    rest = left[right.shape[0] :].astype(right.dtype)
    right = np.concatenate([right, rest])
  return left, right


def is_same(
  pair: Pair,
  base: Mapping[str, Any],
  finetuned: Mapping[str, Any],
  part: tuple[int, int] = (0, 1),
) -> bool:
  """Returns whether both tensors of a pair hold the same bytes.

  So NaN equals itself. Reads a few rows at a time, up to the first that differ.

  Args:
    pair: which tensors.
    base: the base, name -> array.
    finetuned: the finetune, name -> array.
    part: (i, n) looks only at the i-th of n parts of the rows, from 0.

  Returns:
    bool. Always False for pairs kept whole, stacks and parts of tensors.

  Example:
    >>> pair = Pair("w", (2,), TensorPart("w"), TensorPart("w"))
    >>> is_same(pair, {"w": np.zeros(2)}, {"w": np.zeros(2)})
    True
  """
  sides = pair.base, pair.finetuned
  if pair.whole or any(
    not isinstance(side, TensorPart) or side.index or side.swap
    for side in sides
  ):
    return False
  left, right = (
    getattr(checkpoint, "spec", checkpoint)[names_of(side)[0]]
    for checkpoint, side in zip((base, finetuned), sides, strict=True)
  )
  if left.dtype != right.dtype or left.shape != right.shape:
    return False
  return all(
    np.array_equal(_words(one), _words(two))
    for one, two in _rows_of(pair, left, base, finetuned, part)
  )


def _rows_of(pair, spec, base, finetuned, part):
  """Yields both tensors of a pair, a few rows at a time if a file has rows."""
  rows = spec.shape[0] if spec.shape else 1
  which, parts = part
  first, last = rows * which // parts, rows * (which + 1) // parts
  step = rows
  if getattr(spec, "start", None) is not None and rows:
    step = max(1, rows * _COMPARED // max(spec.nbytes, 1))
  for start in range(first, last, step):
    end = min(start + step, last)
    index = (slice(start, end),) if end - start < rows else ()
    yield tuple(
      read_side(checkpoint, side._replace(index=index))
      for checkpoint, side in ((base, pair.base), (finetuned, pair.finetuned))
    )


def _words(array: np.ndarray) -> np.ndarray:
  """Returns the bits of an array, in the longest words that they fill."""
  bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return bits.view(np.uint64) if bits.size % 8 == 0 else bits


def is_equal(left: np.ndarray, right: np.ndarray) -> bool:
  """Returns whether two tensors hold the same values, whatever their dtypes.

  Example:
    >>> is_equal(np.ones(2, np.float16), np.ones(2, np.float32))
    True
  """
  wide = wide_dtype(left, right)
  return np.array_equal(left.astype(wide), right.astype(wide))


def stored_dtype(checkpoint: Mapping[str, Any], side: Side) -> np.dtype:
  """Returns the dtype of a side of a pair as its file has it, float8 included.

  Of several tensors it is that of the first.
  """
  specs = getattr(checkpoint, "spec", checkpoint)
  return np.dtype(specs[names_of(side)[0]].dtype)


def check_finite(path: str, *arrays: Any) -> None:
  """Raises if a parameter's values are NaN or infinite.

  Args:
    path: the parameter's name.
    arrays: the base's and the finetuned tensor, or the finetuned one alone, of
      NumPy or of JAX. If they are sharded all processes must call this.

  Raises:
    ValueError: tells how many values of which side are not finite.
  """
  for side, array in zip(
    ("base", "finetuned")[-len(arrays) :], arrays, strict=True
  ):
    values = array.astype(wide_dtype(array))
    is_finite = library_of(array).isfinite(values)
    bad = array.size - int(is_finite.sum())
    if bad:
      raise ValueError(
        f"{path}: {bad} of {array.size} values of the {side} tensor are NaN or "
        "infinite; the checkpoint is damaged or training diverged."
      )
