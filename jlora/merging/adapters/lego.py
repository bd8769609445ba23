# SPDX-License-Identifier: Apache-2.0
"""Merges Loras unit by unit: like units of all adapters become one (LoRA-LEGO).

A unit is a row of a with the row of b beside it: a change of rank one. Which
units there are depends on how a Lora is written down, so they are taken from
its singular value decomposition, unless the paper's own are asked for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.factoring.factorisers import recompress
from jlora.loras import Lora
from jlora.merging.adapters.concatenation import (
  as_factors,
  concat,
  finite,
  weighted,
)
from jlora.numerics.backends import library_of, over_leading

# A cluster whose a's or b's cancel to less than this writes noise.
_CANCELS = 0.1
_ROUNDING = 1e-5
# Cosines of this size are zeros with rounding.
_ORTHOGONAL = 1e-4


def singular_units(a: Any, b: Any) -> tuple[Any, Any]:
  """Writes a change as its singular vectors, of which each half is as long.

      aᵀ b = Σ_i (√s_i u_i) (√s_i v_i)ᵀ

  Signs are fixed: the entry of largest modulus in each u_i is positive. Where
  singular values are nearly equal, so are many sets of vectors.

  Args:
    a: (r, in).
    b: (r, out).

  Returns:
    a (r, in) and b (r, out), float32, strongest unit first.

  Example:
    >>> singular_units(np.float32([[-2, 1]]), np.float32([[1, 0]]))[0].round(4)
    array([[ 1.3375, -0.6687]], dtype=float32)
  """
  rank, xp = a.shape[-2], library_of(a)
  u, s, vt = recompress(a, b, rank)
  root = xp.sqrt(s)[:, None]
  widths = ((0, rank - s.shape[-1]), (0, 0))
  return xp.pad(root * u.T, widths), xp.pad(root * vt, widths)


def given_units(a: Any, b: Any) -> tuple[Any, Any]:
  """Takes the units as they are stored; equal changes then give other results.

  Args:
    a: (r, in).
    b: (r, out).

  Returns:
    The same.

  Example:
    >>> given_units(np.ones((1, 2)), np.zeros((1, 3)))[1]
    array([[0., 0., 0.]])
  """
  return a, b


def lego(
  loras: Sequence[Lora],
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  rank: int,
  units: Callable[[Any, Any], tuple[Any, Any]] = singular_units,
  output: float | None = None,
  restarts: int = 4,
  steps: int = 30,
) -> Lora:
  """Merges Loras by clustering their units; each cluster becomes one unit.

      m_i = [a_i; b_i] of w_j s_j a_jᵀ b_j,   μ_c = mean of the m_i in c,
      μ_c ← μ_c (mean |m_i|) / |μ_c|,   a = a parts, b = ω b parts

  Units of the same change, m and -m of singular units, are aligned to their
  centroid. A cluster whose parts cancel (opposite changes) becomes a unit of
  zeros. k-means starts from the key by k-means++, several times; the least sum
  of squares counts. It works on the inner products of the units, so data as
  long as a layer is wide is read twice. (An own k-means, because clustering
  must run under jit and know that m and -m are one change.)

  In error at equal rank `svd_merge` is the best there is, and the better
  default: for two adapters of a small language model this was 1.34, 1.63 and
  1.63 times as far from their sum at r / 2, r and 3 r / 2 (one seed of
  `experiments.composition`, medians of ten keys). Take this where units are to
  keep their meaning.

  Args:
    loras: n Loras of one parameter; ranks may differ.
    weights: (n,), may be negative or zero: units are √|w| times as long, and
      the sign goes to b.
    base: unused.
    key: PRNG key; None is `key(0)`.
    rank: clusters, at most Σ r_i, with which the result is `concat`'s.
    units: `singular_units`, or `given_units` as in the paper, whose result is
      no function of the changes.
    output: ω; None is √(r / rank), r the largest of the ranks.
    restarts: of k-means.
    steps: of each.

  Returns:
    Lora of scale 1 in the first's dtype. The scale is NaN where a factor is not
    finite. Sums are not comparable between ranks: with rank Σ r_i it is the sum
    of the adapters, with r nearer to their mean. Rows of zeros in a are
    clusters that cancelled. O((in + out) (Σ r_i)²).

  Raises:
    ValueError: a rank below 1 or above Σ r_i, or as `concat`.

  Example:
    >>> one = Lora(jnp.eye(3)[:1], jnp.eye(2)[:1], jnp.float32(4))
    >>> merged = lego([one, one], [1.0, 1.0], rank=1)
    >>> (merged.a.T @ merged.b).round(4)[0]
    Array([4., 0.], dtype=float32)

  References:
    LoRA-LEGO (Zhao et al., 2024), arXiv 2409.16167.

  Approximation: of the paper only abstract and reviews could be read; norms,
    features and ω are those that third parties use.
  """
  del base
  pairs = weighted(loras, weights)
  ranks = [a.shape[-2] for a, _ in pairs]
  if not 1 <= rank <= sum(ranks):
    raise ValueError(f"rank {rank} must be 1 to {sum(ranks)}, all units.")
  if rank == sum(ranks):
    return concat(loras, weights)
  omega = (max(ranks) / rank) ** 0.5 if output is None else output
  arrays, scale = [], np.float32(1)
  for a, b in pairs:
    (a, b), own = finite(jnp.asarray(a), jnp.asarray(b))
    arrays, scale = [*arrays, a, b], scale * own
  leading = loras[0].a.shape[:-2]
  key = jax.random.key(0) if key is None else key
  keys = jnp.broadcast_to(key, leading)  # a layer is as it would be alone
  one = functools.partial(
    _merged, units=units, rank=rank, restarts=restarts, steps=steps
  )
  with jax.default_matmul_precision("highest"):
    a, b = over_leading(one, len(leading), keys, *arrays, places=as_factors)
  dtype = loras[0].a.dtype
  b = jnp.float32(omega) * b
  return Lora(a.astype(dtype), b.astype(dtype), jnp.asarray(scale))


def _merged(key, *flat, units, rank, restarts, steps):
  """Merges the Loras of one layer, their factors one after the other."""
  a, b, inner = _sorted(flat, units)
  is_aligned = units is not given_units
  shares = _clusters(inner, rank, key, restarts, steps, is_aligned)
  return _centroids(a, b, shares)


@functools.partial(jax.jit, static_argnums=1)
def _sorted(flat, units):
  """Returns all units, the longest first, and their inner products."""
  own = [units(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)]
  a, b = (jnp.concatenate(x) for x in zip(*own, strict=True))
  # The order of adapters must not matter to what is drawn.
  order = jnp.argsort(-_lengths(a, b))
  a, b = a[order], b[order]
  return a, b, a @ a.T + b @ b.T


# Apart from what knows how wide a layer is: compiled once for all widths.
@functools.partial(jax.jit, static_argnums=(1, 3, 4, 5))
def _clusters(inner, count, key, restarts, steps, is_aligned):
  """Clusters units; returns the share of each unit in each centroid, signed."""
  length = jnp.diagonal(inner)
  # Units of zeros, as padding or of weight 0, belong nowhere.
  there = (length > 1e-12 * jnp.max(length)).astype(jnp.float32)
  keys = jax.random.split(key, restarts)
  begun = jax.vmap(lambda k: _seeds(inner, there, count, k, is_aligned))(keys)

  def settle(shares):
    """Runs k-means from its start."""
    step = lambda _, s: _assigned(inner, there, s, is_aligned)[0]  # noqa: E731
    shares = jax.lax.fori_loop(0, steps, step, shares)
    return shares, _assigned(inner, there, shares, is_aligned)[1]

  shares, spread = jax.vmap(settle)(begun)
  return shares[jnp.argmin(spread)]


def _distances(inner, shares, is_aligned):
  """Returns squared distances of all units to all centroids, and signs."""
  between = shares @ inner  # (k, N)
  own = jnp.einsum("kn,kn->k", between, shares)
  length = jnp.diagonal(inner)[None]
  signs = jnp.float32(1)
  if is_aligned:
    # Units of one adapter are orthogonal: rounding must not choose their sign.
    none = _ORTHOGONAL * jnp.sqrt(length * own[:, None])
    signs = jnp.where(between < -none, -1.0, 1.0)
  squares = length + own[:, None] - 2 * signs * between
  return squares, jnp.broadcast_to(signs, between.shape)


def _seeds(inner, there, count, key, is_aligned):
  """Draws first centroids among the units, far ones more likely (k-means++)."""
  total = inner.shape[0]
  none = jnp.full(total, jnp.inf)

  def draw(carry, key):
    """Draws one more."""
    nearest, at = carry
    odds = jnp.where(jnp.isinf(nearest), 1.0, jnp.maximum(nearest, 0)) * there
    odds = jnp.where(odds.sum() > 0, odds, there)
    # By one number, so that units of zeros at the end change nothing.
    sums = jnp.cumsum(odds)
    at = jnp.searchsorted(sums, jax.random.uniform(key) * sums[-1], "right")
    at = jnp.minimum(at, total - 1)
    share = jax.nn.one_hot(at, total)[None]
    squares, _ = _distances(inner, share, is_aligned)
    return (jnp.minimum(nearest, squares[0]), at), share[0]

  start = none, jnp.int32(0)
  _, shares = jax.lax.scan(draw, start, jax.random.split(key, count))
  return shares


def _assigned(inner, there, shares, is_aligned):
  """Takes a step of k-means; returns shares, and the squares before it."""
  squares, signs = _distances(inner, shares, is_aligned)
  nearest = jnp.argmin(squares, axis=0)
  least = jnp.min(squares, axis=0) * there
  # What is not zero by rounding alone is no distance.
  least = jnp.where(least > _ROUNDING * jnp.diagonal(inner), least, 0)
  count = shares.shape[0]
  sizes = jnp.zeros(count).at[nearest].add(there)
  # Empty clusters get the units that are farthest from their own.
  far = jnp.argsort(-least)
  order = jnp.cumsum(sizes == 0) - 1
  chosen = jnp.where(
    sizes == 0, far[jnp.clip(order, 0, far.size - 1)], far.size
  )
  is_far = jnp.take(least, chosen, mode="fill", fill_value=0.0) > 0
  moved = jnp.where(is_far, chosen, far.size)
  nearest = nearest.at[moved].set(jnp.arange(count), mode="drop")
  member = jax.nn.one_hot(nearest, count, axis=0) * there[None]
  signed = member * signs
  sizes = member.sum(axis=1, keepdims=True)
  return signed / jnp.maximum(sizes, 1), least.sum()


def _lengths(a, b):
  """Returns the norms of units."""
  return jnp.sqrt((a**2).sum(1) + (b**2).sum(1))


@jax.jit
def _centroids(a, b, shares):
  """Returns the units of the result: centroids, as long as their members."""
  mean = jnp.abs(shares) @ _lengths(a, b)
  parts = [shares @ x for x in (a, b)]
  norms = [jnp.sqrt((x**2).sum(1)) for x in parts]
  usual = [jnp.abs(shares) @ jnp.sqrt((x**2).sum(1)) for x in (a, b)]
  whole = jnp.sqrt(norms[0] ** 2 + norms[1] ** 2)
  is_kept = jnp.stack(
    [n > _CANCELS * u for n, u in zip(norms, usual, strict=True)]
  ).all(axis=0)
  factor = jnp.where(is_kept, mean / jnp.where(whole > 0, whole, 1), 0)[:, None]
  return factor * parts[0], factor * parts[1]


def prune(lora: Lora, rank: int, **options: Any) -> Lora:
  """Reduces a Lora to fewer units by clustering its own.

  `truncate` loses less, by construction; this is `lego` of one adapter.

  Args:
    lora: a (..., r, in), b (..., r, out).
    rank: at most r.
    **options: of `lego`.

  Returns:
    Lora, as by `lego`.

  Raises:
    ValueError: as `lego`.

  Example:
    >>> lora = Lora(jnp.eye(3)[:2], jnp.eye(3)[:2], jnp.float32(1))
    >>> prune(lora, 1).a.shape
    (1, 3)
  """
  return lego([lora], [1.0], rank=rank, **options)
