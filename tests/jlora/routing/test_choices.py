# SPDX-License-Identifier: Apache-2.0
"""The softmax over the largest logits."""

import jax
import jax.numpy as jnp
import numpy as np

from jlora.routing.choices import softmax_of_largest


def test_softmax_of_largest():
  logits = jnp.array([[1.0, 2.0, 3.0], [-jnp.inf, 0.0, -jnp.inf]])
  found = softmax_of_largest(logits, 2)
  np.testing.assert_allclose(
    found, [[0, *jax.nn.softmax(jnp.array([2.0, 3.0]))], [0, 1, 0]], atol=1e-6
  )
  nothing = jnp.full((2, 3), -jnp.inf)
  assert (softmax_of_largest(nothing) == 0).all()
  slope = jax.grad(lambda x: softmax_of_largest(x)[..., 0].sum())(nothing)
  assert np.isfinite(slope).all()
