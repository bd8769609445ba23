# SPDX-License-Identifier: Apache-2.0
"""Merging methods based on singular vectors: TSV-M and Iso-C.

Both decompose matrices of a layer's size. For Loras use them inside
`core_space`, which computes the same on matrices of the ranks' size.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from jlora.merging.arrays.inputs import along_models, read_inputs, weighted_sum
from jlora.numerics.backends import batched, library_of, single
from jlora.numerics.meshes import run_automatic

# Singular values below this share of the largest count as zero.
_NONE = 1e-5


def tsv(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  keep: int | None = None,
  scale: Any = 1.0,
  tol: float = 1e-3,
) -> Any:
  """Merges changes by their orthogonalised leading singular vectors (TSV-M).

      θ = θ_0 + λ polar([U_i]) diag(w_i S_i) polar([V_i])ᵀ,   δ_i ≈ U_i S_i V_iᵀ

  polar(X) = P Qᵀ for X = P Σ Qᵀ is the orthonormal matrix nearest to X. It
  pushes overlapping directions of different tasks apart before they are added.

  Warning: where tasks share singular vectors, the columns of X are linearly
  dependent and the polar factor is not unique; the authors' code then adds
  arbitrary directions. Here directions with σ < tol are dropped
  (pseudo-polar), so two equal changes give their mean, not their sum.

  Args:
    stack: (n, ..., i, o) floating matrices; leading axes repeat the layer.
    weights: (n,), multiply the singular values; the paper uses ones.
    base: (..., i, o).
    key: unused.
    keep: number of singular triplets of each change. None is all if together
      they are at most min(i, o), as for adapters, else the paper's
      ⌊min(i, o) / n⌋. Triplets of σ = 0 never count.
    scale: λ.
    tol: singular value of the stacked unit vectors, in [0, √n], below which a
      direction is dropped.

  Returns:
    (..., i, o) in the stack's dtype. For vectors, θ_0 + λ Σ w_i δ_i / n.
    A matrix with NaN or infinity becomes all NaN. Costs an svd of each matrix
    and gathers sharded ones.

  Raises:
    ValueError: no base, keep below 1, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> both = jnp.float32([[3, 0], [0, 1]])
    >>> stack = jax.vmap(jnp.diag)(both)
    >>> tsv(stack, jnp.ones(2), jnp.zeros((2, 2))).round(4)
    Array([[3., 0.],
           [0., 1.]], dtype=float32)

  References:
    Gargiulo et al. (2025), task_singular_vectors.
  """
  del key
  given = read_inputs("tsv", stack, weights, base, needs_base=True)
  if keep is not None and keep < 1:
    raise ValueError(f"tsv: keep must be at least 1, got {keep}.")

  def merged(deltas, weights):
    """Merges the changes (n, i, o) of one layer."""
    xp = library_of(deltas, weights)
    u, s, vt = xp.linalg.svd(deltas, full_matrices=False)
    s = (along_models(weights, s) * s)[:, :keep]
    there = _counted(s, min(deltas.shape[1:]), keep).astype(s.dtype)
    left = xp.concatenate(u[:, :, :keep] * there[:, None, :], axis=1)
    right = xp.concatenate(vt[:, :keep] * there[:, :, None], axis=0)
    middle = s.reshape(1, -1)
    return (_polar(left, tol) * middle) @ _polar(right.T, tol).T

  return _of_matrices(merged, given, scale, stack.dtype)


def iso_c(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  scale: Any = 1.0,
  tol: float = 1e-5,
) -> Any:
  """Adds changes to the base, with all singular values of their sum made equal.

      Σ w_i δ_i = U S Vᵀ,   θ = θ_0 + λ mean(S) U Vᵀ

  Args:
    stack: (n, ..., i, o) floating matrices; leading axes repeat the layer.
    weights: (n,); the paper uses ones.
    base: (..., i, o).
    key: unused.
    scale: λ; the authors search 0 to 3.
    tol: singular values below this share of the largest count as zero: they are
      neither in the mean nor raised to it. The authors' code takes all; for a
      sum of low rank that multiplies the mean by rank / min(i, o) and fills the
      rest of the space with arbitrary directions.

  Returns:
    (..., i, o) in the stack's dtype. For a single model this is not the model
    itself. For vectors, θ_0 + λ Σ w_i δ_i / n. A matrix with NaN or
    infinity becomes all NaN. Costs one svd and gathers a sharded matrix.

  Raises:
    ValueError: no base, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> both = jnp.float32([[3, 0], [0, 1]])
    >>> stack = jax.vmap(jnp.diag)(both)
    >>> iso_c(stack, jnp.ones(2), jnp.zeros((2, 2))).round(4)
    Array([[2., 0.],
           [0., 2.]], dtype=float32)

  References:
    Marczak et al. (2025), iso-merging.
  """
  del key
  given = read_inputs("iso_c", stack, weights, base, needs_base=True)

  def merged(deltas, weights):
    """Merges the changes (n, i, o) of one layer."""
    total = weighted_sum(weights, deltas)
    xp = library_of(total)
    u, s, vt = xp.linalg.svd(total, full_matrices=False)
    there = (s > tol * s[0]).astype(s.dtype)
    mean = xp.sum(s * there) / xp.maximum(xp.sum(there), 1)
    return mean * (u * there[None]) @ vt

  return _of_matrices(merged, given, scale, stack.dtype)


def _counted(s: Any, room: int, keep: int | None) -> Any:
  """Returns which triplets (n, k) take part, a mask without σ = 0."""
  xp = library_of(s)
  sizes = xp.abs(s)
  there = sizes > _NONE * xp.max(sizes, axis=1, keepdims=True)
  if keep is not None:
    return there
  leading = xp.arange(s.shape[1]) < max(room // len(s), 1)
  return there & (leading[None] | (xp.sum(there) <= room))


def _of_matrices(merged, given, scale, dtype):
  """Runs a merge of matrices over leading axes; adds λ of it to the base."""
  deltas = given.deltas
  if deltas.ndim < 3:
    change = weighted_sum(given.weights, deltas) / deltas.shape[0]
  else:

    def one(deltas, weights):
      # On NaN, LAPACK may not return.
      xp = library_of(deltas, weights)
      is_finite = xp.isfinite(deltas).all()
      found = merged(xp.where(is_finite, deltas, 0.0), weights)
      return xp.where(is_finite, found, xp.float32(xp.nan))

    for _ in range(deltas.ndim - 3):
      one = batched(one, in_axes=(1, None))
    with jax.default_matmul_precision("highest"):
      change = run_automatic(
        one, (deltas, given.weights), lambda x, _: PartitionSpec(*x[1:])
      )
  return (given.base + single(scale, change) * change).astype(dtype)


def _polar(columns: Any, tol: float) -> Any:
  """Returns the nearest orthonormal columns, without dependent directions."""
  xp = library_of(columns)
  q, r = xp.linalg.qr(columns)
  p, s, qt = xp.linalg.svd(r, full_matrices=False)
  return q @ (p * (s > tol).astype(s.dtype)[None] @ qt)
