# SPDX-License-Identifier: Apache-2.0
"""Merges of two adapters unit by unit, at several ranks and from ten starts.

How far a merge is from the plain sum is measured beside what it composes: as it
is made, and with the best number before all of it.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import numpy as np

from experiments.lib.adapters.benches import (
  Bench,
  Made,
  add,
  choose,
  on_host,
  scaled,
)
from experiments.lib.adapters.equal_ranks import SCALES, UNITS, Merge
from jlora.loras import Loras, dense
from jlora.merging import svd_merge
from jlora.paths import key_for

STARTS = 10
_ONES = np.ones(2, np.float32)
#: Ranks in those of one adapter; at twice its rank all units are kept.
RANKS = {"r / 2": Fraction(1, 2), "r": Fraction(1), "3 r / 2": Fraction(3, 2)}


class Units(NamedTuple):
  """A merge at a rank.

  Attributes:
    how: the merge.
    rank: in ranks of one adapter.
    starts: keys that it is made from.
  """

  how: Merge
  rank: Fraction
  starts: int


#: name of a row -> what it is.
ROWS = {
  f"{name}, {how.name}": Units(
    how, rank, 1 if how.call is svd_merge else STARTS
  )
  for name, rank in RANKS.items()
  for how in UNITS
}


def by_units(bench: Bench, *, how: Units) -> Made:
  """Merges from every start; the scale is what validates best for the first."""
  pair = [on_host(x) for x in bench.work.adapters]
  rank = int(how.rank * bench.work.recipe.rank)
  made = [merge_at(pair, how.how, rank, i) for i in range(how.starts)]
  whole = add(pair, (1.0, 1.0))
  errors = np.array([errors_of(x, whole) for x in made])
  best, _ = choose(bench, {x: scaled(made[0], x) for x in SCALES})
  first, *others = (scaled(x, best) for x in made)
  notes = {
    "scale": best,
    "error": float(np.median(errors[:, 0])),
    "error, best scale": float(np.median(errors[:, 1])),
    "errors": errors.round(5).tolist(),
  }
  return Made(first, 1, notes, others=others)


def merge_at(pair: Sequence[Loras], how: Merge, rank: int, start: int) -> Loras:
  """Merges two adapters to a rank.

  Args:
    pair: of NumPy arrays.
    how: the merge.
    rank: of the result.
    start: of the clusters.

  Returns:
    Loras of NumPy arrays.
  """
  key = jax.random.key(start)
  # Not by `merge`, which would compile the clustering for every width anew.
  loras = on_host(
    {
      path: how.call(
        [own[path] for own in pair], _ONES, key=key_for(key, path), rank=rank
      )
      for path in pair[0]
    }
  )
  if how.then is None:
    return loras
  rng = np.random.default_rng([start, 6])
  return {
    path: how.then(x, [own[path] for own in pair], rng)
    for path, x in loras.items()
  }


def errors_of(loras: Loras, whole: Loras) -> tuple[float, float]:
  """Computes the relative distance of changes from others, all modules as one.

      |Δ - S| / |S|,   and the least of |c Δ - S| / |S| over numbers c

  Args:
    loras: of NumPy arrays.
    whole: of the same paths.

  Returns:
    Both.

  Example:
    >>> from jlora.loras import Lora
    >>> one = {"w": Lora(np.ones((1, 2)), np.ones((1, 2)), np.float64(1))}
    >>> errors_of(one, scaled(one, 2))
    (0.5, 0.0)
  """
  inner = square = length = 0.0
  for path, x in whole.items():
    found, wanted = (np.float64(dense(own)) for own in (loras[path], x))
    inner += float(np.sum(found * wanted))
    square += float(np.sum(found**2))
    length += float(np.sum(wanted**2))
  error = max(square - 2 * inner + length, 0.0) / length
  best = max(1 - inner**2 / (square * length), 0.0) if square else 1.0
  return error**0.5, best**0.5
