# SPDX-License-Identifier: Apache-2.0
"""A merge that takes the entries of a model which matter most: Arcee Fusion."""

from typing import Any

from jlora.merging.arrays.inputs import read_inputs
from jlora.numerics.backends import library_of, log_softmax, single
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

      θ = θ_0 + w (θ_1 - θ_0)   where s > median(s) + 1.5 (Q3(s) - Q1(s))
      s = |θ_1 - θ_0| KL(softmax θ_1 ‖ softmax θ_0),   of each row

  An outlier by Tukey's fence is taken as it is, all else stays the base's. Of a
  bias or norm, the whole vector is one row.

  Args:
    stack: (1, ...) floating.
    weights: (1,), multiplies the changes that are taken.
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
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.4, 3.0]])
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
  score = _importance(model, under)
  low, middle, high = (_lower_quantile(score, q) for q in (1, 2, 3))
  fence = single(fence, score)
  xp = library_of(fence)
  # Compilers compute scores anew to compare them, and may round otherwise.
  least = (middle + fence * (high - low)) * xp.float32(1 + 2**-21)
  taken = score > least
  weight = given.weights[0]
  moved = xp.where(weight == 1, model, under + weight * (model - under))
  merged = xp.where(taken | xp.isnan(model), moved, under)
  return merged.astype(stack.dtype)


def _importance(model: Any, under: Any) -> Any:
  """Computes how much each entry matters, by its change and its row's."""
  xp = library_of(model, under)
  rows, below = (xp.atleast_1d(x) for x in (model, under))
  found = xp.abs(rows - below) * _divergence(rows, below)
  return found.reshape(model.shape)


def _divergence(rows: Any, below: Any) -> Any:
  """Computes KL(softmax rows ‖ softmax below) of each row, (..., 1).

  Of small changes d it is of the order d², which the difference of logarithms
  loses to rounding. With d less its mean under q = softmax(below),

      KL = e^-c Σ q d (e^d - 1) - c,   c = log(1 + Σ q (e^d - 1 - d))

  has no term of the order d, and none that is negative but c.
  """
  xp = library_of(rows)
  logs, log_q = (log_softmax(x) for x in (rows, below))
  wide = xp.sum(xp.exp(logs) * (logs - log_q), axis=-1, keepdims=True)
  q, change = xp.exp(log_q), rows - below
  most = xp.max(xp.abs(change), axis=-1, keepdims=True)
  small = change - xp.sum(q * change, axis=-1, keepdims=True)
  small = xp.where(xp.abs(small) <= 2**-20 * most, 0.0, small)
  small = xp.clip(small, -2, 2)
  power = xp.expm1(small)
  series = small**2 * (0.5 + small * (1 / 6 + small * (1 / 24 + small / 120)))
  rest = xp.where(xp.abs(small) < 0.1, series, power - small)
  c = xp.log1p(xp.sum(q * rest, axis=-1, keepdims=True))
  first = xp.sum(q * small * power, axis=-1, keepdims=True)
  found = xp.where(most < 1, xp.exp(-c) * first - c, wide)
  return xp.maximum(found, 0)


def _lower_quantile(score: Any, quarter: int) -> Any:
  """Returns the entry at ⌊(n - 1) quarter / 4⌋ in ascending order."""
  at = (score.size - 1) * quarter // 4
  return kth_magnitude(score, score.size - at)
