# SPDX-License-Identifier: Apache-2.0
"""The k-th largest magnitude, as a sort gives it; what is kept by chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jlora.merging.arrays.sparsifiers import (
  at_random,
  by_magnitude_rank,
  inverse_keep,
)
from jlora.numerics.kth_largest import count_of, kth_magnitude, kth_of_all

values = st.floats(width=32, allow_nan=False, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(x=arrays(np.float32, (3, 4), elements=values), count=st.integers(1, 12))
def test_it_is_what_a_sort_gives(x, count):
  wanted, was = np.sort(np.abs(x).ravel())[-count], x.copy()
  assert kth_magnitude(x, np.float32(count)) == wanted
  assert kth_magnitude(jnp.asarray(x), np.float32(count)) == wanted
  np.testing.assert_array_equal(x, was)


either = pytest.mark.parametrize("xp", [np, jnp])


@either
def test_counts_beyond_the_entries(xp):
  x = xp.float32([3.0, -5.0])
  assert kth_magnitude(x, 3.0) == 0
  assert np.isnan(kth_magnitude(x, 0.0))


@either
def test_what_is_nan_is_the_largest(xp):
  x = xp.float32([3.0, jnp.nan, -jnp.inf, 1.0])
  assert np.isnan(kth_magnitude(x, 1.0))
  assert np.isinf(kth_magnitude(x, 2.0))
  assert kth_magnitude(x, 3.0) == 3


def test_several_arrays_are_one():
  parts = [jnp.array([[1.0, 7.0]]), jnp.float32(-4), jnp.array([2.0, 3.0, 5.0])]
  assert kth_of_all(parts, jnp.abs, 3) == 4


def test_how_many_a_share_is():
  for density, size, count in (
    (0.6, 5, 3), (0.7, 10, 7), (0.29, 100, 29), (0.5, 4, 2), (0.5, 5, 2),
    (0.01, 10, 1), (0.0, 10, 0), (1.0, 7, 7), (1 / 3, 9, 3),
  ):  # fmt: skip
    assert count_of(density, size) == count
    assert count_of(np.float32(density), size) == count


@pytest.mark.parametrize("sparsify", [at_random, by_magnitude_rank])
def test_what_is_drawn_is_the_change_on_average(sparsify):
  delta = jnp.float32(np.random.default_rng(0).standard_normal((4, 5)))
  keys = jax.random.split(jax.random.key(0), 4000)
  drawn = jax.vmap(lambda key: sparsify(delta, 0.5, key, rescale=inverse_keep))(
    keys
  )
  # No probability is under 0.35: 5 standard errors of the mean.
  bound = 5 * np.abs(delta) * np.sqrt((1 / 0.35 - 1) / len(keys))
  assert (np.abs(drawn.mean(axis=0) - delta) < bound).all()
