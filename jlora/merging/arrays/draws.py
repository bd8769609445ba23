# SPDX-License-Identifier: Apache-2.0
"""Draws random numbers for any part of a tensor, without drawing the rest."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.numerics.backends import library_of
from jlora.numerics.threefry import block

_HALF = 16
_BLOCK = 2**14  # entries that NumPy draws at a time


def uniform(
  key: Any, shape: tuple[int, ...], start: Any = None, like: Any = None
) -> Any:
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
    like: an array of the wanted library; None is JAX's.

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
  if library_of(like) is jnp:
    return _uniform(_two_words(key), *_places(shape), start)
  words = np.asarray(_two_words(key))
  start = None if start is None else np.asarray(start)
  found = np.empty(math.prod(shape), np.float32)
  for at in range(0, found.size, _BLOCK):  # few, so that they stay in the cache
    own = found[at : at + _BLOCK]
    places = at + np.arange(own.size, dtype=np.uint64)
    own[:] = _uniform(words, *_halves(places), start)
  return found.reshape(shape)


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


def _uniform(words: Any, high: Any, low: Any, start: Any) -> Any:
  """Draws the numbers at places, given by their halves, after a start."""
  xp = library_of(high)
  if start is not None:
    own, low = low, low + start[1]
    high = high + start[0] + (low < own).astype(xp.uint32)
  left, right = block(words, high, low)
  return ((left ^ right) >> 9).astype(xp.float32) * xp.float32(2**-23)


def _halves(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the high and low halves of 64-bit integers."""
  low = places.astype(np.uint32)
  return (places >> np.uint64(32)).astype(np.uint32), low


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
