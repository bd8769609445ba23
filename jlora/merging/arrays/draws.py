# SPDX-License-Identifier: Apache-2.0
"""Draws random numbers for any part of a tensor, without drawing the rest."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_TURNS = ((13, 15, 26, 6), (17, 29, 16, 24))
_HALF = 16


def uniform(key: Any, shape: tuple[int, ...], start: Any = None) -> Any:
  """Draws numbers in [0, 1), each from the key and its index alone.

      u_i = 2⁻²³ ⌊w_i / 2⁹⌋,   w_i = the words of block(key, i), one xor other

  These are the numbers of `jax.random.uniform` for Threefry keys. JAX draws
  only whole arrays, and on CPUs writes each round to memory, which takes five
  times as long as the single loop here.

  Args:
    key: PRNG key. With a generator other than Threefry, two words drawn with it
      are the key.
    shape: of the part.
    start: (2,) uint32 from `place_of`, the index of the part's first entry;
      None is 0. The part's entries are consecutive in the flat tensor.

  Returns:
    shape, float32. Elementwise: the same under any sharding.

  Example:
    >>> key, start = jax.random.key(0), place_of(2)
    >>> uniform(key, (4,))[2:], uniform(key, (2,), start)
    (Array([0.33229148, 0.46866846], dtype=float32),
     Array([0.33229148, 0.46866846], dtype=float32))

  References:
    Threefry-2x32 of 20 rounds (Salmon et al., 2011).
  """
  high, low = _places(shape)
  if start is not None:
    own, low = low, low + start[1]
    high = high + start[0] + (low < own).astype(jnp.uint32)
  left, right = block(_two_words(key), high, low)
  return ((left ^ right) >> 9).astype(jnp.float32) * jnp.float32(2**-23)


def place_of(index: int) -> np.ndarray:
  """Splits an index of a flat tensor into two 32-bit halves.

  Args:
    index: may exceed 2^32.

  Returns:
    (2,) uint32, the high and the low half.

  Example:
    >>> place_of(2**32 + 5)
    array([1, 5], dtype=uint32)
  """
  return np.array([index >> 32, index & 0xFFFFFFFF], np.uint32)


def block(key: Any, high: Any, low: Any) -> tuple[Any, Any]:
  """Computes Threefry's two random words for each counter.

  Args:
    key: (2,) uint32.
    high: (...) uint32, of the counters.
    low: likewise.

  Returns:
    Two of (...) uint32.

  Example:
    >>> zero = jnp.uint32([0, 0])
    >>> [hex(word) for word in block(zero, *zero)]
    ['0x6b200159', '0x99ba4efe']
  """
  first, second = key
  keys = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
  left, right = high + keys[0], low + keys[1]
  for turn in range(5):
    for bits in _TURNS[turn % 2]:
      left = left + right
      turned = (right << jnp.uint32(bits)) | (right >> jnp.uint32(32 - bits))
      right = turned ^ left
    left = left + keys[(turn + 1) % 3]
    right = right + keys[(turn + 2) % 3] + jnp.uint32(turn + 1)
  return left, right


def _two_words(key: Any) -> Any:
  """Returns a PRNG key's two words."""
  is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  words = jax.random.key_data(key) if is_typed else key
  return words if words.shape == (2,) else jax.random.bits(key, (2,))


def _places(shape: tuple[int, ...]) -> tuple[Any, Any]:
  """Returns the high and low halves of all indices of an array."""
  high, low = jnp.zeros(shape, jnp.uint32), jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    at = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    more, own = _times(at, math.prod(shape[axis + 1 :]))
    low = low + own
    high = high + more + (low < own).astype(jnp.uint32)
  return high, low


def _times(x: Any, by: int) -> tuple[Any, Any]:
  """Multiplies 32-bit integers; returns the product's high and low halves."""
  most = 2**_HALF - 1
  x0, x1 = x & most, x >> _HALF
  y0, y1 = (jnp.uint32(half & most) for half in (by, by >> _HALF))
  middle = x1 * y0 + ((x0 * y0) >> _HALF)
  rest = x0 * y1 + (middle & most)
  whole = x1 * y1 + (middle >> _HALF) + (rest >> _HALF)
  return whole, x * jnp.uint32(by & 0xFFFFFFFF)
