# SPDX-License-Identifier: Apache-2.0
"""Orthonormal rows, Ritz vectors and triplets, by matrix products.

Nothing here is larger than the basis: eigenvalue and singular value problems
are small and square. Callers set the precision of the products. Arrays are
those of NumPy or of JAX throughout.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jlora.arrays import branch, library_of, repeat
from jlora.decompositions import (
  descending_eigh,
  inverse_of,
  shifted_cholesky,
  thin_qr,
  thin_svd,
)

# Rows whose directions differ by less than this in energy need no conditioning.
_EVEN = 1e-3

# Eigenvalues below this share of the largest are lost in float32 products.
_GRADED = 1e-4


def rows_gram(x: Any) -> Any:
  """The inner products of all rows, `x xᵀ`.

  Args:
    x: (r, n).

  Returns:
    (r, r).

  Example:
    >>> rows_gram(np.array([[3.0, 4.0]]))
    array([[25.]])
  """
  return x @ x.T


def orthonormal_rows(x: Any, rounds: int) -> Any:
  """Orthonormal rows of the same span, zero for a row that depends on others.

      x ← c⁻¹ x,   c cᵀ = x xᵀ + shift

  The shift keeps the Cholesky factor finite for dependent and zero rows, where
  the unshifted scheme gives NaN. The last round is run on nearly orthonormal
  rows and takes a smaller one. What is still short then was rounding noise.

  Args:
    x: (r, n) float32.
    rounds: 2 for rows spread over four decades, 3 for seven; static.

  Returns:
    (r, n) float32. Under sharding only r x r products are reduced.

  Example:
    >>> q = orthonormal_rows(np.float32([[3.0, 0.0], [1.0, 1.0]]), 2)
    >>> np.allclose(q @ q.T, np.eye(2), atol=1e-5)
    True
  """
  xp = library_of(x)

  def condition(turn, x):
    share = xp.where(turn < rounds - 1, 1e-6, 1e-6 / x.shape[0])
    return inverse_of(shifted_cholesky(rows_gram(x), share.astype(x.dtype))) @ x

  x = repeat(rounds, condition, x)
  return _rows_where(xp.sum(x * x, axis=1) > 0.5, x)


def _rows_where(kept, x):
  """The rows that are kept, and zeros; on the host no copy if all are."""
  if library_of(x) is np and kept.all():
    return x
  return library_of(x).where(kept[:, None], x, 0.0)


def row_space(x: Any) -> tuple[Any, Any]:
  """Orthonormal rows that span those of x, and x in terms of them: `x = r q`.

  Args:
    x: (r, n) float32, r at most n.

  Returns:
    q (r, n) and r (r, r), to rounding. By Householder's QR, or where NumPy's
    rows are far from dependent by Cholesky's, twice, for a tenth of the time.

  Example:
    >>> q, r = row_space(np.float32([[3, 4], [0, 5]]))
    >>> np.allclose(r @ q, [[3, 4], [0, 5]], atol=1e-5)
    True
  """
  if library_of(x) is not np or not is_even(rows_gram(x)):
    q, r = thin_qr(x.T)
    return q.T, r.T
  r = np.eye(len(x), dtype=x.dtype)
  for _ in range(2):
    lower = np.linalg.cholesky(rows_gram(x))
    x, r = np.linalg.inv(lower) @ x, r @ lower
  return x, r


def is_even(gram: Any) -> Any:
  """Whether no direction of rows is drowned when they are squared.

  Args:
    gram: (k, k), their inner products.

  Returns:
    Bool scalar.

  Example:
    >>> is_even(np.eye(2, dtype=np.float32))
    np.True_
  """
  xp = library_of(gram)
  squares = xp.square(xp.diagonal(shifted_cholesky(gram)))
  return xp.min(squares) > _EVEN * xp.max(squares) + np.float32(1e-25)


def ritz_vectors(
  projected: Any,
  images: Any,
  rank: int,
  eigenpairs: Callable[[Any], tuple[Any, Any]] | None = None,
) -> Any:
  """Leading eigenvectors, as rows, of `projected = images imagesᵀ`.

  Where eigenvalues under 1e-4 of the largest are wanted, which float32 has
  lost, the large ones are taken off the images and the rest is squared again.

  Args:
    projected: (k, k) float32.
    images: (k, n) float32.
    rank: rows wanted; static.
    eigenpairs: (k, k) -> its eigenvalues, largest first, and eigenvectors; for
      a caller that has found some before.

  Returns:
    (rank, k) orthonormal rows, largest eigenvalue first.

  Example:
    >>> images = np.diag(np.float32([1.0, 2.0]))
    >>> np.abs(ritz_vectors(rows_gram(images), images, 1))
    array([[0., 1.]], dtype=float32)
  """
  xp = library_of(projected)
  values, vectors = (eigenpairs or descending_eigh)(projected)
  leading = vectors[:, :rank]

  def deflate():
    large = values > _GRADED * values[0]
    count = xp.minimum(large.sum(), rank)
    taken = xp.where(large, vectors, 0.0)
    rest = images - taken @ (taken.T @ images)
    small = descending_eigh(rows_gram(rest))[1]
    index = xp.arange(rank)
    mixed = xp.where(
      index < count,
      leading,
      xp.take(small, index - count, axis=1, mode="clip"),
    )
    return thin_qr(mixed)[0]

  graded = values[rank - 1] < _GRADED * values[0]
  return branch(graded, deflate, lambda: leading).T


def triplets(rows: Any, images: Any) -> tuple[Any, Any, Any]:
  """The singular triplets of `rowsᵀ images`, the product never formed.

      rowsᵀ = q_a r_a,  imagesᵀ = q_b r_b,   rowsᵀ images = q_a (r_a r_bᵀ) q_bᵀ

  Args:
    rows: (k, m), k at most m.
    images: (k, n), k at most n.

  Returns:
    u (m, k), s (k,), vt (k, n); u and vt orthonormal also where s is 0, which
    is why the QR is Householder's.

  Example:
    >>> triplets(np.eye(2), np.array([[3.0, 0.0], [0.0, 0.0]]))[1].round(4)
    array([3., 0.])
  """
  xp = library_of(rows)

  def plain():
    """Rows that are orthonormal, images spread over three decades at most."""
    qb = orthonormal_rows(images, 2)
    u, s, vt = thin_svd(images @ qb.T)
    return rows.T @ u, s, vt @ qb

  def careful():
    qa, ra = thin_qr(rows.T)
    qb, rb = thin_qr(images.T)
    u, s, vt = thin_svd(ra @ rb.T)
    return qa @ u, s, vt @ qb.T

  if len(rows) > min(rows.shape[1], images.shape[1]):
    return careful()
  off = xp.max(xp.abs(rows_gram(rows) - xp.eye(len(rows), dtype=rows.dtype)))
  return branch(is_even(rows_gram(images)) & (off < 3e-6), plain, careful)
