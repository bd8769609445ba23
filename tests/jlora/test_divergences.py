# SPDX-License-Identifier: Apache-2.0
"""Means over texts, their errors, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import jlora
from jlora.divergences import mean_kl, recovered, score

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
  assert jlora.recovered is recovered
