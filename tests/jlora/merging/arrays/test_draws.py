# SPDX-License-Identifier: Apache-2.0
"""Draws by place: JAX's numbers, of any part, also beyond 2^32 entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.merging.arrays import draws
from jlora.merging.arrays.draws import block, place_of, uniform

KEY = jax.random.key(5)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 7), (0, 2)])
def test_the_numbers_of_jax(shape):
  expected = jax.random.uniform(KEY, shape)
  for found in (
    uniform(KEY, shape),
    jax.jit(lambda k: uniform(k, shape))(KEY),
    uniform(KEY, shape, like=np.zeros(0)),
    uniform(np.uint32([0, 5]), shape, like=np.zeros(0)),
  ):
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ("key", "counter", "expected"),
  [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3),
     (0xC4923A9C, 0x483DF7A0)),
  ],
)  # fmt: skip
def test_the_published_words(key, counter, expected):
  """Known answers of Random123."""
  key, counter = (jnp.asarray(np.array(x, np.uint32)) for x in (key, counter))
  assert tuple(map(int, block(key, *counter))) == expected


def test_parts_are_those_of_the_whole():
  whole = uniform(KEY, (40, 50)).reshape(-1)
  for start, shape in ((0, (7,)), (33, (4, 50)), (1999, ())):
    part = uniform(KEY, shape, place_of(start)).reshape(-1)
    np.testing.assert_array_equal(part, whole[start : start + part.size])


def test_places_beyond_32_bits():
  """A part may lie across the border; places of a whole are 64 bits wide."""
  start = 2**32 - 3
  found = uniform(KEY, (6,), place_of(start))
  alone = [uniform(KEY, (), place_of(start + at)) for at in range(6)]
  np.testing.assert_array_equal(found, alone)
  by_numpy = uniform(KEY, (6,), place_of(start), np.zeros(0))
  np.testing.assert_array_equal(found, by_numpy)
  assert len(set(found.tolist())) == 6
  x = np.random.default_rng(0).integers(0, 2**32, 100, np.uint64)
  for by in (1, 2**16, 2**20 + 3, 2**32 - 1):
    high, low = draws._times(jnp.asarray(x.astype(np.uint32)), by)
    product = np.asarray(high).astype(np.uint64) << np.uint64(32)
    np.testing.assert_array_equal(product | np.asarray(low), x * np.uint64(by))


def test_keys_of_other_kinds():
  raw = jax.random.PRNGKey(5)
  np.testing.assert_array_equal(uniform(raw, (5,)), uniform(KEY, (5,)))
  other = uniform(jax.random.key(5, impl="rbg"), (5,))
  assert len(set(other.tolist()) | set(uniform(KEY, (5,)).tolist())) == 10


def test_numpy_draws_more_than_a_block():
  shape = (3, draws._BLOCK - 5)
  found = uniform(KEY, shape, place_of(7), np.zeros(0))
  np.testing.assert_array_equal(found, uniform(KEY, shape, place_of(7)))


def test_even():
  drawn = np.asarray(uniform(KEY, (2**16,)), np.float64)
  counts = np.histogram(drawn, 16, (0, 1))[0]
  assert (abs(counts - 2**12) < 5 * 2**6).all()
  assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / 2**8
