# SPDX-License-Identifier: Apache-2.0
"""Says how well one figure tells the order of another."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def area_under_curve(scores: Sequence[float], is_bad: Sequence[bool]) -> float:
  """Computes how often a bad case has a higher score than a good one.

      mean over pairs of 1[bad > good] + ½ 1[bad = good]

  Args:
    scores: of all cases.
    is_bad: which are bad.

  Returns:
    1/2 is chance; NaN without a case of either sort.

  Example:
    >>> area_under_curve([1, 2, 3], [False, True, True])
    1.0
  """
  bad = np.asarray(is_bad, bool)
  count, others = int(bad.sum()), int((~bad).sum())
  if not count or not others:
    return float("nan")
  places = stats.rankdata(scores)[bad].sum() - count * (count + 1) / 2
  return float(places / (count * others))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
  """Computes Spearman's correlation.

  Args:
    x: (n,), not all equal.
    y: (n,), likewise.

  Returns:
    In [-1, 1].

  Example:
    >>> round(rank_correlation([1, 2, 4], [0, 5, 6]), 3)
    1.0
  """
  places = [stats.rankdata(values) for values in (x, y)]
  return float(np.corrcoef(*places)[0, 1])
