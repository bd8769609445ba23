# SPDX-License-Identifier: Apache-2.0
"""The float32 difference of two parameters, and what rounding puts there."""

from typing import Any

import jax
import jax.numpy as jnp


def difference(base: Any, finetuned: Any) -> jax.Array:
  """`finetuned - base`, upcast before it is subtracted.

  Args:
    base: any shape, any floating dtype.
    finetuned: the same shape, its own dtype.

  Returns:
    float32 of that shape; exact to float32 rounding, where a subtraction in
    bfloat16 loses whatever is under 1/256 of the change. Elementwise: keeps
    its inputs' sharding.

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
  return jnp.asarray(finetuned, jnp.float32) - jnp.asarray(base, jnp.float32)


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


def rounding_noise(stored: jax.Array, dtype: Any) -> jax.Array:
  """The standard deviation of the error of rounding an array to its dtype.

      std² = mean(ulp(w)²) / 12,   ulp(w) = 2^(⌊log2 |w|⌋ - mantissa bits)

  Args:
    stored: the values as stored, any shape.
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
  bits = jax.lax.bitcast_convert_type(stored.astype(jnp.float32), jnp.uint32)
  # The exponent alone is 2^⌊log2 |w|⌋, and 0 for zero.
  power = jax.lax.bitcast_convert_type(
    bits & jnp.uint32(0x7F800000), jnp.float32
  )
  ulp = power * 2.0 ** -jnp.finfo(dtype).nmant
  rows = jnp.mean(jnp.square(ulp), axis=-1) if ulp.ndim else jnp.square(ulp)
  return jnp.sqrt(jnp.mean(rows) / 12)
