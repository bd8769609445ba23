# SPDX-License-Identifier: Apache-2.0
"""The float32 difference of two parameters, and figures on its rounding."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.numerics.backends import library_of, wide_dtype
from jlora.numerics.sums import BLOCK, Sums, added, sum_of_squares, sums_of

# The bits of a float32's exponent: alone they are 2^⌊log2 |w|⌋, 0 for zero.
_EXPONENT = np.uint32(0x7F800000)


class Survey(NamedTuple):
  """Figures of a base parameter and its change, found while both are read.

  Attributes:
    base_norm: Frobenius norm of the base's parameter, float32.
    noise_std: standard deviation of the error of rounding the finetune to its
      dtype. The delta carries noise of this size whatever was learnt. As a
      matrix (m, n) the noise has a flat spectrum up to about `std (√m + √n)`.
    unchanged: share of the entries that are equal in both, in [0, 1].
    is_finite: whether all entries of the change are finite.
    sums: the sums over the change, zero if it is not finite.
  """

  base_norm: Any
  noise_std: Any
  unchanged: Any
  is_finite: Any
  sums: Sums


def difference(base: Any, finetuned: Any) -> Any:
  """Computes `finetuned - base`, rounded once to float32.

  Args:
    base: any shape, any floating dtype, of NumPy or of JAX.
    finetuned: the same shape, its own dtype.

  Returns:
    float32 of that shape, NumPy's if both are; exact to float32 rounding, also
    where a side is float64: a change below the weights' step in float32 is
    kept. (A subtraction in bfloat16 loses whatever is under 1/256 of the
    change.) Elementwise: keeps its inputs' sharding.

  Raises:
    ValueError: the shapes differ.

  Example:
    >>> difference(jnp.bfloat16(256), jnp.float32(256.25))
    Array(0.25, dtype=float32)
  """
  _check_shapes(base, finetuned)
  xp = np if library_of(base) is library_of(finetuned) is np else jnp
  wide = wide_dtype(base, finetuned)
  delta = xp.asarray(finetuned, wide) - xp.asarray(base, wide)
  with np.errstate(over="ignore"):  # who reads it tells of infinities
    return xp.asarray(delta, np.float32)


def survey(
  base: Any, finetuned: Any, dtype: Any, room: np.ndarray | None = None
) -> tuple[Any, Survey]:
  """Computes `finetuned - base`, and figures that need both parameters.

      noise_std² = mean(ulp(w)²) / 12,   ulp(w) = 2^(⌊log2 |w|⌋ - mantissa bits)

  Args:
    base: the parameter, any shape, any floating dtype, of NumPy or of JAX.
    finetuned: the same shape, its own dtype, of the same library.
    dtype: the dtype of the finetune's file.
    room: for NumPy, a float32 array of that size or more, in which the delta
      may lie: memory that was used before is several times faster than new.

  Returns:
    The delta as `difference` gives it, and its Survey. The delta is all zeros
    if it is not finite, because LAPACK may not return from NaN. NumPy arrays
    are read once, a block that fits the cache at a time.

  Raises:
    ValueError: the shapes differ.

  Example:
    >>> one = np.ones(4, np.float32)
    >>> delta, found = survey(one, one, jnp.bfloat16)
    >>> float(found.base_norm), float(found.unchanged)
    (2.0, 1.0)
    >>> round(float(found.noise_std) * 12**0.5, 7)   # one ulp at 1.0
    0.0078125

  Approximation: treats rounding errors as uniform and independent, which holds
  while the changes are larger than an ulp.
  """
  _check_shapes(base, finetuned)
  xp, size = library_of(finetuned), np.float32(base.size)
  ulp_of_one = np.float32(2.0 ** -jnp.finfo(dtype).nmant)

  if xp is jnp:
    wide = wide_dtype(base, finetuned)
    equal = _count(base.astype(wide) == finetuned.astype(wide))
    left, right = base.astype(np.float32), finetuned.astype(np.float32)
    steps = (right.view(np.uint32) & _EXPONENT).view(np.float32)
    found = sum_of_squares(left), sum_of_squares(steps), equal
    delta = difference(base, finetuned)
    is_finite = xp.isfinite(delta).all()
    delta = xp.where(is_finite, delta, 0.0)
    change = sums_of(jnp.atleast_1d(delta))
  else:
    delta, found, change = _by_block(base, finetuned, room)
    is_finite = np.isfinite(change.squares)
    if not is_finite:
      delta[...] = 0
      change = sums_of(delta)
  return delta, Survey(
    base_norm=xp.sqrt(found[0]),
    noise_std=xp.sqrt(found[1] / (12 * size)) * ulp_of_one,
    unchanged=found[2].astype(np.float32) / size,
    is_finite=is_finite,
    sums=change,
  )


def _count(where):
  """Counts the true entries of a JAX array, in float32."""
  # By rows first: the largest tensors have more entries than an int32 counts.
  rows = jnp.count_nonzero(jnp.atleast_1d(where), axis=-1)
  return jnp.sum(rows.astype(np.float32))


def _by_block(base, finetuned, room):
  """Returns the delta, three sums for the survey, and the delta's Sums.

  The three are ‖base‖², Σ (ulp / ulp(1))² and how many entries are equal.
  """
  room = np.empty(base.size, np.float32) if room is None else room
  delta = room[: base.size].reshape(base.shape)
  left, right, out = (x.reshape(-1) for x in (base, finetuned, delta))
  total, changes = np.zeros(3), []
  scratch = np.empty((3, min(BLOCK, out.size)), np.float32)
  is_wide = wide_dtype(base, finetuned) is np.float64
  # The caller reports the infinities of a damaged file.
  with np.errstate(invalid="ignore", over="ignore"):
    for start in range(0, out.size, BLOCK):
      part = slice(start, start + BLOCK)
      one, two = map(_as_float32, (left[part], right[part]), scratch)
      change, steps = out[part], scratch[2, : one.size]
      if is_wide:
        change[...] = difference(left[part], right[part])
      else:
        np.subtract(two, one, out=change)
      np.bitwise_and(two.view(np.uint32), _EXPONENT, out=steps.view(np.uint32))
      if is_wide:
        one, two = (x[part].astype(np.float64) for x in (left, right))
      equal = np.count_nonzero(one == two)
      total += np.vdot(one, one), np.vdot(steps, steps), equal
      changes.append(sums_of(change))
  return delta, total.astype(np.float32), added(changes)


def _as_float32(x, room):
  """Returns a block in float32; a converted copy lies in cached memory."""
  if x.dtype == np.float32:
    return x
  np.copyto(room[: x.size], x)
  return room[: x.size]


def _check_shapes(base, finetuned):
  """Raises unless both parameters have the same shape."""
  if base.shape != finetuned.shape:
    raise ValueError(
      f"base {base.shape} and finetuned {finetuned.shape} differ in shape; "
      "give the base this finetune was made from."
    )
