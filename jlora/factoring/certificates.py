# SPDX-License-Identifier: Apache-2.0
"""Certificates: a change's exact error, and a bound on the best possible."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.loras import Lora
from jlora.numerics.backends import (
  branch,
  library_of,
  normal,
  over_leading,
  scaled,
  times,
)
from jlora.numerics.linalg import row_space
from jlora.numerics.sums import (
  Sums,
  check_single,
  exponent_of,
  sum_over_rows,
  sums_of,
)

# A mean of 16 chi-square variables falls below this share of its expectation
# with probability 1e-6: scipy.stats.chi2.ppf(1e-6, 16) / 16 = 0.0907.
_PROBES = 16
_SHARE = 0.09
# Sums of squares in float32 are off by less than this share (5e-7 measured).
_ROUNDING = 2e-6
# A squared error under this share of ‖delta‖² is computed from the residual.
_CANCELS = 0.05
# Up to this short side all singular values cost less than bounds on them do.
_SHORT = 512


class Certificate(NamedTuple):
  """The errors of a change at its rank and every lower one, with lower bounds.

  The first k units of a Lora are its rank-k version, so each curve below has an
  entry for every rank. All arrays are float32.

  Attributes:
    norm: (...) Frobenius norm of the delta.
    mean_abs: (...) mean modulus of the delta's entries.
    errors: (..., r + 1) Frobenius norm of delta - change, using the first k
      units as stored, k = 0..r.
    changes: (..., r + 1) Frobenius norm of the change.
    projections: (..., r + 1) length of the change along the delta,
      ⟨delta, change⟩ / ‖delta‖; 0 where the delta is 0.
    floors: (..., r + 1) lower bounds on the error of the best change of rank k;
      0 where float32 cannot tell that error from zero.
  """

  norm: jax.Array
  mean_abs: jax.Array
  errors: jax.Array
  changes: jax.Array
  projections: jax.Array
  floors: jax.Array

  @property
  def cosines(self) -> jax.Array:
    """Returns (..., r + 1) cosines of delta and change; 0 where either is 0."""
    live = self.changes > 0
    return jnp.where(
      live, self.projections / jnp.where(live, self.changes, 1), 0
    )


def certificate(
  delta: Any, lora: Lora, key: Any = None, *, sums: Sums | None = None
) -> Certificate:
  """Computes a change's exact error and a lower bound on the best possible one.

      error_k² = ‖delta - change_k‖²,   change_k = scale Σ_{i≤k} a_iᵀ b_i,
      best_k²  = ‖delta‖² - Σ_{i≤k} σ_i²
               ≥ ‖delta‖² - max_{t≤k} (Σ_{i≤k-t} θ_i + K_t) - Σ_{i≤k} c_i

  Errors come from ‖delta‖² and from the energy that each unit adds: its share
  of ‖change‖² less `2⟨delta, a_iᵀ b_i⟩`. Where so little is left that rounding
  would show (under 22% of the norm), they come from the residual itself.

  With a short side of up to 512 the bound is the best error itself, from
  H = deltaᵀ delta. For longer sides let V be the row space of b. Then θ are the
  eigenvalues of H within V, and c the singular values of its block between V
  and the rest. K_t bounds the sum of the t largest eigenvalues of H outside V:
  `t^(1-1/p) tr(H⊥^p)^(1/p)` for the best p of 1 to 4. p = 1 is exact. The
  others are estimated from 16 Gaussian probes, and raised so far that the
  probability that one of them is too low is under 4e-6.

  Args:
    delta: (..., m, n), read as float32; all arrays are NumPy's or all JAX's.
    lora: a (..., r, m), b (..., r, n), scale (...), in their storage dtype:
      rounding is part of the error. Units should be sorted, largest first.
    key: PRNG key of the probes; None is `key(0)`.
    sums: `sums_of(delta)` if it is known; only for a single matrix.

  Returns:
    Certificate; `errors[..., -1] / floors[..., -1]` is an upper bound on the
    ratio to the optimum. Costs as much as three products of `2 m n r`
    operations and 32 rows more, and a fourth product where the residual is
    formed, in blocks of rows. Under sharding only thin products are gathered,
    and the delta if a short side of up to 512 is cut.

  Raises:
    ValueError: the shapes of delta and lora do not fit; `sums` for a batch.

  Example:
    >>> delta = jnp.array([[3.0, 0.0], [4.0, 5.0]])
    >>> half = Lora(jnp.array([[1.5, 4.5]]), jnp.ones((1, 2)), jnp.float32(1))
    >>> bool(jnp.allclose(certificate(delta, half).errors, jnp.sqrt(
    ...     jnp.array([50.0, 5.0]))))
    True

  Approximation: the lower bound is our own. It follows from Ky Fan's inequality
  for block matrices and Hölder's for the moments. On pure noise it lies about
  6% under the best error, on decaying spectra 3 to 15%.
  """
  given = (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
  if delta.shape != given or lora.a.shape[:-1] != lora.b.shape[:-1]:
    raise ValueError(
      f"delta {delta.shape} does not fit a {lora.a.shape}, b {lora.b.shape}: "
      "needed are a (..., r, m), b (..., r, n) for delta (..., m, n)."
    )
  check_single(delta, sums)

  def one(matrix, a, b, scale):
    matrix = matrix.astype(np.float32, copy=False)
    known = sums_of(matrix) if sums is None else sums
    return _certify(matrix, a, b, scale, key, known)

  with jax.default_matmul_precision("highest"):
    return over_leading(one, delta.ndim - 2, delta, lora.a, lora.b, lora.scale)


def _certify(delta, a, b, scale, key, sums):
  """Computes the certificate of one matrix, scaled by a power of two."""
  xp = library_of(delta)
  a, b = a.astype(np.float32), b.astype(np.float32)
  b_unit = xp.ldexp(xp.float32(1), exponent_of(b))
  unit, norm2 = sums.unit, sums.squares
  b = b / b_unit
  a = a * (b_unit / unit * scale.astype(np.float32))
  images, energies = _leading_energies(delta, b, norm2, key, 1 / unit)
  inner = xp.sum(images * a, axis=1)
  overlaps = (a @ a.T) * (b @ b.T)
  added = 2 * xp.sum(xp.tril(overlaps), axis=1) - xp.diagonal(overlaps)
  lost = _from_zero(added - 2 * inner)
  rest2 = branch(
    norm2 + lost[-1] > _CANCELS * norm2,
    lambda: norm2 + lost[-1],
    lambda: _residual(delta, a, b, 1 / unit),
  )
  # Count back from the last rank: nothing cancels where little is left.
  errors2 = xp.concatenate([norm2[None], rest2 + (lost - lost[-1])[1:]])
  norm = xp.sqrt(norm2)
  best2 = norm2 - energies - _ROUNDING * norm2
  return Certificate(
    norm=unit * norm,
    mean_abs=unit * sums.moduli / delta.size,
    errors=unit * xp.sqrt(xp.maximum(errors2, 0.0)),
    changes=unit * xp.sqrt(xp.maximum(_from_zero(added), 0.0)),
    projections=unit * _from_zero(inner) / xp.where(norm > 0, norm, 1.0),
    floors=unit * xp.sqrt(xp.where(best2 > 1e-5 * norm2, best2, 0.0)),
  )


def _from_zero(x):
  """Returns the sums of the first 0..r entries, (r + 1,)."""
  xp = library_of(x)
  return xp.concatenate([xp.zeros(1, x.dtype), xp.cumsum(x)])


def _residual(delta, a, b, inverse):
  """Computes ‖delta - aᵀb‖² by blocks of rows."""
  xp = library_of(delta)

  def squares(rows, columns):
    return xp.sum(
      xp.sum(xp.square(rows * inverse - columns @ b), axis=1), axis=0
    )

  return sum_over_rows(squares, delta, a.T)


def _leading_energies(delta, b, norm2, key, inverse):
  """Returns `b deltaᵀ`, and bounds on the energy of the k largest values.

  The bounds are upper ones, (r + 1,), for k from 0 to r.
  """
  xp, rank = library_of(delta), b.shape[0]
  if min(delta.shape) <= _SHORT:
    values = _all_energies(delta, inverse)[:rank]
    values = xp.pad(values, (0, rank - len(values)))
    return times(b, delta.T) * inverse, _from_zero(values)
  v, within = row_space(b)

  def off_v(rows):
    """Removes what lies in the row space of b from rows."""
    return rows - (rows @ v.T) @ v

  # All rows go through one product, so delta is read only four times.
  probes = off_v(normal(key, (_PROBES, delta.shape[1]), delta))
  first = scaled(times(xp.concatenate([v, probes]), delta.T), inverse)
  second = off_v(scaled(times(first, delta), inverse))
  left, across, second = first[:rank], second[:rank], second[rank:]
  third = scaled(times(second, delta.T), inverse)
  fourth = off_v(scaled(times(third, delta), inverse))
  inside = xp.linalg.eigvalsh(left @ left.T)[::-1]
  coupling = xp.linalg.eigvalsh(across @ across.T)[::-1]
  count = xp.arange(rank + 1)
  tail = xp.minimum(
    xp.maximum(norm2 - inside.sum(), 0.0),
    _tail_sums((second, third, fourth), count.astype(v.dtype)),
  )
  kept = count[:, None] - count[None]
  mixed = _from_zero(inside)[xp.maximum(kept, 0)] + tail[None]
  most = xp.max(xp.where(kept >= 0, mixed, 0.0), axis=1)
  coupled = _from_zero(xp.sqrt(xp.maximum(coupling, 0.0)))
  return within @ left, most + coupled


def _all_energies(delta, inverse):
  """Returns the squared singular values, largest first."""
  xp = library_of(delta)
  rows = delta if delta.shape[0] <= delta.shape[1] else delta.T
  rows = rows * inverse
  return xp.maximum(xp.linalg.eigvalsh(rows @ rows.T)[::-1], 0.0)


def _tail_sums(powers, count):
  """Bounds the sum of the t largest eigenvalues outside V, t from 0 to r."""
  xp = library_of(count)
  least = xp.full(count.shape, np.inf, count.dtype)
  for p, power in enumerate(powers, start=2):
    moment = xp.sum(power * power) / _PROBES / _SHARE
    least = xp.minimum(least, count ** (1 - 1 / p) * moment ** (1 / p))
  return least
