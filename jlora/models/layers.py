# SPDX-License-Identifier: Apache-2.0
"""The layers that the decoder's parts share: linear, norm and gated MLP."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.shape import Shape


def dense(
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
    >>> dense(3, jnp.float32, "q").features
    3
  """
  return nn.Dense(
    features, use_bias=bias, name=name, dtype=dtype, param_dtype=dtype
  )


def norm(shape: Shape, name: str) -> "Norm":
  """A root-mean-square norm over the last axis, at a path of its own.

  Args:
    shape: gives its epsilon and dtype.
    name: the last part of its path.

  Returns:
    A module, to be called inside another.

  Example:
    >>> import types
    >>> norm(types.SimpleNamespace(eps=1e-6, dtype=jnp.float32), "norm").eps
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
    gate = dense(s.mlp, s.dtype, "gate", bias=s.mlp_bias)(x)
    up = dense(s.mlp, s.dtype, "up", bias=s.mlp_bias)(x)
    y = jax.nn.silu(gate) * up
    return dense(s.hidden, s.dtype, "down", bias=s.mlp_bias)(y)
