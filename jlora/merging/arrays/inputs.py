# SPDX-License-Identifier: Apache-2.0
"""Checks the arguments of merging methods, and sums over models.

`read_inputs` is how every method for arrays reads its arguments.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora.loras import Lora
from jlora.numerics.backends import library_of


class Inputs(NamedTuple):
  """The checked arguments of a merging method, all float32.

  Of NumPy if no array of JAX was among them: the method then compiles nothing.

  Attributes:
    models: (n, ...).
    weights: (n,), a NumPy array unless they are traced.
    base: (...), zeros if none was given.
  """

  models: Any
  weights: Any
  base: Any

  @property
  def deltas(self) -> Any:
    """The models' changes of the base, (n, ...)."""
    return self.models - self.base[None]


def read_inputs(
  method: str,
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  needs_base: bool = False,
  counts: tuple[int, float] = (1, math.inf),
) -> Inputs:
  """Checks the arguments of a merging method and converts them to float32.

  Args:
    method: its name, for errors.
    stack: (n, ...) floating, one parameter of n models.
    weights: (n,).
    base: (...) floating, or None.
    needs_base: whether None is an error.
    counts: the minimal and maximal number of models.

  Returns:
    Inputs. Sharding is kept.

  Raises:
    ValueError: `stack` is not a floating stack (or holds Loras), the number of
      models is not in `counts`, not one weight per model, weights that are not
      finite (unless traced), no base where one is needed, or a base of another
      shape.

  Example:
    >>> read_inputs("linear", jnp.ones((2, 3)), [1, 1]).weights
    array([1., 1.], dtype=float32)
  """
  _check_stack(method, stack)
  count, (least, most) = stack.shape[0], counts
  if not least <= count <= most:
    wanted = f"{least}" if most == least else f"at least {least}"
    raise ValueError(f"{method} merges {wanted} models, got {count}.")
  weights = numbers("weights", weights, count)
  xp = library_of(stack, weights, base)
  models = xp.asarray(stack).astype(xp.float32)
  if base is None:
    if needs_base:
      raise ValueError(
        f"{method} works on what models change of a base; pass the base they "
        "were finetuned from."
      )
    return Inputs(models, weights, xp.zeros(models.shape[1:], xp.float32))
  if base.shape != stack.shape[1:]:
    raise ValueError(
      f"{method}: base {base.shape} and models {stack.shape[1:]} differ in "
      "shape."
    )
  return Inputs(models, weights, xp.asarray(base).astype(xp.float32))


def numbers(name: str, values: Any, count: int) -> Any:
  """Converts numbers to one float32 number per model.

  Args:
    name: their name, for errors.
    values: (n,), or one for all.
    count: n.

  Returns:
    (n,) float32, a NumPy array unless they are traced, so that checks of the
    values work under `jit` as well.

  Raises:
    ValueError: another shape, or a value that is not finite (unless traced).

  Example:
    >>> numbers("density", 0.5, 2)
    array([0.5, 0.5], dtype=float32)
  """
  if is_known(values):
    values = np.asarray(jax.device_get(values), np.float32)
    if not np.isfinite(values).all():
      raise ValueError(f"{name} must be finite, got {values.tolist()}.")
  else:
    values = jnp.asarray(values).astype(jnp.float32)
  if values.shape not in ((), (count,)):
    raise ValueError(
      f"{name} {values.shape} must be one for each of {count} models."
    )
  return (np if is_known(values) else jnp).broadcast_to(values, (count,))


def shares(weights: Any) -> Any:
  """Divides weights (n,) by their sum.

  Raises:
    ValueError: a sum of zero. Traced weights give infinities or NaN instead.

  Example:
    >>> shares(np.float32([1, 3]))
    array([0.25, 0.75], dtype=float32)
  """
  total = weights.sum()
  if is_known(total) and abs(float(total)) < 1e-8:
    raise ValueError(
      f"weights {weights.tolist()} sum to zero and have no mean; use a method "
      "that adds, as task_arithmetic does."
    )
  return weights / total


def is_known(value: Any) -> bool:
  """Returns whether all values of a pytree are available, not traced."""
  return not any(isinstance(x, Tracer) for x in jax.tree.leaves(value))


def along_models(weights: Any, models: Any) -> Any:
  """Reshapes weights (n,) to (n, 1, ...), to multiply models (n, ...)."""
  return weights.reshape(-1, *(1,) * (models.ndim - 1))


def weighted_sum(weights: Any, models: Any) -> Any:
  """Computes `Σ_i weight_i model_i`, in float32.

  Elementwise, so that no accelerator's matrix unit rounds it.
  """
  return over_models(along_models(weights, models) * models)


def over_models(stack: Any) -> Any:
  """Sums over the first axis, one model after the other.

  Not `jnp.sum`: on CPUs, XLA passes short sums over millions of entries to a
  library that needs a second where this loop needs 3 ms.
  """
  return functools.reduce(operator.add, (stack[i] for i in range(len(stack))))


def inner(left: Any, right: Any, axis: int | None = None) -> Any:
  """Computes inner products of tensors, keeping summed axes with length 1.

  Sums axis by axis, because one long float32 sum loses digits.

  Args:
    left: (...) float32.
    right: the same number of axes.
    axis: to sum over; None sums over all.

  Example:
    >>> inner(jnp.ones((2, 3)), jnp.ones((2, 3))), inner(
    ...   jnp.ones((2, 3)), jnp.ones((2, 3)), -1).shape
    (Array([[6.]], dtype=float32), (2, 1))
  """
  product = left * right
  if product.ndim == 0:
    return product
  if axis is not None:
    return product.sum(axis=axis, keepdims=True)
  for own in reversed(range(product.ndim)):
    product = product.sum(axis=own, keepdims=True)
  return product


def euclidean_norm(x: Any, axis: int | None = None) -> Any:
  """Computes Euclidean norms, over the axes that `inner` sums over."""
  return library_of(x).sqrt(inner(x, x, axis))


def divided(x: Any, by: Any) -> Any:
  """Returns `x / by`, or x where `by` is 0.

  Example:
    >>> divided(jnp.array([3.0, 3.0]), jnp.array([0.0, 2.0]))
    Array([3. , 1.5], dtype=float32)
  """
  xp = library_of(by)
  return x / xp.where(by == 0, xp.float32(1), by)


def _check_stack(method: str, stack: Any) -> None:
  """Raises unless given a stack of floating arrays."""
  if isinstance(stack, list | tuple) and any(
    isinstance(one, Lora) for one in stack
  ):
    raise ValueError(
      f"{method} merges arrays and was given Loras. Use concat for their exact "
      f"sum, or functools.partial(core_space, method={method})."
    )
  if not isinstance(stack, jax.Array | np.ndarray):
    raise ValueError(
      f"{method} merges arrays stacked on a first axis, got "
      f"{type(stack).__name__}: use jnp.stack."
    )
  if stack.ndim < 1 or not jnp.issubdtype(stack.dtype, jnp.floating):
    raise ValueError(
      f"{method} merges a floating stack (n, ...), got {stack.dtype} "
      f"{stack.shape}."
    )
