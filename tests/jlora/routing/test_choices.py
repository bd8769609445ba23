# SPDX-License-Identifier: Apache-2.0
"""The softmax over the largest logits, and gates that are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.adapting.binding import bind
from jlora.adapting.programs import Gated
from jlora.adapting.transforms import adapt
from jlora.loras import Lora
from jlora.routing.choices import given, softmax_of_largest


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


def test_given_gates_are_those_of_their_examples():
  rng = np.random.default_rng(0)
  a, b, x, gates = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((3, 2, 6), (3, 2, 5), (4, 7, 6), (4, 3))
  )
  params, bank = {"w": jnp.zeros((6, 5))}, Lora(a, b, jnp.ones(3))
  run = adapt(lambda p, x: x @ p["w"], strict=True)
  found = run(bind(params, {"w": Gated(bank, gates, given)}), x)
  for i in range(4):
    alone = run(bind(params, {"w": Gated(bank, gates[i], given)}), x[i])
    np.testing.assert_allclose(found[i], alone, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match=r"\(4, 3\).*\(3, 7, 6\)"):
    given(gates, x[:3])
