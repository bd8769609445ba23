# SPDX-License-Identifier: Apache-2.0
"""Means over texts, their errors, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

import jlora
from jlora.evaluation import outputs as sums
from jlora.evaluation.outputs import mean_kl, recovered, score

VOCAB = 11
RNG = np.random.default_rng(0)
P, Q = (RNG.standard_normal((VOCAB, VOCAB)).astype(np.float32) for _ in "pq")
BATCHES = [RNG.integers(0, VOCAB, shape) for shape in ((4, 9), (3, 5), (2, 9))]


def table(params, tokens):
  """A model that looks only at the token it stands on."""
  return params[tokens]


def row_means(values, batches):
  """(rows,) sums and counts of a figure that each token has."""
  rows = [values[row] for batch in batches for row in batch]
  return np.array([r.sum() for r in rows]), np.array([r.size for r in rows])


def ratio(sums, counts):
  """The mean over tokens and its standard error over rows."""
  mean, n = sums.sum() / counts.sum(), len(sums)
  spread = np.sum((sums - mean * counts) ** 2) * n / (n - 1)
  return mean, math.sqrt(spread) / counts.sum()


def test_divergence_over_batches_of_different_lengths():
  log_p, log_q = (log_softmax(x.astype(np.float64), axis=-1) for x in (P, Q))
  figures = {
    "kl": np.sum(np.exp(log_p) * (log_p - log_q), axis=-1),
    "reverse_kl": np.sum(np.exp(log_q) * (log_q - log_p), axis=-1),
    "agreement": (P.argmax(-1) == Q.argmax(-1)).astype(np.float64),
  }
  found = mean_kl(table, jnp.asarray(P), jnp.asarray(Q), iter(BATCHES))
  assert found.tokens == sum(batch.size for batch in BATCHES)
  for name, values in figures.items():
    mean, error = ratio(*row_means(values, BATCHES))
    assert getattr(found, name) == pytest.approx(mean, rel=1e-6)
    assert getattr(found, f"{name}_error") == pytest.approx(error, rel=1e-5)


def test_the_error_is_over_texts_not_tokens():
  """A text of one token repeated says no more than the token once."""
  short = RNG.integers(0, VOCAB, (8, 1))
  once = mean_kl(table, jnp.asarray(P), jnp.asarray(Q), [short])
  often = mean_kl(table, jnp.asarray(P), jnp.asarray(Q), [short.repeat(64, 1)])
  assert often.kl == pytest.approx(once.kl, rel=1e-6)
  assert often.kl_error == pytest.approx(once.kl_error, rel=1e-6)
  # n equal rows: the sample's standard deviation over root n, as usual.
  each = [mean_kl(table, P, Q, [row[None]]).kl for row in short]
  usual = np.std(each, ddof=1) / math.sqrt(8)
  assert once.kl_error == pytest.approx(usual, rel=1e-5)


def test_the_same_model_does_not_diverge():
  found = mean_kl(table, jnp.asarray(P), jnp.asarray(P), BATCHES)
  assert (found.kl, found.reverse_kl, found.agreement) == (0, 0, 1)
  assert (found.kl_error, found.agreement_error) == (0, 0)


def test_loss_and_perplexity():
  losses = -log_softmax(P.astype(np.float64), axis=-1)
  rows = [losses[row[:-1], row[1:]] for batch in BATCHES for row in batch]
  sums, counts = np.array([[row.sum(), row.size] for row in rows]).T
  mean, error = ratio(sums, counts)
  found = score(table, jnp.asarray(P), BATCHES)
  assert found.tokens == counts.sum()
  assert found.loss == pytest.approx(mean, rel=1e-6)
  assert found.loss_error == pytest.approx(error, rel=1e-5)
  assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-6)


def test_masked_positions_do_not_count():
  """Padding behind two texts gives the figures of the texts alone."""
  texts = RNG.integers(1, VOCAB, (3, 6))
  padded = np.pad(texts, ((0, 0), (0, 4)))
  live = lambda tokens: tokens != 0  # noqa: E731
  p, q = jnp.asarray(P).at[0].set(jnp.nan), jnp.asarray(Q)
  for got, wanted in (
    (mean_kl(table, p, q, [padded], mask=live), mean_kl(table, p, q, [texts])),
    (score(table, p, [padded], mask=live), score(table, p, [texts])),
  ):
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_a_row_without_a_counted_position_is_no_sample():
  rows = np.concatenate([BATCHES[0], np.zeros((5, 9), int)])

  def live(tokens):
    return np.repeat(tokens.any(axis=1, keepdims=True), 9, axis=1)

  found = mean_kl(table, P, Q, [rows], mask=live)
  np.testing.assert_allclose(found, mean_kl(table, P, Q, BATCHES[:1]))


def test_one_text_has_no_error():
  found = mean_kl(table, P, Q, [BATCHES[0][:1]])
  assert math.isnan(found.kl_error)
  assert found.kl > 0


def test_other_parameters_do_not_trace_again():
  traces = []

  def counted(params, tokens):
    traces.append(tokens.shape)
    return params[tokens]

  for seed in range(3):
    q = jnp.asarray(np.random.default_rng(seed).standard_normal(P.shape))
    mean_kl(counted, jnp.asarray(P), q.astype(jnp.float32), BATCHES)
  # p and q of two shapes; the third batch has a shape of its own.
  assert traces == [(4, 9)] * 2 + [(3, 5)] * 2 + [(2, 9)] * 2
  score(counted, jnp.asarray(P), BATCHES[:1])
  score(counted, jnp.asarray(Q), BATCHES[:1])
  assert len(traces) == 7


def test_an_impossible_word_is_infinite_not_an_error():
  q = jnp.asarray(Q).at[:, 3].set(-jnp.inf)
  found = mean_kl(table, jnp.asarray(P), q, BATCHES)
  assert math.isinf(found.kl)
  assert math.isfinite(found.reverse_kl)


def test_a_sharded_batch_gives_the_same():
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  tokens = RNG.integers(0, VOCAB, (16, 4))
  spread = jax.device_put(tokens, spec)
  found = mean_kl(table, P, Q, [spread])
  np.testing.assert_allclose(found, mean_kl(table, P, Q, [tokens]), rtol=1e-6)


def test_transfers_are_explicit():
  p, q = jax.device_put(P), jax.device_put(Q)
  with jax.transfer_guard("disallow"):
    assert mean_kl(table, p, q, BATCHES[:1]).kl > 0
    assert score(table, p, BATCHES[:1]).loss > 0


def nothing(tokens):
  return np.zeros(tokens.shape, bool)


@pytest.mark.parametrize(
  ("batches", "options", "message"),
  [
    ([], {}, "No position counts"),
    ([BATCHES[0]], {"mask": nothing}, "No position counts"),
    ([BATCHES[0][0]], {}, r"\(batch, time\) integers, got \(9,\)"),
    ([BATCHES[0] * 1.0], {}, r"integers, got \(4, 9\) float"),
    ([BATCHES[0] - VOCAB], {}, "Tokens below 0"),
    ([BATCHES[0]], {"mask": lambda t: t}, r"mask must give bool \(4, 9\)"),
  ],
)
def test_what_is_refused(batches, options, message):
  with pytest.raises(ValueError, match=message):
    mean_kl(table, P, Q, batches, **options)
  with pytest.raises(ValueError, match=message):
    score(table, P, batches, **options)


def test_damaged_logits_are_refused():
  damaged = jnp.asarray(Q).at[:, 2].set(jnp.nan)
  with pytest.raises(ValueError, match="NaN in kl at 36 of 36 positions"):
    mean_kl(table, P, damaged, BATCHES[:1])
  with pytest.raises(ValueError, match=r"`apply` gave \(4, 9\) for tokens"):
    score(lambda params, tokens: tokens, None, BATCHES[:1])


def test_a_model_of_one_word_too_few_has_no_loss():
  with pytest.raises(ValueError, match="NaN in loss"):
    score(lambda params, tokens: jnp.zeros((*tokens.shape, 2)), None, BATCHES)


def test_recovered_share():
  assert recovered(0.0, 0.25) == 1
  assert recovered(0.25, 0.25) == 0
  assert recovered(0.5, 0.25) == -1
  with pytest.raises(ValueError, match=r"kl_base must be above 0, got 0\.0"):
    recovered(0.0, 0.0)


def test_public_names():
  assert jlora.mean_kl is mean_kl
  assert jlora.score is score
  assert jlora.evaluation.recovered is recovered


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
