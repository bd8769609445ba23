# SPDX-License-Identifier: Apache-2.0
"""What NumPy does otherwise gives what JAX gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.numerics import backends
from jlora.numerics.backends import (
  batched,
  compiled,
  library_of,
  log_softmax,
  ranks_along,
  single,
)


def draw(*shape):
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_one_array_of_jax_makes_all_of_jax():
  own, other = draw(2), jnp.ones(2)
  assert library_of(own, np.float32(1), 2.0, None) is np
  assert library_of(own, other) is library_of(1.0) is jnp
  jax.jit(lambda x: library_of(own, x) is jnp or 1 / 0)(own)
  assert type(single(0.5, own)) is np.ndarray
  assert isinstance(single(0.5, other), jax.Array)
  assert single(np.float64(0.5), own).dtype == np.float32


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(5, 7), (3, 1), (0, 4), (4, 0), (2, 3, 300)])
def test_ranks(shape, axis, monkeypatch):
  """Also in parts; of equal entries the first is first, and NaN is last."""
  monkeypatch.setattr(backends, "_SORTED", 512)
  x = np.abs(draw(*shape)).round(1)
  if x.size:
    x.reshape(-1)[x.size // 2] = np.nan
  found = ranks_along(x, axis)
  np.testing.assert_array_equal(found, ranks_along(jnp.asarray(x), axis))
  assert found.dtype == np.int32


def test_batches():
  x, w = draw(2, 3, 4), draw(2)
  function = lambda x, w: (w[:, None] * x).sum(axis=0)  # noqa: E731
  found = batched(function, (1, None))(x, w)
  assert type(found) is np.ndarray
  wanted = batched(function, (1, None))(jnp.asarray(x), w)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_what_is_compiled_for_jax_runs_as_it_is_for_numpy():
  seen = []

  @compiled
  def double(x):
    seen.append(type(x))
    return x + x

  assert [double(np.ones(1)).tolist() for _ in range(2)] == [[2], [2]]
  assert [double(jnp.ones(1)).tolist() for _ in range(2)] == [[2], [2]]
  assert seen[:2] == [np.ndarray] * 2
  assert len(seen) == 3


def test_log_softmax():
  x = 50 * draw(3, 5)
  np.testing.assert_allclose(
    log_softmax(x), log_softmax(jnp.asarray(x)), rtol=1e-5, atol=1e-6
  )
