# SPDX-License-Identifier: Apache-2.0
"""The float32 difference of two parameters, and what rounding puts there."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.arrays import library_of, sum_over_rows

# A block of so many entries stays in the cache while it is worked on.
_BLOCK = 2**17


def difference(
  base: Any, finetuned: Any, room: np.ndarray | None = None
) -> Any:
  """`finetuned - base`, upcast before it is subtracted.

  Args:
    base: any shape, any floating dtype, of NumPy or of JAX.
    finetuned: the same shape, its own dtype.
    room: for NumPy, float32 of that size or more that the result may lie in:
      memory that was used before is several times faster than new.

  Returns:
    float32 of that shape, NumPy's if both are; exact to float32 rounding,
    where a subtraction in bfloat16 loses whatever is under 1/256 of the change.
    Elementwise: keeps its inputs' sharding.

  Raises:
    ValueError: the shapes differ.

  Example:
    >>> difference(jnp.bfloat16(256), jnp.float32(256.25))
    Array(0.25, dtype=float32)
  """
  if base.shape != finetuned.shape:
    raise ValueError(
      f"base {base.shape} and finetuned {finetuned.shape} differ in shape; "
      "give the base this finetune was made from."
    )
  if library_of(base) is jnp or library_of(finetuned) is jnp:
    return jnp.asarray(finetuned, jnp.float32) - jnp.asarray(base, jnp.float32)
  room = np.empty(base.size, np.float32) if room is None else room
  delta = room[: base.size].reshape(base.shape)
  left, right, out = (x.reshape(-1) for x in (base, finetuned, delta))
  for start in range(0, out.size, _BLOCK):
    part = slice(start, start + _BLOCK)
    # Infinities of a damaged file are found by the caller.
    with np.errstate(invalid="ignore", over="ignore"):
      out[part] = right[part].astype(np.float32) - left[part]
  return delta


def is_matrix(path: str, leaf: Any) -> bool:
  """Whether a parameter can be read as a matrix: floating, two axes or more.

  Args:
    path: the parameter's name (not looked at; the view table reads it).
    leaf: anything with `.shape` and `.dtype`.

  Returns:
    bool. The default of `select`.

  Example:
    >>> is_matrix("norm/scale", jnp.ones(3)), is_matrix("w", jnp.ones((3, 3)))
    (False, True)
  """
  del path
  return len(leaf.shape) >= 2 and is_floating(leaf.dtype)


def is_floating(dtype: Any) -> bool:
  """Whether a dtype is floating, bfloat16 and float8 included.

  Args:
    dtype: a NumPy or ml_dtypes dtype.

  Returns:
    bool.

  Example:
    >>> is_floating(jnp.bfloat16), is_floating(jnp.int32)
    (True, False)
  """
  return bool(jnp.issubdtype(dtype, jnp.floating))


def norm_of(parameter: Any) -> Any:
  """The Frobenius norm of a parameter of any dtype.

  Args:
    parameter: any shape with an axis or more, of NumPy or of JAX.

  Returns:
    float32 scalar.

  Example:
    >>> norm_of(np.array([3.0, 4.0], np.float16))
    np.float32(5.0)
  """
  xp = library_of(parameter)
  return xp.sqrt(_sum(lambda x: xp.square(x.astype(np.float32)), parameter))


def rounding_noise(stored: Any, dtype: Any) -> Any:
  """The standard deviation of the error of rounding an array to its dtype.

      std² = mean(ulp(w)²) / 12,   ulp(w) = 2^(⌊log2 |w|⌋ - mantissa bits)

  Args:
    stored: the values as stored, any shape, of NumPy or of JAX.
    dtype: the dtype of the file they come from.

  Returns:
    float32 scalar. A finetune's delta carries noise of this size whatever was
    learnt; as a matrix (m, n) its largest singular value is about
    `std (√m + √n)`, with a flat spectrum below.

  Example:
    >>> noise = rounding_noise(jnp.full((4,), 1.0), jnp.bfloat16)
    >>> round(float(noise) * 12**0.5, 7)   # one ulp at 1.0
    0.0078125

  Approximation: treats rounding errors as uniform and independent, which holds
  while the changes are larger than an ulp.
  """
  xp = library_of(stored)
  ulp_of_one = np.float32(2.0 ** -jnp.finfo(dtype).nmant)

  def squared_ulps(x):
    # The exponent alone is 2^⌊log2 |w|⌋, and 0 for zero.
    bits = x.astype(np.float32).view(np.uint32) & np.uint32(0x7F800000)
    return xp.square(bits.view(np.float32) * ulp_of_one)

  return xp.sqrt(_sum(squared_ulps, stored) / np.float32(12 * stored.size))


def share_of_zeros(delta: Any) -> Any:
  """The share of a delta's entries that are zero: nothing changed there.

  Args:
    delta: any shape, of NumPy or of JAX.

  Returns:
    Scalar in [0, 1].

  Example:
    >>> float(share_of_zeros(np.array([0.0, 1.0, 0.0, 2.0])))
    0.5
  """
  xp = library_of(delta)
  if xp is np:
    return np.float64(1 - np.count_nonzero(delta) / delta.size)
  return xp.mean((delta == 0).astype(np.float32))


def _sum(function: Any, x: Any) -> Any:
  """The sum of an elementwise function, NumPy's a block at a time."""
  if library_of(x) is jnp:
    # By rows first: rounding then grows with the sides, not the area.
    parts = function(x)
    return jnp.sum(jnp.sum(parts, axis=-1) if parts.ndim else parts)
  with np.errstate(over="ignore"):  # infinity is the figure then
    return sum_over_rows(lambda part: np.sum(function(part)), x.reshape(-1))
