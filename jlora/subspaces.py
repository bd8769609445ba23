# SPDX-License-Identifier: Apache-2.0
"""Orthonormal rows, Krylov spaces and Ritz vectors, by matrix products.

Nothing here is larger than the basis: eigenvalue and singular value problems
are small and square. Callers set the precision of the products. Arrays are
those of NumPy or of JAX throughout.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.arrays import branch, library_of, put, repeat, rows_at, run_while

Multiply = Callable[[Any], Any]

# How many blocks make it worth asking whether they are enough. Where four are
# not, five rarely are, and asking has its price.
_ASKED_AT = (3, 4)

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
    >>> rows_gram(jnp.array([[3.0, 4.0]]))
    Array([[25.]], dtype=float32)
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
    >>> q = orthonormal_rows(jnp.array([[3.0, 0.0], [1.0, 1.0]]), 2)
    >>> bool(jnp.allclose(q @ q.T, jnp.eye(2), atol=1e-5))
    True
  """
  xp = library_of(x)

  def condition(turn, x):
    share = xp.where(turn < rounds - 1, 1e-6, 1e-6 / x.shape[0])
    return _inverse(_cholesky(rows_gram(x), share.astype(x.dtype))) @ x

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
  if library_of(x) is not np or not _is_even(rows_gram(x)):
    q, r = library_of(x).linalg.qr(x.T)
    return q.T, r.T
  r = np.eye(len(x), dtype=x.dtype)
  for _ in range(2):
    lower = np.linalg.cholesky(rows_gram(x))
    x, r = np.linalg.inv(lower) @ x, r @ lower
  return x, r


def _cholesky(g, share=1e-6):
  """The lower factor of g, shifted by a share of its trace."""
  xp = library_of(g)
  shift = share * xp.trace(g) + np.float32(1e-30)
  g = g + shift * xp.eye(g.shape[0], dtype=g.dtype)
  if xp is np:
    return np.linalg.cholesky(g)
  return jax.lax.linalg.cholesky(g, symmetrize_input=False)


def _inverse(lower):
  """The inverse of a lower triangular matrix."""
  if library_of(lower) is np:
    return np.linalg.inv(lower)
  eye = jnp.eye(lower.shape[0], dtype=lower.dtype)
  return jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)


def _is_even(gram):
  """Whether no direction of the rows is drowned when they are squared."""
  xp = library_of(gram)
  squares = xp.square(xp.diagonal(_cholesky(gram)))
  return xp.min(squares) > _EVEN * xp.max(squares) + np.float32(1e-25)


def iterate(
  forward: Multiply,
  backward: Multiply,
  block: Any,
  energy: Any,
  *,
  length: int,
  rank: int,
  passes: int,
  tol: float,
) -> tuple[Any, Any]:
  """Ritz rows and their images from a block Krylov space of a matrix.

  Rows of the basis that are not reached stay zero: they are orthogonal to all
  and have no image, so they never lead.

  Args:
    forward: rows (k, m) -> their images `rows a` (k, n).
    backward: (k, n) -> `rows aᵀ` (k, m).
    block: (w, m) orthonormal rows to start from.
    energy: `‖a‖²`.
    length: n; static, as all below.
    rank: rows wanted, at most w.
    passes: blocks at the most.
    tol: as for `krylov`.

  Returns:
    (r, m) orthonormal rows and (r, n), their images.

  Example:
    >>> a = jnp.diag(jnp.array([1.0, 4.0, 2.0]))
    >>> rows, _ = iterate(lambda x: x @ a, lambda x: x @ a.T, jnp.eye(3)[:2],
    ...                   jnp.sum(a * a), length=3, rank=1, passes=1,
    ...                   tol=0.0)
    >>> jnp.abs(rows).round(4)
    Array([[0., 1., 0.]], dtype=float32)
  """
  xp = library_of(block)
  width = block.shape[0]
  asked_at = [count for count in _ASKED_AT if count < passes and tol > 0]
  eigenpairs = _keeping(_descending_eigh)

  def add(at, filled, block, newest, gram):
    """The block, its images and their products beside the others'."""
    basis, images, projected = filled
    start, last = at * width, xp.maximum(at - 1, 0) * width
    # All else in these rows is zero: the Lanczos recurrence.
    if xp is jnp or at > 0:
      cross = newest @ rows_at(images, last, width).T
      projected = put(projected, cross, (start, last))
      projected = put(projected, cross.T, (last, start))
    projected = put(projected, gram, (start, start))
    basis = put(basis, block, (start, 0))
    images = put(images, newest, (start, 0))
    return basis, images, projected

  def follow(count, filled, newest, gram):
    """The next block, and whether the basis is rich enough without it."""
    basis, _, projected = filled
    off_basis = _off_basis(basis, count * width, width)
    off, mixed = _residual(backward, newest, gram, off_basis)
    settled = xp.bool_(False)
    if asked_at:
      settled = branch(
        (count >= asked_at[0]) & (count <= asked_at[-1]),
        lambda: _is_settled(
          energy, projected, off, mixed, count, rank, tol, eigenpairs
        ),
        lambda: settled,
      )
    block = branch(
      settled, lambda: off, lambda: _orthonormal_block(off, off_basis)
    )
    return block, settled | ~xp.any(block)

  def grow(state):
    count, _, block, filled = state
    newest = forward(block)
    gram = rows_gram(newest)
    filled = add(count, filled, block, newest, gram)
    count = count + 1
    block, done = branch(
      count < passes,
      lambda: follow(count, filled, newest, gram),
      lambda: (block, xp.bool_(True)),
    )
    return count, done, block, filled

  span = passes * width
  # On the host no row is read before it is filled.
  blank = np.empty if xp is np else xp.zeros
  basis, images = (
    blank((span, columns), block.dtype) for columns in (block.shape[1], length)
  )
  room = basis, images, xp.zeros((span, span), block.dtype)
  state = (xp.int32(0), xp.bool_(False), block, room)
  count, _, _, filled = run_while(lambda state: ~state[1], grow, state)
  basis, images, projected = _filled(count * width, *filled)
  rows = ritz_vectors(projected, images, rank, eigenpairs)
  return rows @ basis, rows @ images


def _keeping(decompose):
  """A function of a growing matrix that keeps the host's result of each size.

  The question whether a space is rich enough takes the eigenpairs that its Ritz
  vectors take.
  """
  kept = {}

  def run(matrix):
    if library_of(matrix) is jnp:
      return decompose(matrix)
    if len(matrix) not in kept:
      kept[len(matrix)] = decompose(matrix)
    return kept[len(matrix)]

  return run


def _filled(count, basis, images, projected):
  """What is filled so far; all of it where shapes must not hang on values."""
  if library_of(basis) is jnp:
    return basis, images, projected
  return basis[:count], images[:count], projected[:count, :count]


def _is_settled(total, projected, off, mixed, count, rank, tol, eigenpairs):
  """Whether the space still lacks less than `tol` of the squared error.

  What it lacks is estimated as Σ |residual|² / (value - mean of the others)
  over the leading Ritz pairs: for decaying spectra to a few tenths, for flat
  ones up to 3 times too low. A residual is the newest block's part of the
  eigenvector times what that block has off the basis, `mixed off`.
  """
  xp = library_of(projected)
  width = off.shape[0]
  size = (_ASKED_AT[-1] if xp is jnp else count) * width
  values, vectors = eigenpairs(projected[:size, :size])
  others = values[rank:].sum() / (count * width - rank).astype(values.dtype)
  values, vectors = values[:rank], vectors[:, :rank]
  newest = rows_at(vectors, (count - 1) * width, width)
  residuals = xp.sum(xp.square(off.T @ (mixed.T @ newest)), axis=0)
  above = values - others
  lacking = xp.sum(residuals / xp.where(above > 0, above, 1.0))
  rest = total - values.sum()
  # Under this share of the total, rounding decides and another pass is due.
  return (lacking <= tol * rest) & (rest > 1e-5 * total)


def _off_basis(basis, filled, width):
  """A function of rows: what they have off the rows of a basis that are filled.

  Rows that lay in the basis leave only rounding, which must not be blown up
  into rows that are not orthogonal to the basis: they come out as zeros.
  """
  xp = library_of(basis)

  def off_rows(rows, count):
    return rows - (rows @ basis[:count].T) @ basis[:count]

  def off_basis(rows, noise):
    if xp is np:
      rows = off_rows(rows, filled)
    else:  # in the first passes that is half of the work
      rows = branch(
        filled <= 3 * width,
        lambda: off_rows(rows, 3 * width),
        lambda: off_rows(rows, len(basis)),
      )
    is_more = xp.linalg.norm(rows) > noise
    return rows if xp is np and is_more else xp.where(is_more, rows, 0.0)

  return off_basis


def _residual(backward, images, gram, off_basis):
  """What `images aᵀ` has off the basis, (w, m), up to a mixing of the rows.

  Also the mixing (w, w): what the images have off the basis is `mixed off`.
  The images' inner products are given.
  """
  xp = library_of(images)
  eye = xp.eye(images.shape[0], dtype=images.dtype)

  def condition():
    """Keeps directions that a dominant singular value would drown, squared."""
    even = orthonormal_rows(images, 2)
    return even, images @ even.T

  images, mixed = branch(_is_even(gram), lambda: (images, eye), condition)
  block = backward(images)
  return off_basis(block, 3e-6 * xp.linalg.norm(block)), mixed


def _orthonormal_block(off, off_basis):
  """The next Krylov block: orthonormal rows of a residual, off the basis."""
  rows = orthonormal_rows(off, 2)
  noise = 3e-6 * library_of(off).linalg.norm(rows)
  return orthonormal_rows(off_basis(rows, noise), 2)


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
    >>> images = jnp.diag(jnp.array([1.0, 2.0]))
    >>> jnp.abs(ritz_vectors(rows_gram(images), images, 1))
    Array([[0., 1.]], dtype=float32)
  """
  xp = library_of(projected)
  values, vectors = (eigenpairs or _descending_eigh)(projected)
  leading = vectors[:, :rank]

  def deflate():
    large = values > _GRADED * values[0]
    count = xp.minimum(large.sum(), rank)
    taken = xp.where(large, vectors, 0.0)
    rest = images - taken @ (taken.T @ images)
    small = _descending_eigh(rows_gram(rest))[1]
    index = xp.arange(rank)
    mixed = xp.where(
      index < count,
      leading,
      xp.take(small, index - count, axis=1, mode="clip"),
    )
    return xp.linalg.qr(mixed)[0]

  graded = values[rank - 1] < _GRADED * values[0]
  return branch(graded, deflate, lambda: leading).T


def _descending_eigh(symmetric):
  values, vectors = library_of(symmetric).linalg.eigh(symmetric)
  return values[::-1], vectors[:, ::-1]


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
    >>> triplets(jnp.eye(2), jnp.array([[3.0, 0.0], [0.0, 0.0]]))[1].round(4)
    Array([3., 0.], dtype=float32)
  """
  xp = library_of(rows)

  def plain():
    """Rows that are orthonormal, images spread over three decades at most."""
    qb = orthonormal_rows(images, 2)
    u, s, vt = xp.linalg.svd(images @ qb.T, full_matrices=False)
    return rows.T @ u, s, vt @ qb

  def careful():
    qa, ra = xp.linalg.qr(rows.T)
    qb, rb = xp.linalg.qr(images.T)
    u, s, vt = xp.linalg.svd(ra @ rb.T, full_matrices=False)
    return qa @ u, s, vt @ qb.T

  if len(rows) > min(rows.shape[1], images.shape[1]):
    return careful()
  off = xp.max(xp.abs(rows_gram(rows) - xp.eye(len(rows), dtype=rows.dtype)))
  return branch(_is_even(rows_gram(images)) & (off < 3e-6), plain, careful)
