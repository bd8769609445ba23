# SPDX-License-Identifier: Apache-2.0
"""Means of models: linear, passthrough, nearswap and model stock."""

import math
from typing import Any

import numpy as np

from jlora.merging.arrays.inputs import (
  divided,
  euclidean_norm,
  inner,
  is_known,
  over_models,
  read_inputs,
  shares,
  weighted_sum,
)
from jlora.numerics.backends import batched, library_of, single


def linear(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  normalize: bool = True,
) -> Any:
  """Computes the weighted mean of models.

      θ = Σ w_i θ_i / Σ w_i

  Args:
    stack: (n, ...) floating.
    weights: (n,).
    base: unused; there so that all methods have the same arguments. The mean of
      models equals the base plus the mean of their changes.
    key: unused, likewise.
    normalize: False leaves out the division.

  Returns:
    (...) in the stack's dtype. Elementwise: keeps the sharding.

  Raises:
    ValueError: the weights sum to zero, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> linear(jnp.array([[1.0], [5.0]]), jnp.array([3.0, 1.0]))
    Array([2.], dtype=float32)

  References:
    Model soups (Wortsman et al., 2022).
  """
  del base, key
  given = read_inputs("linear", stack, weights)
  weights = shares(given.weights) if normalize else given.weights
  return weighted_sum(weights, given.models).astype(stack.dtype)


def passthrough(
  stack: Any, weights: Any, base: Any = None, *, key: Any = None
) -> Any:
  """Returns a single model's parameter times its weight.

  Args:
    stack: (1, ...) floating.
    weights: (1,); with 1 the parameter is returned exactly.
    base: unused.
    key: unused.

  Returns:
    (...) in the stack's dtype.

  Raises:
    ValueError: more than one model, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> passthrough(jnp.array([[2.0, 4.0]]), jnp.array([0.5]))
    Array([1., 2.], dtype=float32)
  """
  del base, key
  given = read_inputs("passthrough", stack, weights, counts=(1, 1))
  return weighted_sum(given.weights, given.models).astype(stack.dtype)


def nearswap(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  t: Any,
) -> Any:
  """Moves every entry of the base towards a model's, by at most t.

      θ = θ_0 + c (θ_1 - θ_0),   c = clip(w t / max(|θ_1 - θ_0|, 1e-6), 0, 1)

  Args:
    stack: (1, ...) floating.
    weights: (1,), multiplies t.
    base: (...), the model that is changed.
    key: unused.
    t: how far entries may move, in the parameters' own units. Entries that
      differ by less become the model's.

  Returns:
    (...) in the stack's dtype. Elementwise: keeps the sharding.

  Raises:
    ValueError: more than one model, no base, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack, base = jnp.array([[1.01, 1.5, 3.0]]), jnp.ones(3)
    >>> nearswap(stack, jnp.ones(1), base, t=0.1).round(4)
    Array([1.01, 1.1 , 1.1 ], dtype=float32)

  References:
    mergekit's method of this name, which has no paper.
  """
  del key
  given = read_inputs(
    "nearswap", stack, weights, base, needs_base=True, counts=(1, 1)
  )
  change = given.deltas[0]
  t = given.weights[0] * single(t, change)
  xp = library_of(t, change)
  share = xp.clip(t / xp.maximum(xp.abs(change), 1e-6), 0, 1)
  merged = xp.where(share == 1, given.models[0], given.base + share * change)
  return merged.astype(stack.dtype)


def model_stock(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  axis: int | None = None,
) -> Any:
  """Interpolates between the base and its finetunes' mean, by their angles.

      θ = t mean(θ_i) + (1 - t) θ_0,   t = n c / (1 + (n - 1) c)

  c is the mean cosine of all pairs of changes. What finetunes share is taken as
  learnt and where they differ as noise, which a mean of more models averages
  out.

  Args:
    stack: (n, ...) floating, two models or more.
    weights: (n,), all equal: the paper's mean is unweighted.
    base: (...).
    key: unused.
    axis: of a single model; vectors along it have an angle each, as with
      mergekit's `filter_wise`. None is one angle for the whole tensor.

  Returns:
    (...) in the stack's dtype. The base where changes are orthogonal or obtuse,
    for which the formula gives t <= 0. `n (n - 1) / 2` inner products; under
    sharding only their sums move between devices.

  Raises:
    ValueError: a single model, no base, weights that differ (unless traced), or
      as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[1.0, 0.0], [0.5, 3**0.5 / 2]])   # 60 degrees
    >>> model_stock(stack, jnp.ones(2), jnp.zeros(2)).round(4)
    Array([0.5       , 0.28869998], dtype=float32)

  References:
    Jang et al. (2024).
  """
  del key
  given = read_inputs(
    "model_stock", stack, weights, base, needs_base=True, counts=(2, math.inf)
  )
  if is_known(given.weights) and np.ptp(given.weights):
    raise ValueError(
      f"model_stock takes equal weights, got {given.weights.tolist()}."
    )
  deltas = given.deltas
  count = deltas.shape[0]
  units = divided(deltas, batched(lambda x: euclidean_norm(x, axis))(deltas))
  cosines = [
    inner(units[i], units[j], axis) for j in range(count) for i in range(j)
  ]
  cosine = library_of(deltas).clip(sum(cosines) / len(cosines), 0, 1)
  share = count * cosine / (1 + (count - 1) * cosine)
  merged = given.base + share * over_models(deltas) / len(deltas)
  return merged.astype(stack.dtype)
