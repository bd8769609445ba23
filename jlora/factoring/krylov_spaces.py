# SPDX-License-Identifier: Apache-2.0
"""Block Krylov spaces of a matrix, grown until they are rich enough.

Nothing here is larger than the basis. Callers set the precision of the
products. Arrays are those of NumPy or of JAX throughout.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.numerics.backends import branch, library_of, put, rows_at, run_while
from jlora.numerics.linalg import (
  descending_eigh,
  is_even,
  orthonormal_rows,
  ritz_vectors,
  rows_gram,
)

Multiply = Callable[[Any], Any]

# How many blocks make it worth asking whether they are enough. Where four are
# not, five rarely are, and asking has its price.
_ASKED_AT = (3, 4)


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
  eigenpairs = _keeping(descending_eigh)

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

  images, mixed = branch(is_even(gram), lambda: (images, eye), condition)
  block = backward(images)
  return off_basis(block, 3e-6 * xp.linalg.norm(block)), mixed


def _orthonormal_block(off, off_basis):
  """The next Krylov block: orthonormal rows of a residual, off the basis."""
  rows = orthonormal_rows(off, 2)
  noise = 3e-6 * library_of(off).linalg.norm(rows)
  return orthonormal_rows(off_basis(rows, noise), 2)
