# SPDX-License-Identifier: Apache-2.0
"""The layers that the decoder's parts share: linear, norm and gated MLP."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.config import Shape


def linear_layer(
  features: int, dtype: Any, name: str, *, bias: bool = False
) -> nn.Dense:
  """A linear layer whose kernel is (in, out), at a path of its own.

  Args:
    features: outputs.
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
  """A root-mean-square norm over the last axis, at a path of its own.

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
  """x / sqrt(mean(x^2) + eps) * scale, in float32 whatever x is."""

  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (..., features), rounded to its own dtype before `scale`."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.dtype)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * jnp.expand_dims(scale, range(x.ndim - 1))


class Mlp(nn.Module):
  """The gated layer down(silu(gate(x)) * up(x)), called SwiGLU."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (batch, time, hidden) position by position."""
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
    scores = linear_layer(s.experts, s.dtype, "router")(x)
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
