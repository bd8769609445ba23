# SPDX-License-Identifier: Apache-2.0
"""Linear algebra of small and of thin matrices, whole on every device.

XLA would cut even a 64 x 64 problem over the devices of a mesh, and exchange
more than it saves. Where the mesh is known while JAX traces (`jax.set_mesh`),
decompositions here ask for the whole matrix on every device; a thin one is
gathered for that. Built on them: orthonormal rows, Ritz vectors, and the
singular triplets of a product of thin factors.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jlora.numerics.backends import branch, library_of, repeat


def alike(decompose: Callable[[Any], Any], x: Any) -> Any:
  """Runs a decomposition of a whole matrix on every device.

  Args:
    decompose: array -> arrays.
    x: small or thin, of NumPy or of JAX.

  Returns:
    The arrays, replicated where a mesh of Auto axes is known.

  Example:
    >>> alike(np.linalg.inv, np.array([[2.0]]))
    array([[0.5]])
  """
  mesh = jax.sharding.get_abstract_mesh()
  kinds = mesh.axis_types
  is_known = not mesh.empty and all(kind is AxisType.Auto for kind in kinds)
  if library_of(x) is np or not is_known:
    return decompose(x)
  whole = functools.partial(
    jax.lax.with_sharding_constraint, shardings=PartitionSpec()
  )
  return jax.tree.map(whole, decompose(whole(x)))


def thin_qr(x: Any) -> tuple[Any, Any]:
  """Computes `x = q r` by Householder's QR: orthonormal columns and a triangle.

  For x (m, k): q (m, min(m, k)) and r (min(m, k), k).
  """
  q, r = alike(library_of(x).linalg.qr, x)
  return q, r


def triangle_of(x: Any) -> Any:
  """Computes the triangle of `x = q r` alone, in half the time of both.

  For x (m, k): (min(m, k), k).

  Example:
    >>> abs(triangle_of(np.array([[3.0], [4.0]]))).round(4).tolist()
    [[5.0]]
  """
  return alike(functools.partial(library_of(x).linalg.qr, mode="r"), x)


def thin_svd(x: Any) -> tuple[Any, Any, Any]:
  """Computes the thin singular value decomposition of a small matrix.

  Returns u, s and vt; s is descending.
  """
  svd = functools.partial(library_of(x).linalg.svd, full_matrices=False)
  u, s, vt = alike(svd, x)
  return u, s, vt


def descending_eigh(symmetric: Any) -> tuple[Any, Any]:
  """Computes a symmetric matrix's eigenvalues, largest first, and eigenvectors.

  Args:
    symmetric: (k, k) float32.

  Returns:
    (k,) and (k, k), eigenvectors as columns. On TPUs this is Jacobi's method at
    every size: above 256 XLA's own choice there takes more than a minute to
    compile, and 40 MiB of program for each call.

  Example:
    >>> descending_eigh(np.diag([1.0, 2.0]))[0]
    array([2., 1.])
  """
  values, vectors = alike(_eigh, symmetric)
  return values[::-1], vectors[:, ::-1]


def _eigh(symmetric):
  """Calls the eigensolver of the library, and in JAX of the platform."""
  if library_of(symmetric) is np:
    return np.linalg.eigh(symmetric)
  return jax.lax.platform_dependent(symmetric, tpu=_jacobi, default=_usual)


def _usual(symmetric):
  """Calls the eigensolver that JAX chooses."""
  values, vectors = jnp.linalg.eigh(symmetric)
  return values, vectors


def _jacobi(symmetric):
  """Calls XLA's Jacobi eigensolver."""
  vectors, values = jax.lax.linalg.eigh(
    symmetric, implementation=jax.lax.linalg.EighImplementation.JACOBI
  )
  return values, vectors


# A share of the trace that is above the rounding of any float32 Gram matrix.
_SURE = 1e-6


def shifted_cholesky(gram: Any, share: Any = _SURE) -> Any:
  """Computes the lower Cholesky factor of a Gram matrix, its diagonal raised.

  The diagonal is raised by a share of the trace. So the factor is finite also
  for dependent and for zero rows. A smaller share can be less than rounding,
  where most rows are zero: then it is raised by 1e-6.

  Args:
    gram: (k, k), positive semidefinite.
    share: of the trace.
  """
  xp = library_of(gram)

  def raised(share):
    shift = share * xp.trace(gram) + np.float32(1e-30)
    return gram + shift * xp.eye(gram.shape[0], dtype=gram.dtype)

  if xp is np:
    try:
      return np.linalg.cholesky(raised(share))
    except np.linalg.LinAlgError:
      return np.linalg.cholesky(raised(_SURE))
  factor = functools.partial(jax.lax.linalg.cholesky, symmetrize_input=False)
  lower = alike(factor, raised(share))
  if isinstance(share, float):
    return lower
  return branch(
    xp.isfinite(lower[-1, -1]),
    lambda: lower,
    lambda: alike(factor, raised(_SURE)),
  )


def inverse_of(lower: Any) -> Any:
  """Inverts a lower triangular matrix."""
  if library_of(lower) is np:
    return np.linalg.inv(lower)
  eye = jnp.eye(lower.shape[0], dtype=lower.dtype)
  solve = functools.partial(
    jax.lax.linalg.triangular_solve, left_side=True, lower=True
  )
  return alike(lambda lower: solve(lower, eye), lower)


# Rows need no conditioning where the weakest direction has more than this share
# of the strongest one's energy.
_EVEN = 1e-3

# Eigenvalues below this share of the largest are lost in float32 products.
_GRADED = 1e-4


def rows_gram(x: Any) -> Any:
  """Computes the inner products of all rows, `x xᵀ`."""
  return x @ x.T


def orthonormal_rows(x: Any, rounds: int) -> Any:
  """Returns orthonormal rows of the same span; dependent rows become zero.

      x ← c⁻¹ x,   c cᵀ = x xᵀ + shift

  The shift keeps the Cholesky factor finite for dependent and zero rows, where
  the unshifted scheme gives NaN. The last round works on nearly orthonormal
  rows and takes a smaller shift. A row that is still short after it was
  rounding noise, and is set to zero.

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
  """Sets the rows that are not kept to zero; the host copies only if needed."""
  if library_of(x) is np and kept.all():
    return x
  return library_of(x).where(kept[:, None], x, 0.0)


def independent_rows(x: Any, least: float) -> tuple[Any, Any]:
  """Returns nearly orthonormal rows; those that were hardly there become zero.

  Args:
    x: (r, n) float32 rows, orthonormal but for what was taken off them.
    least: the energy that a row must have beside those before it.

  Returns:
    (r, n) float32, and the least energy of any row.

  Example:
    >>> independent_rows(np.float32([[1, 0], [1, 1e-3]]), 0.3)[0].round(3)
    array([[1., 0.],
           [0., 0.]], dtype=float32)
  """
  xp = library_of(x)
  lower = shifted_cholesky(rows_gram(x))
  energies = xp.square(xp.diagonal(lower))
  rows = _rows_where(energies > least, inverse_of(lower) @ x)
  return rows, xp.min(energies)


def row_space(x: Any) -> tuple[Any, Any]:
  """Computes `x = r q`, where q has orthonormal rows that span those of x.

  Args:
    x: (r, n) float32, r at most n.

  Returns:
    q (r, n) and r (r, r), to rounding. Uses Householder's QR; for NumPy rows
    that are far from dependent two rounds of Cholesky QR, in a tenth of the
    time.

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


def is_even(gram: Any, share: Any = _EVEN) -> Any:
  """Returns whether all directions of rows survive in their Gram matrix.

  float32 squares lose a direction whose energy is far below that of the
  strongest.

  Args:
    gram: the rows' inner products, (k, k).
    share: of the strongest direction's energy that the weakest must have.

  Returns:
    bool scalar.
  """
  xp = library_of(gram)
  squares = xp.square(xp.diagonal(shifted_cholesky(gram)))
  return xp.min(squares) > share * xp.max(squares) + np.float32(1e-25)


def ritz_vectors(
  projected: Any,
  images: Any,
  rank: int,
  eigenpairs: Callable[[Any], tuple[Any, Any]] | None = None,
) -> Any:
  """Computes the leading eigenvectors of `projected = images imagesᵀ`, as rows.

  float32 loses eigenvalues under 1e-4 of the largest. Where such are wanted,
  the large ones are removed from the images and the rest is squared again.

  Args:
    projected: (k, k) float32.
    images: (k, n) float32.
    rank: rows wanted; static.
    eigenpairs: (k, k) -> its eigenvalues, largest first, and eigenvectors, for
      a caller that keeps results; None is `descending_eigh`.

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
    """Removes the large eigenvectors from the images and squares the rest."""
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
  """Computes the singular triplets of `rowsᵀ images` without forming it.

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
    """Handles orthonormal rows with images that spread over three decades."""
    qb = orthonormal_rows(images, 2)
    u, s, vt = thin_svd(images @ qb.T)
    return rows.T @ u, s, vt @ qb

  def careful():
    """Handles all others, by Householder's QR."""
    qa, ra = thin_qr(rows.T)
    qb, rb = thin_qr(images.T)
    u, s, vt = thin_svd(ra @ rb.T)
    return qa @ u, s, vt @ qb.T

  if len(rows) > min(rows.shape[1], images.shape[1]):
    return careful()
  off = xp.max(xp.abs(rows_gram(rows) - xp.eye(len(rows), dtype=rows.dtype)))
  return branch(is_even(rows_gram(images)) & (off < 3e-6), plain, careful)
