# SPDX-License-Identifier: Apache-2.0
"""Threefry, the generator behind JAX's keys, for arrays of either library.

On the host, where a key is its two words, nothing has to be compiled to derive
keys and to draw.
"""

from typing import Any

import jax
import numpy as np

from jlora.numerics.backends import library_of

_TURNS = ((13, 15, 26, 6), (17, 29, 16, 24))


@np.errstate(over="ignore")  # words wrap around; NumPy warns of single ones
def block(key: Any, high: Any, low: Any) -> tuple[Any, Any]:
  """Computes Threefry's two random words for each counter.

  Args:
    key: (2,) uint32.
    high: (...) uint32, of the counters.
    low: likewise.

  Returns:
    Two of (...) uint32.

  Example:
    >>> zero = np.uint32([0, 0])
    >>> [hex(word) for word in block(zero, *zero)]
    ['0x6b200159', '0x99ba4efe']
  """
  first, second = key
  uint = library_of(first).uint32
  keys = (first, second, first ^ second ^ uint(0x1BD11BDA))
  left, right = high + keys[0], low + keys[1]
  for turn in range(5):
    for bits in _TURNS[turn % 2]:
      left = left + right
      turned = (right << uint(bits)) | (right >> uint(32 - bits))
      right = turned ^ left
    left = left + keys[(turn + 1) % 3]
    right = right + keys[(turn + 2) % 3] + uint(turn + 1)
  return left, right


def fold_in(key: Any, number: int) -> Any:
  """Derives a key from another: `jax.random.fold_in`, by NumPy on its words.

  Args:
    key: PRNG key, or its two words of NumPy.
    number: below 2^32.

  Returns:
    A key of the same kind.

  Example:
    >>> fold_in(np.uint32([0, 5]), 3), fold_in(jax.random.key(5), 3)
    (array([2939540675, 3076691462], dtype=uint32),
     Array((), dtype=key<fry>) overlaying:
     [2939540675 3076691462])
  """
  if library_of(key) is np:
    return np.array(block(key, np.uint32(0), np.uint32(number)), np.uint32)
  return jax.random.fold_in(key, number)


def seed_words(seed: int) -> np.ndarray:
  """Returns the two words of `jax.random.key(seed)`, without calling JAX.

  As JAX does without 64-bit integers, it takes the seed modulo 2^32.

  Example:
    >>> seed_words(7)
    array([0, 7], dtype=uint32)
  """
  return np.array([0, seed & 0xFFFFFFFF], np.uint32)
