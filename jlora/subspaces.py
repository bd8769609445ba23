# SPDX-License-Identifier: Apache-2.0
"""Orthonormal rows, Krylov spaces and Ritz vectors, by matrix products.

Nothing here is larger than the basis: eigenvalue and singular value problems
are small and square. Callers set the precision of the products.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Multiply = Callable[[jax.Array], jax.Array]

# Blocks beside the first before it is asked whether the space is rich enough.
_FIRST_CHECK = 3

# Eigenvalues below this share of the largest are lost in float32 products.
_GRADED = 1e-4


def rows_gram(x: jax.Array) -> jax.Array:
  """The inner products of all rows, `x xᵀ`.

  Args:
    x: (r, n).

  Returns:
    (r, r).

  Example:
    >>> rows_gram(jnp.array([[3.0, 4.0]]))
    Array([[25.]], dtype=float32)
  """
  return jnp.einsum("im,jm->ij", x, x)


def orthonormal_rows(x: jax.Array, rounds: int) -> jax.Array:
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
  eye = jnp.eye(x.shape[0], dtype=x.dtype)

  def condition(turn, x):
    g = rows_gram(x)
    share = jnp.where(turn < rounds - 1, 1e-6, 1e-6 / x.shape[0])
    c = jax.lax.linalg.cholesky(
      g + (share * jnp.trace(g) + 1e-30) * eye, symmetrize_input=False
    )
    inverse = jax.lax.linalg.triangular_solve(
      c, eye, left_side=True, lower=True
    )
    return inverse @ x

  x = jax.lax.fori_loop(0, rounds, condition, x)
  return jnp.where(jnp.sum(x * x, axis=1, keepdims=True) > 0.5, x, 0.0)


def iterate(
  forward: Multiply,
  backward: Multiply,
  block: jax.Array,
  energy: Callable[[], jax.Array],
  *,
  rank: int,
  passes: int,
  tol: float,
) -> tuple[jax.Array, jax.Array]:
  """Ritz rows and their images from a block Krylov space of a matrix.

  Rows of the basis that are not reached stay zero: they are orthogonal to all
  and have no image, so they never lead.

  Args:
    forward: rows (k, m) -> their images `rows a` (k, n).
    backward: (k, n) -> `rows aᵀ` (k, m).
    block: (w, m) orthonormal rows to start from.
    energy: `‖a‖²`, called where it is needed.
    rank: rows wanted, at most w; static.
    passes: blocks at the most; static.
    tol: as for `krylov`.

  Returns:
    (r, m) orthonormal rows and (r, n), their images.

  Example:
    >>> a = jnp.diag(jnp.array([1.0, 4.0, 2.0]))
    >>> rows, _ = iterate(lambda x: x @ a, lambda x: x @ a.T, jnp.eye(3)[:2],
    ...                   lambda: jnp.sum(a * a), rank=1, passes=1, tol=0.0)
    >>> jnp.abs(rows).round(4)
    Array([[0., 1., 0.]], dtype=float32)
  """
  width = block.shape[0]
  image = forward(block)
  basis, images = (_with_room(first, passes) for first in (block, image))
  projected = jnp.pad(rows_gram(image), (0, (passes - 1) * width))

  def grow(state):
    at, _, basis, images, projected = state
    start, last = at * width, (at - 1) * width
    older = jax.lax.dynamic_slice_in_dim(images, last, width)
    block = _next_block(backward, basis, older, at)
    newest = forward(block)
    basis = jax.lax.dynamic_update_slice_in_dim(basis, block, start, 0)
    images = jax.lax.dynamic_update_slice_in_dim(images, newest, start, 0)
    # All else in these rows is zero: the Lanczos recurrence.
    cross = newest @ older.T
    for part, corner in (
      (rows_gram(newest), (start, start)),
      (cross, (start, last)),
      (cross.T, (last, start)),
    ):
      projected = jax.lax.dynamic_update_slice(projected, part, corner)
    settled = jnp.bool_(False)
    if passes > _FIRST_CHECK + 1:
      settled = jax.lax.cond(
        at >= _FIRST_CHECK,
        lambda: _is_settled(energy(), projected, cross, at, rank, tol),
        lambda: settled,
      )
    return at + 1, settled | ~jnp.any(block), basis, images, projected

  def unsettled(state):
    return (state[0] < passes) & ~state[1]

  start = (jnp.int32(1), jnp.bool_(False), basis, images, projected)
  *_, basis, images, projected = jax.lax.while_loop(unsettled, grow, start)
  rows = ritz_vectors(projected, images, rank)
  return rows @ basis, rows @ images


def _with_room(block, passes):
  """A block and zero rows for the others."""
  return jnp.pad(block, ((0, (passes - 1) * block.shape[0]), (0, 0)))


def _is_settled(total, projected, cross, at, rank, tol):
  """Whether the space still lacks less than `tol` of the squared error.

  What it lacks is estimated as Σ |residual|² / value over the leading Ritz
  pairs. A residual is the newest block's part of the eigenvector times the
  coupling to the next block, for which the last coupling stands in: it is
  larger, but for flat spectra, where the estimate is up to 4 times too low.
  """
  width = cross.shape[0]
  size = projected.shape[0] - width  # after the last block nobody asks
  values, vectors = _descending_eigh(projected[:size, :size])
  values, vectors = values[:rank], vectors[:, :rank]
  newest = jax.lax.dynamic_slice_in_dim(vectors, at * width, width)
  residuals = jnp.sum(jnp.square(cross.T @ newest), axis=0)
  lacking = jnp.sum(residuals / jnp.where(values > 0, values, 1.0))
  rest = total - values.sum()
  # Under this share of the total, rounding decides and another pass is due.
  return (lacking <= tol * rest) & (rest > 1e-5 * total)


def _next_block(backward, basis, images, at):
  """The next Krylov block: orthonormal rows of `images aᵀ`, off the basis."""
  # Conditioning the images first keeps directions that a dominant singular
  # value would drown, squared, in the rounding of the product.
  block = backward(orthonormal_rows(images, 2))
  noise = 3e-6 * jnp.linalg.norm(block)
  filled = 3 * images.shape[0]

  def project(block):
    """Off the rows that are filled: half of the work in the first passes."""
    return jax.lax.cond(
      at <= 3,
      lambda: block - (block @ basis[:filled].T) @ basis[:filled],
      lambda: block - (block @ basis.T) @ basis,
    )

  def off_basis(_, block):
    block = project(block)
    # A block that lay in the basis leaves only rounding, which must not be
    # blown up into rows that are not orthogonal to the basis.
    block = jnp.where(jnp.linalg.norm(block) > noise, block, 0.0)
    return orthonormal_rows(block, 2)

  return jax.lax.fori_loop(0, 2, off_basis, block)


def ritz_vectors(
  projected: jax.Array, images: jax.Array, rank: int
) -> jax.Array:
  """Leading eigenvectors, as rows, of `projected = images imagesᵀ`.

  Where eigenvalues under 1e-4 of the largest are wanted, which float32 has
  lost, the large ones are taken off the images and the rest is squared again.

  Args:
    projected: (k, k) float32.
    images: (k, n) float32.
    rank: rows wanted; static.

  Returns:
    (rank, k) orthonormal rows, largest eigenvalue first.

  Example:
    >>> images = jnp.diag(jnp.array([1.0, 2.0]))
    >>> jnp.abs(ritz_vectors(rows_gram(images), images, 1))
    Array([[0., 1.]], dtype=float32)
  """
  values, vectors = _descending_eigh(projected)
  leading = vectors[:, :rank]

  def deflate(_):
    large = values > _GRADED * values[0]
    count = jnp.minimum(large.sum(), rank)
    taken = jnp.where(large, vectors, 0.0)
    rest = images - taken @ (taken.T @ images)
    small = _descending_eigh(rows_gram(rest))[1]
    index = jnp.arange(rank)
    mixed = jnp.where(
      index < count,
      leading,
      jnp.take(small, index - count, axis=1, mode="clip"),
    )
    return jnp.linalg.qr(mixed)[0]

  graded = values[rank - 1] < _GRADED * values[0]
  return jax.lax.cond(graded, deflate, lambda _: leading, None).T


def _descending_eigh(symmetric):
  values, vectors = jnp.linalg.eigh(symmetric)
  return values[::-1], vectors[:, ::-1]


def triplets(
  rows: jax.Array, images: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
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
  qa, ra = jnp.linalg.qr(rows.T)
  qb, rb = jnp.linalg.qr(images.T)
  u, s, vt = jnp.linalg.svd(ra @ rb.T, full_matrices=False)
  return qa @ u, s, vt @ qb.T
