# SPDX-License-Identifier: Apache-2.0
"""Carries a Lora from the base it was made on to another base of that shape.

add         Δ_t = Δ_s
project     Δ_t = P_t Δ_s Q_t
both_parts  Δ_t = P_t P_s Δ_s Q_s Q_t + (1-P_t)(1-P_s) Δ_s (1-Q_s)(1-Q_t)
rotate      Δ_t = R Δ_s Sᵀ

P and Q project on the spaces of a weight's k leading singular vectors, R and S
are the smallest rotations between those of source and target. All read weights
alone: none can know what changed in activations.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jlora.factoring.factorisers import Factoriser, svd
from jlora.loras import Lora, check_loras
from jlora.numerics.backends import library_of
from jlora.numerics.meshes import run_automatic

_RIGHT_ANGLE = 1e-4  # a cosine below this is one
#: (lora, w_source, w_target, k, factor) -> Lora
Port = Callable[[Lora, Any, Any, int, Factoriser], Lora]


class Spaces(NamedTuple):
  """The spaces of a weight's leading singular vectors.

  Attributes:
    reads: (..., in, k) orthonormal columns, zero beyond the weight's rank.
    writes: (..., out, k) likewise.
  """

  reads: jax.Array
  writes: jax.Array


def add(
  lora: Lora, w_source: Any, w_target: Any, k: int, factor: Factoriser = svd
) -> Lora:
  """Takes the change as it is: the baseline, which costs nothing.

      Δ_t = Δ_s

  Args:
    lora: any.
    w_source: unused, as what follows.
    w_target: unused.
    k: unused.
    factor: unused.

  Returns:
    The Lora.

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(1))
    >>> add(lora, None, None, 1) is lora
    True
  """
  del w_source, w_target, k, factor
  return lora


def project(
  lora: Lora, w_source: Any, w_target: Any, k: int, factor: Factoriser = svd
) -> Lora:
  """Keeps what reads and writes the target's leading spaces (LoRA-X).

      Δ_t = U_t U_tᵀ Δ_s V_t V_tᵀ

  Never longer than Δ_s; a second time it changes nothing.

  Args:
    lora: a (..., r, in), b (..., r, out).
    w_source: unused.
    w_target: (..., in, out).
    k: how many leading singular vectors.
    factor: finds them.

  Returns:
    Lora of rank r.

  Example:
    >>> lora = Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.float32(1))
    >>> project(lora, None, jnp.diag(jnp.array([2.0, 1.0])), 1).b
    Array([[1., 0.]], dtype=float32)
  """
  del w_source
  target = find_spaces(w_target, k, factor)
  a, b = _wide(lora)
  return Lora(_onto(a, target.reads), _onto(b, target.writes), lora.scale)


def both_parts(
  lora: Lora, w_source: Any, w_target: Any, k: int, factor: Factoriser = svd
) -> Lora:
  """Carries the parts in and out of the source's spaces apart (ProLoRA).

      Δ_t = P_t P_s Δ_s Q_s Q_t + (1-P_t)(1-P_s) Δ_s (1-Q_s)(1-Q_t)

  Parts that read in and write out of the spaces, or the reverse, are left out,
  as in the paper.

  Args:
    lora: a (..., r, in), b (..., r, out).
    w_source: (..., in, out).
    w_target: (..., in, out).
    k: how many leading singular vectors.
    factor: finds them.

  Returns:
    Lora of rank 2 r.

  Example:
    >>> w = jnp.diag(jnp.array([2.0, 1.0]))
    >>> lora = Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.float32(1))
    >>> both_parts(lora, w, w, 1).a
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
  """
  source, target = (find_spaces(w, k, factor) for w in (w_source, w_target))
  parts = []
  for rows, own, other in zip(_wide(lora), source, target, strict=True):
    inside = _onto(rows, own)
    outside = rows - inside
    pair = [_onto(inside, other), outside - _onto(outside, other)]
    parts.append(jnp.concatenate(pair, axis=-2))
  a, b = parts
  return Lora(a, b, lora.scale)


def rotate(
  lora: Lora, w_source: Any, w_target: Any, k: int, factor: Factoriser = svd
) -> Lora:
  """Turns the change as the leading spaces turned.

      Δ_t = R Δ_s Sᵀ,
      R = 1 + Σ_i (t_i - s_i) s_iᵀ + ((c_i - 1) n_i - |t_i - c_i s_i| s_i) n_iᵀ

  where s_i, t_i are the principal vectors of both spaces, c_i = s_i · t_i and
  n_i is t_i - c_i s_i at length 1. R turns each plane (s_i, t_i) by its own
  angle and leaves the rest: of all rotations that take the source's space to
  the target's the one nearest to 1. Where the spaces are the same it is 1,
  whatever happened within them.

  Args:
    lora: a (..., r, in), b (..., r, out).
    w_source: (..., in, out).
    w_target: (..., in, out).
    k: how many leading singular vectors.
    factor: finds them.

  Returns:
    Lora of rank r and of the same length |Δ|. Principal vectors at a right
    angle (c below 1e-4) have no smallest rotation, and stay: so do those of
    which one space has none, where a weight's rank is below k.

  Example:
    >>> source, target = jnp.array([[1.0], [0.0]]), jnp.array([[0.6], [0.8]])
    >>> lora = Lora(jnp.array([[0.0, 1.0]]), jnp.ones((1, 1)), jnp.float32(1))
    >>> [round(float(x), 4) for x in rotate(lora, source, target, 1).a[0]]
    [-0.8, 0.6]

  References:
    Davis and Kahan (1970), the direct rotation.
  """
  source, target = (find_spaces(w, k, factor) for w in (w_source, w_target))
  a, b = _wide(lora)
  return Lora(
    _turned(a, source.reads, target.reads),
    _turned(b, source.writes, target.writes),
    lora.scale,
  )


def find_spaces(w: Any, k: int, factor: Factoriser = svd) -> Spaces:
  """Finds the spaces of a weight's k leading singular vectors.

  Args:
    w: (..., in, out).
    k: at most min(in, out).
    factor: a factoriser.

  Returns:
    Spaces. Columns of singular values below max(in, out) ε σ_1 are zero: there
    a weight has no directions of its own.

  Example:
    >>> find_spaces(jnp.diag(jnp.array([2.0, 0.0])), 2).reads
    Array([[1., 0.],
           [0., 0.]], dtype=float32)
  """
  found = factor(library_of(w).asarray(w, jnp.float32), k)
  least = max(w.shape[-2:]) * jnp.finfo(jnp.float32).eps
  is_there = found.s > least * found.s[..., :1]
  writes = jnp.swapaxes(found.vt, -1, -2)
  return Spaces(
    *(jnp.where(is_there[..., None, :], u, 0.0) for u in (found.u, writes))
  )


def port(
  lora: Lora,
  w_source: Any,
  w_target: Any,
  *,
  method: Port = add,
  k: int | None = None,
  factor: Factoriser = svd,
) -> Lora:
  """Carries a Lora of one weight to another weight of the same shape.

  With all of a square weight's directions `project` is `add`, whatever the
  target: it can differ only by what it removes. So compare it with removing a
  random part of the same size before crediting the spaces.

  Args:
    lora: a (..., r, in), b (..., r, out).
    w_source: (..., in, out), the weight that it was made on.
    w_target: (..., in, out), the weight that it is for.
    method: `add`, `project`, `both_parts` or `rotate`.
    k: how many leading singular vectors a space has; None is min(in, out).
      Beyond a weight's rank there are none.
    factor: finds them: `svd`, or `krylov` where k is small.

  Returns:
    Lora in float32, of rank r; of rank 2 r by `both_parts`. The same change for
    any (R a, R⁻ᵀ b) and for any signs or order of singular vectors. Nothing of
    a weight's size is formed but its own bases. Factors lie as they did; of
    sharded weights nothing is gathered that the factoriser does not. Pure.

  Raises:
    ValueError: a malformed Lora, weights of another shape, or k out of range.

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(1))
    >>> w = jnp.diag(jnp.array([3.0, 2.0, 1.0]))[:, :2]
    >>> port(lora, w, w, method=project).a.round(4)
    Array([[1., 1., 0.]], dtype=float32)

  References:
    LoRA-X (arXiv 2501.16559): `project`. ProLoRA (2506.04244): `both_parts`.
    Cross-LoRA (2508.05232) is `project` at k = 320 for weights of one shape:
    its least-squares map has the solution U_t U_sᵀ.

  Approximation: no official code was found. Pairing singular vectors by index,
  as their formulas for weights of other shapes do, needs their signs matched
  and is worse than `add` without; `rotate` is the rotation that needs no pairs.
  """
  k = _checked(lora, w_source, w_target, k)

  def carry(a, b, scale, w_source, w_target):
    """Carries the Lora with all axes Auto."""
    return method(Lora(a, b, scale), w_source, w_target, k, factor)

  parts = tuple(jnp.asarray(x) for x in (lora.a, lora.b, lora.scale))
  if method is add:  # nothing is to be known of weights
    return add(Lora(*parts), None, None, k)
  # NumPy's stay NumPy's: a factoriser need not be compiled for them.
  weights = (
    library_of(w).asarray(w, jnp.float32) for w in (w_source, w_target)
  )
  return run_automatic(
    carry,
    (*parts, *weights),
    lambda a, b, scale, *_: Lora(
      *(PartitionSpec(*x) for x in (a, b, scale))  # pyright: ignore
    ),
  )


_times = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _wide(lora: Lora) -> tuple[jax.Array, jax.Array]:
  """Returns both factors in float32."""
  return lora.a.astype(jnp.float32), lora.b.astype(jnp.float32)


def _onto(rows: jax.Array, space: jax.Array) -> jax.Array:
  """Projects rows (..., r, n) on a space (..., n, k)."""
  inside = _times("...rn,...nk->...rk", rows, space)
  return _times("...rk,...nk->...rn", inside, space)


def _turned(rows: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
  """Turns rows (..., r, n) as the space (..., n, k) turned."""
  both = _times("...nk,...nl->...kl", source, target)
  left, _, right = jnp.linalg.svd(both, full_matrices=False)
  old = _times("...nk,...ki->...ni", source, left)
  new = _times("...nl,...il->...ni", target, right)
  cosine = jnp.sum(old * new, axis=-2, keepdims=True)
  turns = cosine > _RIGHT_ANGLE
  old, new = jnp.where(turns, old, 0.0), jnp.where(turns, new, 0.0)
  away = new - cosine * old
  sine = jnp.linalg.norm(away, axis=-2, keepdims=True)
  normal = away / jnp.where(sine > 0, sine, 1.0)
  along = _times("...rn,...ni->...ri", rows, old)
  across = _times("...rn,...ni->...ri", rows, normal)
  turned = _times("...ri,...ni->...rn", along, new - old)
  bent = jnp.where(turns, cosine - 1, 0.0) * normal - sine * old
  return rows + turned + _times("...ri,...ni->...rn", across, bent)


def _checked(lora: Lora, w_source: Any, w_target: Any, k: int | None) -> int:
  """Returns k; raises unless the Lora, both weights and k fit."""
  check_loras({"lora": lora})
  wanted = (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
  shapes = [tuple(w.shape) for w in (w_source, w_target)]
  if shapes != [wanted, wanted]:
    raise ValueError(
      f"The Lora is of a weight {wanted}; w_source is {shapes[0]} and w_target "
      f"{shapes[1]}. Needed is one shape for all three."
    )
  most = min(wanted[-2:])
  if k is not None and not 1 <= k <= most:
    raise ValueError(f"k is {k}; a weight {wanted} has 1 to {most}.")
  return most if k is None else k
