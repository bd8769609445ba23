# SPDX-License-Identifier: Apache-2.0
"""What gates share: a softmax over the largest, what they read, given ones."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def softmax_of_largest(
  logits: jax.Array, chosen: int | None = None
) -> jax.Array:
  """Computes the softmax over the `chosen` largest logits; others get zero.

  Logits of -inf get zero, also where all are. Of equal logits the first count.

  Args:
    logits: (..., n) float32.
    chosen: how many; None is all.

  Example:
    >>> softmax_of_largest(jnp.array([0.0, -jnp.inf, 0.0, -1.0]), 2)
    Array([0.5, 0. , 0.5, 0. ], dtype=float32)
  """
  count = logits.shape[-1]
  if chosen is None or chosen == count:
    return _softmax(logits)
  largest, at = lax.top_k(logits, chosen)
  places = jax.nn.one_hot(at, count, dtype=logits.dtype)
  return jnp.einsum("...k,...kn->...n", _softmax(largest), places)


def _softmax(logits):
  """Computes the softmax; zeros where all logits are -inf."""
  top = lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0))
  total = weights.sum(axis=-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1.0)


def given(params: jax.Array, x: jax.Array) -> jax.Array:
  """Gates with numbers that are given, for all rows or one for each example.

      g = params

  Args:
    params: (n,), or (examples, n).
    x: (examples, tokens..., in), a layer's input.

  Returns:
    (n,), or (examples, 1..., n), for the `gate` of a `Gated`.

  Raises:
    ValueError: gates of other examples than x has.

  Example:
    >>> given(jnp.ones((2, 4)), jnp.ones((2, 7, 3))).shape
    (2, 1, 4)
  """
  if params.ndim == 1:
    return params
  if params.ndim != 2 or x.ndim < 2 or len(params) != len(x):
    raise ValueError(
      f"Gates are given as {params.shape} for a layer's input {x.shape}; "
      "needed is (n,), or (examples, n) with the examples on x's first axis."
    )
  return params.reshape(len(params), *(1,) * (x.ndim - 2), -1)


def by_token(x: jax.Array, mask: Any = None) -> jax.Array:
  """Reads every token for itself.

      z = x

  Args:
    x: (..., in), a layer's input.
    mask: unused.

  Returns:
    x.

  Example:
    >>> by_token(jnp.ones((2, 5, 3))).shape
    (2, 5, 3)
  """
  del mask
  return x


def by_sequence(x: jax.Array, mask: Any = None) -> jax.Array:
  """Reads the mean of an example's tokens, without those of padding.

      z = Σ_t mask_t x_t / Σ_t mask_t

  Args:
    x: (examples, tokens..., in), a layer's input; (in,) or (examples, in) has
      no tokens.
    mask: None, or (examples, tokens...), which tokens are no padding.

  Returns:
    (examples, 1..., in) in x's dtype, averaged in float32; zero for an example
    of padding alone.

  Raises:
    ValueError: a mask of other tokens.

  Example:
    >>> x = jnp.array([[[1.0], [3.0], [9.0]]])
    >>> by_sequence(x, jnp.array([[True, True, False]]))
    Array([[[2.]]], dtype=float32)
  """
  if mask is not None and mask.shape != x.shape[:-1]:
    raise ValueError(
      f"The mask is {mask.shape} for a layer's input {x.shape}; needed is one "
      f"truth value for each token, {x.shape[:-1]}."
    )
  tokens = tuple(range(1, x.ndim - 1))
  if not tokens:
    return x
  wide = x.astype(jnp.float32)
  if mask is None:
    return wide.mean(axis=tokens, keepdims=True).astype(x.dtype)
  kept = mask[..., None].astype(jnp.float32)
  total = (wide * kept).sum(axis=tokens, keepdims=True)
  count = kept.sum(axis=tokens, keepdims=True)
  return (total / jnp.maximum(count, 1.0)).astype(x.dtype)
