# SPDX-License-Identifier: Apache-2.0
"""Whether numbers are finite, and rounding that tells if they are no more."""

from typing import Any

import ml_dtypes
import numpy as np

# Entries looked at a time: they stay in the cache.
_BLOCK = 2**18
# Two bytes: with all bits of the exponent set a number is infinite or NaN.
# NumPy converts these to float32 first, which takes ten times longer.
_EXPONENTS = {
  np.dtype(np.float16): np.uint16(0x7C00),
  np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
}


def is_finite(x: np.ndarray) -> bool:
  """Returns whether all entries of an array are finite.

  Args:
    x: of NumPy, any shape; of integers all are.

  Example:
    >>> is_finite(np.ones(3, np.float16)), is_finite(np.float32([1, np.nan]))
    (True, False)
  """
  if x.dtype.kind in "biu" or not x.size:
    return True
  flat, bits = x.reshape(-1), _EXPONENTS.get(x.dtype)
  parts = (flat[at : at + _BLOCK] for at in range(0, x.size, _BLOCK))
  if bits is None:
    return all(bool(np.isfinite(part).all()) for part in parts)
  return all((part.view(np.uint16) & bits).max() != bits for part in parts)


def rounded(name: str, x: Any, dtype: Any) -> np.ndarray:
  """Rounds an array to a dtype; raises if the result is not finite.

  Args:
    name: what it is, for the error.
    x: floating, of NumPy or of JAX.
    dtype: a floating one.

  Returns:
    A NumPy array; the given one if it has that dtype.

  Raises:
    ValueError: NaN or infinity in x, or entries larger than the dtype holds;
      tells how many.

  Example:
    >>> rounded("w", np.float32([1, 1e5]), np.float16)
    Traceback (most recent call last):
    ...
    ValueError: w: 1 of 2 values, up to 1e+05, are more than float16 holds,
    65504; store it in bfloat16 or float32
  """
  x = np.asarray(x)
  with np.errstate(over="ignore", invalid="ignore"):  # told below
    out = x.astype(dtype, copy=False)
  if not is_finite(out):
    raise not_finite(name, x, out.dtype)
  return out


def not_finite(name: str, x: np.ndarray, dtype: Any) -> ValueError:
  """Returns the error for an array that is not finite in a dtype.

  Args:
    name: what it is.
    x: before it was rounded.
    dtype: to which it was.

  Example:
    >>> print(not_finite("w", np.float32([1, np.nan]), np.float32))
    w: 1 of 2 values are NaN or infinite; a checkpoint is damaged or training
    diverged
  """
  with np.errstate(invalid="ignore"):
    wide = x.astype(np.float64)
  lost = int(np.count_nonzero(~np.isfinite(wide)))
  if lost:
    return ValueError(
      f"{name}: {lost} of {x.size} values are NaN or infinite; a checkpoint is "
      "damaged or training diverged"
    )
  with np.errstate(over="ignore"):
    out = wide.astype(dtype).astype(np.float64)
  dtype = np.dtype(dtype)
  most = float(ml_dtypes.finfo(dtype).max)
  others = [
    other
    for other in ("bfloat16", "float32", "float64")
    if float(ml_dtypes.finfo(other).max) > max(most, np.abs(wide).max())
  ]
  return ValueError(
    f"{name}: {np.count_nonzero(~np.isfinite(out))} of {x.size} values, up to "
    f"{np.abs(wide).max():.3g}, are more than {dtype.name} holds, {most:.6g}; "
    f"store it in {' or '.join(others[:2]) or 'no other dtype'}"
  )
