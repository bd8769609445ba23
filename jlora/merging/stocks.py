# SPDX-License-Identifier: Apache-2.0
"""Model Stock: how far to go from the base, told by the angles of finetunes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.merging.inputs import (
  divided,
  inner,
  is_known,
  norm,
  over_models,
  read,
)


def model_stock(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  axis: int | None = None,
) -> Any:
  """A point between the base and the mean of its finetunes.

      θ = t mean(θ_i) + (1 - t) θ_0,   t = n c / (1 + (n - 1) c)

  with c the mean cosine of all pairs of changes: what finetunes share is
  learnt, where they differ is chance, and the more of them the less it counts.

  Args:
    stack: (n, ...) floating, two models or more.
    weights: (n,), all equal: the paper's mean is plain.
    base: (...).
    key: unused.
    axis: that of a single model along which vectors lie, for an angle each, as
      mergekit's `filter_wise`; None is one angle for the tensor.

  Returns:
    (...) in the stack's dtype. The base where changes are at right angles or
    obtuse, for which the formula gives t below 0. `n (n - 1) / 2` inner
    products, of which only sums travel under sharding.

  Raises:
    ValueError: a single model, no base, weights known to differ, or as `read`.

  Example:
    >>> stack = jnp.array([[1.0, 0.0], [0.5, 3**0.5 / 2]])   # 60 degrees
    >>> model_stock(stack, jnp.ones(2), jnp.zeros(2)).round(4)
    Array([0.5       , 0.28869998], dtype=float32)

  References:
    Jang et al. (2024).
  """
  del key
  given = read(
    "model_stock", stack, weights, base, needs_base=True, counts=(2, math.inf)
  )
  if is_known(given.weights) and np.ptp(given.weights):
    raise ValueError(
      f"model_stock takes equal weights, got {given.weights.tolist()}."
    )
  deltas = given.deltas
  count = deltas.shape[0]
  units = divided(deltas, jax.vmap(lambda x: norm(x, axis))(deltas))
  cosines = [
    inner(units[i], units[j], axis) for j in range(count) for i in range(j)
  ]
  cosine = jnp.clip(sum(cosines) / len(cosines), 0, 1)
  share = count * cosine / (1 + (count - 1) * cosine)
  merged = given.base + share * over_models(deltas) / len(deltas)
  return merged.astype(stack.dtype)
