# SPDX-License-Identifier: Apache-2.0
"""Gradient moments against the Fisher information of a small model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib.adapters.moments import gradient_moments

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 9, (2, 5)).astype(np.int32)


class Layers(nn.Module):
  """A table, a hidden layer and logits."""

  twice: bool = False

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(9, 6, name="embed")(tokens)
    hidden = nn.Dense(6, name="hidden")
    y = jnp.tanh(hidden(x))
    if self.twice:
      y = hidden(y)
    return nn.Dense(9, use_bias=False, name="last")(y)


PARAMS: Any = Layers().init(jax.random.key(0), TOKENS)["params"]


def apply(params, tokens) -> Any:
  return Layers().apply({"params": params}, tokens)


def test_of_logits_it_is_the_covariance_of_one_hot_labels():
  """E g gᵀ = diag(p) - p pᵀ, averaged over many draws of labels."""
  found = gradient_moments(
    apply, PARAMS, [np.repeat(TOKENS, 4000, axis=0)], jax.random.key(1)
  )
  assert set(found) == {"hidden/kernel", "last/kernel"}
  p = np.asarray(jax.nn.softmax(apply(PARAMS, TOKENS))).reshape(-1, 9)
  wanted = np.mean([np.diag(row) - np.outer(row, row) for row in p], axis=0)
  moment = found["last/kernel"]
  assert moment.count == 4000 * TOKENS.size
  assert moment.total.dtype == np.float32
  np.testing.assert_allclose(moment.total / moment.count, wanted, atol=5e-3)
  # The layer below has the same, through its slope.
  w = np.asarray(PARAMS["last"]["kernel"])
  below = found["hidden/kernel"]
  x = np.asarray(PARAMS["embed"]["embedding"])[TOKENS].reshape(-1, 6)
  slope = 1 - np.tanh(x @ PARAMS["hidden"]["kernel"]) ** 2
  wanted = np.mean(
    [
      (s[:, None] * w) @ (np.diag(row) - np.outer(row, row)) @ (s * w.T)
      for s, row in zip(slope, p, strict=True)
    ],
    axis=0,
  )
  np.testing.assert_allclose(below.total / below.count, wanted, atol=5e-3)


def test_half_the_weighted_square_is_the_divergence():
  """What a small change of the last layer costs, in nats."""
  change = 0.02 * RNG.standard_normal((6, 9)).astype(np.float32)
  other = {**PARAMS, "last": {"kernel": PARAMS["last"]["kernel"] + change}}
  p, q = (jax.nn.log_softmax(apply(x, TOKENS)) for x in (PARAMS, other))
  kl = float((jnp.exp(p) * (p - q)).sum(-1).mean())
  found = gradient_moments(
    apply, PARAMS, [np.repeat(TOKENS, 4000, axis=0)], jax.random.key(2)
  )["last/kernel"]
  x = jnp.tanh(
    PARAMS["embed"]["embedding"][TOKENS] @ PARAMS["hidden"]["kernel"]
  ).reshape(-1, 6)
  c = np.asarray(x.T @ x) / len(x)
  g = np.asarray(found.total) / found.count
  predicted = np.trace(change.T @ c @ change @ g) / 2
  assert predicted == pytest.approx(kl, rel=0.3)  # inputs and labels depend


def test_what_cannot_be_told_apart_is_refused():
  def twice(params, tokens) -> Any:
    return Layers(twice=True).apply({"params": params}, tokens)

  with pytest.raises(ValueError, match="hidden/kernel is called twice"):
    gradient_moments(twice, PARAMS, [TOKENS], jax.random.key(0))
  with pytest.raises(ValueError, match="no batch"):
    gradient_moments(apply, PARAMS, [], jax.random.key(0))
