# SPDX-License-Identifier: Apache-2.0
"""The decoder's basic layers: linear, norm, gated MLP, mixture of experts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.config import Shape


def linear_layer(
  features: int, dtype: Any, name: str, *, bias: bool = False
) -> nn.Dense:
  """Makes a linear layer with a kernel (in, out).

  Args:
    features: number of outputs.
    dtype: of the parameters and of the computation.
    name: the last part of its path.
    bias: whether it has one.

  Returns:
    A module, to be called inside another.

  Example:
    >>> linear_layer(3, jnp.float32, "q").features
    3
  """
  return nn.Dense(
    features, use_bias=bias, name=name, dtype=dtype, param_dtype=dtype
  )


def rms_norm(shape: Shape, name: str) -> "Norm":
  """Makes a root-mean-square norm over the last axis.

  Args:
    shape: gives its epsilon and dtype.
    name: the last part of its path.

  Returns:
    A module, to be called inside another.

  Example:
    >>> import types
    >>> rms_norm(types.SimpleNamespace(eps=1e-6, dtype=jnp.float32), "norm").eps
    1e-06
  """
  return Norm(shape.eps, shape.dtype, name=name)


class Norm(nn.Module):
  """A norm, x / sqrt(mean(x^2) + eps) * scale, in float32 for any x."""

  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x (..., features); rounds to its dtype before `scale`."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.dtype)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * jnp.expand_dims(scale, range(x.ndim - 1))


class Mlp(nn.Module):
  """A gated MLP (SwiGLU), down(silu(gate(x)) * up(x))."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (batch, time, hidden), each position independently."""
    s = self.shape
    gate = linear_layer(s.mlp, s.dtype, "gate", bias=s.mlp_bias)(x)
    up = linear_layer(s.mlp, s.dtype, "up", bias=s.mlp_bias)(x)
    y = jax.nn.silu(gate) * up
    return linear_layer(s.hidden, s.dtype, "down", bias=s.mlp_bias)(y)


class Experts(nn.Module):
  """MLPs under '0', '1', ..., summed with each token's weights."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array, gates: jax.Array) -> jax.Array:
    """Sums the MLPs of x, weighted by gates (batch, time, experts)."""
    y = jnp.zeros(x.shape, jnp.float32)
    for i in range(self.shape.experts):
      out = Mlp(self.shape, name=str(i))(x).astype(jnp.float32)
      y += gates[..., i, None] * out
    return y.astype(x.dtype)


class Mixture(nn.Module):
  """A mixture of experts with a router, k experts for each token.

      y = sum_e g_e expert_e(x),   g = softmax over the k largest of x @ router

  Every expert computes every token, with gates of zero for those not chosen:
  exact, of static shape, and every product has its own parameter path. It costs
  experts / k times the products that the chosen experts need.
  """

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (batch, time, hidden), each position independently."""
    s = self.shape
    scores = linear_layer(s.experts, s.dtype, "router")(x)
    gates = choose(scores.astype(jnp.float32), s.chosen)
    return Experts(s, name="experts")(x, gates)


def choose(scores: jax.Array, count: int) -> jax.Array:
  """Computes the softmax over the largest scores, zero elsewhere.

      g_e = exp(s_e) / sum_{j in top k} exp(s_j) if e in top k, else 0

  Args:
    scores: (..., experts) float32.
    count: k, number of chosen experts; of equal scores the first.

  Returns:
    (..., experts) float32; each row sums to 1.

  Example:
    >>> choose(jnp.array([1.0, 5.0, 1.0, 5.0]), 2).tolist()
    [0.0, 0.5, 0.0, 0.5]

  References:
    Jiang et al. (2024), Mixtral of Experts.
  """
  largest, index = jax.lax.top_k(scores, count)
  places = jax.nn.one_hot(index, scores.shape[-1], dtype=scores.dtype)
  return (jax.nn.softmax(largest)[..., None] * places).sum(-2)
