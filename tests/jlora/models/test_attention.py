# SPDX-License-Identifier: Apache-2.0
"""Attention against float64 NumPy, in one block and in several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.attention import Span, attend


def attended(q, k, v, window, start, skip):
  """One row, one head and one query at a time."""
  y = np.zeros(q.shape)
  for row, at, head in np.ndindex(q.shape[:3]):
    last = start + at
    first = 0 if window is None else max(0, last - window + 1)
    first = min(max(first, skip[row]), last)
    group = head // (q.shape[2] // k.shape[2])
    seen = slice(first, last + 1)
    scores = k[row, seen, group] @ q[row, at, head] / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max())
    y[row, at, head] = weights @ v[row, seen, group] / weights.sum()
  return y


@pytest.mark.parametrize("time", [1, 40, 203])
@pytest.mark.parametrize(
  ("window", "start", "skip"),
  [(None, 0, None), (7, 0, None), (None, 3, None), (90, 0, (0, 5))],
)
def test_each_query_averages_its_past(time, window, start, skip):
  rng = np.random.default_rng(0)
  past = start + time
  q = rng.standard_normal((2, time, 4, 3))
  k, v = rng.standard_normal((2, 2, past, 2, 3))
  span = Span(start, None, None if skip is None else jnp.array(skip))
  attention = jax.jit(functools.partial(attend, window=window, span=span))
  found = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
  expected = attended(q, k, v, window, start, skip or (0, 0))
  # A text that begins later has no past before that; padding sees itself.
  np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_traced_start_is_a_static_one():
  rng = np.random.default_rng(1)
  q = jnp.asarray(rng.standard_normal((1, 200, 2, 3)), jnp.float32)
  k = jnp.asarray(rng.standard_normal((1, 205, 2, 3)), jnp.float32)
  traced = jax.jit(lambda start: attend(q, k, k, span=Span(start)))
  np.testing.assert_allclose(
    traced(jnp.int32(5)), attend(q, k, k, span=Span(5)), atol=2e-6
  )
