# SPDX-License-Identifier: Apache-2.0
"""A mixture of gated MLPs, of which each token is sent through a few."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.layers import Mlp, dense
from jlora.models.shape import Shape


class Experts(nn.Module):
  """MLPs under '0', '1', ..., summed with each token's weights."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array, gates: jax.Array) -> jax.Array:
    """Maps x (batch, time, hidden) by gates (batch, time, experts) float32."""
    y = jnp.zeros(x.shape, jnp.float32)
    for i in range(self.shape.experts):
      out = Mlp(self.shape, name=str(i))(x).astype(jnp.float32)
      y += gates[..., i, None] * out
    return y.astype(x.dtype)


class Mixture(nn.Module):
  """The sum of the chosen experts' outputs, weighted by the router.

      y = sum_e g_e expert_e(x),   g = softmax over the k largest of x @ router

  Every expert computes every token, and the gates of those not chosen are
  zero: exact, of static shape, and each product keeps a path of its own. It
  costs experts / k times the products that the choice needs.
  """

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (batch, time, hidden) position by position."""
    s = self.shape
    scores = dense(s.experts, s.dtype, "router")(x)
    gates = choose(scores.astype(jnp.float32), s.chosen)
    return Experts(s, name="experts")(x, gates)


def choose(scores: jax.Array, count: int) -> jax.Array:
  """The softmax over the largest scores, zero elsewhere.

      g_e = exp(s_e) / sum_{j in top k} exp(s_j) if e in top k, else 0

  Args:
    scores: (..., experts) float32.
    count: k, how many are chosen; of equal scores the first.

  Returns:
    (..., experts) float32, each row's sum 1.

  Example:
    >>> choose(jnp.array([1.0, 5.0, 1.0, 5.0]), 2).tolist()
    [0.0, 0.5, 0.0, 0.5]

  References:
    Jiang et al. (2024), Mixtral of Experts.
  """
  largest, index = jax.lax.top_k(scores, count)
  places = jax.nn.one_hot(index, scores.shape[-1], dtype=scores.dtype)
  return (jax.nn.softmax(largest)[..., None] * places).sum(-2)
