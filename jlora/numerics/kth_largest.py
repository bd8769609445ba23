# SPDX-License-Identifier: Apache-2.0
"""The k-th largest magnitude without a sort, of one array or of a whole model.

The bits of a float32 that is not negative are in the order of their values, so
the threshold is found bit by bit, by counting entries above a candidate. Counts
are all that travels under sharding; a sort would gather the array.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@jax.jit
def kth_magnitude(x: Any, count: Any) -> Any:
  """The largest t for which at least `count` entries have |x| ≥ t.

  Args:
    x: (...) float32.
    count: how many, may be traced. Above the number of entries it gives 0, and
      0 or below a NaN, which nothing reaches.

  Returns:
    () float32. NaN counts as the largest of all. Exact up to 2^24 entries, for
    more to 1e-7 of their number. 31 passes that only read and count.

  Example:
    >>> kth_magnitude(jnp.array([3.0, -5.0, 1.0]), 2)
    Array(3., dtype=float32)
  """
  return kth_of_all([x], jnp.abs, count)


def kth_of_all(
  parts: Sequence[Any], size: Callable[[Any], Any], count: Any
) -> Any:
  """`kth_magnitude` over the entries of many arrays together.

  Args:
    parts: whatever `size` takes, such as pairs of a model and its base.
    size: a part -> (...) float32, not negative. Computed anew in every pass,
      so that nothing of the model's size is kept.
    count: as for `kth_magnitude`.

  Returns:
    () float32, likewise.

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


def count_of(density: Any, size: int) -> Any:
  """How many entries a share of them is: ⌊density · size⌋.

  Args:
    density: in [0, 1], may be traced.
    size: of the array or model.

  Returns:
    float32, whole, at least 1 where the density is above 0: no small tensor is
    erased whole.

  Example:
    >>> count_of(0.7, 10), count_of(0.01, 10)
    (Array(7., dtype=float32), Array(1., dtype=float32))
  """
  density = jnp.asarray(density).astype(jnp.float32)
  count = jnp.floor(density * size + 1e-3)  # 0.7 is less in float32
  return jnp.where(density > 0, jnp.clip(count, 1, size), 0.0)


def _bits(x: Any) -> Any:
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def _count(where: Any) -> Any:
  # By rows first: the entries of the largest tensors overflow an int32.
  rows = jnp.count_nonzero(jnp.atleast_1d(where), axis=-1)
  return jnp.sum(rows.astype(jnp.float32))
