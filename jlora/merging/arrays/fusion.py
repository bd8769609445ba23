# SPDX-License-Identifier: Apache-2.0
"""A merge that takes the entries of a model which matter most: Arcee Fusion."""

from typing import Any

import jax
import jax.numpy as jnp

from jlora.merging.arrays.inputs import read_inputs
from jlora.numerics.kth_largest import kth_magnitude


def arcee_fusion(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  fence: Any = 1.5,
) -> Any:
  """Takes a model's entries where they matter much more than most.

      θ = θ_1 where s > median(s) + 1.5 (Q3(s) - Q1(s)), else θ_0
      s = |θ_1 - θ_0| KL(softmax θ_1 ‖ softmax θ_0),   of each row

  An outlier by Tukey's fence is taken as it is, all else stays the base's. Of a
  bias or norm, the whole vector is one row.

  Args:
    stack: (1, ...) floating.
    weights: (1,), ones: an entry is taken or not.
    base: (...), the model that is changed.
    key: unused; there so that all methods have the same arguments.
    fence: how many quartile ranges above the median importance begins.

  Returns:
    (...) in the stack's dtype. Quartiles are entries of s, the lower of two
    that a quantile lies between, and of the tensor as a whole. Under sharding
    only counts and the rows' sums move between devices.

  Raises:
    ValueError: more than one model, no base, or as `read_inputs`.

  Example:
    >>> stack = jnp.array([[0.1, -0.1, 0.1, -0.1, 0.1, -0.1, 0.2, 3.0]])
    >>> arcee_fusion(stack, [1.0], jnp.zeros(8))
    Array([0., 0., 0., 0., 0., 0., 0., 3.], dtype=float32)

  References:
    Arcee AI's description of mergekit 0.1, which has no paper.
  """
  del key
  given = read_inputs(
    "arcee_fusion", stack, weights, base, needs_base=True, counts=(1, 1)
  )
  model, under = given.models[0], given.base
  score = jax.lax.optimization_barrier(_importance(model, under))
  low, middle, high = (_lower_quantile(score, q) for q in (1, 2, 3))
  fence = jnp.asarray(fence).astype(jnp.float32)
  taken = score > middle + fence * (high - low)
  seen = taken | jnp.isnan(model) | jnp.isnan(under)
  change = given.weights[0] * (model - under)
  merged = jnp.where(given.weights[0] == 1, model, under + change)
  merged = jnp.where(seen, merged, under)
  return merged.astype(stack.dtype)


def _importance(model: Any, under: Any) -> Any:
  """Computes how much each entry matters, by its change and its row's."""
  rows, below = (jnp.atleast_1d(x) for x in (model, under))
  log_p, log_q = (jax.nn.log_softmax(x, axis=-1) for x in (rows, below))
  apart = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1, keepdims=True)
  found = jnp.abs(rows - below) * jnp.maximum(apart, 0)
  return found.reshape(model.shape)


def _lower_quantile(score: Any, quarter: int) -> Any:
  """Returns the entry at ⌊(n - 1) quarter / 4⌋ in ascending order."""
  at = (score.size - 1) * quarter // 4
  return kth_magnitude(score, score.size - at)
