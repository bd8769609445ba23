# SPDX-License-Identifier: Apache-2.0
"""Spherical means: average directions on a sphere and lengths on a line."""

from typing import Any

from jlora.merging.arrays.inputs import (
  Inputs,
  divided,
  euclidean_norm,
  inner,
  read_inputs,
  shares,
  weighted_sum,
)
from jlora.numerics.backends import (
  batched,
  compiled,
  library_of,
  run_while,
  single,
)

# Directions cancel if their mean is shorter than this.
_CANCELLED = 1e-6


def slerp(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  t: Any = None,
  colinear: float = 0.9995,
  products: Any = None,
) -> Any:
  """Interpolates between two models along an arc, each read as one vector.

      θ = (sin((1-t) α) θ_1 + sin(t α) θ_2) / sin α,   α their angle

  Args:
    stack: (2, ...) floating; t = 0 gives the first.
    weights: (2,).
    base: unused: the arc connects the models themselves. `nuslerp` can connect
      their changes.
    key: unused.
    t: in [0, 1]; None is w_2 / (w_1 + w_2).
    colinear: above this |cos α| the straight line is taken, also for opposite
      vectors, which have no shortest arc.
    products: (3,), the inner products ⟨θ_1, θ_1⟩, ⟨θ_1, θ_2⟩, ⟨θ_2, θ_2⟩ of the
      whole tensor, if the stack is a piece of it; None computes the stack's.

  Returns:
    (...) in the stack's dtype. Costs three inner products of the whole tensor;
    under sharding only their sums move between devices.

  Raises:
    ValueError: not two models, weights that sum to zero where t is None, or as
      `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> slerp(stack, jnp.ones(2)).round(4)
    Array([0.7071, 1.4142], dtype=float32)

  References:
    Shoemake (1985); on models, as mergekit does.
  """
  del base, key
  given = read_inputs("slerp", stack, weights, counts=(2, 2))
  t = shares(given.weights)[1] if t is None else t
  products = _products(given.models) if products is None else products
  merged = _arc(given.models, _cosine(*products), t, colinear)
  return merged.astype(stack.dtype)


def nuslerp(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  axis: int | None = None,
) -> Any:
  """Applies `slerp` to two models or their changes, whole or vector by vector.

      θ = θ_0 + slerp(θ_1 - θ_0, θ_2 - θ_0),   t = w_2 / (w_1 + w_2)

  Args:
    stack: (2, ...) floating.
    weights: (2,); t is 1/2 where they sum to zero.
    base: (...), or None for zeros.
    key: unused.
    axis: of a single model, along which vectors lie: -1 for rows, 0 for
      columns. None is the whole tensor.

  Returns:
    (...) in the stack's dtype. The line is taken where 1 - |cos α| is below
    1e-6, the rounding of float32. mergekit instead tests |sin α| < 1e-8, misses
    opposite vectors by rounding, and divides by their sine.

  Raises:
    ValueError: not two models, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> nuslerp(stack, jnp.array([0.0, 1.0]))
    Array([0., 1.], dtype=float32)

  References:
    mergekit's method of this name.
  """
  del key
  given = read_inputs("nuslerp", stack, weights, base, counts=(2, 2))
  xp, total = library_of(given.weights), given.weights.sum()
  is_none = xp.abs(total) < 1e-6
  t = xp.where(is_none, 0.5, divided(given.weights[1], total))
  cosine = _cosine(*_products(given.deltas, axis))
  change = _arc(given.deltas, cosine, t, 1 - 1e-6)
  return (given.base + change).astype(stack.dtype)


def multislerp(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
) -> Any:
  """Averages directions of models or changes, and their lengths separately.

      θ = θ_0 + (Σ w_i ‖δ_i‖) m / ‖m‖,   m = Σ w_i u_i,   u_i = δ_i / ‖δ_i‖

  mergekit adds a step along the tangent Σ w_i (u_i - ⟨u_i, m⟩ m). For this m
  the tangent is zero, so the step is left out. `karcher` iterates.

  Args:
    stack: (n, ...) floating.
    weights: (n,), divided by their sum.
    base: (...), or None for zeros.
    key: unused.

  Returns:
    (...) in the stack's dtype; the straight mean where directions cancel (there
    mergekit refuses three models or more). Under sharding only sums move
    between devices.

  Raises:
    ValueError: weights that sum to zero, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> multislerp(stack, jnp.ones(2)).round(4)
    Array([1.4142, 1.4142], dtype=float32)

  References:
    mergekit's method of this name.
  """
  del key
  given = read_inputs("multislerp", stack, weights, base)
  weights, units, length = _polar(given)
  mean = weighted_sum(weights, units)
  size = euclidean_norm(mean)
  straight = weighted_sum(weights, given.deltas)
  xp = library_of(size)
  change = xp.where(size > _CANCELLED, length * divided(mean, size), straight)
  return (given.base + change).astype(stack.dtype)


def karcher(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  steps: int = 10,
  tol: float = 1e-5,
) -> Any:
  """Computes the Karcher mean of directions, times the mean length.

      m = argmin Σ w_i angle(m, u_i)²,   by   m ← exp_m(Σ w_i log_m u_i)

  Args:
    stack: (n, ...) floating.
    weights: (n,), divided by their sum.
    base: (...), or None for zeros: the mean is then of the models themselves,
      as in mergekit.
    key: unused.
    steps: maximal number.
    tol: in radians; stops after a smaller step.

  Returns:
    (...) in the stack's dtype. Starts from the direction of the mean, or of the
    first model where directions cancel. A tensor of zeros has no direction and
    contributes none. Each step reads all models once; under sharding only sums
    move between devices.

  Raises:
    ValueError: weights that sum to zero, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> karcher(stack, jnp.ones(2)).round(4)
    Array([1.4142, 1.4142], dtype=float32)

  References:
    Karcher (1977); on models, as mergekit does.
  """
  del key
  given = read_inputs("karcher", stack, weights, base)
  weights, units, length = _polar(given)
  change = length * _mean_direction(weights, units, steps, tol)
  return (given.base + change).astype(stack.dtype)


@compiled
def _mean_direction(weights: Any, units: Any, steps: Any, tol: Any) -> Any:
  """Computes the Karcher mean of unit vectors."""
  xp = library_of(units)

  def step(state):
    """Moves the mean along the weighted mean of tangents."""
    count, mean, _ = state
    cosine = xp.clip(batched(lambda u: inner(u, mean))(units), -1, 1)
    angle = xp.arccos(cosine)
    sine = xp.sin(angle)
    ratio = xp.where(sine > 1e-6, divided(angle, sine), 1.0)
    tangent = weighted_sum(weights, ratio * (units - cosine * mean[None]))
    size = euclidean_norm(tangent)
    mean = xp.cos(size) * mean + xp.sin(size) * divided(tangent, size)
    return count + 1, divided(mean, euclidean_norm(mean)), size.max()

  mean = weighted_sum(weights, units)
  size = euclidean_norm(mean)
  mean = xp.where(size > _CANCELLED, divided(mean, size), units[0])
  _, mean, _ = run_while(
    lambda state: (state[0] < steps) & (state[2] > tol),
    step,
    (xp.int32(0), mean, xp.float32(xp.inf)),
  )
  return mean


def _polar(given: Inputs) -> tuple[Any, Any, Any]:
  """Returns weights of sum 1, unit vectors (n, ...) and the mean length."""
  weights = shares(given.weights)
  deltas = given.deltas
  norms = batched(euclidean_norm)(deltas)
  return weights, divided(deltas, norms), weighted_sum(weights, norms)


def products_of(stack: Any) -> Any:
  """Computes the inner products that determine the angle of two models.

      ⟨θ_1, θ_1⟩, ⟨θ_1, θ_2⟩, ⟨θ_2, θ_2⟩

  Args:
    stack: (2, ...) float32.

  Returns:
    (3,) float32; those of a tensor's pieces add up to the tensor's.

  Example:
    >>> import jax.numpy as jnp
    >>> products_of(jnp.array([[1.0, 0.0], [1.0, 2.0]]))
    Array([1., 1., 5.], dtype=float32)
  """
  products = [product.reshape(()) for product in _products(stack)]
  return library_of(stack).stack(products)


def _products(pair: Any, axis: int | None = None) -> tuple[Any, Any, Any]:
  """Computes the three inner products, keeping summed axes with length 1."""
  left, right = pair
  return (
    inner(left, left, axis),
    inner(left, right, axis),
    inner(right, right, axis),
  )


def _cosine(first: Any, between: Any, second: Any) -> Any:
  """Computes the cosine from the three inner products."""
  xp = library_of(first)
  cosine = divided(between, xp.sqrt(first) * xp.sqrt(second))
  return xp.clip(cosine, -1, 1)


def _arc(pair: Any, cosine: Any, t: Any, colinear: float) -> Any:
  """Returns the point t of the arc, or of the line if nearly colinear."""
  left, right = pair
  t = single(t, cosine)
  xp = library_of(t)
  angle = xp.arccos(cosine)
  straight = xp.abs(cosine) > colinear
  sine = xp.where(straight, 1.0, xp.sin(angle))
  first = xp.where(straight, 1 - t, xp.sin((1 - t) * angle) / sine)
  second = xp.where(straight, t, xp.sin(t * angle) / sine)
  return first * left + second * right
