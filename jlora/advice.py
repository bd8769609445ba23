# SPDX-License-Identifier: Apache-2.0
"""Which rank is needed: the fewest bytes that reach a goal, and a verdict."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.ranks import budget

Ranks = dict[str, int]
Measure = Callable[[Ranks], float]


class Advice(NamedTuple):
  """The smallest adapter found that reaches a goal.

  Attributes:
    ranks: path -> rank, uneven; the best found, also if the goal was missed.
    nbytes: bytes of its factors.
    value: what it was measured at.
    met: whether that is within the goal.
    tried: (bytes, value) of everything that was measured, by bytes.
    held_out: what was found of the ranks on what had no part in choosing them;
      None if nothing was held out.
  """

  ranks: Ranks
  nbytes: int
  value: float
  met: bool
  tried: list[tuple[int, float]]
  held_out: Any = None


def advise(
  spectra: Mapping[str, Any],
  unit_bytes: Mapping[str, int],
  measure: Measure,
  goal: float,
  *,
  precision: float = 0.03,
  held_out: Callable[[Ranks], Any] | None = None,
) -> Advice:
  """The smallest byte budget at which an adapter measures within a goal.

      min bytes   so that   measure(budget(spectra, unit_bytes, bytes)) ≤ goal

  Ranks are uneven, from the byte budget policy. Bytes are bisected on a log
  scale: a measure that does not fall with the bytes gives one of its crossings.

  Args:
    spectra: path -> (..., r) singular values, descending.
    unit_bytes: path -> bytes of one unit of rank.
    measure: of ranks: `error_of`, or a divergence measured with the model.
    goal: the largest value allowed.
    precision: the answer is at most this share too large; each halving costs
      one measurement, about 8 from a unit to everything.
    held_out: as `measure`, on other data, called once with the ranks chosen;
      may give more than a number. The ranks are the fewest that meet the goal
      on the data of `measure`, where they look better than they are: report a
      divergence from here.

  Returns:
    Advice. Where everything that was factored misses the goal, `met` is False
    and the ranks are all there are.

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
  """The measure of ranks that is the relative error of all changes together.

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


def _squared(norm: Any) -> float:
  """The sum of squares of one norm or several, in float64."""
  return float(np.sum(np.square(np.asarray(norm, np.float64))))


def verdict(
  rank: int,
  kept: float,
  share: float,
  nbytes: int,
  model_bytes: int,
  met: bool,
  goal: str | None = None,
) -> str:
  """A plain sentence on what a rank keeps and what a goal would cost.

  Args:
    rank: the usual one that is judged.
    kept: share of the finetune's effect that it keeps.
    share: the share asked for.
    nbytes: bytes that reach it, or the most there are if nothing does.
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
