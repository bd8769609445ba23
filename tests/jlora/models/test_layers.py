# SPDX-License-Identifier: Apache-2.0
"""The router's gates, on random scores."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.models import layers


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 2**31 - 1))
def test_gates_are_the_softmax_of_all_but_the_rest(experts, count, seed):
  """Chosen, they are in proportion to the softmax over every expert."""
  count = min(count, experts)
  rng = np.random.default_rng(seed)
  scores = rng.normal(0, 3, (5, experts)).astype(np.float32)
  gates = np.asarray(layers.choose(jnp.asarray(scores), count))
  np.testing.assert_allclose(gates.sum(-1), 1.0, rtol=1e-6)
  every = np.asarray(jax.nn.softmax(jnp.asarray(scores)))
  kept = np.where(gates > 0, every, 0)
  np.testing.assert_allclose(
    gates, kept / kept.sum(-1, keepdims=True), rtol=1e-4
  )
  assert ((gates > 0).sum(-1) <= count).all()
  least = np.where(gates > 0, scores, np.inf).min(-1)
  most = np.where(gates > 0, -np.inf, scores).max(-1)
  assert ((gates > 0).sum(-1) < count).any() or (least >= most).all()
