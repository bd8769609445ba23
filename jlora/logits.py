# SPDX-License-Identifier: Apache-2.0
"""What logits say at each position: divergence of two, loss of a target.

Logits are read once, a block of the vocabulary at a time, with sums that are
rescaled as the maximum grows: nothing as large as the logits is formed.
"""

from typing import Any

import jax
import jax.numpy as jnp

# float32 of a block of so many words is what is formed beside the logits.
_BLOCK = 4096
# Under any logit, and differences of two such still are finite.
_LOW = -1e30


def divergence_of(
  logits_p: jax.Array, logits_q: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The divergence of two arrays of logits at every position.

      KL(p || q) = E_p[(p - max p) - (q - max q)] + log S_q - log S_p,
      S = Σ exp(x - max x)

  Distances from the own maximum keep what rounding would take from the
  logarithms of small probabilities and large logits.

  Args:
    logits_p: (..., vocab), any floating dtype.
    logits_q: the same shape.

  Returns:
    KL(p || q) and KL(q || p), nats, and 1 where both have the same largest
    logit, else 0: (...) float32 each. Rounding is about 1e-6 nats either way,
    so that a mean over positions is far better, and one position may be a
    little below 0. One pass over blocks of the vocabulary; shard the leading
    axes, not the vocabulary.

  Raises:
    ValueError: the shapes differ.

  Example:
    >>> same = jnp.array([1.0, 2.0])
    >>> [float(x) for x in divergence_of(same, same + 7)]
    [0.0, 0.0, 1.0]
  """
  if logits_p.shape != logits_q.shape:
    raise ValueError(
      f"Logits of p {logits_p.shape} and of q {logits_q.shape} differ in "
      "shape; both models need the same vocabulary."
    )
  zero = jnp.zeros(logits_p.shape[:-1], jnp.float32)
  side = (zero + _LOW, zero, zero, jnp.zeros(zero.shape, jnp.int32))

  def add(state, start, size):
    p, q = _block(logits_p, start, size), _block(logits_q, start, size)
    tops = [
      jnp.maximum(one[0], jnp.max(x, axis=-1))
      for one, x in zip(state, (p, q), strict=True)
    ]
    far_p, far_q = p - tops[0][..., None], q - tops[1][..., None]
    moved_p, moved_q = state[0][0] - tops[0], state[1][0] - tops[1]
    return (
      _advance(state[0], tops[0], moved_p, moved_q, p, far_p, far_q, start),
      _advance(state[1], tops[1], moved_q, moved_p, q, far_q, far_p, start),
    )

  p, q = _over_blocks(add, (side, side), logits_p.shape[-1])
  # Logarithms of like sums would round more than they differ.
  apart = (q[1] - p[1]) / p[1]
  rest = jnp.where(
    jnp.abs(apart) < 0.5, jnp.log1p(apart), jnp.log(q[1]) - jnp.log(p[1])
  )
  same = (p[3] == q[3]).astype(jnp.float32)
  return p[2] / p[1] + rest, q[2] / q[1] - rest, same


def loss_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """The loss of a target word at every position.

      loss = log Σ_v exp(x_v - max x) - (x_target - max x)

  Args:
    logits: (..., vocab), any floating dtype.
    targets: (...) integers.

  Returns:
    (...) float32, nats; NaN where the target is not in the vocabulary. One
    pass over blocks of the vocabulary; shard the leading axes.

  Example:
    >>> round(float(loss_of(jnp.zeros((2,)), jnp.int32(1))), 4)
    0.6931
  """
  zero = jnp.zeros(logits.shape[:-1], jnp.float32)

  def add(state, start, size):
    top, total = state
    x = _block(logits, start, size)
    new = jnp.maximum(top, jnp.max(x, axis=-1))
    weights = jnp.exp(x - new[..., None])
    return new, total * jnp.exp(top - new) + jnp.sum(weights, axis=-1)

  top, total = _over_blocks(add, (zero + _LOW, zero), logits.shape[-1])
  target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.log(total) - (target.astype(jnp.float32) - top)


def _advance(side, new, moved, other_moved, x, far, other_far, start):
  """A side's (max, sum, sum weighted by the distance, argmax), a block on."""
  top, total, weighted, index = side
  weights = jnp.exp(far)
  # A word that is ruled out adds nothing, whatever the other side says.
  terms = jnp.where(weights > 0, weights * (far - other_far), 0.0)
  faded = jnp.exp(moved)
  # Before the first word that counts the shift is as large as _LOW.
  shifted = faded * (weighted + total * (moved - other_moved))
  place = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  first = jnp.where(x == new[..., None], place, x.shape[-1])
  here = start + jnp.min(first, axis=-1)
  return (
    new,
    total * faded + jnp.sum(weights, axis=-1),
    jnp.where(total * faded > 0, shifted, 0.0) + jnp.sum(terms, axis=-1),
    jnp.where(new > top, here, index),
  )


def _block(logits, start, size):
  kind, words = logits.dtype, logits
  if kind.itemsize == 2:
    # Of bfloat16 XLA's CPU compiler would make float32 as a whole.
    words = jax.lax.bitcast_convert_type(logits, jnp.uint16)
  part = jax.lax.dynamic_slice_in_dim(words, start, size, -1)
  if kind.itemsize == 2:
    part = jax.lax.bitcast_convert_type(part, kind)
  return part.astype(jnp.float32)


def _over_blocks(add: Any, state: Any, size: int) -> Any:
  """`add(state, start, length)` for every block, the last one shorter."""
  whole, rest = divmod(size, _BLOCK)
  if whole:
    state = jax.lax.fori_loop(
      0, whole, lambda turn, state: add(state, turn * _BLOCK, _BLOCK), state
    )
  return add(state, jnp.int32(whole * _BLOCK), rest) if rest else state
