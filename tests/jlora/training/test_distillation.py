# SPDX-License-Identifier: Apache-2.0
"""Distilling: the loss is the divergence from the teacher, and it falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import jlora
from jlora.extraction.trees import extract
from jlora.loras import Lora
from jlora.training import beside, distil, summed


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


def first(loras, target, source, adapter, **how):
  """The divergence before a step, and the trained factors after it."""
  init, update = distil(model, optax.sgd(0.1), **how)
  moved, _, value = update(loras, init(loras), target, source, adapter, TOKENS)
  return value, moved


def test_the_value_is_the_divergence(pair):
  base, tuned = pair
  loras = extract(base, tuned, rank=2)
  student = jlora.apply(base, loras)
  p, q = (
    scipy.special.log_softmax(np.asarray(model(x, TOKENS), np.float64), -1)
    for x in (tuned, student)
  )
  expected = (np.exp(p) * (p - q)).sum(-1).mean()
  for through in (beside, summed):
    found, _ = first(loras, base, tuned, {}, through=through)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_teacher_is_a_base_with_its_adapter(pair):
  base, tuned = pair
  adapter, other = extract(base, tuned, rank=3), draw(3)
  start = extract(other, tuned, rank=1)
  summed_up = jlora.apply(base, adapter)
  one, moved = first(start, other, base, adapter)
  two, same = first(start, other, summed_up, {})
  np.testing.assert_allclose(one, two, rtol=1e-4)
  for path, lora in moved.items():
    np.testing.assert_allclose(lora.b, same[path].b, atol=1e-5)


def test_an_adapter_on_its_own_base_is_where_it_stays(pair):
  base, tuned = pair
  adapter = extract(base, tuned, rank=2)
  value, moved = first(adapter, base, base, adapter)
  assert value == pytest.approx(0, abs=1e-6)
  for path, lora in moved.items():
    np.testing.assert_allclose(lora.a, adapter[path].a, atol=1e-6)
    np.testing.assert_array_equal(lora.scale, adapter[path].scale)


def test_distilled_factors_are_nearer_on_other_tokens_too(pair):
  base, tuned = pair
  loras = start = extract(base, tuned, rank=2)
  init, update = distil(model, optax.adam(1e-2))
  step, state = jax.jit(update), init(loras)
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    for turn in range(120):
      tokens = jax.random.randint(jax.random.key(turn), (8, 9), 0, 11)
      loras, state, _ = step(loras, state, base, tuned, {}, tokens)
  before, after = (float(first(x, base, tuned, {})[0]) for x in (start, loras))
  assert after < 0.6 * before
  assert loras.keys() == start.keys()


def test_the_gradient_is_that_of_finite_differences(pair):
  base, tuned = pair
  loras = extract(base, tuned, rank=2)
  path, size = "up/kernel", 1e-3
  _, moved = first(loras, base, tuned, {})
  slope = (loras[path].a - moved[path].a) / 0.1
  way = jax.random.normal(jax.random.key(5), slope.shape)

  def loss(far):
    lora = loras[path]
    changed = {**loras, path: Lora(lora.a + far * way, lora.b, lora.scale)}
    return first(changed, base, tuned, {})[0]

  apart = (loss(size) - loss(-size)) / (2 * size)
  np.testing.assert_allclose(jnp.vdot(slope, way), apart, rtol=2e-2)
