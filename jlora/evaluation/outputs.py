# SPDX-License-Identifier: Apache-2.0
"""Compares models by their outputs: KL divergence, agreement and loss.

Works with any `apply(params, tokens) -> logits`. The logits are read in blocks
of the vocabulary, so nothing else of their size is formed.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Vocabulary entries that are converted to float32 at a time.
_BLOCK = 4096
# Lower than any logit, but differences of two such numbers are finite.
_LOW = -1e30


def divergence_of(
  logits_p: jax.Array, logits_q: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes the KL divergences of two arrays of logits at every position.

      KL(p || q) = E_p[(p - max p) - (q - max q)] + log S_q - log S_p,
      S = Σ exp(x - max x)

  Subtracting each side's own maximum avoids the rounding errors of logarithms
  of small probabilities and of large logits.

  Args:
    logits_p: (..., vocab), any floating dtype.
    logits_q: the same shape.

  Returns:
    KL(p || q) and KL(q || p), nats, and 1 where the largest logit is at the
    same word, else 0: (...) float32 each. Rounding errors are about 1e-6 nats
    in either direction, so a single position can be slightly below 0; they
    average out in means. One pass over blocks of the vocabulary; shard the
    leading axes, not the vocabulary.

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
    """Adds a block of the vocabulary to both sides' states."""
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
  # If the sums are similar, their logarithms would round to more than they
  # differ.
  apart = (q[1] - p[1]) / p[1]
  rest = jnp.where(
    jnp.abs(apart) < 0.5, jnp.log1p(apart), jnp.log(q[1]) - jnp.log(p[1])
  )
  same = (p[3] == q[3]).astype(jnp.float32)
  return p[2] / p[1] + rest, q[2] / q[1] - rest, same


def loss_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Computes the cross-entropy of a target word at every position.

      loss = log Σ_v exp(x_v - max x) - (x_target - max x)

  Args:
    logits: (..., vocab), any floating dtype.
    targets: (...) integers.

  Returns:
    (...) float32, nats; NaN where the target is not in the vocabulary.

  Example:
    >>> round(float(loss_of(jnp.zeros((2,)), jnp.int32(1))), 4)
    0.6931
  """
  zero = jnp.zeros(logits.shape[:-1], jnp.float32)

  def add(state, start, size):
    """Adds a block of the vocabulary to the maximum and the sum."""
    top, total = state
    x = _block(logits, start, size)
    new = jnp.maximum(top, jnp.max(x, axis=-1))
    weights = jnp.exp(x - new[..., None])
    return new, total * jnp.exp(top - new) + jnp.sum(weights, axis=-1)

  top, total = _over_blocks(add, (zero + _LOW, zero), logits.shape[-1])
  target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.log(total) - (target.astype(jnp.float32) - top)


Apply = Callable[[Any, jax.Array], jax.Array]
Mask = Callable[[np.ndarray], np.ndarray]


class Divergence(NamedTuple):
  """The mean divergence of two models' predictions, p and q.

  Standard errors are over sequences (rows of the batches), not over tokens,
  because tokens of one text are correlated. They are NaN for a single sequence.

  Attributes:
    kl: mean KL(p || q), nats per token.
    kl_error: its standard error.
    reverse_kl: mean KL(q || p), nats per token.
    reverse_kl_error: its standard error.
    agreement: share of tokens, in [0, 1], whose likeliest next token is the
      same; of equal logits the first counts.
    agreement_error: its standard error.
    tokens: number of positions counted.
  """

  kl: float
  kl_error: float
  reverse_kl: float
  reverse_kl_error: float
  agreement: float
  agreement_error: float
  tokens: int


class Score(NamedTuple):
  """The loss of a model on given text.

  Attributes:
    loss: nats per predicted token.
    loss_error: its standard error over sequences; NaN for a single one.
    perplexity: exp(loss).
    tokens: number of predicted tokens.
  """

  loss: float
  loss_error: float
  perplexity: float
  tokens: int


def mean_kl(
  apply: Apply,
  params_p: Any,
  params_q: Any,
  batches: Iterable[Any],
  *,
  mask: Mask | None = None,
) -> Divergence:
  """Computes the mean KL divergence of two models' next-token predictions.

      KL(p || q) = Σ_v p_v (log p_v - log q_v),   p = softmax(logits of p)

  Args:
    apply: `(params, tokens (batch, time) int) -> logits (batch, time, vocab)`,
      any floating dtype. Compiled once for each function and shape, so pass the
      same function, not a new lambda, in later calls.
    params_p: parameters of p, usually the finetune.
    params_q: parameters of q, in any structure that `apply` takes: the base, or
      the base with an adapter.
    batches: (batch, time) integers each, NumPy or JAX (possibly sharded over
      the batch), of any lengths; every shape compiles once.
    mask: tokens (batch, time), NumPy -> bool (batch, time), which positions
      count; None counts all.

  Returns:
    Divergence, in nats. Costs two forward passes. Sums are float32 within a
    position and float64 over positions. One position has an error of about 1e-6
    nats and 1e-6 of its size; means have far less. Infinite where q gives
    probability 0 to a word that p does not.

  Raises:
    ValueError: no batch or no counted position, tokens that are not (batch,
      time) integers, logits of p and q that differ in shape, or NaN at a
      counted position.

  Example:
    >>> table = lambda params, tokens: params[tokens]
    >>> p, q = jnp.log(jnp.eye(2) + 1), jnp.zeros((2, 2))
    >>> found = mean_kl(table, p, q, [np.array([[0, 1, 1], [0, 1, 0]])])
    >>> round(found.kl, 6), found.tokens   # 2/3 log 4/3 + 1/3 log 2/3
    (0.056633, 6)
  """
  step = functools.partial(_compare, apply)
  names = ("kl", "reverse_kl", "agreement")
  found = _mean_over(step, (params_p, params_q), batches, mask, names)
  (kl, reverse, same), errors, tokens = found
  return Divergence(kl, errors[0], reverse, errors[1], same, errors[2], tokens)


def score(
  apply: Apply,
  params: Any,
  batches: Iterable[Any],
  *,
  mask: Mask | None = None,
) -> Score:
  """Computes the mean loss of a model on text, and its perplexity.

      loss = mean_t -log softmax(logits_t)[token_{t+1}]

  Args:
    apply: as for `mean_kl`.
    params: the model's parameters.
    batches: (batch, time) integers each, time 2 or more.
    mask: tokens (batch, time), NumPy -> bool (batch, time), which predicted
      tokens count; None counts all. The first of a row never counts.

  Returns:
    Score, in nats. Costs a forward pass.

  Raises:
    ValueError: as for `mean_kl`.

  Example:
    >>> uniform = lambda params, tokens: jnp.zeros((*tokens.shape, 8))
    >>> found = score(uniform, None, [np.zeros((2, 5), int)])
    >>> round(found.perplexity, 4), found.tokens
    (8.0, 8)
  """
  step = functools.partial(_lose, apply)

  def predicted(tokens):
    """Returns the mask of positions whose next token counts."""
    counts = _counted(tokens, mask)
    # Position t predicts token t + 1, the last position nothing.
    shifted = np.zeros(tokens.shape, bool)
    shifted[:, :-1] = counts[:, 1:]
    return shifted

  found = _mean_over(step, (params,), batches, predicted, ("loss",))
  (loss,), (error,), tokens = found
  with np.errstate(over="ignore"):
    return Score(loss, error, float(np.exp(loss)), tokens)


def recovered(kl: float, kl_base: float) -> float:
  """Returns the share of a finetune's effect that an adapter keeps.

      recovered = 1 - KL_r / KL_0

  Args:
    kl: KL(finetuned || base with adapter), nats per token.
    kl_base: KL(finetuned || base), nats per token.

  Returns:
    float: 1 if nothing is lost, 0 if nothing is kept, negative if the adapter
    is worse than the base.

  Raises:
    ValueError: kl_base is not above 0: there is no effect to keep.

  Example:
    >>> recovered(0.0625, 0.25)
    0.75
  """
  if not kl_base > 0:
    raise ValueError(
      f"kl_base must be above 0, got {kl_base}: base and finetune say the same."
    )
  return 1 - kl / kl_base


def _mean_over(step, params, batches, mask, names):
  """Returns means over tokens, their errors over rows, and the count."""
  rows = [np.zeros((0, len(names) + 1))]
  for batch in batches:
    tokens = _checked(batch)
    values = np.stack(jax.device_get(step(*params, tokens)), axis=-1)
    host = np.asarray(jax.device_get(tokens))
    counts = _counted(host, mask)
    values = np.where(counts[..., None], values, 0).astype(np.float64)
    bad = np.isnan(values).sum(axis=(0, 1))
    if bad.any():
      raise ValueError(
        f"NaN in {names[int(np.argmax(bad))]} at {bad.max()} of "
        f"{counts.sum()} positions: logits are NaN or +inf there."
      )
    sums = np.concatenate([values, counts[..., None]], axis=-1).sum(axis=1)
    rows.append(sums[sums[:, -1] > 0])
  return _ratios(np.concatenate(rows))


def _ratios(rows: np.ndarray) -> tuple[list[float], list[float], int]:
  """Computes ratios of sums over rows, and the ratios' standard errors.

  mean = Σ s_i / Σ n_i,   error² = N / (N - 1) Σ (s_i - mean n_i)² / (Σ n)²
  """
  sums, counts = rows[:, :-1], rows[:, -1:]
  count, total = len(rows), counts.sum()
  if not total:
    raise ValueError(
      "No position counts: give at least one batch, and a mask that is not "
      "False everywhere."
    )
  means = sums.sum(axis=0) / total
  if count < 2:
    return means.tolist(), [math.nan] * len(means), int(total)
  with np.errstate(invalid="ignore"):  # an infinite mean has no error
    spread = np.sum(np.square(sums - means * counts), axis=0)
  errors = np.sqrt(count / (count - 1) * spread) / total
  return means.tolist(), errors.tolist(), int(total)


def _checked(batch: Any) -> jax.Array:
  """Returns a batch on the device; raises unless valid tokens."""
  tokens = jax.device_put(batch)
  shape, dtype = np.shape(tokens), getattr(tokens, "dtype", type(batch))
  if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(
      f"Tokens must be (batch, time) integers, got {shape} {dtype}."
    )
  if tokens.size and int(jax.device_get(jnp.min(tokens))) < 0:
    raise ValueError(
      "Tokens below 0: pad with any token and leave it out by `mask`."
    )
  return tokens


def _counted(tokens: np.ndarray, mask: Mask | None) -> np.ndarray:
  """Returns the mask of counted tokens; raises if it does not fit."""
  if mask is None:
    return np.ones(tokens.shape, bool)
  counts = np.asarray(mask(tokens))
  if counts.shape != tokens.shape or counts.dtype != bool:
    raise ValueError(
      f"mask must give bool {tokens.shape}, got {counts.dtype} {counts.shape}."
    )
  return counts


@functools.partial(jax.jit, static_argnums=0)
def _compare(apply, params_p, params_q, tokens):
  """Computes KL(p || q), KL(q || p) and agreement, (batch, time) each."""
  logits = apply(params_p, tokens), apply(params_q, tokens)
  _check_logits(tokens, logits[0])
  return divergence_of(*logits)


@functools.partial(jax.jit, static_argnums=0)
def _lose(apply, params, tokens):
  """Computes the loss at each position; the last one's has no meaning."""
  logits = apply(params, tokens)
  _check_logits(tokens, logits)
  return (loss_of(logits, jnp.roll(tokens, -1, axis=1)),)


def _check_logits(tokens: jax.Array, logits: jax.Array) -> None:
  """Raises unless logits are (batch, time, vocab)."""
  if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
    raise ValueError(
      f"`apply` gave {logits.shape} for tokens {tokens.shape}; needed are "
      "logits (batch, time, vocab)."
    )


def _advance(side, new, moved, other_moved, x, far, other_far, start):
  """Updates a side's (max, sum, weighted sum, argmax) by one block."""
  top, total, weighted, index = side
  weights = jnp.exp(far)
  # A word of probability 0 adds nothing, whatever the other side's logit.
  terms = jnp.where(weights > 0, weights * (far - other_far), 0.0)
  faded = jnp.exp(moved)
  # Before the first word of nonzero probability the shift is as large as _LOW.
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
  """Reads a block of the vocabulary as float32."""
  kind, words = logits.dtype, logits
  if kind.itemsize == 2:
    # Otherwise XLA's CPU compiler converts the whole bfloat16 array to float32.
    words = jax.lax.bitcast_convert_type(logits, jnp.uint16)
  part = jax.lax.dynamic_slice_in_dim(words, start, size, -1)
  if kind.itemsize == 2:
    part = jax.lax.bitcast_convert_type(part, kind)
  return part.astype(jnp.float32)


def _over_blocks(add: Any, state: Any, size: int) -> Any:
  """Runs `add(state, start, length)` over all blocks."""
  whole, rest = divmod(size, _BLOCK)
  if whole:
    state = jax.lax.fori_loop(
      0, whole, lambda turn, state: add(state, turn * _BLOCK, _BLOCK), state
    )
  return add(state, jnp.int32(whole * _BLOCK), rest) if rest else state
