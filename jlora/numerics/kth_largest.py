# SPDX-License-Identifier: Apache-2.0
"""The k-th largest magnitude without a sort: compiled, on the host, from disk.

The bits of a float32 that is not negative are in the order of their values, so
the threshold is found bit by bit, by counting entries above a candidate. Counts
are all that travels under sharding; a sort would gather the array. NumPy has a
selection of its own; what is read piece by piece is counted in two passes, by
its high bits and then by the low ones of the bin that counts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.numerics.backends import library_of, single

_LOW, _HIGH = 16, 15  # bits of a magnitude that the two passes count by


def kth_magnitude(x: Any, count: Any) -> Any:
  """Returns the largest t for which at least `count` entries have |x| ≥ t.

  Args:
    x: (...) float32, of either library.
    count: how many; may be traced. More than there are entries gives 0; 0 or
      less gives NaN, which no entry reaches.

  Returns:
    () float32. NaN entries count as the largest. Compiled, the count is exact
    up to 2^24 entries, beyond that to 1e-7 of their number; it takes 31 passes
    that only read and count. NumPy's selection copies the entries once.

  Example:
    >>> kth_magnitude(jnp.array([3.0, -5.0, 1.0]), 2)
    Array(3., dtype=float32)
  """
  if library_of(x, count) is np:
    return _selected(np.abs(x).reshape(-1), int(count))
  return _counted(x, count)


@jax.jit
def _counted(x: Any, count: Any) -> Any:
  """Finds the magnitude by counting."""
  return kth_of_all([x], jnp.abs, count)


def _selected(sizes: np.ndarray, count: int) -> np.float32:
  """Finds the k-th largest entry by NumPy's selection, in place."""
  if not 0 < count <= sizes.size:
    return np.float32(np.nan if count < 1 else 0)
  sizes.partition(sizes.size - count)
  return sizes[sizes.size - count]


def kth_of_all(
  parts: Sequence[Any], size: Callable[[Any], Any], count: Any
) -> Any:
  """Returns `kth_magnitude` of the entries of many arrays together.

  Args:
    parts: whatever `size` takes, such as pairs of a model and its base.
    size: a part -> (...) float32, not negative. Computed anew in every pass,
      so that nothing of the model's size is kept.
    count: as for `kth_magnitude`.

  Example:
    >>> kth_of_all([jnp.ones(2), -3 * jnp.ones(1)], jnp.abs, 1)
    Array(3., dtype=float32)
  """
  count = jnp.asarray(count).astype(jnp.float32)

  def reached(candidate):
    return sum(_count(_bits(size(part)) >= candidate) for part in parts)

  def step(turn, found):
    candidate = found | (jnp.int32(1) << (30 - turn))
    return jnp.where(reached(candidate) >= count, candidate, found)

  found = jax.lax.fori_loop(0, 31, step, jnp.int32(0))
  return jax.lax.bitcast_convert_type(found, jnp.float32)


def kth_of_pieces(
  pieces: Callable[[], Iterator[np.ndarray]], density: float
) -> float:
  """Returns the magnitude that a share of a stream of entries reaches.

  Args:
    pieces: begins the stream anew, which is read twice: (...) float32, not
      negative.
    density: share to keep, in (0, 1]; at least one entry is.

  Returns:
    The value, exact however many entries there are.

  Example:
    >>> kth_of_pieces(lambda: iter([np.float32([3, 1]), np.float32([2])]), 0.7)
    2.0
  """
  high = np.zeros(2**_HIGH, np.int64)
  for bits in map(_patterns, pieces()):
    high += np.bincount(bits >> _LOW, minlength=len(high))
  wanted = max(int(density * high.sum() + 1e-3), 1)  # as `count_of`
  top, wanted = _bin_of(high, wanted)
  low = np.zeros(2**_LOW, np.int64)
  for bits in map(_patterns, pieces()):
    own = bits[bits >> _LOW == top] & (2**_LOW - 1)
    low += np.bincount(own, minlength=len(low))
  bits = (top << _LOW) + _bin_of(low, wanted)[0]
  return float(np.uint32(bits).view(np.float32))


def _patterns(x: np.ndarray) -> np.ndarray:
  """Returns the bits of magnitudes, in the order of their values."""
  return np.ascontiguousarray(x).reshape(-1).view(np.uint32)


def _bin_of(counts: np.ndarray, wanted: int) -> tuple[int, int]:
  """Returns the bin of the entry that far from the top, and how far in it."""
  above = np.cumsum(counts[::-1])
  at = int(np.searchsorted(above, wanted))
  before = int(above[at - 1]) if at else 0
  return len(counts) - 1 - at, wanted - before


def count_of(density: Any, size: int) -> Any:
  """Returns how many entries a share of them is: ⌊density · size⌋ in float32.

  At least 1 where the density is above 0, so that no small tensor is erased
  whole. The density, in [0, 1], may be traced.

  Example:
    >>> count_of(0.7, 10), count_of(0.01, 10)
    (Array(7., dtype=float32), Array(1., dtype=float32))
  """
  xp, density = library_of(density), single(density)
  count = xp.floor(density * size + 1e-3)  # float32 rounds 0.7 down
  return xp.where(density > 0, xp.clip(count, 1, size), 0.0)


def _bits(x: Any) -> Any:
  """Returns the bits of float32 numbers as int32."""
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def _count(where: Any) -> Any:
  """Counts the true entries, in float32."""
  # By rows first: the largest tensors have more entries than an int32 counts.
  rows = jnp.count_nonzero(jnp.atleast_1d(where), axis=-1)
  return jnp.sum(rows.astype(jnp.float32))
