# SPDX-License-Identifier: Apache-2.0
"""Factorisers: functions from matrices to their leading singular triplets.

All share the call `(delta, rank, key) -> Factors`, work on batches over leading
axes and go through `jit` and `vmap`. `krylov` touches the delta only in matrix
products, so a sharded one is never gathered; its eigenvalue and singular value
problems are small and square. Bases are kept with the rank axis first,
(rows, m), as in a Lora.

A NumPy array is factored on the host by the same algorithm, and the result is
NumPy's. There nothing is compiled, and the work grows only with what is filled.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jlora.factoring.krylov_spaces import iterate
from jlora.loras import Factors
from jlora.numerics.backends import (
  branch,
  library_of,
  normal,
  over_leading,
  run_while,
  scaled,
  times,
)
from jlora.numerics.linalg import (
  orthonormal_rows,
  ritz_vectors,
  row_space,
  rows_gram,
  triplets,
)
from jlora.numerics.low_products import Multiply, is_faster, low_products
from jlora.numerics.sums import Sums, check_single, exponent_of, sums_of

Factoriser = Callable[..., Factors]

# An operation of LAPACK's eigh or svd takes as long as this many of a matrix
# product, measured on CPU at sizes 80 to 600.
_EIGH_WEIGHT = 15
_SVD_WEIGHT = 20
# Below this many operations there is nothing to save: the exact one is taken.
_SMALL = 10**7
# bfloat16 does not resolve a change of which the first block's images have
# directions with less than this share of the strongest one's energy, or of
# which less than this share of the energy is left over.
_STEEP = 1e-5
_LEFT = 1e-3


def svd(delta: Any, rank: int, key: Any = None) -> Factors:
  """Computes the best rank-r approximation from the full decomposition.

      delta ≈ u diag(s) vt,   error² = Σ_{i>r} σ_i²   (Eckart and Young, 1936)

  Args:
    delta: (..., m, n), read as float32.
    rank: triplets to keep, static; clipped to min(m, n).
    key: unused; there so that every factoriser has the same call.

  Returns:
    Factors u (..., m, r), s (..., r), vt (..., r, n), float32. The entry of
    largest modulus in each column of u is positive. Costs O(m n min(m, n))
    and gathers a sharded delta: use it to check the others.

  Raises:
    ValueError: rank below 1, or delta without two axes.

  Example:
    >>> svd(np.array([[3.0, 0.0], [4.0, 5.0]]), 1).s.round(4)
    array([6.7082], dtype=float32)
  """
  del key
  rank = _check(delta, rank)

  def core(a, half, _):
    u, s, vt = library_of(a).linalg.svd(a * half * half, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]

  return _each(core, delta)


def gram(delta: Any, rank: int, key: Any = None) -> Factors:
  """Computes the leading triplets through the Gram matrix of the short side.

      delta deltaᵀ = u diag(s²) uᵀ,   diag(s) vt = uᵀ delta

  Squaring loses singular values under 1e-2 of the largest. If such are wanted,
  the large ones are removed and the rest is squared again, so that one value
  1e4 times the others does no harm.

  Args:
    delta: (..., m, n), read as float32.
    rank: triplets to keep, static; clipped to min(m, n).
    key: unused; there so that every factoriser has the same call.

  Returns:
    Factors as `svd` gives them, to rounding. Costs one product of
    `2 min(m, n)² max(m, n)` operations and an eigenproblem of the short side,
    which is replicated under sharding; the long side stays where it is, the
    short one is gathered if it is cut.

  Raises:
    ValueError: rank below 1, or delta without two axes.

  Example:
    >>> gram(np.diag([1.0, 4.0, 2.0]), 2).s.round(4)
    array([4., 2.], dtype=float32)
  """
  del key
  rank = _check(delta, rank)

  def core(a, half, _):
    a = a * half * half
    vectors = ritz_vectors(rows_gram(a), a, rank)
    return triplets(vectors, vectors @ a)

  return _each(functools.partial(_short_side_first, core), delta)


def krylov(
  delta: Any,
  rank: int,
  key: Any = None,
  *,
  oversample: int = 16,
  passes: int = 6,
  tol: float = 5e-4,
  low: bool | None = None,
  sums: Sums | None = None,
) -> Factors:
  """Computes the leading triplets from a block Krylov space, by Rayleigh-Ritz.

  The space is spanned by blocks of `rank + oversample` orthonormal rows,

      q_1 random,   z_j = q_j delta,   q_{j+1} = orth(z_j deltaᵀ  off  q_1..q_j)

  and the triplets are those of delta restricted to it: with q the collected
  rows and z = q delta, the eigenvectors w of z zᵀ give u = qᵀ w and
  diag(s) vt = wᵀ z. The images z are kept, so the projected problem needs no
  further product with delta. If another factoriser needs fewer operations
  (`cheapest` counts them), that one is called.

  With `low` all these products are taken in bfloat16. Of the images of the r
  leading rows only the directions are kept, q = orth(wᵀ z), and one product in
  float32 measures them: delta ≈ (delta qᵀ) q. It is half a pass more, so that
  the error is no larger. Where bfloat16 cannot tell the weak directions from
  rounding, which the first block's images and the error left show, all is done
  again in float32.

  Args:
    delta: (..., m, n), read as float32.
    rank: triplets to keep, static; clipped to min(m, n).
    key: PRNG key of the start block; None is `key(0)`. The same key gives the
      same product u s vt on any mesh, up to rounding.
    oversample: rows of a block beyond the rank.
    passes: the most blocks; they cost `2 passes - 1` products of
      `2 m n (rank + oversample)` operations.
    tol: stops after the third or fourth block if more blocks are estimated to
      reduce the squared error by less than this share. Under `vmap` all
      matrices stop together.
    low: whether to iterate in bfloat16; None does where it is known to be
      faster (`jlora.numerics.low_products.is_faster`). Not in batches of JAX
      arrays.
    sums: `sums_of(delta)` if it is known; only for a single matrix.

  Returns:
    Factors u (..., m, r), s (..., r), vt (..., r, n), float32, orthonormal also
    where delta is zero or of low rank (s is then 0). In a flat spectrum single
    values are less exact than the total error is: use `svd` to study those.

  Raises:
    ValueError: rank or passes below 1, delta without two axes, or `sums` for
      a batch.

  Example:
    >>> delta = np.outer(np.arange(1.0, 6.0), np.ones(3))
    >>> u, s, vt = krylov(delta, 1, jax.random.key(0))
    >>> np.allclose(u @ np.diag(s) @ vt, delta, atol=1e-4)
    True

  References:
    Musco and Musco (2015), algorithm 2; Halko, Martinsson, Tropp (2011).
    Orthonormal rows: shifted Cholesky QR, Fukaya et al. (2020).
  """
  rank = _check(delta, rank)
  check_single(delta, sums)
  if passes < 1 or oversample < 0:
    raise ValueError(
      f"krylov needs passes >= 1 and oversample >= 0, got passes {passes}, "
      f"oversample {oversample}."
    )
  shape = delta.shape[-2:]
  other = cheapest(shape, rank, oversample=oversample, passes=passes)
  if other is not krylov:
    return other(delta, rank, key)

  if low is None:
    low = is_faster(delta)
  in_low = low and (delta.ndim == 2 or library_of(delta) is np)

  def core(a, half, energy):
    """Iterates in bfloat16 if that is wanted, and in float32 if need be."""
    start = orthonormal_rows(normal(key, (rank + oversample, a.shape[0]), a), 2)
    settings: dict[str, Any] = {
      "length": a.shape[1], "rank": rank, "passes": passes, "tol": tol,
    }  # fmt: skip
    exact = _products(a, half)
    if not in_low:
      return triplets(*iterate(*exact, start, energy, **settings)[:2])
    return _low_first(a, half, exact, start, energy, settings)

  return _each(functools.partial(_short_side_first, core), delta, sums)


def _products(a: Any, half: Any) -> tuple[Multiply, Multiply]:
  """Returns the products of rows with `a half²` and with its transpose."""
  return (
    lambda rows: scaled(times(rows * half, a), half),
    lambda rows: scaled(times(rows * half, a.T), half),
  )


def _low_first(a, half, exact, start, energy, settings):
  """Computes triplets by iterating in bfloat16, then in float32 if need be."""
  xp = library_of(a)
  products = low_products(a, half)

  def attempt(state):
    """Iterates once; the second time in float32."""
    count, *_ = state
    is_low = count == 0
    forward, backward = (
      lambda rows, low=low, full=full: branch(
        is_low, lambda: low(rows), lambda: full(rows)
      )
      for low, full in zip(products, exact, strict=True)
    )
    least = xp.where(is_low, xp.float32(_STEEP), xp.float32(-1))
    rows, images, gave_up = iterate(
      forward, backward, start, energy, least=least, is_low=is_low, **settings
    )
    measure = functools.partial(_measured, exact[1], images)
    rows, images = branch(is_low, measure, lambda: (rows, images))
    left = energy - xp.sum(xp.square(images))
    is_done = ~gave_up & (left > _LEFT * energy) | ~is_low
    return count + 1, is_done, rows, images

  # The host starts from nothing; JAX needs the shapes.
  rows, images = (
    xp.zeros((settings["rank"], side), a.dtype) for side in a.shape
  )
  state = xp.int32(0), xp.bool_(False), rows, images
  *_, rows, images = run_while(lambda state: ~state[1], attempt, state)
  return triplets(rows, images)


def _measured(backward, images):
  """Returns orthonormal rows and their exact images in the span of images."""
  span = orthonormal_rows(images, 2)
  rows, mixing = row_space(backward(span))
  return rows, mixing.T @ span


def cheapest(
  shape: tuple[int, ...], rank: int, *, oversample: int = 16, passes: int = 6
) -> Factoriser:
  """Returns the factoriser with the fewest operations for a shape and rank.

  Args:
    shape: (m, n).
    rank: triplets wanted.
    oversample: as for `krylov`.
    passes: as for `krylov`.

  Returns:
    `svd` if the matrix is so small that there is nothing to save, `gram` if the
    short side is small or the Krylov space would fill it, else `krylov`.

  Example:
    >>> cheapest((2048, 5632), 64).__name__, cheapest((192, 576), 64).__name__
    ('krylov', 'gram')
  """
  short, long = sorted(shape)
  width = min(rank, short) + oversample
  span = width * passes
  exact = _SVD_WEIGHT * short**2 * (long + short)
  if exact < _SMALL:
    return svd
  if span >= short:
    return gram
  squared = 2 * short**2 * long + _EIGH_WEIGHT * short**3
  iterated = (
    2 * short * long * width * (2 * passes - 1)
    + span**2 * (4 * short + long)
    + _EIGH_WEIGHT * span**3
  )
  return krylov if iterated < squared else gram


def recompress(a: Any, b: Any, rank: int) -> Factors:
  """Computes the best rank-r triplets of `aᵀ b` from the thin factors alone.

      aᵀ = q_a r_a,  bᵀ = q_b r_b,   aᵀ b = q_a (r_a r_bᵀ) q_bᵀ

  Args:
    a: (..., k, m).
    b: (..., k, n).
    rank: triplets to keep, static; clipped to min(k, m, n).

  Returns:
    Factors of `aᵀ b`, float32. The product is never formed: O((m + n) k²).

  Raises:
    ValueError: a and b differ in k or leading axes, or rank below 1.

  Example:
    >>> a = np.array([[1.0, 0.0], [1.0, 0.0]])
    >>> recompress(a, np.array([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), 1).s
    array([3.], dtype=float32)
  """
  if a.shape[:-1] != b.shape[:-1] or a.ndim < 2:
    raise ValueError(
      f"a {a.shape} and b {b.shape} must agree in all axes but the last, "
      "(..., k, m) and (..., k, n)."
    )
  if rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}.")
  rank = min(rank, a.shape[-2], a.shape[-1], b.shape[-1])

  def one(a, b):
    a, b = a.astype(np.float32), b.astype(np.float32)
    (a_half, a_root), (b_half, b_root) = (
      _halves(exponent_of(x)) for x in (a, b)
    )
    u, s, vt = triplets(a * a_half * a_half, b * b_half * b_half)
    s = s[:rank] * a_root * b_root * a_root * b_root
    return _fix_signs(u[:, :rank], s, vt[:rank])

  with jax.default_matmul_precision("highest"):
    return over_leading(
      one,
      a.ndim - 2,
      a,
      b,
      places=lambda a, b: factor_specs(a[:-2], a[-1], b[-1]),
    )


def factor_specs(lead: Any, rows: Any, columns: Any) -> Factors:
  """Returns the specs of Factors, given how their matrix is cut.

  Args:
    lead: the mesh axes of each leading axis.
    rows: those of axis -2, or None.
    columns: those of axis -1, or None.

  Returns:
    Factors of PartitionSpecs; the rank is on all devices.

  Example:
    >>> factor_specs((), "x", None).u
    P('x', None)
  """
  leaves: Any = (
    PartitionSpec(*lead, rows, None),
    PartitionSpec(*lead),
    PartitionSpec(*lead, None, columns),
  )
  return Factors(*leaves)


def _check(delta: Any, rank: int) -> int:
  """Checks delta and rank; returns the rank, clipped to the short side."""
  if delta.ndim < 2:
    raise ValueError(f"delta needs two axes or more, got shape {delta.shape}.")
  if rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}.")
  return min(rank, *delta.shape[-2:])


def _each(core, delta: Any, known: Sums | None = None) -> Factors:
  """Applies `core` to each matrix of a batch and fixes the signs.

  The call is `core(a, half, ‖a half²‖²)`, and it factors `a half²`, whose
  largest modulus is about 1. It scales thin factors instead of `a` where it
  can: a scaled copy of `a` costs as much as a product.
  """

  def one(a):
    a = a.astype(np.float32, copy=False)
    sums = sums_of(a) if known is None else known
    half, root = _halves(sums.exponent)
    energy = sums.squares * (sums.unit * half * half) ** 2
    u, s, vt = core(a, half, energy)
    return _fix_signs(u, s * root * root, vt)

  with jax.default_matmul_precision("highest"):
    return over_leading(
      one, delta.ndim - 2, delta, places=lambda x: factor_specs(x[:-2], *x[-2:])
    )


def _halves(exponent: Any) -> tuple[Any, Any]:
  """Returns powers of two with squares 2^-e and 2^e, rounded if e is odd."""
  xp = library_of(exponent)
  one = xp.float32(1)
  return xp.ldexp(one, -(exponent // 2)), xp.ldexp(one, exponent // 2)


def _fix_signs(u: Any, s: Any, vt: Any) -> Factors:
  """Makes the entry of largest modulus in each column of u positive."""
  xp = library_of(u)
  index = xp.argmax(xp.abs(u), axis=-2, keepdims=True)
  top = xp.take_along_axis(u, index, axis=-2)
  sign = xp.where(top < 0, xp.float32(-1), xp.float32(1))
  return Factors(u * sign, s, vt * xp.swapaxes(sign, -1, -2))


def _short_side_first(core, a: Any, half: Any, energy: Any):
  """Calls `core` on the matrix or its transpose: rows are the short side."""
  if a.shape[0] <= a.shape[1]:
    return core(a, half, energy)
  u, s, vt = core(a.T, half, energy)
  return vt.T, s, u.T
