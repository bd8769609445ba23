# SPDX-License-Identifier: Apache-2.0
"""Decompositions of small and of thin matrices, whole on every device.

XLA would cut even a problem of 64 x 64 over the devices of a mesh, and exchange
more than it saves. Where the mesh is known while JAX traces (`jax.set_mesh`),
all of them are told to hold the matrix whole; a thin one is gathered for that.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jlora.arrays import library_of


def alike(decompose: Callable[[Any], Any], x: Any) -> Any:
  """A decomposition that every device makes of the whole of a matrix.

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
  """Orthonormal columns and a triangle, `x = q r`, by Householder's method.

  Args:
    x: (m, k).

  Returns:
    q (m, min(m, k)) and r (min(m, k), k).

  Example:
    >>> q, r = thin_qr(np.array([[3.0], [4.0]]))
    >>> abs(r).round(6)
    array([[5.]])
  """
  q, r = alike(library_of(x).linalg.qr, x)
  return q, r


def thin_svd(x: Any) -> tuple[Any, Any, Any]:
  """The singular value decomposition of a small matrix.

  Args:
    x: (m, n).

  Returns:
    u, s descending, vt, thin.

  Example:
    >>> thin_svd(np.diag([1.0, 2.0]))[1]
    array([2., 1.])
  """
  svd = functools.partial(library_of(x).linalg.svd, full_matrices=False)
  u, s, vt = alike(svd, x)
  return u, s, vt


def descending_eigh(symmetric: Any) -> tuple[Any, Any]:
  """Eigenvalues of a symmetric matrix, largest first, and eigenvectors.

  Args:
    symmetric: (k, k) float32.

  Returns:
    (k,) and (k, k), eigenvectors as columns. On TPUs by Jacobi's method
    whatever the size: above 256 XLA's own choice there takes more than a minute
    to compile and 40 MiB of program for each call.

  Example:
    >>> descending_eigh(np.diag([1.0, 2.0]))[0]
    array([2., 1.])
  """
  values, vectors = alike(_eigh, symmetric)
  return values[::-1], vectors[:, ::-1]


def _eigh(symmetric):
  if library_of(symmetric) is np:
    return np.linalg.eigh(symmetric)
  return jax.lax.platform_dependent(symmetric, tpu=_jacobi, default=_usual)


def _usual(symmetric):
  values, vectors = jnp.linalg.eigh(symmetric)
  return values, vectors


def _jacobi(symmetric):
  vectors, values = jax.lax.linalg.eigh(
    symmetric, implementation=jax.lax.linalg.EighImplementation.JACOBI
  )
  return values, vectors


def shifted_cholesky(gram: Any, share: Any = 1e-6) -> Any:
  """The lower factor of inner products, shifted by a share of their trace.

  Args:
    gram: (k, k), positive semidefinite.
    share: of the trace.

  Returns:
    (k, k), finite also for dependent and for zero rows.

  Example:
    >>> shifted_cholesky(np.float32([[4]])).round(3)
    array([[2.]], dtype=float32)
  """
  xp = library_of(gram)
  shift = share * xp.trace(gram) + np.float32(1e-30)
  gram = gram + shift * xp.eye(gram.shape[0], dtype=gram.dtype)
  if xp is np:
    return np.linalg.cholesky(gram)
  return alike(
    lambda gram: jax.lax.linalg.cholesky(gram, symmetrize_input=False), gram
  )


def inverse_of(lower: Any) -> Any:
  """The inverse of a lower triangular matrix.

  Args:
    lower: (k, k).

  Returns:
    (k, k).

  Example:
    >>> inverse_of(np.array([[2.0, 0.0], [1.0, 1.0]]))
    array([[ 0.5,  0. ],
           [-0.5,  1. ]])
  """
  if library_of(lower) is np:
    return np.linalg.inv(lower)
  eye = jnp.eye(lower.shape[0], dtype=lower.dtype)
  solve = functools.partial(
    jax.lax.linalg.triangular_solve, left_side=True, lower=True
  )
  return alike(lambda lower: solve(lower, eye), lower)
