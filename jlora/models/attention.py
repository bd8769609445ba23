# SPDX-License-Identifier: Apache-2.0
"""Causal attention, rotary positions, and the cache of keys and values."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# In half of all pairs, the key is in the query's future. Computing queries in
# four blocks skips three quarters of that half. With fewer queries than _MANY
# it does not pay.
_BLOCKS, _MANY = 4, 192


class Span(NamedTuple):
  """The positions that a call computes, and the size of the cache.

  Attributes:
    start: position of the first token, an int; or () int32 with a cache of the
      tokens before it.
    length: number of positions that the cache has room for; None for no cache.
    skip: (batch,) int32, number of padding tokens before each text; None for no
      padding.
  """

  start: int | jax.Array = 0
  length: int | None = None
  skip: jax.Array | None = None

  def positions(self, time: int) -> jax.Array:
    """Returns the positions of tokens in their texts, (1 or batch, time) int32.

    Args:
      time: number of tokens, from `start`.
    """
    places = jnp.arange(time)[None] + self.start
    if self.skip is None:
      return places
    return jnp.maximum(places - self.skip[:, None], 0)


#: A text from its start, without a cache.
WHOLE = Span()


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  window: int | None = None,
  span: Span = WHOLE,
) -> jax.Array:
  """Computes causal attention: each position's past, by softmax(q k / √d).

  Args:
    q: (batch, time, heads, d), any float dtype, of the span's positions.
    k: (batch, past, kv_heads, d), of the positions from 0; each key head serves
      heads / kv_heads query heads. A query does not see later positions or
      padding; a padding token sees itself.
    v: (batch, past, kv_heads, d).
    window: number of positions seen, the present one included; None for all.
    span: positions of the queries and starts of their texts.

  Returns:
    (batch, time, heads, d) in the dtype of `q`; the softmax is float32. Holds
    heads * time * past numbers per example. Many queries of a static start are
    computed in four blocks.

  Example:
    >>> x = jnp.eye(2)[None, :, None]
    >>> attend(jnp.zeros((1, 2, 1, 2)), x, x)[0, :, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]

  References:
    Ainslie et al. (2023), GQA.
  """
  time = q.shape[1]
  if not isinstance(span.start, int) or time < _MANY:
    return _attend(q, k, v, window, span)
  # A block's products leave out its future; a mask would only zero the results.
  parts, size = [], -(-time // _BLOCKS)
  for at in range(0, time, size):
    start, stop = span.start + at, span.start + at + size
    block = q[:, at : at + size], k[:, :stop], v[:, :stop]
    parts.append(_attend(*block, window, span._replace(start=start)))
  return jnp.concatenate(parts, axis=1)


def _attend(q, k, v, window, span):
  """Computes attention of one block of queries."""
  batch, time, heads, d = q.shape
  past, kv_heads = k.shape[1:3]
  grouped = (batch, kv_heads, heads // kv_heads, time)
  # Put the queries of a group next to each other: one product per key head.
  q = q.reshape(batch, time, kv_heads, -1, d).transpose(0, 2, 3, 1, 4)
  q = q.reshape(batch, kv_heads, -1, d)
  scores = jnp.einsum(
    "bgnd,bsgd->bgns", q, k, preferred_element_type=jnp.float32
  ).reshape(*grouped, past)
  age = np.arange(time)[:, None] - np.arange(past)[None] + span.start
  seen = age >= 0
  if window is not None:
    seen &= age < window
  seen = seen[None, None, None]
  if span.skip is not None:
    is_text = np.arange(past)[None] >= span.skip[:, None]
    seen &= is_text[:, None, None, None] | (age == 0)[None, None, None]
  scores = jnp.where(seen, scores / math.sqrt(d), -jnp.inf)
  # Each position sees itself, so every row's largest score is finite.
  most = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - most)
  y = jnp.einsum(
    "bgns,bsgd->bgnd",
    weights.reshape(batch, kv_heads, -1, past).astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  ).reshape(*grouped, d)
  y = (y / weights.sum(-1, keepdims=True)).astype(v.dtype)
  return y.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, d)


def turns(
  frequencies: Sequence[float],
  span: Span,
  time: int,
  dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
  """Computes the cosines and sines of rotary positions' angles.

      cos(t f_i), sin(t f_i),   t = start - skip, ..., start - skip + time - 1

  Args:
    frequencies: d/2 angles per position, in radians.
    span: where the positions start; with a traced start it needs a length.
    time: number of positions.
    dtype: of the result; the angles are float64.

  Returns:
    Two arrays (1, time, 1, d/2); (batch, time, 1, d/2) with padding.

  Example:
    >>> turns((np.pi,), Span(), 2, jnp.float32)[0].ravel().tolist()
    [1.0, -1.0]
  """
  angles = np.outer(np.arange(span.length or time), frequencies)
  tables = (jnp.asarray(f(angles), dtype) for f in (np.cos, np.sin))
  places = span.positions(time)
  cos, sin = (table.at[places].get(mode="clip") for table in tables)
  return cos[:, :, None], sin[:, :, None]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates pairs of channels of x by their position's angle (RoPE).

  Channel i is paired with channel i + d/2, as Hugging Face stores them:

      y_i       = x_i cos(t f_i) - x_{i+d/2} sin(t f_i)
      y_{i+d/2} = x_{i+d/2} cos(t f_i) + x_i sin(t f_i)

  Args:
    x: (batch, time, heads, d), any float dtype.
    cos: (1 or batch, time, 1, d/2), from `turns`, in the dtype of `x`.
    sin: the same.

  Returns:
    The shape and dtype of `x`.

  Example:
    >>> x = jnp.ones((1, 2, 1, 2))
    >>> y = rotate(x, *turns((np.pi / 2,), Span(), 2, x.dtype))
    >>> y[0, :, 0].round(3).tolist()
    [[1.0, 1.0], [-1.0, 1.0]]

  References:
    Su et al. (2021), RoFormer.
  """
  low, high = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [low * cos - high * sin, high * cos + low * sin], axis=-1
  )


def remember(
  module: nn.Module, k: jax.Array, v: jax.Array, span: Span
) -> tuple[jax.Array, jax.Array]:
  """Adds keys and values to a layer's cache; returns those of all positions.

  Args:
    module: the layer whose collection "cache" holds `keys` and `values`,
      each (batch, length, kv_heads, d); created at the first call.
    k: (batch, time, kv_heads, d), of the span's positions.
    v: the same.
    span: where they start, and the cache's length, if there is one.

  Returns:
    Two arrays (batch, past, kv_heads, d), from position 0; zeros at positions
    that are not computed yet.

  Example:
    >>> class Layer(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x, span):
    ...     return remember(self, x, x, span)[0]
    >>> x = jnp.ones((1, 1, 1, 1))
    >>> _, kept = Layer().apply({}, x, Span(0, 3), mutable="cache")
    >>> y, _ = Layer().apply(kept, 2 * x, Span(1, 3), mutable="cache")
    >>> y.ravel().tolist()
    [1.0, 2.0, 0.0]
  """
  if span.length is None:
    return k, v
  is_first = not module.has_variable("cache", "keys")
  shape = (k.shape[0], span.length, *k.shape[2:])
  kept = {
    name: module.variable("cache", name, jnp.zeros, shape, k.dtype)
    for name in ("keys", "values")
  }
  for name, new in (("keys", k), ("values", v)):
    kept[name].value = jax.lax.dynamic_update_slice_in_dim(
      kept[name].value, new, span.start, axis=1
    )
  # The prompt attends to itself alone, not to the cache's unused positions.
  return (k, v) if is_first else (kept["keys"].value, kept["values"].value)
