# SPDX-License-Identifier: Apache-2.0
"""Merges Loras in a small space that contains all of their changes.

A method that works entry by entry, as TIES does, needs coordinates that mean
the same for all adapters. Entries of the factors do not: equal changes have
many factorisations (R a, R⁻ᵀ b). The coordinates here depend on the changes
alone, as long as singular values differ. Only the sign of each coordinate is
arbitrary, and it is the same for all adapters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.factoring.factorisers import factor_specs
from jlora.loras import Factors, Lora, from_factors
from jlora.merging.adapters.concatenation import finite, weighted
from jlora.merging.arrays.inputs import numbers
from jlora.merging.arrays.task_vectors import ties
from jlora.numerics.backends import over_leading

Method = Callable[..., Any]


def core_space(
  loras: Sequence[Lora],
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  method: Method,
  rank: int | None = None,
  **settings: Any,
) -> Lora:
  """Merges Loras by a method for arrays, in the space that they span together.

      Δ_i = Pᵀ C_i Q,   Δ = Pᵀ method([C_i]) Q

  P (k, in) and Q (l, out) are orthonormal rows, the singular vectors of
  [Δ_1 ... Δ_n] and of [Δ_1; ...; Δ_n]. They span all inputs that the changes
  read and all outputs that they write, so nothing is lost, and each C_i is only
  as large as the ranks.

  Args:
    loras: n Loras of one parameter; ranks may differ.
    weights: (n,), passed to the method.
    base: unused; the method gets a base of zeros, because the Cs are changes.
    key: passed to the method.
    method: `(stack, weights, base, *, key, **settings) -> array`, such as
      `ties`, `tsv` or `iso_c`.
    rank: of the result; None is the full min(Σ r_i, in, out).
    **settings: passed to the method.

  Returns:
    Lora of scale 1 in the first's dtype, balanced, its units in descending
    order of strength. O((in + out) (Σ r_i)²), and the method on
    (n, Σ r_i, Σ r_i).

  Raises:
    ValueError: the Loras do not belong to one parameter, or the method's own
      error.

  Example:
    >>> from jlora.merging import iso_c
    >>> eye, one = jnp.eye(2), jnp.ones(())
    >>> loras = [Lora(eye[:1], 3 * eye[:1], one), Lora(eye[1:], eye[1:], one)]
    >>> merged = core_space(loras, [1.0, 1.0], method=iso_c)
    >>> (merged.a.T @ merged.b).round(4)
    Array([[2., 0.],
           [0., 2.]], dtype=float32)

  References:
    Core Space merging (Panariello et al., 2025). The paper computes P and Q
    from the factors themselves, so they depend on the factorisation.
  """
  del base

  def merged(key, pairs, weights):
    """Merges the Loras of one layer."""
    p, _ = _directions([(b, a) for a, b in pairs])
    q, _ = _directions(pairs)
    cores = jnp.stack([(p @ a.T) @ (b @ q.T) for a, b in pairs])
    core = _applied(method, cores, weights, key, settings)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    kept = slice(None, rank)
    return Factors(p.T @ u[:, kept], s[kept], vt[kept] @ q)

  return _over_layers(merged, loras, weights, key, rank)


def knots(
  loras: Sequence[Lora],
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  method: Method = ties,
  rank: int | None = None,
  tol: float = 1e-5,
  **settings: Any,
) -> Lora:
  """Merges Loras by a method for arrays, aligned by a joint SVD (KnOTS).

      [Δ_1ᵀ ... Δ_nᵀ] = U S [V_1ᵀ ... V_nᵀ],   Δᵀ = U method([S V_iᵀ])

  U (out, k) holds the output directions of all adapters together. The method
  merges each adapter's coordinates in them, (k, in).

  Args:
    loras: n Loras of one parameter; ranks may differ.
    weights: (n,), passed to the method.
    base: unused; the method gets a base of zeros, as S V_iᵀ are changes.
    key: passed to the method.
    method: as for `core_space`; the paper uses TIES and DARE-TIES.
    rank: of the result; None is the full min(Σ r_i, in, out).
    tol: directions with σ below this share of the largest are dropped. The
      authors' code drops those with σ below 1e-5, not relative.
    **settings: passed to the method.

  Returns:
    Lora of scale 1 in the first's dtype, balanced, its units in descending
    order of strength. No dense change is formed: O((in + out) (Σ r_i)²), and
    the method on (n, Σ r_i, in).

  Raises:
    ValueError: the Loras do not belong to one parameter, or the method's own
      error.

  Example:
    >>> eye, one = jnp.eye(2), jnp.ones(())
    >>> loras = [Lora(eye[:1], 3 * eye[:1], one), Lora(eye[1:], eye[1:], one)]
    >>> merged = knots(loras, [1.0, 1.0], density=1.0)
    >>> (merged.a.T @ merged.b).round(4)
    Array([[3., 0.],
           [0., 1.]], dtype=float32)

  References:
    KnOTS (Stoica et al., 2024).
  """
  del base

  def merged(key, pairs, weights):
    """Merges the Loras of one layer."""
    q, s = _directions(pairs)
    q = q * (s > tol * s[0]).astype(s.dtype)[:, None]
    tasks = jnp.stack([(q @ b.T) @ a for a, b in pairs])
    task = _applied(method, tasks, weights, key, settings)
    # Rows of q are orthonormal, so taskᵀ q has the singular values of task.
    v, r = jnp.linalg.qr(task.T)
    u, s, vt = jnp.linalg.svd(r, full_matrices=False)
    kept = slice(None, rank)
    return Factors(v @ u[:, kept], s[kept], vt[kept] @ q)

  return _over_layers(merged, loras, weights, key, rank)


def _applied(method, changes, weights, key, settings):
  """Runs a method for arrays on changes, with a base of zeros."""
  none = jnp.zeros_like(changes[0])
  return method(changes, weights, none, key=key, **settings)


def _directions(pairs: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
  """Returns the joint output directions of changes aᵀ b, and their strengths.

  These are the right singular vectors, as rows, of the changes stacked on top
  of each other. Thin QRs suffice: aᵀ b = q_a (r_a b), and the orthonormal q_a
  does not affect right singular vectors.
  """
  rows = [jnp.linalg.qr(a.T)[1] @ b for a, b in pairs]
  q, r = jnp.linalg.qr(jnp.concatenate(rows).T)
  u, s, _ = jnp.linalg.svd(r, full_matrices=False)
  return (q @ u).T, s


def _over_layers(
  merged, loras: Sequence[Lora], weights: Any, key: Any, rank: Any
) -> Lora:
  """Runs `(key, pairs, weights) -> Factors` for each layer of the Loras."""
  if rank is not None and rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}.")
  pairs = [
    (jnp.asarray(a), jnp.asarray(b))
    for a, b in weighted(loras, np.ones(len(loras)))
  ]
  weights = numbers("weights", weights, len(loras))
  scales = []
  for i, (a, b) in enumerate(pairs):
    pairs[i], scale = finite(a, b)
    scales.append(scale)
  leading = loras[0].a.shape[:-2]
  key = jax.random.key(0) if key is None else key
  keys = jax.random.split(key, leading) if leading else key

  def one(key, *flat):
    """Merges one layer, given the factors one after the other."""
    return merged(key, list(zip(flat[::2], flat[1::2], strict=True)), weights)

  flat = [x for pair in pairs for x in pair]
  with jax.default_matmul_precision("highest"):
    found = over_leading(
      one,
      len(leading),
      keys,
      *flat,
      places=lambda _, a, b, *rest: factor_specs(a[:-2], a[-1], b[-1]),
    )
  result = from_factors(Factors(*found), loras[0].a.dtype)
  scale = jnp.prod(jnp.stack(scales), axis=0)
  return Lora(result.a, result.b, scale)
