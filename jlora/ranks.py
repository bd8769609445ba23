# SPDX-License-Identifier: Apache-2.0
"""Rank policies: the spectra of all modules in, {path: rank} out.

Spectra are the leading singular values of each delta up to the cap r at which
it was factored, path -> (..., r) descending. Leading axes are scanned layers or
experts that share one rank; their values count together, as the root of the sum
of squares over the batch. All arithmetic is float64 on the host. Rank 0 is
legal: such a module is left out of the adapter.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.messages import name_some
from jlora.paths import check_same


def fixed(
  spectra: Mapping[str, Any], rank: int | Mapping[str, int]
) -> dict[str, int]:
  """The same rank for every module, or one given for each, clipped to r.

  Args:
    spectra: path -> (..., r) singular values, descending.
    rank: the rank, or path -> rank with exactly the paths of `spectra`.

  Returns:
    {path: rank}, in 0..r.

  Raises:
    ValueError: a rank below 0 or not whole, paths that differ, or a malformed
      spectrum.

  Example:
    >>> fixed({"q": [3.0, 1.0], "k": [2.0, 1.0, 0.5]}, 3)
    {'q': 2, 'k': 3}
  """
  wanted = rank if isinstance(rank, Mapping) else dict.fromkeys(spectra, rank)
  given = _numbers(spectra, wanted, "rank")
  broken = [f"{path}: {value}" for path, value in given.items() if value % 1]
  if broken:
    raise ValueError(f"Ranks must be whole numbers, got {name_some(broken)}.")
  return _each(spectra, lambda path, sigma: min(int(given[path]), sigma.size))


def energy(
  spectra: Mapping[str, Any], norms: Mapping[str, Any], share: float
) -> dict[str, int]:
  """The smallest ranks that hold a share of each delta's squared norm.

      rank = min {k : Σ_{i≤k} σ_i² ≥ share ‖delta‖²},   r if there is no such k

  The relative error is then at most `√(1 - share)`. A share of Frobenius norm p
  ("fro" elsewhere) is `share = p²`.

  Args:
    spectra: path -> (..., r) singular values, descending.
    norms: path -> Frobenius norm of the whole delta, of which only r singular
      values are known: one number, or (...) as the spectrum's leading axes.
    share: in (0, 1].

  Returns:
    {path: rank}, in 0..r; 0 where the delta is zero.

  Raises:
    ValueError: share outside (0, 1], paths that differ, a negative norm, or a
      malformed spectrum.

  Example:
    >>> energy({"q": [4.0, 2.0, 1.0, 0.5]}, {"q": 21.25**0.5}, 0.95)
    {'q': 3}
  """
  if not 0 < share <= 1:
    raise ValueError(f"share must be in (0, 1], got {share}.")
  given = _numbers(spectra, norms, "norms")

  def count(path, sigma):
    held = np.append(0.0, np.cumsum(sigma**2))
    reached = held >= share * np.sum(given[path] ** 2)
    return int(np.argmax(reached)) if reached.any() else sigma.size

  return _each(spectra, count)


def ratio(spectra: Mapping[str, Any], divisor: float) -> dict[str, int]:
  """The number of singular values above the largest over a divisor.

      rank = #{i : σ_i > σ_1 / divisor}

  Args:
    spectra: path -> (..., r) singular values, descending.
    divisor: above 1; at 1 no value is above the largest.

  Returns:
    {path: rank}, in 0..r.

  Raises:
    ValueError: divisor not above 1, or a malformed spectrum.

  Example:
    >>> ratio({"q": [4.0, 2.0, 1.0, 0.5]}, 3)
    {'q': 2}
  """
  if not divisor > 1:
    raise ValueError(f"divisor must be above 1, got {divisor}.")
  return _each(
    spectra, lambda _, sigma: int(np.sum(sigma > sigma[:1] / divisor))
  )


def above_floor(
  spectra: Mapping[str, Any], floors: Mapping[str, Any]
) -> dict[str, int]:
  """The number of singular values that rounding noise does not explain.

      rank = #{i : σ_i > floor}

  Args:
    spectra: path -> (..., r) singular values, descending.
    floors: path -> the largest singular value that the rounding of the stored
      dtype alone would give one matrix, `noise_floor` of a report's row: one
      number for all of a batch or (...), combined over the batch as the
      spectrum is.

  Returns:
    {path: rank}, in 0..r.

  Raises:
    ValueError: paths that differ, a negative floor, or a malformed spectrum.

  Example:
    >>> above_floor({"q": [4.0, 2.0, 1.0, 0.5]}, {"q": 0.9})
    {'q': 3}
  """
  given = _numbers(spectra, floors, "floors")

  def count(path, sigma):
    batch = np.shape(spectra[path])[:-1]
    floor = math.sqrt(np.sum(np.broadcast_to(given[path], batch) ** 2))
    return int(np.sum(sigma > floor))

  return _each(spectra, count)


def budget(
  spectra: Mapping[str, Any], unit_bytes: Mapping[str, int], max_bytes: int
) -> dict[str, int]:
  """The ranks that lower the total squared error most within a byte budget.

      minimise Σ_modules Σ_{i>rank} σ_i²   so that   Σ rank * unit_bytes ≤ max

  Units, one rank of one module each, are bought in the order of `σ² / bytes`.
  As σ falls within a module, its units come up in order, and the greedy choice
  is the optimum where units cost the same. Where costs differ it is optimal for
  the bytes spent when the first unit did not fit; what is left is then filled
  with smaller units, and the optimum for all of `max_bytes` holds at most one
  such unit's σ² more.

  Args:
    spectra: path -> (..., r) singular values, descending.
    unit_bytes: path -> bytes of one unit of rank,
      `(in + out) * itemsize * batch`.
    max_bytes: bytes of all factors together, at the most.

  Returns:
    {path: rank}, in 0..r. A singular value of 0 is never bought. Ties go to
    the earlier path. Costs a sort of all singular values.

  Raises:
    ValueError: max_bytes holds not one unit (the smallest is named), paths that
      differ, bytes below 1, or a malformed spectrum.

  Example:
    >>> budget({"q": [3.0, 1.0], "k": [2.0, 0.0]}, {"q": 8, "k": 8}, 16)
    {'q': 1, 'k': 1}
  """
  costs = _numbers(spectra, unit_bytes, "unit_bytes")
  free = [f"{path}: {costs[path]:g}" for path in costs if costs[path] < 1]
  if free:
    raise ValueError(f"unit_bytes must be 1 or more, got {name_some(free)}.")
  energies = {path: s[s > 0] ** 2 for path, s in _combined(spectra).items()}
  paths = [path for path in energies for _ in energies[path]]
  if not paths:
    return dict.fromkeys(spectra, 0)
  smallest = min(paths, key=costs.__getitem__)
  if costs[smallest] > max_bytes:
    raise ValueError(
      f"max_bytes {max_bytes} holds no unit of rank: the smallest, of "
      f"{smallest}, takes {costs[smallest]:g} bytes."
    )
  gains = np.concatenate([energies[path] / costs[path] for path in energies])
  ranks, left = dict.fromkeys(spectra, 0), max_bytes
  for unit in np.argsort(-gains, kind="stable"):
    path = paths[unit]
    if costs[path] <= left:
      ranks[path] += 1
      left -= costs[path]
  return ranks


def _each(
  spectra: Mapping[str, Any], rank: Callable[[str, np.ndarray], int]
) -> dict[str, int]:
  """`rank(path, sigma)` of every module, batches combined."""
  return {path: rank(path, s) for path, s in _combined(spectra).items()}


def _combined(spectra: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Path -> (r,) float64, root of the sum of squares over the batch."""
  arrays = {path: np.asarray(s, np.float64) for path, s in spectra.items()}
  wrong = [
    f"{path} {s.shape}" for path, s in arrays.items() if not _is_spectrum(s)
  ]
  if wrong:
    raise ValueError(
      "Spectra must be (..., r), finite, not negative and descending: "
      f"{name_some(wrong)}."
    )
  return {
    path: np.sqrt(np.sum(s**2, axis=tuple(range(s.ndim - 1))))
    for path, s in arrays.items()
  }


def _is_spectrum(s: np.ndarray) -> bool:
  return bool(
    s.ndim
    and np.isfinite(s).all()
    and (s >= 0).all()
    and (np.diff(s, axis=-1) <= 0).all()
  )


def _numbers(
  spectra: Mapping[str, Any], values: Mapping[str, Any], name: str
) -> dict[str, np.ndarray]:
  """The values that go with the spectra, float64, if they do."""
  check_same(spectra, values, "spectra", name)
  numbers = {path: np.asarray(values[path], np.float64) for path in spectra}
  wrong = [
    f"{path}: {number}"
    for path, number in numbers.items()
    if not (np.isfinite(number).all() and (number >= 0).all())
  ]
  if wrong:
    raise ValueError(
      f"{name} must be finite and not negative, got {name_some(wrong)}."
    )
  return numbers


class Spectra(NamedTuple):
  """What a rank policy sees of a run; all mappings are by module path.

  Attributes:
    values: (r,) singular values.
    norms: Frobenius norms of the whole deltas.
    floors: the singular value that rounding noise alone would reach.
    unit_bytes: bytes of one unit of rank.
  """

  values: dict[str, np.ndarray]
  norms: dict[str, float]
  floors: dict[str, float]
  unit_bytes: dict[str, int]
