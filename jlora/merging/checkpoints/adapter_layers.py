# SPDX-License-Identifier: Apache-2.0
"""Merges the Loras of one layer, and says what a smaller rank loses.

Σ c_i s_i a_iᵀ b_i for methods that add. Others merge the changes s_i a_iᵀ b_i
entry by entry, or in a space that all of them span.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.factoring.factorisers import cheapest, recompress
from jlora.loras import Factors, Lora, dense, from_factors
from jlora.merging.adapters.common_spaces import core_space, knots
from jlora.merging.adapters.concatenation import concat, fill_missing
from jlora.merging.arrays.averages import linear, passthrough
from jlora.merging.arrays.pruning import breadcrumbs, dare, della
from jlora.merging.arrays.task_vectors import sce, task_arithmetic, ties
from jlora.merging.trees import merge

# Their result is a weighted sum of changes.
ADDING = (linear, task_arithmetic, passthrough)
# They work on changes, entry by entry.
BY_ENTRY = (ties, dare, della, breadcrumbs, sce)
# They take Loras.
OF_LORAS = (core_space, knots)


class MergedLayer(NamedTuple):
  """The result of a layer.

  Attributes:
    lora: of the rank that was asked for.
    lost: squared norm of what such a rank does not hold.
    energy: squared norm of the whole change.
  """

  lora: Lora
  lost: float
  energy: float


def merge_layer(
  name: str,
  loras: Sequence[Lora | None],
  method: Callable[..., Any],
  options: Mapping[str, Any],
  rank: int,
  key: jax.Array | None,
) -> MergedLayer:
  """Merges the Loras of one layer.

  Args:
    name: of the parameter, for errors and keys.
    loras: one for each adapter; None: it does not change this layer.
    method: one of `ADDING`, `BY_ENTRY` or `OF_LORAS`, its options bound.
    options: its numbers, with `weights`.
    rank: of the result.
    key: PRNG key of methods that draw.

  Returns:
    MergedLayer of NumPy arrays, float32. Methods of `BY_ENTRY` form the dense
    changes of this one layer.

  Raises:
    ValueError: the method's own error, with the name.

  Example:
    >>> one = Lora(*(np.ones(s, np.float32) for s in ((1, 2), (1, 3), ())))
    >>> found = merge_layer("w", [one, None], linear, {"weights": (1, 3)}, 1,
    ...                     None)
    >>> (found.lora.a.T @ found.lora.b)[0], found.lost
    (array([0.25, 0.25, 0.25], dtype=float32), 0.0)
  """
  plain = getattr(method, "func", method)
  if plain in BY_ENTRY:
    return _by_entry(name, _no_gaps(loras), method, options, rank, key)
  if plain in ADDING:
    try:
      shares = coefficients(method, len(loras), options)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error
    there = {i: lora for i, lora in enumerate(loras) if lora is not None}
    whole = concat([*there.values()], shares[[*there]])
    if rank >= whole.rank:
      return MergedLayer(whole, 0.0, _energy(whole.a, whole.b))
  else:
    given = {"method": method, "settings": options, "key": key}
    loras = _no_gaps(loras)
    whole = merge([{name: lora} for lora in loras], **given)[name]
    whole = jax.tree.map(np.asarray, whole)
  return _cut(recompress(whole.a, whole.b, whole.rank), rank)


def _no_gaps(loras: Sequence[Lora | None]) -> list[Lora]:
  """Puts Loras of zeros, of rank 1, where there are none."""
  filled = fill_missing([{} if x is None else {"": x} for x in loras])
  return [own[""] for own in filled]


def coefficients(
  method: Callable[..., Any], count: int, options: Mapping[str, Any]
) -> np.ndarray:
  """Computes by what a method that adds multiplies each change.

  Args:
    method: one of `ADDING`.
    count: number of changes.
    options: its numbers, with `weights`.

  Returns:
    (n,) float32.

  Example:
    >>> coefficients(linear, 2, {"weights": (1.0, 3.0)})
    array([0.25, 0.75], dtype=float32)
  """
  options = dict(options)
  weights = options.pop("weights")
  unit, zeros = np.eye(count, dtype=np.float32), np.zeros(count, np.float32)
  return np.asarray(method(unit, weights, zeros, **options))


def _by_entry(name, loras, method, options, rank, key) -> MergedLayer:
  """Merges dense changes and factors the result."""
  changes = [{name: dense(lora)} for lora in loras]
  zeros = {name: np.zeros_like(changes[0][name])}
  given = {"method": method, "base": zeros, "settings": options, "key": key}
  change = np.asarray(merge(changes, **given)[name])
  factorise = cheapest(change.shape[-2:], rank)
  factors = factorise(change, rank, jax.random.key(0))
  kept = float(np.square(factors.s, dtype=np.float64).sum())
  energy = float(np.square(change, dtype=np.float64).sum())
  return MergedLayer(from_factors(factors), max(energy - kept, 0.0), energy)


def _cut(factors: Factors, rank: int) -> MergedLayer:
  """Keeps the leading units; fills up with zeros if there are fewer."""
  u, s, vt = factors
  squares = np.square(s, dtype=np.float64)
  kept = from_factors(Factors(u[..., :rank], s[..., :rank], vt[..., :rank, :]))
  return MergedLayer(
    kept, float(squares[..., rank:].sum()), float(squares.sum())
  )


def _energy(a: Any, b: Any) -> float:
  """Computes the squared norm of aᵀ b from the factors."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  grams = [x @ np.swapaxes(x, -1, -2) for x in (a, b)]
  return float(np.sum(grams[0] * grams[1]))
