# SPDX-License-Identifier: Apache-2.0
"""Sparsifiers, which drop entries of a change, and rescalings of the rest.

A sparsifier is a function `(delta, density, key) -> delta` of one model's
change that sets entries to zero; `functools.partial` binds its settings. A
rescaling `(delta, kept, probability) -> kept` makes up for the dropped entries.
NaN is never dropped, so that it shows in the result.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jlora.merging.arrays.draws import uniform
from jlora.merging.arrays.inputs import divided, inner, is_known
from jlora.numerics.backends import library_of, ranks_along, single
from jlora.numerics.kth_largest import count_of, kth_magnitude
from jlora.numerics.threefry import seed_words

Rescaling = Callable[[Any, Any, Any], Any]


def inverse_keep(delta: Any, kept: Any, probability: Any) -> Any:
  """Divides kept entries by the probability of keeping them.

  The expectation of the result is the delta.

  Args:
    delta: unused; there so that all rescalings have the same arguments.
    kept: (...) float32, delta with zeros.
    probability: broadcasts to it.

  Example:
    >>> import jax.numpy as jnp
    >>> inverse_keep(None, jnp.array([2.0, 0.0]), 0.5)
    Array([4., 0.], dtype=float32)

  References:
    DARE (Yu et al., 2024), and DELLA (Deep et al., 2024).
  """
  del delta
  return divided(kept, single(probability, kept))


def match_l1(
  delta: Any, kept: Any, probability: Any = None, *, lengths: Any = None
) -> Any:
  """Scales kept entries so that their magnitudes sum to the delta's.

      kept · ‖delta‖₁ / ‖kept‖₁

  This is mergekit's rescaling. It keeps the strength of each tensor exactly,
  not only on average, which matters for tensors of few entries.

  Args:
    delta: (...) float32.
    kept: (...) float32, delta with zeros.
    probability: unused.
    lengths: (2,), the two sums; for a piece of a tensor, those of the whole.
      None takes delta's and kept's.

  Returns:
    As kept; zeros where nothing was kept.

  Example:
    >>> import jax.numpy as jnp
    >>> match_l1(jnp.array([2.0, 2.0]), jnp.array([2.0, 0.0]))
    Array([4., 0.], dtype=float32)
  """
  del probability
  whole, part = lengths_of(delta, kept) if lengths is None else lengths
  return kept * divided(whole, part)


def lengths_of(delta: Any, kept: Any) -> Any:
  """Computes the norms ‖delta‖₁ and ‖kept‖₁ that `match_l1` makes equal.

  Returns:
    (2,) float32; those of pieces of a tensor add up.

  Example:
    >>> import jax.numpy as jnp
    >>> lengths_of(jnp.array([2.0, -2.0]), jnp.array([2.0, 0.0]))
    Array([4., 2.], dtype=float32)
  """
  xp = library_of(delta, kept)
  one = xp.float32(1)
  found = [inner(xp.abs(x), one).reshape(()) for x in (delta, kept)]
  return xp.stack(found)


def unscaled(delta: Any, kept: Any, probability: Any = None) -> Any:
  """Returns the kept entries as they are."""
  del delta, probability
  return kept


Sparsifier = Callable[..., Any]


def by_magnitude(
  delta: Any, density: Any, key: Any = None, *, rescale: Rescaling = unscaled
) -> Any:
  """Keeps the largest entries of a change, as TIES trims.

  Finds them by counting, not sorting (`kth_magnitude`).

  Args:
    delta: (...) float32.
    density: share of the entries to keep, rounded down, at least one entry.
      Entries that equal the smallest kept are kept too.
    key: unused; there so that all sparsifiers have the same arguments.
    rescale: `unscaled` as in the paper, or `match_l1`.

  Example:
    >>> import jax.numpy as jnp
    >>> by_magnitude(jnp.array([3.0, -5.0, 1.0, 2.0]), 0.5)
    Array([ 3., -5.,  0.,  0.], dtype=float32)
  """
  del key
  count = count_of(single(density, delta), delta.size)
  return from_threshold(delta, kth_magnitude(delta, count), rescale=rescale)


def from_threshold(
  delta: Any, threshold: Any, key: Any = None, *, rescale: Rescaling = unscaled
) -> Any:
  """Keeps the entries of a change whose magnitude is at least a threshold.

  Example:
    >>> import jax.numpy as jnp
    >>> from_threshold(jnp.array([3.0, -5.0, 1.0]), 3.0)
    Array([ 3., -5.,  0.], dtype=float32)
  """
  del key
  kept = _where(abs(delta) >= threshold, delta)
  return rescale(delta, kept, None)


def at_random(
  delta: Any,
  density: Any,
  key: Any = None,
  *,
  rescale: Rescaling = inverse_keep,
  start: Any = None,
) -> Any:
  """Keeps entries of a change at random and rescales them, as DARE does.

  Whether an entry is kept depends only on the key and its index in the tensor,
  so the same entries are kept on any mesh.

  Args:
    delta: (...) float32.
    density: probability to keep an entry.
    key: PRNG key; None is `key(0)`.
    rescale: `inverse_keep` as in the paper, `match_l1` as in mergekit, or
      `unscaled`.
    start: as for `uniform`, where delta is a piece of a tensor.
  """
  key = seed_words(0) if key is None else key
  is_on_host = library_of(delta, density) is np and is_known((key, start))
  like = delta if is_on_host else None
  drawn = uniform(key, delta.shape, start, like) < density
  return rescale(delta, _where(drawn, delta), density)


def by_magnitude_rank(
  delta: Any,
  density: Any,
  key: Any = None,
  *,
  epsilon: Any = 0.15,
  axis: int = -1,
  rescale: Rescaling = inverse_keep,
  ranks: Any = None,
) -> Any:
  """Keeps entries at random, large ones more likely, as DELLA does.

      p = density - ε + 2 ε rank / (n - 1),   rank 0 the smallest in its row

  Sorts along `axis`, which is gathered if it is sharded.

  Args:
    delta: (...) float32.
    density: mean probability to keep an entry; 1 keeps all.
    key: PRNG key; None is `key(0)`.
    epsilon: ε; density ± ε must lie within 0 and 1.
    axis: along which entries are ranked. A single entry has p = density.
    rescale: `inverse_keep` divides each entry by its own p, as in the paper;
      `match_l1` as in mergekit; or `unscaled`.
    ranks: (...) integers, the entries' ranks if they are known.

  Raises:
    ValueError: density ± ε leaves [0, 1] (unless traced).
  """
  probability = keep_probability(
    delta, density, epsilon=epsilon, axis=axis, ranks=ranks
  )
  return at_random(delta, probability, key, rescale=rescale)


def keep_probability(
  delta: Any,
  density: Any,
  *,
  epsilon: Any = 0.15,
  axis: int = -1,
  ranks: Any = None,
) -> Any:
  """Computes the probabilities with which `by_magnitude_rank` keeps entries.

  Example:
    >>> import jax.numpy as jnp
    >>> found = keep_probability(jnp.array([0.1, 0.5, 2.0, 1.0]), 0.7)
    >>> np.asarray(found).round(3)
    array([0.55, 0.65, 0.85, 0.75], dtype=float32)
  """
  check_range(density, epsilon)
  xp = library_of(delta, density, epsilon, ranks)
  density, half = single(density, delta), single(epsilon, delta)
  rows = xp.atleast_1d(xp.abs(delta))
  rank = ranks_along(rows, axis) if ranks is None else ranks
  steps = rows.shape[axis] - 1
  rank = rank.reshape(rows.shape).astype(xp.float32)
  above = 2 * rank / max(steps, 1) - 1
  share = density + half * (above if steps else xp.zeros_like(above))
  probability = xp.where(density >= 1, 1.0, xp.clip(share, 0, 1))
  return probability.reshape(delta.shape)


def keep_middle(
  delta: Any,
  density: Any,
  key: Any = None,
  *,
  gamma: Any = 0.01,
  rescale: Rescaling = unscaled,
) -> Any:
  """Drops the largest and smallest entries of a change, as Breadcrumbs does.

      ranks k ... k + m of |delta|, largest first,
      m = ⌊density n⌋,   k = min(⌊γ n⌋, n - m)

  A share of `density` is kept for any γ: where both do not fit, fewer of the
  largest are dropped.

  Finds them by counting, not sorting.

  Args:
    delta: (...) float32.
    density: share to keep; 1 keeps all, outliers too.
    key: unused.
    gamma: share of the largest entries, which are dropped as outliers. Entries
      that equal the largest kept are kept too.
    rescale: `unscaled` as in the paper, or `match_l1`.

  Example:
    >>> import jax.numpy as jnp
    >>> keep_middle(jnp.array([5.0, -4.0, 3.0, 2.0, 1.0]), 0.6, gamma=0.2)
    Array([ 0., -4.,  3.,  2.,  0.], dtype=float32)
  """
  del key
  xp = library_of(delta, density, gamma)
  density, share = single(density, delta), single(gamma, delta)
  count = count_of(density, delta.size)
  outliers = xp.floor(share * delta.size + 1e-3)
  outliers = xp.minimum(outliers, delta.size - count)
  most = kth_magnitude(delta, outliers + 1)
  least = kth_magnitude(delta, outliers + count)
  size = xp.abs(delta)
  kept = (size >= least) & ~(size > most) & (density > 0)
  return rescale(delta, _where(kept | (density >= 1), delta), density)


def check_range(
  density: Any, margin: Any = 0.0, *, name: str = "density"
) -> None:
  """Raises unless shares are 1 or within [margin, 1 - margin], or traced.

  Example:
    >>> check_range(0.9, 0.15)
    Traceback (most recent call last):
    ...
    ValueError: density 0.9 must lie in [0.15, 0.85], or be 1.
  """
  if not is_known((density, margin)):
    return
  given, margins = np.broadcast_arrays(
    *(np.float64(jax.device_get(x)).round(7) for x in (density, margin))
  )
  inside = (margins - 1e-6 <= given) & (given <= 1 - margins + 1e-6)
  wrong = ~((given == 1) | inside)
  if wrong.any():
    widest = margins[wrong].max()
    raise ValueError(
      f"{name} {given.tolist()} must lie in [{widest:g}, {1 - widest:g}], or "
      "be 1."
    )


def _where(kept: Any, delta: Any) -> Any:
  """Keeps entries by a mask, and NaN always."""
  xp = library_of(kept, delta)
  return xp.where(kept | xp.isnan(delta), delta, 0.0)
