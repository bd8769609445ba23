# SPDX-License-Identifier: Apache-2.0
"""Which entries of a weight change are kept, and what makes up for the rest.

A sparsifier is a function `(delta, density, key) -> delta`, of one model, with
zeros for what it drops; settings are bound by `functools.partial`. What is NaN
is never dropped: it must be seen in what comes out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.merging.arrays.draws import uniform
from jlora.merging.arrays.inputs import divided, inner, is_known
from jlora.numerics.kth_largest import count_of, kth_magnitude

Rescaling = Callable[[Any, Any, Any], Any]


def inverse_keep(delta: Any, kept: Any, probability: Any) -> Any:
  """What was kept, divided by the probability of that: the mean is the delta.

  Args:
    delta: unused; there so that every rescaling has the same call.
    kept: (...) float32, delta with zeros.
    probability: broadcasts to it.

  Returns:
    As kept.

  Example:
    >>> inverse_keep(None, jnp.array([2.0, 0.0]), 0.5)
    Array([4., 0.], dtype=float32)

  References:
    DARE (Yu et al., 2024), and DELLA (Deep et al., 2024).
  """
  del delta
  return divided(kept, jnp.asarray(probability).astype(jnp.float32))


def match_l1(
  delta: Any, kept: Any, probability: Any = None, *, lengths: Any = None
) -> Any:
  """What was kept, scaled so that the sum of magnitudes is the delta's.

      kept · ‖delta‖₁ / ‖kept‖₁

  mergekit's way, of the whole tensor. What is left of it by chance keeps the
  strength of the whole: a tensor of few entries is not what it is on average.

  Args:
    delta: (...) float32.
    kept: (...) float32, delta with zeros.
    probability: unused.
    lengths: (2,) of `lengths_of`, for a piece of a tensor those of the whole;
      None takes delta's and kept's.

  Returns:
    As kept; zeros where nothing was kept.

  Example:
    >>> match_l1(jnp.array([2.0, 2.0]), jnp.array([2.0, 0.0]))
    Array([4., 0.], dtype=float32)
  """
  del probability
  whole, part = lengths_of(delta, kept) if lengths is None else lengths
  return kept * divided(whole, part)


def lengths_of(delta: Any, kept: Any) -> Any:
  """The sums of magnitudes that `match_l1` makes equal.

  Args:
    delta: (...) float32.
    kept: (...) float32.

  Returns:
    (2,) float32, delta's and kept's; those of pieces add up.

  Example:
    >>> lengths_of(jnp.array([2.0, -2.0]), jnp.array([2.0, 0.0]))
    Array([4., 2.], dtype=float32)
  """
  one = jnp.float32(1)
  found = [inner(jnp.abs(x), one).reshape(()) for x in (delta, kept)]
  return jnp.stack(found)


def unscaled(delta: Any, kept: Any, probability: Any = None) -> Any:
  """What was kept, as it is.

  Args:
    delta: unused.
    kept: (...).
    probability: unused.

  Returns:
    kept.

  Example:
    >>> unscaled(None, 3.0)
    3.0
  """
  del delta, probability
  return kept


Sparsifier = Callable[..., Any]


def by_magnitude(delta: Any, density: Any, key: Any = None) -> Any:
  """A change with its largest entries only: TIES' trim.

  Args:
    delta: (...) float32.
    density: share of the entries to keep, rounded down, at least one. Entries
      that equal the smallest kept are kept too.
    key: unused; there so that every sparsifier has the same call.

  Returns:
    As delta. By counting, not sorting (`kth_magnitude`).

  Example:
    >>> by_magnitude(jnp.array([3.0, -5.0, 1.0, 2.0]), 0.5)
    Array([ 3., -5.,  0.,  0.], dtype=float32)
  """
  del key
  count = count_of(density, delta.size)
  return from_threshold(delta, kth_magnitude(delta, count))


def from_threshold(delta: Any, threshold: Any, key: Any = None) -> Any:
  """A change with its entries of a magnitude or more only.

  Args:
    delta: (...) float32.
    threshold: the magnitude, such as one of `magnitude_thresholds`.
    key: unused.

  Returns:
    As delta.

  Example:
    >>> from_threshold(jnp.array([3.0, -5.0, 1.0]), 3.0)
    Array([ 3., -5.,  0.], dtype=float32)
  """
  del key
  return _where(jnp.abs(delta) >= threshold, delta)


def at_random(
  delta: Any,
  density: Any,
  key: Any = None,
  *,
  rescale: Rescaling = inverse_keep,
  start: Any = None,
) -> Any:
  """A change with entries kept by chance, all alike: DARE's drop and rescale.

  Whether an entry stays is known by the key and by its place in the tensor.

  Args:
    delta: (...) float32.
    density: probability of an entry to be kept.
    key: PRNG key; None is `key(0)`.
    rescale: `inverse_keep` as in the paper, `match_l1` as mergekit, `unscaled`.
    start: place of delta's first entry, as for `uniform`, where delta is a
      piece of a tensor.

  Returns:
    As delta. The same entries on any mesh.

  Example:
    >>> at_random(jnp.ones(6), 1.0)
    Array([1., 1., 1., 1., 1., 1.], dtype=float32)
  """
  key = jax.random.key(0) if key is None else key
  drawn = uniform(key, delta.shape, start) < density
  return rescale(delta, _where(drawn, delta), density)


def by_magnitude_rank(
  delta: Any,
  density: Any,
  key: Any = None,
  *,
  epsilon: float = 0.15,
  axis: int = -1,
  rescale: Rescaling = inverse_keep,
) -> Any:
  """A change with entries kept by chance, the larger the likelier: DELLA's.

      p = density - ε + 2 ε rank / (n - 1),   rank 0 the smallest in its row

  Args:
    delta: (...) float32.
    density: mean probability to be kept; 1 keeps all.
    key: PRNG key; None is `key(0)`.
    epsilon: ε; density ± ε must lie within 0 and 1.
    axis: that along which a row lies. One entry alone has p = density.
    rescale: `inverse_keep` divides each entry by its own p, as in the paper;
      `match_l1` as mergekit; `unscaled`.

  Returns:
    As delta. Sorts along `axis`, which is gathered if it is sharded.

  Raises:
    ValueError: density ± ε known to leave [0, 1].

  Example:
    >>> by_magnitude_rank(jnp.ones((1, 2)), 1.0)
    Array([[1., 1.]], dtype=float32)
  """
  probability = keep_probability(delta, density, epsilon=epsilon, axis=axis)
  return at_random(delta, probability, key, rescale=rescale)


def keep_probability(
  delta: Any, density: Any, *, epsilon: float = 0.15, axis: int = -1
) -> Any:
  """The probabilities that `by_magnitude_rank` keeps entries with.

  Args:
    delta: as for `by_magnitude_rank`.
    density: likewise.
    epsilon: likewise.
    axis: likewise.

  Returns:
    As delta, in [0, 1].

  Raises:
    ValueError: as `by_magnitude_rank`.

  Example:
    >>> found = keep_probability(jnp.array([0.1, 0.5, 2.0, 1.0]), 0.7)
    >>> np.asarray(found).round(3)
    array([0.55, 0.65, 0.85, 0.75], dtype=float32)
  """
  check_range(density, epsilon)
  density = jnp.asarray(density).astype(jnp.float32)
  rows = jnp.atleast_1d(jnp.abs(delta))
  rank = jnp.argsort(jnp.argsort(rows, axis=axis), axis=axis)
  steps = rows.shape[axis] - 1
  above = 2 * rank.astype(jnp.float32) / max(steps, 1) - 1
  share = density + epsilon * (above if steps else jnp.zeros_like(above))
  probability = jnp.where(density >= 1, 1.0, jnp.clip(share, 0, 1))
  return probability.reshape(delta.shape)


def keep_middle(
  delta: Any,
  density: Any,
  key: Any = None,
  *,
  gamma: float = 0.01,
  erases_small: bool = False,
) -> Any:
  """A change without its largest and its smallest entries: Breadcrumbs' mask.

      ranks ⌊γ n⌋ ... ⌊γ n⌋ + ⌊density n⌋ of |delta|, largest first

  Args:
    delta: (...) float32.
    density: share to keep; 1 keeps all, outliers too.
    key: unused.
    gamma: share of the largest that are dropped as outliers. Those that equal
      the largest kept are kept too.
    erases_small: mergekit's slip: where ⌊γ n⌋ is 0, which at γ = 0.01 is any
      tensor of less than 100 entries, nothing is kept.

  Returns:
    As delta. By counting, not sorting.

  Example:
    >>> keep_middle(jnp.array([5.0, -4.0, 3.0, 2.0, 1.0]), 0.6, gamma=0.2)
    Array([ 0., -4.,  3.,  2.,  0.], dtype=float32)
  """
  del key
  density = jnp.asarray(density).astype(jnp.float32)
  outliers = jnp.floor(jnp.asarray(gamma * delta.size + 1e-3, jnp.float32))
  most = kth_magnitude(delta, outliers + 1)
  least = kth_magnitude(delta, outliers + count_of(density, delta.size))
  size = jnp.abs(delta)
  kept = (size >= least) & ~(size > most) & (density > 0)
  if erases_small:
    kept = kept & (outliers > 0)
  return _where(kept | (density >= 1), delta)


def check_range(density: Any, margin: float = 0.0) -> None:
  """Nothing, if densities lie within 0 and 1 with a margin, or cannot be known.

  Args:
    density: one or more; 1 itself needs no margin.
    margin: from both ends.

  Raises:
    ValueError: one that does not.

  Example:
    >>> check_range(0.9, 0.15)
    Traceback (most recent call last):
    ...
    ValueError: density 0.9 must lie in [0.15, 0.85], or be 1.
  """
  if not is_known(density):
    return
  given = np.asarray(jax.device_get(density), np.float64).round(7)
  low, high = margin - 1e-6, 1 - margin + 1e-6
  if not np.all((given == 1) | ((low <= given) & (given <= high))):
    raise ValueError(
      f"density {given.tolist()} must lie in [{margin:g}, {1 - margin:g}], or "
      "be 1."
    )


def _where(kept: Any, delta: Any) -> Any:
  return jnp.where(kept | jnp.isnan(delta), delta, 0.0)
