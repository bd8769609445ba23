# SPDX-License-Identifier: Apache-2.0
"""Rank policies, which turn spectra into ranks, and a search for the smallest.

A policy takes the spectra of all modules and returns {path: rank}. Spectra are
path -> (..., r): the leading singular values of each delta, descending, up to
the rank r at which it was factored. Leading axes are scanned layers or experts
that share one rank; their values count together, as the root of the sum of
squares over the batch. All arithmetic is float64 on the host. Rank 0 is legal:
such a module is left out of the adapter.

`advise` looks for the smallest adapter that meets a goal, measured in any way.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.messages import name_some
from jlora.paths import check_same_paths

Ranks = dict[str, int]
Measure = Callable[[Ranks], float]


class Spectra(NamedTuple):
  """The facts of a run that rank policies use, all by module path.

  Attributes:
    values: (r,) singular values.
    norms: Frobenius norms of the whole deltas.
    floors: the largest singular value that rounding alone would cause.
    unit_bytes: bytes of one unit of rank.
  """

  values: dict[str, np.ndarray]
  norms: dict[str, float]
  floors: dict[str, float]
  unit_bytes: dict[str, int]


class Advice(NamedTuple):
  """The smallest adapter found that meets a goal.

  Attributes:
    ranks: path -> rank, different between modules. If the goal was missed, the
      ranks of everything that was factored.
    nbytes: bytes of its factors.
    value: its measured value.
    met: whether that is within the goal.
    tried: (bytes, value) of everything that was measured, sorted by bytes.
    held_out: what `held_out` found of the ranks, on data that had no part in
      choosing them; None if nothing was held out.
  """

  ranks: Ranks
  nbytes: int
  value: float
  met: bool
  tried: list[tuple[int, float]]
  held_out: Any = None


def fixed(
  spectra: Mapping[str, Any], rank: int | Mapping[str, int]
) -> dict[str, int]:
  """Gives every module the same rank, or its own from a table, clipped to r.

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
  """Returns the smallest ranks that keep a share of each delta's squared norm.

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
    """Returns the rank at which the share is reached, else r."""
    held = np.append(0.0, np.cumsum(sigma**2))
    reached = held >= share * np.sum(given[path] ** 2)
    return int(np.argmax(reached)) if reached.any() else sigma.size

  return _each(spectra, count)


def ratio(spectra: Mapping[str, Any], divisor: float) -> dict[str, int]:
  """Counts in each module the singular values above the largest over a divisor.

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


def norm(spectra: Mapping[str, Any], share: float) -> dict[str, int]:
  """Returns the smallest ranks that keep a share of each change's norm.

      rank = min {k : √(Σ_{i≤k} σ_i²) ≥ share √(Σ σ_i²)}

  `sv_fro` of kohya's scripts; `energy` of the share squared.

  Args:
    spectra: path -> (..., r) singular values, descending, all there are.
    share: in (0, 1].

  Returns:
    {path: rank}, in 0..r; 0 where the change is zero.

  Raises:
    ValueError: share outside (0, 1], or a malformed spectrum.

  Example:
    >>> norm({"q": [4.0, 2.0, 1.0, 0.5]}, 0.9)
    {'q': 2}
  """
  return _reaching(spectra, share, 2)


def total(spectra: Mapping[str, Any], share: float) -> dict[str, int]:
  """Returns the smallest ranks that keep a share of the sum of values.

      rank = min {k : Σ_{i≤k} σ_i ≥ share Σ σ_i}

  `sv_cumulative` of kohya's scripts.

  Args:
    spectra: path -> (..., r) singular values, descending, all there are.
    share: in (0, 1].

  Returns:
    {path: rank}, in 0..r; 0 where the change is zero.

  Raises:
    ValueError: share outside (0, 1], or a malformed spectrum.

  Example:
    >>> total({"q": [4.0, 2.0, 1.0, 0.5]}, 0.9)
    {'q': 3}
  """
  return _reaching(spectra, share, 1)


def above(spectra: Mapping[str, Any], least: float) -> dict[str, int]:
  """Counts in each module the singular values above one number.

  `threshold` of LyCORIS.

  Args:
    spectra: path -> (..., r) singular values, descending.
    least: 0 or more.

  Returns:
    {path: rank}, in 0..r.

  Raises:
    ValueError: a negative number, or a malformed spectrum.

  Example:
    >>> above({"q": [4.0, 2.0, 1.0, 0.5]}, 1.0)
    {'q': 2}
  """
  if not least >= 0:
    raise ValueError(f"least must be 0 or more, got {least}.")
  return _each(spectra, lambda _, sigma: int(np.sum(sigma > least)))


def above_quantile(spectra: Mapping[str, Any], q: float) -> dict[str, int]:
  """Counts in each module the singular values above a quantile of its own.

  `quantile` of LyCORIS.

  Args:
    spectra: path -> (..., r) singular values, descending, all there are.
    q: in [0, 1), interpolated between values as NumPy does.

  Returns:
    {path: rank}, in 0..r.

  Raises:
    ValueError: q outside [0, 1), or a malformed spectrum.

  Example:
    >>> above_quantile({"q": [4.0, 2.0, 1.0, 0.5]}, 0.5)
    {'q': 2}
  """
  if not 0 <= q < 1:
    raise ValueError(f"q must be in [0, 1), got {q}.")

  def count(_, sigma):
    """Returns how many values lie above the quantile."""
    return int(np.sum(sigma > np.quantile(sigma, q))) if sigma.size else 0

  return _each(spectra, count)


def above_floor(
  spectra: Mapping[str, Any], floors: Mapping[str, Any]
) -> dict[str, int]:
  """Counts in each module the singular values that rounding cannot explain.

      rank = #{i : σ_i > floor}

  Args:
    spectra: path -> (..., r) singular values, descending.
    floors: path -> the largest singular value that rounding to the stored dtype
      would cause alone in one matrix, `noise_floor` of a report's row. One
      number for the whole batch, or (...). Combined over the batch as the
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
    """Returns how many values lie above the batch's floor."""
    batch = np.shape(spectra[path])[:-1]
    floor = math.sqrt(np.sum(np.broadcast_to(given[path], batch) ** 2))
    return int(np.sum(sigma > floor))

  return _each(spectra, count)


def budget(
  spectra: Mapping[str, Any], unit_bytes: Mapping[str, int], max_bytes: int
) -> dict[str, int]:
  """Returns the ranks that lower the total squared error most in a byte budget.

      minimise Σ_modules Σ_{i>rank} σ_i²   so that   Σ rank * unit_bytes ≤ max

  A unit is one rank of one module. Units are bought in the order of
  `σ² / bytes`. As σ falls within a module, its units come up in order. This
  greedy choice is the optimum where all units cost the same. Where costs
  differ, it is optimal for the bytes spent up to the first unit that does not
  fit; smaller units then fill the rest. The optimum for all of `max_bytes`
  keeps at most the σ² of that one unit more.

  Args:
    spectra: path -> (..., r) singular values, descending.
    unit_bytes: path -> bytes of one unit of rank,
      `(in + out) * itemsize * batch`.
    max_bytes: the most bytes that all factors may take together.

  Returns:
    {path: rank}, in 0..r. A singular value of 0 is never bought. Ties go to
    the earlier path. Costs a sort of all singular values.

  Raises:
    ValueError: max_bytes is less than the smallest unit (which is named), paths
      that differ, bytes below 1, or a malformed spectrum.

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


def advise(
  spectra: Mapping[str, Any],
  unit_bytes: Mapping[str, int],
  measure: Measure,
  goal: float,
  *,
  precision: float = 0.03,
  held_out: Callable[[Ranks], Any] | None = None,
) -> Advice:
  """Finds the smallest adapter whose measured value is within a goal.

      min bytes   so that   measure(budget(spectra, unit_bytes, bytes)) ≤ goal

  `budget` chooses the ranks for a number of bytes, and bytes are bisected on a
  log scale. If the measure does not always fall as bytes grow, the answer is
  one of the places where it crosses the goal.

  Args:
    spectra: path -> (..., r) singular values, descending.
    unit_bytes: path -> bytes of one unit of rank.
    measure: ranks -> a number to keep small: `error_of`, or a divergence
      measured with the model.
    goal: the largest value allowed.
    precision: the answer is at most this share too large. Each bisection costs
      one measurement; there are about 8 between one unit and everything.
    held_out: as `measure`, on other data, called once with the ranks chosen;
      may give more than a number. The ranks are the fewest that meet the goal
      on the data of `measure`, where they look better than they are: report a
      divergence from here.

  Returns:
    Advice. If even everything that was factored misses the goal, `met` is False
    and the ranks are the full ones.

  Raises:
    ValueError: a goal that is not a number, or as `budget`.

  Example:
    >>> spectra, sizes = {"q": [4.0, 2.0, 1.0, 0.5]}, {"q": 8}
    >>> measure = error_of(spectra, {"q": 21.25 ** 0.5})
    >>> found = advise(spectra, sizes, measure, 0.3)
    >>> found.ranks, found.nbytes, round(found.value, 3)
    ({'q': 2}, 16, 0.243)
  """
  if math.isnan(goal):
    raise ValueError("goal must be a number, got nan.")
  known: dict[tuple[int, ...], float] = {}
  tried: list[tuple[int, float]] = []

  def look(max_bytes: int) -> tuple[Ranks, int, float]:
    """Measures the best ranks for a number of bytes, equal ranks only once."""
    ranks = budget(spectra, unit_bytes, max_bytes)
    spent = sum(ranks[path] * unit_bytes[path] for path in ranks)
    name = tuple(ranks.values())
    if name not in known:
      known[name] = float(measure(ranks))
      tried.append((spent, known[name]))
    return ranks, spent, known[name]

  most = sum(np.shape(s)[-1] * unit_bytes[path] for path, s in spectra.items())
  low, best = min(unit_bytes.values()), look(most)
  high = best[1]
  if best[2] <= goal:
    while high > low * (1 + precision) and high - low > 1:
      middle = max(low + 1, int(math.sqrt(low * high)))
      found = look(middle)
      if found[2] <= goal:
        best, high = found, min(found[1], middle)
      else:
        low = middle
    least = look(low)
    best = least if least[2] <= goal else best
  other = None if held_out is None else held_out(best[0])
  return Advice(*best, best[2] <= goal, sorted(tried), other)


def error_of(
  spectra: Mapping[str, Any],
  norms: Mapping[str, Any],
  rests: Mapping[str, Any] | None = None,
) -> Measure:
  """Returns a function that computes all changes' relative error from ranks.

      √(Σ_modules (Σ_{i>rank} σ_i² + rest²) / Σ ‖delta‖²)

  Args:
    spectra: path -> (..., r) singular values, descending.
    norms: path -> Frobenius norm of the whole delta.
    rests: path -> norm of what all the units leave of the delta, taken from the
      residual itself. None: `rest² = ‖delta‖² - Σ σ²`, a difference that in
      float32 tells nothing below an error of about 1e-3.

  Returns:
    ranks -> relative error in [0, 1]; a module without a rank is missing whole.

  Example:
    >>> round(error_of({"q": [4.0, 3.0]}, {"q": 5.0})({"q": 1}), 3)
    0.6
    >>> round(error_of({"q": [1.0]}, {"q": 1.0}, {"q": 1e-6})({"q": 1}), 9)
    1e-06
  """
  lost = {path: np.array([_squared(norm)]) for path, norm in norms.items()}
  for path, values in spectra.items():
    squares = np.square(np.asarray(values, np.float64))
    by_unit = squares.reshape(-1, squares.shape[-1]).sum(0)
    if rests is None:
      rest2 = max(_squared(norms[path]) - float(by_unit.sum()), 0.0)
    else:
      rest2 = _squared(rests[path])
    # From the last unit down, so that nothing cancels where little is left.
    lost[path] = np.cumsum(np.append(rest2, by_unit[::-1]))[::-1]
  total = sum(float(left[0]) for left in lost.values())

  def measure(ranks: Ranks) -> float:
    left = sum(float(x[ranks.get(path, 0)]) for path, x in lost.items())
    return math.sqrt(left / total) if total else 0.0

  return measure


def verdict(
  rank: int,
  kept: float,
  share: float,
  nbytes: int,
  model_bytes: int,
  met: bool,
  goal: str | None = None,
) -> str:
  """Writes one sentence on what a rank keeps and what a goal would cost.

  Args:
    rank: the rank to judge.
    kept: share of the finetune's effect that it keeps.
    share: the share asked for.
    nbytes: bytes that reach that share; if none do, the bytes of everything
      that was factored.
    model_bytes: bytes of the model's parameters in the same dtype.
    met: whether the share was reached.
    goal: what was asked for, if it was not that share: "a KL of 0.01".

  Returns:
    One sentence.

  Example:
    >>> verdict(64, 0.71, 0.95, 410 * 2**20, 683 * 2**20, True)
    'This finetune is not low-rank: at rank 64 the adapter keeps 71.0% of its \
effect; 95% needs 410.0 MiB, 60.0% of the model.'
  """
  mib, least = nbytes / 2**20, goal or f"{share:.0%}"
  end = (
    f"{least} needs {mib:.1f} MiB, {nbytes / model_bytes:.1%} of the model"
    if met
    else f"{least} is not reached with all that was factored, {mib:.1f} MiB"
  )
  return (
    f"This finetune is {'' if kept >= share else 'not '}low-rank: at rank "
    f"{rank} the adapter keeps {kept:.1%} of its effect; {end}."
  )


def _each(
  spectra: Mapping[str, Any], rank: Callable[[str, np.ndarray], int]
) -> dict[str, int]:
  """Applies `rank(path, sigma)` to every module, batches combined."""
  return {path: rank(path, s) for path, s in _combined(spectra).items()}


def _reaching(spectra: Any, share: float, power: int) -> dict[str, int]:
  """Returns the ranks of which the p-norm is a share of all values'."""
  if not 0 < share <= 1:
    raise ValueError(f"share must be in (0, 1], got {share}.")

  def count(_, sigma):
    """Returns the rank at which the share is reached."""
    held = np.append(0.0, np.cumsum(sigma**power))
    return int(np.argmax(held >= share**power * held[-1]))

  return _each(spectra, count)


def _combined(spectra: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Checks the spectra and combines batches: path -> (r,) float64."""
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
  """Returns whether values are finite, not negative and descending."""
  return bool(
    s.ndim
    and np.isfinite(s).all()
    and (s >= 0).all()
    and (np.diff(s, axis=-1) <= 0).all()
  )


def _numbers(
  spectra: Mapping[str, Any], values: Mapping[str, Any], name: str
) -> dict[str, np.ndarray]:
  """Checks the values that go with the spectra, and returns them in float64."""
  check_same_paths(spectra, values, "spectra", name)
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


def _squared(norm: Any) -> float:
  """Sums the squares of one norm or several, in float64."""
  return float(np.sum(np.square(np.asarray(norm, np.float64))))
