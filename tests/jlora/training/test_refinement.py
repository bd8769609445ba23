# SPDX-License-Identifier: Apache-2.0
"""Refining factors: the loss is the divergence, and it falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jlora.extraction.trees import extract
from jlora.loras import Lora
from jlora.training.refinement import distance, refine


def model(params, tokens):
  x = params["embed"][tokens]
  return jnp.tanh(x @ params["up"]["kernel"]) @ params["head"]["kernel"]


def draw(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = {"embed": (11, 12), "up": (12, 16), "head": (16, 11)}
  embed, up, head = (
    jax.random.normal(key, shape)
    for key, shape in zip(keys, shapes.values(), strict=True)
  )
  return {"embed": embed, "up": {"kernel": up}, "head": {"kernel": head}}


@pytest.fixture(scope="module")
def pair():
  base = draw(0)
  tuned = jax.tree.map(lambda w, d: w + 0.3 * d, base, draw(1))
  return base, {**tuned, "embed": base["embed"]}


TOKENS = jax.random.randint(jax.random.key(2), (4, 9), 0, 11)


def test_the_distance_is_the_divergence(pair):
  base, tuned = pair
  p, q = (
    scipy.special.log_softmax(np.asarray(model(x, TOKENS), np.float64), -1)
    for x in (tuned, base)
  )
  expected = (np.exp(p) * (p - q)).sum(-1).mean()
  found = distance(model, base, tuned, {}, TOKENS)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert distance(model, tuned, tuned, {}, TOKENS) == pytest.approx(0, abs=1e-6)


def test_refined_factors_are_nearer_on_other_tokens_too(pair):
  base, tuned = pair
  loras = extract(base, tuned, rank=2)
  start = dict(loras)
  init, update = refine(model, optax.adam(1e-2))
  step, state = jax.jit(update), init(loras)
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    for turn in range(120):
      tokens = jax.random.randint(jax.random.key(turn), (8, 9), 0, 11)
      loras, state, _ = step(loras, state, base, tuned, tokens)
  before, after = (
    float(distance(model, base, tuned, x, TOKENS)) for x in (start, loras)
  )
  assert after < 0.6 * before
  assert loras.keys() == start.keys()
  for path, lora in loras.items():
    assert lora.a.shape == start[path].a.shape
    np.testing.assert_array_equal(lora.scale, start[path].scale)


def test_the_gradient_is_that_of_finite_differences(pair):
  base, tuned = pair
  loras = extract(base, tuned, rank=2)

  def loss(a):
    lora = loras["up/kernel"]
    changed = {**loras, "up/kernel": Lora(a, lora.b, lora.scale)}
    return distance(model, base, tuned, changed, TOKENS)

  a = loras["up/kernel"].a
  way = jax.random.normal(jax.random.key(5), a.shape)
  slope = jnp.vdot(jax.grad(loss)(a), way)
  apart = (loss(a + 1e-3 * way) - loss(a - 1e-3 * way)) / 2e-3
  np.testing.assert_allclose(slope, apart, rtol=2e-2)
