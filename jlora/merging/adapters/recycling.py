# SPDX-License-Identifier: Apache-2.0
"""Chooses and weighs adapters of a pool, beside the control: random adapters.

`learn_weights` learns by gradients; here are selection, search without
gradients (LoraHub), and adapters that are random but for their size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlora.evaluation.conflicts import inner_product
from jlora.loras import Lora, Loras, check_loras
from jlora.merging.adapters.concatenation import as_factors, finite
from jlora.messages import name_some
from jlora.numerics.backends import over_leading, words_of
from jlora.numerics.linalg import thin_qr
from jlora.paths import key_for

# Steps of a search grow by this after a success, so that one success in five
# keeps them as they are.
_GROWTH = 1.5
_FIFTH = 0.25


def random_like(
  adapters: Sequence[Mapping[str, Lora]],
  key: jax.Array | None = None,
  *,
  keep: Literal["entries", "spectrum"] = "entries",
) -> list[Loras]:
  """Makes random adapters of the same size: the control of every pool.

      entries:   ã ~ N(0, std(a)²),  b̃ ~ N(0, std(b)²)
      spectrum:  ãᵀ b̃ = u diag(σ(aᵀ b)) vᵀ,  u and v random directions

  Random entries have a flat spectrum, whatever the adapter's.

  Args:
    adapters: path -> Lora each.
    key: PRNG key; None is `key(0)`. Each Lora has its own, by path and place.
    keep: what stays of every matrix: the standard deviations of the entries of
      a and of b, or the singular values of the change.

  Returns:
    As many adapters of the same paths, ranks, scales and dtypes. O((in + out)
    r²) for the spectrum; stays sharded.

  Raises:
    ValueError: another `keep`, or malformed Loras.

  Example:
    >>> lora = Lora(jnp.eye(3)[:2], 2 * jnp.eye(3)[:2], jnp.float32(1))
    >>> (like,) = random_like([{"q": lora}], keep="spectrum")
    >>> jnp.linalg.svd(like["q"].a.T @ like["q"].b)[1].round(3)
    Array([2., 2., 0.], dtype=float32)

  References:
    Recycling LoRAs with adaptive merging, arXiv 2602.12323.
  """
  makers = {"entries": _entries_like, "spectrum": _spectrum_like}
  if keep not in makers:
    raise ValueError(f"keep is one of {[*makers]}, got {keep!r}.")
  key = jax.random.key(0) if key is None else key

  def random(path: str, at: int, lora: Lora) -> Lora:
    """Makes one Lora's like."""
    keys = jax.random.split(
      jax.random.fold_in(key_for(key, path), at), lora.a.shape[:-2]
    )
    leaves = keys, jnp.asarray(lora.a), jnp.asarray(lora.b)
    a, b = over_leading(
      makers[keep], lora.a.ndim - 2, *leaves, places=as_factors
    )
    return Lora(a, b, lora.scale)

  made = []
  for at, own in enumerate(adapters):
    check_loras(own)
    made.append({path: random(path, at, lora) for path, lora in own.items()})
  return made


def _entries_like(key, a, b):
  """Draws normal factors with the standard deviations of others."""
  drawn = []
  for own, x in zip(jax.random.split(key), (a, b), strict=True):
    spread = jnp.std(x.astype(jnp.float32))
    drawn.append(
      _beside(spread * jax.random.normal(own, x.shape, jnp.float32), x)
    )
  return tuple(drawn)


def _spectrum_like(key, a, b):
  """Draws factors in random directions, with the change's singular values."""
  (left, right), scale = finite(a.astype(jnp.float32), b.astype(jnp.float32))
  with jax.default_matmul_precision("highest"):
    core = thin_qr(left.T)[1] @ thin_qr(right.T)[1].T
    s = jnp.linalg.svd(core, compute_uv=False)
    factors = []
    for own, x in zip(jax.random.split(key), (left, right), strict=True):
      drawn = jax.random.normal(own, x.T.shape, jnp.float32)
      rows = thin_qr(drawn)[0].T[: s.size]
      padded = ((0, a.shape[0] - s.size), (0, 0))
      factors.append(jnp.pad(jnp.sqrt(s)[:, None] * rows, padded) * scale)
  return _beside(factors[0], a), _beside(factors[1], b)


def _beside(drawn, x):
  """Returns what was drawn in the dtype of x, and on a mesh where x lies.

  The compiler puts the operands of one elementwise operation side by side.
  """
  return jnp.where(jnp.isnan(x), x, drawn.astype(x.dtype))


def select(
  adapters: Sequence[Mapping[str, Lora]],
  loss: Callable[[Mapping[str, Lora]], Any],
  k: int,
) -> list[int]:
  """Chooses the k adapters of the smallest loss.

  Other selections are one line: `jax.random.choice(key, n, (k,),
  replace=False)` at random, `select(adapters, lambda one: -closeness(one,
  target), k)` by likeness to the target's own, `range(n)` all.

  Args:
    adapters: n of them.
    loss: adapter -> a number, of the same few examples for all.
    k: 1 to n.

  Returns:
    Places in `adapters`, the best first; of equal ones the earlier.

  Raises:
    ValueError: a k outside, or losses that are NaN.

  Example:
    >>> losses = iter([2, 1, 3])
    >>> select([{}, {}, {}], lambda one: next(losses), 2)
    [1, 0]
  """
  if not 1 <= k <= len(adapters):
    raise ValueError(f"k is 1 to {len(adapters)}, the adapters, got {k}.")
  losses = [float(loss(own)) for own in adapters]
  wrong = [str(at) for at, value in enumerate(losses) if math.isnan(value)]
  if wrong:
    raise ValueError(
      f"The loss of adapters {name_some(wrong)} is NaN; leave them out."
    )
  return sorted(range(len(adapters)), key=losses.__getitem__)[:k]


def closeness(one: Mapping[str, Lora], other: Mapping[str, Lora]) -> float:
  """Computes the cosine of two adapters' changes, read as one vector each.

      Σ_path <Δ, Δ'> / (|Δ| |Δ'|)

  Args:
    one: path -> Lora; what only one of both has counts in its length.
    other: of the same base.

  Returns:
    Between -1 and 1, NaN if either is zero. O((in + out) r r') on the host.

  Raises:
    ValueError: no common path, or malformed Loras.

  Example:
    >>> lora = Lora(np.ones((1, 2)), np.ones((1, 3)), np.float32(2))
    >>> round(closeness({"q": lora}, {"q": Lora(lora.a, -lora.b, lora.scale)}))
    -1
  """
  check_loras(one)
  check_loras(other)
  shared = one.keys() & other.keys()
  if not shared:
    raise ValueError(
      f"The adapters have no module in common: {name_some(sorted(one))} and "
      f"{name_some(sorted(other))}."
    )
  inner = sum(inner_product(one[path], other[path]) for path in sorted(shared))
  squares = [
    sum(inner_product(x, x) for x in own.values()) for own in (one, other)
  ]
  length = math.prod(squares) ** 0.5
  return inner / length if length > 0 else float("nan")


def search_weights(
  loss: Callable[[np.ndarray], Any],
  n: int,
  *,
  key: jax.Array | None = None,
  low: float = -1.5,
  high: float = 1.5,
  steps: int = 40,
  start: float = 0.0,
) -> np.ndarray:
  """Searches weights of adapters without a gradient (LoraHub).

  One trial after the other is drawn around the best so far; the width of the
  draws adapts, so that one in five succeeds.

  Args:
    loss: weights (n,) float32 -> a number. LoraHub adds .05 mean |weights| to
      the loss of five examples.
    n: how many weights, such as one for each adapter.
    key: PRNG key; None is `key(0)`.
    low: least value of a weight.
    high: largest.
    steps: evaluations of the loss, at least 1; the first is of the start.
    start: of all weights; within [low, high].

  Returns:
    (n,) float32, the best of those that were evaluated.

  Raises:
    ValueError: bounds or steps that make no sense, or no finite loss.

  Example:
    >>> found = search_weights(lambda w: ((w - 1) ** 2).sum(), 2, steps=200)
    >>> found.round(1)
    array([1., 1.], dtype=float32)

  References:
    LoraHub (Huang et al., 2023), arXiv 2307.13269.

  Approximation: LoraHub searches with nevergrad's NGOpt and sums factors, so
    that weights act squared; here a (1+1) evolution strategy weighs whatever
    the loss does with them, in `mix` the changes.
  """
  if not (n >= 1 and steps >= 1 and low <= start <= high and low < high):
    raise ValueError(
      "Needed: n and steps of at least 1, low < high, and start between; got "
      f"n {n}, steps {steps}, low {low}, high {high}, start {start}."
    )
  key = jax.random.key(0) if key is None else key
  dice = np.random.default_rng([int(word) for word in words_of(key)])
  best, least = np.full(n, start, np.float32), math.inf
  width, trial = (high - low) / 6, best
  for _ in range(steps):
    value = float(loss(trial))
    if value <= least:
      best, least, width = trial, value, width * _GROWTH
    else:
      width *= _GROWTH**-_FIFTH
    drawn = best + np.float32(width) * dice.standard_normal(n, np.float32)
    trial = np.clip(drawn, np.float32(low), np.float32(high))
  if not math.isfinite(least):
    raise ValueError(f"None of {steps} trials has a finite loss.")
  return best
