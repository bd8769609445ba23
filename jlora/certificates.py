# SPDX-License-Identifier: Apache-2.0
"""The certified error of a stored low-rank change, and how near the optimum."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora.loras import Lora

# A mean of 16 chi-square variables falls below this share of its expectation
# with probability 1e-6: scipy.stats.chi2.ppf(1e-6, 16) / 16 = 0.0907.
_PROBES = 16
_SHARE = 0.09
# Sums of squares in float32 are off by less than this share (5e-7 measured).
_ROUNDING = 2e-6
# Rows of the residual are formed in blocks of about this many entries.
_BLOCK = 2**18


class Certificate(NamedTuple):
  """What a change loses against a delta, at its rank and every lower one.

  Ranks are nested: the first k units of a Lora are its rank-k version, so the
  curves below answer for all of them. All float32.

  Attributes:
    norm: (...) Frobenius norm of the delta.
    mean_abs: (...) mean modulus of the delta's entries.
    errors: (..., r + 1) Frobenius norm of delta - change, using the first k
      units as stored, k = 0..r.
    changes: (..., r + 1) Frobenius norm of the change.
    projections: (..., r + 1) length of the change along the delta,
      ⟨delta, change⟩ / ‖delta‖; 0 where the delta is.
    floors: (..., r + 1) lower bounds on the error of the best change of rank k;
      0 where float32 cannot tell it from zero.
  """

  norm: jax.Array
  mean_abs: jax.Array
  errors: jax.Array
  changes: jax.Array
  projections: jax.Array
  floors: jax.Array

  @property
  def cosines(self) -> jax.Array:
    """(..., r + 1) cosine between delta and change; 0 where either is 0."""
    live = self.changes > 0
    return jnp.where(
      live, self.projections / jnp.where(live, self.changes, 1), 0
    )


def certificate(
  delta: jax.Array, lora: Lora, key: jax.Array | None = None
) -> Certificate:
  """The exact error of a stored change and a lower bound on the best possible.

      error_k² = ‖delta - change_k‖²,   change_k = scale Σ_{i≤k} a_iᵀ b_i,
      best_k²  = ‖delta‖² - Σ_{i≤k} σ_i²
               ≥ ‖delta‖² - max_{t≤k} (Σ_{i≤k-t} θ_i + K_t) - Σ_{i≤k} c_i

  The error of the full rank comes from the residual itself, those of lower
  ranks from the energy each unit adds, `2⟨delta, a_iᵀ b_i⟩` less its share of
  ‖change‖², so that nothing cancels. In the bound, with V the row space of b
  and H = deltaᵀ delta, θ are the eigenvalues of H within V, c the singular
  values of its block between V and the rest, and K_t bounds the t largest
  eigenvalues of H outside V together: `t^(1-1/p) tr(H⊥^p)^(1/p)` for the best p
  of 1 to 4, p = 1 exact, the others from 16 Gaussian probes, raised so far that
  one of them is too low with a probability under 4e-6.

  Args:
    delta: (..., m, n), read as float32.
    lora: a (..., r, m), b (..., r, n), scale (...), in their storage dtype:
      rounding is part of the error. Units should be sorted, largest first.
    key: PRNG key of the probes; None is `key(0)`.

  Returns:
    Certificate; `errors[..., -1] / floors[..., -1]` is an upper bound on the
    ratio to the optimum. Costs as much as five products of `2 m n r`
    operations; the residual is formed in blocks of rows. Nothing but thin
    products is gathered under sharding.

  Raises:
    ValueError: the shapes of delta and lora do not fit.

  Example:
    >>> delta = jnp.array([[3.0, 0.0], [4.0, 5.0]])
    >>> half = Lora(jnp.array([[1.5, 4.5]]), jnp.ones((1, 2)), jnp.float32(1))
    >>> bool(jnp.allclose(certificate(delta, half).errors, jnp.sqrt(
    ...     jnp.array([50.0, 5.0]))))
    True

  Approximation: the lower bound is ours; it follows Ky Fan's inequality for
  block matrices and Hölder's for the moments. On pure noise it lies about 6%
  under the best error, on decaying spectra 3 to 15%.
  """
  given = (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
  if delta.shape != given or lora.a.shape[:-1] != lora.b.shape[:-1]:
    raise ValueError(
      f"delta {delta.shape} does not fit a {lora.a.shape}, b {lora.b.shape}: "
      "needed are a (..., r, m), b (..., r, n) for delta (..., m, n)."
    )
  key = jax.random.key(0) if key is None else key

  def one(matrix, a, b, scale):
    return _certify(matrix.astype(jnp.float32), a, b, scale, key)

  for _ in range(delta.ndim - 2):
    one = jax.vmap(one)
  with jax.default_matmul_precision("highest"):
    return one(delta, lora.a, lora.b, lora.scale)


def _certify(delta, a, b, scale, key):
  """The certificate of one matrix, everything in units of its top entry."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  unit, b_unit = _power(delta), _power(b)
  b = b / b_unit
  a = a * b_unit / unit * scale.astype(jnp.float32)
  residual2, norm2, total = _sums(delta, a, b, 1 / unit)
  images, energies = _leading_energies(delta, b, norm2, key, 1 / unit)
  inner = jnp.sum(images * a, axis=1)
  overlaps = (a @ a.T) * (b @ b.T)
  added = 2 * jnp.sum(jnp.tril(overlaps), axis=1) - jnp.diag(overlaps)
  gained = jnp.cumsum((2 * inner - added)[::-1])[::-1]
  errors2 = (residual2 + jnp.append(gained, 0.0)).at[0].set(norm2)
  norm = jnp.sqrt(norm2)
  best2 = norm2 - energies - _ROUNDING * norm2
  return Certificate(
    norm=unit * norm,
    mean_abs=unit * total / delta.size,
    errors=unit * jnp.sqrt(jnp.maximum(errors2, 0.0)),
    changes=unit * jnp.sqrt(jnp.maximum(_from_zero(added), 0.0)),
    projections=unit * _from_zero(inner) / jnp.where(norm > 0, norm, 1.0),
    floors=unit * jnp.sqrt(jnp.where(best2 > 1e-5 * norm2, best2, 0.0)),
  )


def _power(x):
  """A power of two near the largest entry: scaling by it rounds nothing."""
  top = jnp.max(jnp.abs(x))
  return jnp.ldexp(1.0, jnp.frexp(jnp.where(top > 0, top, 1.0))[1])


def _from_zero(x):
  """(r + 1,) sums of the first 0..r entries."""
  return jnp.append(0.0, jnp.cumsum(x))


def _sums(delta, a, b, inverse):
  """‖delta - aᵀb‖², ‖delta‖² and Σ|delta|, a block of rows at a time.

  A block fits the cache, so the delta is read from memory once.
  """

  def sums(rows, columns):
    rows = rows * inverse
    rest = rows - columns.T @ b
    parts = (jnp.square(rest), jnp.square(rows), jnp.abs(rows))
    # By rows first: rounding then grows with the sides, not the area.
    return jnp.stack([jnp.sum(jnp.sum(part, axis=1)) for part in parts])

  m, n = delta.shape
  blocks = min(math.ceil(m * n / _BLOCK), m)
  if blocks == 1:
    return sums(delta, a)
  height = m // blocks
  whole = height * blocks
  stacked = delta[:whole].reshape(blocks, height, n)
  columns = a[:, :whole].reshape(-1, blocks, height).swapaxes(0, 1)
  parts = jax.lax.map(lambda block: sums(*block), (stacked, columns)).sum(0)
  return parts if whole == m else parts + sums(delta[whole:], a[:, whole:])


def _leading_energies(delta, b, norm2, key, inverse):
  """`b deltaᵀ`; (r + 1,) upper bounds on the energy of the k largest values."""
  rank = b.shape[0]
  v = jnp.linalg.qr(b.T)[0].T

  def off_v(rows):
    return rows - (rows @ v.T) @ v

  # One product for all that is to be multiplied, thrice: delta is read thrice.
  probes = off_v(jax.random.normal(key, (_PROBES, delta.shape[1])))
  images, left, first = _times(
    delta.T, inverse, jnp.concatenate([b, v, probes]), (rank, 2 * rank)
  )
  across, second = _times(
    delta, inverse, jnp.concatenate([left, first]), (rank,)
  )
  across, second = off_v(across), off_v(second)
  third = (second @ delta.T) * inverse
  fourth = off_v((third @ delta) * inverse)
  inside = jnp.linalg.eigvalsh(left @ left.T)[::-1]
  coupling = jnp.linalg.eigvalsh(across @ across.T)[::-1]
  count = jnp.arange(rank + 1)
  tail = jnp.minimum(
    jnp.maximum(norm2 - inside.sum(), 0.0),
    _tail_sums((second, third, fourth), count.astype(v.dtype)),
  )
  kept = count[:, None] - count[None]
  mixed = _from_zero(inside)[jnp.maximum(kept, 0)] + tail[None]
  most = jnp.max(jnp.where(kept >= 0, mixed, 0.0), axis=1)
  return images, most + _from_zero(jnp.sqrt(jnp.maximum(coupling, 0.0)))


def _times(matrix, inverse, rows, splits):
  """`rows matrix`, scaled, in parts."""
  return jnp.split((rows @ matrix) * inverse, splits)


def _tail_sums(powers, count):
  """(r + 1,) bounds on the sum of the t largest eigenvalues outside V."""
  least = jnp.full(count.shape, jnp.inf)
  for p, power in enumerate(powers, start=2):
    moment = jnp.sum(power * power) / _PROBES / _SHARE
    least = jnp.minimum(least, count ** (1 - 1 / p) * moment ** (1 / p))
  return least
