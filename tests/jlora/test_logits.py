# SPDX-License-Identifier: Apache-2.0
"""Sums over the vocabulary in blocks, against float64 in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from jlora import logits as sums

# Compiled once for each shape.
divergence_of = jax.jit(sums.divergence_of)
loss_of = jax.jit(sums.loss_of)
# Under one block, exactly one, and two with a shorter third.
VOCABULARIES = [1, 7, 4096, 2 * 4096 + 13]


def drawn(vocab, size, dtype, seed=0):
  """(3, 5, vocab) logits of a given size, in units of their dtype."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(size * rng.standard_normal((3, 5, vocab)), dtype)


def exact(p, q):
  """KL(p || q), KL(q || p) and agreement in float64."""
  p, q = (np.asarray(x, np.float64) for x in (p, q))
  log_p, log_q = log_softmax(p, axis=-1), log_softmax(q, axis=-1)
  same = np.argmax(p, axis=-1) == np.argmax(q, axis=-1)
  return (
    np.sum(np.exp(log_p) * (log_p - log_q), axis=-1),
    np.sum(np.exp(log_q) * (log_q - log_p), axis=-1),
    same.astype(np.float64),
  )


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_divergence_is_that_of_float64(vocab, size, dtype):
  p, q = drawn(vocab, size, dtype), drawn(vocab, size, dtype, seed=1)
  found = divergence_of(p, q)
  for one, other in zip(found, exact(p, q), strict=True):
    np.testing.assert_allclose(one, other, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_loss_is_that_of_float64(vocab, size):
  x = drawn(vocab, size, jnp.float32)
  targets = np.random.default_rng(2).integers(0, vocab, (3, 5))
  found = loss_of(x, jnp.asarray(targets))
  full = -log_softmax(np.asarray(x, np.float64), axis=-1)
  wanted = np.take_along_axis(full, targets[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("shift", [0.0, 7.0, -3e4])
def test_a_small_divergence_is_not_lost_beside_large_logits(shift):
  """Two models 1e-3 apart: 5e-7 nats, at logits of any height."""
  p = drawn(9000, 1.0, jnp.float32)
  step = drawn(9000, 1e-3, jnp.float32, seed=1)
  p = p + np.float32(shift)
  q = p + step
  for found, wanted in zip(
    divergence_of(p, q)[:2], exact(p, q)[:2], strict=True
  ):
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.mean(found) == pytest.approx(np.mean(wanted), abs=1e-7)


@pytest.mark.parametrize("place", [0, 4095, 4096, 8999])
def test_the_maximum_may_come_late(place):
  """Everything before it fades to nothing."""
  p = drawn(9000, 1.0, jnp.float32).at[..., place].set(500.0)
  q = drawn(9000, 1.0, jnp.float32, seed=1)
  for found, wanted in zip(divergence_of(p, q), exact(p, q), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=3e-6)


def test_words_that_both_rule_out_add_nothing():
  p, q = drawn(9000, 3.0, jnp.float32), drawn(9000, 3.0, jnp.float32, seed=1)
  holes = np.arange(9000) % 3 == 0
  holes[:4096] = True  # a whole block of them
  found = divergence_of(
    jnp.where(holes, -jnp.inf, p), jnp.where(holes, -jnp.inf, q)
  )
  wanted = exact(p[..., ~holes], q[..., ~holes])
  for one, other in zip(found, wanted, strict=True):
    np.testing.assert_allclose(one, other, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("first", [0.0, 400.0])
def test_what_only_one_rules_out_is_infinite_one_way(first):
  p = jnp.zeros(5000).at[4999].set(first)
  q = p.at[3].set(-jnp.inf)
  kl, reverse, same = divergence_of(p, q)
  # At 400 the word has no probability that float32 could hold.
  assert np.isinf(kl) if first == 0 else np.isfinite(kl)
  assert np.isfinite(reverse)
  assert same == 1


def test_the_first_of_equal_logits_is_the_likeliest():
  p = jnp.zeros(9000).at[jnp.array([5000, 8000])].set(2.0)
  q = jnp.zeros(9000).at[5000].set(1.0)
  assert divergence_of(p, q)[2] == 1
  assert divergence_of(p, q.at[4999].set(1.0))[2] == 0


def test_nan_is_not_hidden():
  p = jnp.zeros(9000).at[10].set(jnp.nan)
  found = divergence_of(p, jnp.zeros(9000))
  assert np.isnan(found[0])
  assert np.isnan(found[1])
  assert np.isnan(loss_of(p, jnp.int32(3)))


def test_a_target_outside_the_vocabulary_has_no_loss():
  assert np.isnan(loss_of(jnp.zeros(4), jnp.int32(4)))


def test_other_vocabularies_are_refused():
  with pytest.raises(ValueError, match=r"\(4,\) and of q \(5,\).*vocabulary"):
    divergence_of(jnp.zeros(4), jnp.zeros(5))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_nothing_as_large_as_the_logits_is_formed_in_float32(dtype):
  """A block of 4096 of 65536 words alone."""
  shape = jax.ShapeDtypeStruct((4, 8, 65536), dtype)
  compiled = jax.jit(sums.divergence_of).lower(shape, shape).compile()
  memory = compiled.memory_analysis()
  assert memory is not None
  if dtype == jnp.float32:
    assert memory.temp_size_in_bytes < 4 * 8 * 65536 * 2
  else:
    assert "f32[4,8,65536]" not in str(compiled.as_text())


@settings(deadline=None, max_examples=40)
@given(
  st.lists(
    st.tuples(st.floats(-50, 50, width=32), st.floats(-50, 50, width=32)),
    min_size=6,
    max_size=6,
  ),
  st.floats(-1000, 1000, width=16),
)
def test_divergences_are_positive_and_know_no_level(pairs, level):
  p, q = np.array(pairs, np.float32).T
  kl, reverse, _ = map(float, divergence_of(jnp.asarray(p), jnp.asarray(q)))
  assert kl > -1e-5
  assert reverse > -1e-5
  moved = divergence_of(jnp.asarray(p + np.float32(level)), jnp.asarray(q))
  assert float(moved[0]) == pytest.approx(kl, rel=1e-2, abs=1e-2)
  assert float(divergence_of(jnp.asarray(p), jnp.asarray(p))[0]) == 0
