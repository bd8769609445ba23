# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes with the least error in what a layer reads and writes.

Truncated SVD weighs every entry of the error alike. Weights made of second
moments count an error by what it does to the layer's actual inputs, and by how
much the loss depends on the outputs that it changes.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.factoring.factorisers import Factoriser, krylov
from jlora.factoring.moments import Moment
from jlora.loras import Factors
from jlora.numerics.backends import library_of


class Weight(NamedTuple):
  """The weight of each direction of an axis: the root of a second moment.

  Attributes:
    root: (..., n, n) symmetric, or (..., n) where the weight is diagonal.
    inverse: of the same shape; zero along directions of no weight.
  """

  root: Any
  inverse: Any


def full(moment: Any, ridge: float = 0.0) -> Weight:
  """Computes the weight of a whole second moment, correlations included.

      root = (C + ridge mean(diag C) I)^½ = v √λ vᵀ

  Args:
    moment: Moment, whose mean over inputs is C, or C itself, (..., n, n)
      symmetric, not negative.
    ridge: share of C's mean eigenvalue that is added to all eigenvalues. It
      limits how far directions that inputs rarely have are given up.

  Returns:
    Weight, root and inverse (..., n, n) float32. Eigenvalues that rounding
    hides, under `n eps max λ`, count as zero. Costs one eigenproblem of size n,
    which every device solves under sharding.

  Raises:
    ValueError: a moment that is not square, or a ridge below 0.

  Example:
    >>> full(np.diag(np.array([4.0, 16.0], np.float32))).root.round(4)
    array([[2., 0.],
           [0., 4.]], dtype=float32)
  """
  c = _checked(moment, ridge)
  xp = library_of(c)
  with jax.default_matmul_precision("highest"):
    values, vectors = xp.linalg.eigh(c)
    values = xp.maximum(values, xp.zeros_like(values))
    added = np.float32(ridge) * values.mean(-1, keepdims=True)
    root, inverse = _roots(values + added, c.shape[-1])
    other = xp.swapaxes(vectors, -1, -2)
    return Weight(
      (vectors * root[..., None, :]) @ other,
      (vectors * inverse[..., None, :]) @ other,
    )


def diagonal(moment: Any, ridge: float = 0.0) -> Weight:
  """Computes the weight of a second moment's diagonal: one number a channel.

      root = √(diag C + ridge mean(diag C))

  Args:
    moment: as for `full`.
    ridge: as for `full`.

  Returns:
    Weight, root and inverse (..., n) float32. The cost is negligible.

  Raises:
    ValueError: as `full`.

  Example:
    >>> diagonal(np.array([[4.0, 3.0], [3.0, 16.0]], np.float32)).root
    array([2., 4.], dtype=float32)
  """
  c = _checked(moment, ridge)
  xp = library_of(c)
  values = xp.diagonal(c, axis1=-2, axis2=-1)
  values = xp.maximum(values, xp.zeros_like(values))
  added = np.float32(ridge) * values.mean(-1, keepdims=True)
  return Weight(*_roots(values + added, c.shape[-1]))


def whitened(
  delta: Any,
  rank: int,
  key: Any = None,
  *,
  inputs: Weight | None = None,
  outputs: Weight | None = None,
  factor: Factoriser = krylov,
) -> Factors:
  """Computes the leading triplets of a change under a weighted error.

      min over rank r of ‖L (D - X) R‖,   u s vt = svd(L D R),
      X = (L⁻¹ u) diag(s) (vt R⁻¹)

  L is the root of the inputs' second moment C, so that ‖L E‖² = ⟨C E, E⟩ is the
  mean square error of the layer's output. R is the root of G, the second moment
  of the loss's gradient with respect to that output. With both, half the
  squared error is K-FAC's estimate of the divergence in nats. With neither,
  this is `factor` itself.

  Args:
    delta: (..., in, out), read as float32.
    rank: triplets to keep, static; clipped to min(in, out).
    key: of the factoriser.
    inputs: Weight of the in axis; None weighs all alike.
    outputs: Weight of the out axis; None weighs all alike.
    factor: the factoriser of L D R.

  Returns:
    Factors u (..., in, r), s (..., r), vt (..., r, out), float32, orthonormal
    under the weights, uᵀ C u = 1 = vt G vtᵀ, and s the singular values of
    L D R, descending. The first k are the optimum of rank k, whose squared
    error is the sum of all further s². Directions of no weight get no change.
    Costs the factoriser, and for full weights a product of `2 in² out` and one
    of `2 in out²` operations.

  Raises:
    ValueError: weights that do not fit, or as the factoriser.

  Example:
    >>> delta = np.diag(np.array([3.0, 4.0], np.float32))
    >>> moment = np.diag(np.array([4.0, 1.0], np.float32))
    >>> found = whitened(delta, 1, inputs=full(moment))
    >>> found.s, (found.u * found.s @ found.vt).round(4)
    (array([6.], dtype=float32), array([[3., 0.],
           [0., 0.]], dtype=float32))

  References:
    SVD-LLM (Wang et al., 2024) and ASVD (Yuan et al., 2023) weigh inputs; the
    two-sided form is K-FAC's metric (Martens and Grosse, 2015).

  Approximation:
    Inputs and gradients are taken as independent of each other, layers as well.
  """
  _check_fit(delta, inputs, outputs)
  with jax.default_matmul_precision("highest"):
    change = delta.astype(np.float32)
    if inputs is not None:
      change = _times_left(inputs.root, change)
    if outputs is not None:
      change = _times_right(change, outputs.root)
    u, s, vt = factor(change, rank, key)
    if inputs is not None:
      u = _times_left(inputs.inverse, u)
    if outputs is not None:
      vt = _times_right(vt, outputs.inverse)
  return Factors(u, s, vt)


def _checked(moment: Any, ridge: float) -> Any:
  """Checks a moment and a ridge; returns the mean second moment in float32."""
  c = moment.total if isinstance(moment, Moment) else moment
  if c.ndim < 2 or c.shape[-1] != c.shape[-2] or not ridge >= 0:
    raise ValueError(
      f"a weight needs a moment (..., n, n) and a ridge of 0 or more, got "
      f"{c.shape} and {ridge}."
    )
  c = c.astype(np.float32)
  return c / np.float32(moment.count) if isinstance(moment, Moment) else c


def _roots(values: Any, size: int) -> tuple[Any, Any]:
  """Returns square roots and their inverses, 0 for values under rounding."""
  xp = library_of(values)
  floor = np.float32(size * np.finfo(np.float32).eps)
  seen = values > floor * values.max(-1, keepdims=True)
  root = xp.sqrt(xp.where(seen, values, xp.ones_like(values)))
  none = xp.zeros_like(root)
  return xp.where(seen, root, none), xp.where(seen, 1 / root, none)


def _times_left(weight: Any, matrix: Any) -> Any:
  """Computes `weight @ matrix`, for a full or a diagonal weight."""
  if weight.ndim < matrix.ndim:
    return weight[..., None] * matrix
  return weight @ matrix


def _times_right(matrix: Any, weight: Any) -> Any:
  """Computes `matrix @ weight`, for a full or a diagonal weight."""
  if weight.ndim < matrix.ndim:
    return matrix * weight[..., None, :]
  return matrix @ weight


def _check_fit(delta: Any, *weights: Weight | None) -> None:
  """Raises unless the weights of the in and the out axis fit a delta."""
  for axis, weight in zip((-2, -1), weights, strict=True):
    if weight is None or delta.ndim < 2:
      continue
    lead, size = delta.shape[:-2], delta.shape[axis]
    legal = (*lead, size), (*lead, size, size)
    if weight.root.shape not in legal:
      raise ValueError(
        f"the {('inputs', 'outputs')[axis]} weight {weight.root.shape} does "
        f"not fit delta {delta.shape}: needed is {legal[0]} (diagonal) or "
        f"{legal[1]}."
      )
