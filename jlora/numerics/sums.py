# SPDX-License-Identifier: Apache-2.0
"""Sums of squares and moduli of arrays, which neither overflow nor vanish.

A NumPy array is read from memory once, a block that fits the cache at a time.
For JAX arrays the compiler decides.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.numerics.backends import library_of

# A block of this many entries stays in the cache while it is worked on.
BLOCK = 2**15
# Rows are summed in blocks of about this many entries: they stay in the cache.
_ROWS_BLOCK = 2**17
# Rows are worked on in this many parts, each of which may lie on a device.
_PARTS = 64

_ONES = np.ones(BLOCK, np.float32)
# Squares of numbers under 2 to this, summed over a block, need no scaling.
_MODERATE = 40


class Sums(NamedTuple):
  """Sums over an array, in units of a power of two above its largest entry.

  Attributes:
    exponent: int32, from `exponent_of`; the unit is `2^exponent`.
    squares: `Σ (x / unit)²`, float32; not finite if some entry is not.
    moduli: `Σ |x / unit|`, float32.
  """

  exponent: Any
  squares: Any
  moduli: Any

  @property
  def unit(self) -> Any:
    """Returns the power of two, in float32."""
    xp = library_of(self.squares)
    return xp.ldexp(xp.float32(1), self.exponent)


def sums_of(x: Any) -> Sums:
  """Computes the sums over all entries of an array.

  Args:
    x: float32, any shape with entries, of NumPy or of JAX.

  Returns:
    Sums, with a relative error of about 1e-7, for entries from 1e-38 to 3e38.
    A sharded array is not gathered.

  Example:
    >>> sums = sums_of(np.float32([[3e30, -4e30]]))
    >>> round(float(sums.squares**0.5 * sums.unit) / 1e30, 6)
    5.0
  """
  if library_of(x) is jnp:
    return _of_block(x)
  flat = x.reshape(-1) if x.flags.c_contiguous else x.T.reshape(-1)
  return added(
    [
      _of_block(flat[start : start + BLOCK])
      for start in range(0, flat.size, BLOCK)
    ]
  )


def added(parts: Sequence[Sums]) -> Sums:
  """Combines the Sums of several NumPy arrays into one, in their largest unit.

  Example:
    >>> added([sums_of(np.float32([x])) for x in (3, -4)]).moduli * 8
    np.float32(7.0)
  """
  if len(parts) == 1:
    return parts[0]
  exponents, squares, moduli = map(np.array, zip(*parts, strict=True))
  exponent = exponents.max()
  lower = np.ldexp(1.0, exponents - exponent)
  return Sums(
    np.int32(exponent),
    np.float32(np.sum(squares * lower**2)),
    np.float32(np.sum(moduli * lower)),
  )


def check_single(x: Any, sums: Sums | None) -> None:
  """Raises a ValueError if sums are given for a batch of matrices."""
  if sums is not None and x.ndim > 2:
    raise ValueError(
      f"sums are of one matrix, the delta {x.shape} is a batch: leave them out."
    )


def exponent_of(x: Any) -> Any:
  """Returns the exponent of a power of two above the largest modulus.

  Args:
    x: real, any shape with entries.

  Returns:
    int32 e with `2^(e-1) <= max |x| < 2^e`, but within ±126, where 2^e and
    2^-e are normal numbers: scaling by them rounds nothing. 1 for zeros.

  Example:
    >>> exponent_of(np.float32([1, -3, 2]))
    np.int32(2)
  """
  xp = library_of(x)
  top = xp.maximum(xp.max(x), -xp.min(x))  # no array of moduli
  if xp is np:  # NumPy's functions of scalars would take longer than the rest
    exponent = math.frexp(top)[1] if top > 0 else 1
    return np.int32(min(max(exponent, -126), 126))
  exponent = xp.frexp(xp.where(top > 0, top, xp.float32(1)))[1]
  return xp.clip(exponent, -126, 126)


def sum_of_squares(x: Any) -> Any:
  """Computes `Σ x²`, in the dtype of x.

  A NumPy array that is not contiguous is copied. Rounding errors grow with the
  sides of the array, not with its area.
  """
  if library_of(x) is np:
    return x.dtype.type(inner_product(x, x))
  squares = jnp.square(x)
  return jnp.sum(jnp.sum(squares, axis=-1) if x.ndim else squares)


def inner_product(x: Any, y: Any) -> float:
  """Computes `Σ x y` of NumPy's arrays, block sums added up in float64.

  A single float32 sum loses digits with the length: the squares of 28 million
  normal numbers came out 1.4e-4 too small.

  Args:
    x: real, any shape; contiguous, or it is copied.
    y: the same shape.

  Returns:
    The sum; relative to `Σ |x y|` right within about 1e-6 for float32.

  Example:
    >>> inner_product(np.float32([3, 4]), np.float32([1, 2]))
    11.0
  """
  x, y = x.reshape(-1), y.reshape(-1)
  starts = range(0, x.size, BLOCK)
  parts = ((x[at : at + BLOCK], y[at : at + BLOCK]) for at in starts)
  return sum((float(np.vdot(*part)) for part in parts), 0.0)


def norm_of(x: np.ndarray) -> float:
  """Computes the Frobenius norm of a NumPy array of any size and scale.

  Args:
    x: float32, any shape.

  Returns:
    The norm, right within about 1e-6 of itself; 0 without entries.

  Example:
    >>> round(norm_of(np.full((3, 3), np.float32(1e30))) / 1e30, 6)
    3.0
  """
  if not x.size:
    return 0.0
  sums = sums_of(x)
  return math.ldexp(math.sqrt(sums.squares), int(sums.exponent))


def sum_over_rows(function: Callable[..., Any], *arrays: Any) -> Any:
  """Sums a function over blocks of rows that fit the cache.

  Args:
    function: blocks (h, ...) -> an array.
    arrays: (m, ...) each, of one library.

  Returns:
    The sum. Each array is read from memory once, whatever the function does.

  Example:
    >>> sum_over_rows(lambda x: x.sum(axis=0), np.ones((5, 2)))
    array([5., 5.])
  """
  rows = arrays[0].shape[0]
  blocks = min(math.ceil(arrays[0].size / _ROWS_BLOCK), rows)
  if blocks < 2:
    return function(*arrays)
  height = rows // blocks
  if library_of(arrays[0]) is np:
    return sum(
      function(*(x[start : start + height] for x in arrays))
      for start in range(0, rows, height)
    )
  # A block takes as many rows of each part, so that parts may lie on devices.
  parts = math.gcd(rows, _PARTS)
  height = max(height // parts, 1)
  cut = [x.reshape(parts, rows // parts, *x.shape[1:]) for x in arrays]

  def block(start, height):
    """Returns the function of one block, with `height` rows of each part."""
    own = (jax.lax.dynamic_slice_in_dim(x, start, height, 1) for x in cut)
    return function(*(x.reshape(-1, *x.shape[2:]) for x in own))

  whole = rows // parts // height * height
  starts = jnp.arange(0, whole, height)
  total = jax.lax.map(lambda start: block(start, height), starts).sum(0)
  if whole == rows // parts:
    return total
  return total + block(whole, rows // parts - whole)


def _of_block(x):
  """Computes the Sums of one block."""
  xp = library_of(x)
  exponent = exponent_of(x)
  if xp is np and abs(exponent) < _MODERATE:
    inverse = np.ldexp(np.float32(1), -exponent)
    moduli = np.vdot(np.abs(x), _ONES[: x.size])
    return Sums(exponent, np.vdot(x, x) * inverse**2, moduli * inverse)
  x = x * xp.ldexp(xp.float32(1), -exponent)
  moduli = xp.abs(x)
  return Sums(exponent, sum_of_squares(x), xp.sum(xp.sum(moduli, axis=-1)))
