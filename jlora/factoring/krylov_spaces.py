# SPDX-License-Identifier: Apache-2.0
"""Block Krylov spaces of a matrix, grown until they are rich enough.

No array here is larger than the basis. Callers set the precision of products.
Arrays are all NumPy's or all JAX's.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.numerics.backends import branch, library_of, put, rows_at, run_while
from jlora.numerics.linalg import (
  descending_eigh,
  independent_rows,
  is_even,
  orthonormal_rows,
  ritz_vectors,
  rows_gram,
)
from jlora.numerics.low_products import Multiply

# After this many blocks a test tells whether they are enough. Where four are
# not, five rarely are, and the test has its price.
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
  least: Any = 0.0,
  is_low: Any = np.False_,
) -> tuple[Any, Any, Any]:
  """Computes the leading Ritz rows of a matrix in a block Krylov space.

  Rows of the basis that are never filled stay zero. They are orthogonal to all
  others and have no image, so they are never among the leading ones.

  Args:
    forward: rows (k, m) -> their images `rows a` (k, n).
    backward: (k, n) -> `rows aᵀ` (k, m).
    block: (w, m) orthonormal rows to start from.
    energy: `‖a‖²`.
    length: n; static, as all below.
    rank: rows wanted, at most w.
    passes: the most blocks.
    tol: as for `krylov`.
    least: gives up after the first block if its images' weakest direction has
      less than this share of the strongest one's energy. May be traced.
    is_low: whether products are those of bfloat16, for which blocks need not be
      orthogonal to the last digit. May be traced.

  Returns:
    (r, m) orthonormal rows and (r, n), their images; and whether it gave up.

  Example:
    >>> a = jnp.diag(jnp.array([1.0, 4.0, 2.0]))
    >>> rows, *_ = iterate(lambda x: x @ a, lambda x: x @ a.T, jnp.eye(3)[:2],
    ...                    jnp.sum(a * a), length=3, rank=1, passes=1,
    ...                    tol=0.0)
    >>> jnp.abs(rows).round(4)
    Array([[0., 1., 0.]], dtype=float32)
  """
  xp = library_of(block)
  width = block.shape[0]
  asked_at = [count for count in _ASKED_AT if count < passes and tol > 0]
  eigenpairs = _keeping(descending_eigh)

  def add(at, filled, block, newest, gram):
    """Puts the block, its images and their products beside the others."""
    basis, images, projected = filled
    start, last = at * width, xp.maximum(at - 1, 0) * width
    # Products with earlier blocks are zero, by the Lanczos recurrence.
    if xp is jnp or at > 0:
      cross = newest @ rows_at(images, last, width).T
      projected = put(projected, cross, (start, last))
      projected = put(projected, cross.T, (last, start))
    projected = put(projected, gram, (start, start))
    basis = put(basis, block, (start, 0))
    images = put(images, newest, (start, 0))
    return basis, images, projected

  def follow(count, filled, newest, gram):
    """Returns the next block, and whether the basis is rich enough without."""
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
      settled, lambda: off, lambda: _orthonormal_block(off, off_basis, is_low)
    )
    return block, settled | ~xp.any(block)

  def grow(state):
    """Adds a block to the basis and computes the next one."""
    count, _, is_steep, block, filled = state
    newest = forward(block)
    gram = rows_gram(newest)
    if not isinstance(least, float) or least > 0:
      is_steep = is_steep | ((count == 0) & ~is_even(gram, least))
    filled = add(count, filled, block, newest, gram)
    count = count + 1
    block, done = branch(
      (count < passes) & ~is_steep,
      lambda: follow(count, filled, newest, gram),
      lambda: (block, xp.bool_(True)),
    )
    return count, done | is_steep, is_steep, block, filled

  span = passes * width
  # The host never reads a row before it is filled.
  blank = np.empty if xp is np else xp.zeros
  basis, images = (
    blank((span, columns), block.dtype) for columns in (block.shape[1], length)
  )
  room = basis, images, xp.zeros((span, span), block.dtype)
  state = (xp.int32(0), xp.bool_(False), xp.bool_(False), block, room)
  count, _, is_steep, _, filled = run_while(
    lambda state: ~state[1], grow, state
  )
  basis, images, projected = _filled(count * width, *filled)
  rows = ritz_vectors(projected, images, rank, eigenpairs)
  return rows @ basis, rows @ images, is_steep


def _keeping(decompose):
  """Wraps a decomposition so that the host keeps its result for each size.

  The test whether a space is rich enough needs the same eigenpairs as its Ritz
  vectors.
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
  """Returns the filled part; in JAX all of it, since shapes are static."""
  if library_of(basis) is jnp:
    return basis, images, projected
  return basis[:count], images[:count], projected[:count, :count]


def _is_settled(total, projected, off, mixed, count, rank, tol, eigenpairs):
  """Returns whether the space lacks less than `tol` of the squared error.

  What it lacks is estimated as Σ |residual|² / (value - mean of the others)
  over the leading Ritz pairs. The estimate is right to a few tenths for
  decaying spectra, and up to 3 times too low for flat ones. A residual is the
  newest block's part of the eigenvector times what that block's images lead to
  outside the basis, `mixed off`.
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
  # Where less than this share of the total is left, rounding decides the test:
  # take another pass.
  return (lacking <= tol * rest) & (rest > 1e-5 * total)


def _off_basis(basis, filled, width):
  """Returns a function that removes from rows what lies in the filled basis.

  Of rows that lay in the basis only rounding is left. They become zero, because
  rounding blown up to unit length is not orthogonal to the basis.
  """
  xp = library_of(basis)

  def off_rows(rows, count):
    return rows - (rows @ basis[:count].T) @ basis[:count]

  def off_basis(rows, noise):
    if xp is np:
      rows = off_rows(rows, filled)
    else:  # the short basis of the first passes halves their work
      rows = branch(
        filled <= 3 * width,
        lambda: off_rows(rows, 3 * width),
        lambda: off_rows(rows, len(basis)),
      )
    is_more = xp.linalg.norm(rows) > noise
    return rows if xp is np and is_more else xp.where(is_more, rows, 0.0)

  return off_basis


def _residual(backward, images, gram, off_basis):
  """Returns the part of `images aᵀ` outside the basis, its rows mixed.

  The rows (w, m) are mixed to keep weak directions. The second result is the
  mixing (w, w): unmixed, the part is `mixed off`. `gram` holds the inner
  products of the images.
  """
  xp = library_of(images)
  eye = xp.eye(images.shape[0], dtype=images.dtype)

  def condition():
    """Evens out the images, whose squares would lose weak directions."""
    even = orthonormal_rows(images, 2)
    return even, images @ even.T

  images, mixed = branch(is_even(gram), lambda: (images, eye), condition)
  block = backward(images)
  return off_basis(block, 3e-6 * xp.linalg.norm(block)), mixed


# A direction that loses more than this share of its energy when what lies in
# the basis is removed again was rounding: what is left of it is no better.
_LOST = 0.7
# Where one loses less than this, the basis is out of all of them.
_CLEAN = 0.1


def _orthonormal_block(off, off_basis, is_low):
  """Returns the next Krylov block: orthonormal rows, off the basis."""

  def cleaned(rows):
    """Removes the basis again, and rows of which then little is left."""
    noise = 3e-6 * library_of(rows).linalg.norm(rows)
    return independent_rows(off_basis(rows, noise), 1 - _LOST)

  rows, least = cleaned(orthonormal_rows(off, 2))
  rows = branch(least > 1 - _CLEAN, lambda: rows, lambda: cleaned(rows)[0])
  return branch(is_low, lambda: rows, lambda: orthonormal_rows(rows, 1))
