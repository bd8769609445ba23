# SPDX-License-Identifier: Apache-2.0
"""The figures of an extracted module for reports, from its certificate.

All come from one factorisation. Ranks are nested, so the figures at a lower
rank need no further pass over the weights. Computed on the host.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from jlora.factoring.certificates import Certificate
from jlora.factoring.rounding import Learnt, learnt_of
from jlora.loras import Lora

# float32 norms of 1e30 square to infinity, so figures are computed in float64.
_F64 = np.float64


class Measured(NamedTuple):
  """The stored factors of a module, and all that its figures are computed from.

  Attributes:
    lora: a (..., r, in), b (..., r, out) in the storage dtype.
    sigma: (..., r) singular values found.
    certificate: of the stored factors.
    base_norm: Frobenius norm of the base's parameter.
    noise_std: standard deviation of the finetune's rounding to its dtype.
    unchanged: share of the entries that the finetune left as they were.
    ulps: (3, 32) changes by ulp, from `ulp_histogram`; None if not counted.
  """

  lora: Lora
  sigma: Any
  certificate: Certificate
  base_norm: Any
  noise_std: Any
  unchanged: Any
  ulps: Any = None


# Shares of the energy for which the rank is reported.
_SHARES = {"rank_90": 0.90, "rank_95": 0.95, "rank_99": 0.99}
# The figures of `summarise` that a module's row repeats unchanged.
_TOLD = (
  "mean_abs_delta",
  "relative_change",
  "stable_rank",
  "effective_rank",
  *_SHARES,
  "noise_floor",
  "noise_floor_rank",
  "learnt_norm",
  "rounding_share",
  "unchanged",
  "norm",
  "singular_values",
)


def summarise(
  certificate: Certificate,
  sigma: np.ndarray,
  shape: tuple[int, ...],
  *,
  base_norm: float,
  noise_std: float,
  unchanged: float,
  ulps: np.ndarray | None = None,
) -> dict[str, Any]:
  """Computes a module's figures that hold at any rank, and curves over ranks.

      effective_rank = exp(-Σ p_i log p_i),  p_i = σ_i² / Σ σ²  (entropy rank)

  Args:
    certificate: of the module. Leading axes (experts, layers) count together:
      norms and errors are those of all members as one vector, and singular
      value i is the root of the sum of squares of every member's i-th.
    sigma: (..., r) singular values found.
    shape: (..., in, out) of the module.
    base_norm: Frobenius norm of the base's parameter.
    noise_std: standard deviation of the finetuned parameter's rounding.
    unchanged: share of the entries, in [0, 1], that are equal in both
      checkpoints; with updates under half an ulp most are.
    ulps: changes by ulp, from `ulp_histogram`. None leaves `learnt_norm` and
      `rounding_share` None.

  Returns:
    A dict for JSON: `norm`, `mean_abs_delta`, `relative_change`,
    `stable_rank`, `effective_rank` (of the values found), `rank_90`, `rank_95`
    and `rank_99` (how many units of the stored factors keep this share of the
    energy; None if all together do not), `noise_floor`, `noise_floor_rank`,
    `learnt_norm` (of the change before it was rounded) and `rounding_share`
    (how much of its energy rounding took or hides; `learnt_of` estimates both,
    and they are None where it cannot), `unchanged`, `singular_values`, and by
    rank 0..r `errors`, `changes`, `inner`, `floors`.

  Example:
    >>> one = np.ones(())
    >>> c = Certificate(one * 5, one, np.array([5.0, 3]), np.array([0.0, 4]),
    ...                 np.array([0, 3.2]), np.array([5.0, 3]))
    >>> summarise(c, np.array([4.0]), (3, 7), base_norm=50.0,
    ...           noise_std=0.0, unchanged=0.0)["relative_change"]
    0.1
  """
  batch = tuple(range(np.ndim(sigma) - 1))
  norms = np.asarray(certificate.norm, _F64)
  norm = math.sqrt(float(np.sum(norms**2)))
  together = lambda curve: np.sqrt(  # noqa: E731
    np.sum(np.asarray(curve, _F64) ** 2, axis=batch)
  )
  inner = np.asarray(certificate.projections, _F64) * norms[..., None]
  values = together(sigma)
  floor = noise_std * (math.sqrt(shape[-2]) + math.sqrt(shape[-1]))
  floor *= math.sqrt(math.prod(shape[:-2]))
  share = values[values > 0] ** 2 / np.sum(values**2)
  entropy = -np.sum(share * np.log(share))
  learnt = Learnt(None, None) if ulps is None else learnt_of(ulps, norm)
  errors = together(certificate.errors)
  return {
    "norm": norm,
    "mean_abs_delta": float(np.mean(certificate.mean_abs)),
    "relative_change": norm / base_norm if base_norm else None,
    "stable_rank": norm**2 / float(values[0]) ** 2 if values[0] else 0.0,
    "effective_rank": float(np.exp(entropy)) if values[0] else 0.0,
    **{name: _rank_for(errors, norm, part) for name, part in _SHARES.items()},
    "learnt_norm": learnt.norm,
    "rounding_share": learnt.rounding_share,
    "unchanged": float(unchanged),
    "noise_floor": floor,
    "noise_floor_rank": int(np.sum(values > floor)),
    "singular_values": values.tolist(),
    "errors": errors.tolist(),
    "changes": together(certificate.changes).tolist(),
    "inner": np.sum(inner, axis=batch).tolist(),
    "floors": together(certificate.floors).tolist(),
  }


def at_rank(figures: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
  """Computes the figures of a module at one of its ranks.

  Args:
    figures: from `summarise`.
    rank: 0..r.
    size: entries of the parameter.

  Returns:
    A dict: `relative_error` (Frobenius, over the norm of the delta),
    `energy` (the squared share kept), `mse`, `cosine_distance`,
    `optimality`, an upper bound on error / best error at this rank, None where
    the best error cannot be told from zero, and `spectral_bound`, an upper
    bound on the largest singular value of the error: the first singular value
    left out if it was found, else the last one kept, but at most the Frobenius
    error. It holds as far as the factors are the delta's own triplets.

    It is a bound because the value itself (`spectral_norm`) costs much and
    comes no nearer. At 2048 x 5632 and rank 64 four to eight turns with 8
    probes took 23 to 81% of the factorisation's processor time (on a loaded
    machine) to come within 1 to 2% from below; one probe took 8% to come
    within 6%. The bound was 2% above.

  Example:
    >>> at_rank({"norm": 5.0, "errors": [5.0, 3.0], "changes": [0.0, 4.0],
    ...          "inner": [0.0, 16.0], "floors": [5.0, 3.0],
    ...          "singular_values": [4.0]}, 1, 36)["mse"]
    0.25
  """
  norm, error = figures["norm"], figures["errors"][rank]
  change, floor = figures["changes"][rank], figures["floors"][rank]
  cosine = figures["inner"][rank] / (norm * change) if norm * change else 0.0
  relative = error / norm if norm else 0.0
  values = figures["singular_values"]
  return {
    "relative_error": relative,
    "energy": 1 - relative**2,
    "mse": error**2 / size,
    "cosine_distance": max(1 - cosine, 0.0),
    "optimality": max(error / floor, 1.0) if floor else None,
    "spectral_bound": min(values[min(rank, len(values) - 1)], error),
  }


def row_of(figures: dict[str, Any], rank: int) -> dict[str, Any]:
  """Returns a module's row as reports and `compare` have it.

  Args:
    figures: from `summarise`, and `shape`, (..., in, out).
    rank: 0..r.

  Returns:
    A dict for JSON: shape, rank, what `at_rank` gives, the figures of
    `summarise` without its curves, `error` (Frobenius), and `relative_errors`
    by rank 0..r. Costs nothing, so it can be called for every rank.

  Example:
    >>> one = np.ones(())
    >>> c = Certificate(one * 5, one, np.array([5.0, 3]), np.array([0.0, 4]),
    ...                 np.array([0, 3.2]), np.array([5.0, 3]))
    >>> figures = summarise(c, np.array([4.0]), (3, 7), base_norm=50.0,
    ...                     noise_std=0.0, unchanged=0.0)
    >>> row_of({"shape": [3, 7], **figures}, 1)["relative_error"]
    0.6
  """
  norm = figures["norm"]
  return {
    "shape": figures["shape"],
    "rank": rank,
    **at_rank(figures, rank, math.prod(figures["shape"])),
    **{name: figures[name] for name in _TOLD},
    "error": figures["errors"][rank],
    "relative_errors": [
      error / norm if norm else 0.0 for error in figures["errors"]
    ],
  }


def _rank_for(errors: np.ndarray, norm: float, share: float) -> int | None:
  """Returns the first rank that keeps a share of the energy, or None."""
  # The 1e-6 forgives float32's rounding where the share is reached exactly.
  reached = errors**2 <= (1 - share + 1e-6) * norm**2
  return int(np.argmax(reached)) if reached.any() else None
