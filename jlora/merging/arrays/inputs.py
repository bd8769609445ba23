# SPDX-License-Identifier: Apache-2.0
"""What every merge of arrays is given: read as float32 and checked."""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora.loras import Lora


class Inputs(NamedTuple):
  """What a merge works on, all float32.

  Attributes:
    models: (n, ...).
    weights: (n,), NumPy's if they are known.
    base: (...), zeros where none was given.
  """

  models: Any
  weights: Any
  base: Any

  @property
  def deltas(self) -> Any:
    """(n, ...), what each model changes of the base."""
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
  """The arguments of a merge of arrays in float32, if they fit each other.

  Args:
    method: its name, for errors.
    stack: (n, ...) floating, one parameter of n models.
    weights: (n,).
    base: (...) floating, or None.
    needs_base: whether None is an error.
    counts: how many models the method takes, at least and at most.

  Returns:
    Inputs. Sharding is kept.

  Raises:
    ValueError: what is no floating stack (Loras among it), a number of models
      that the method does not take, weights that are not one for each model or
      known not to be finite, no base where one is needed, or one of another
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
  models = jnp.asarray(stack).astype(jnp.float32)
  if base is None:
    if needs_base:
      raise ValueError(
        f"{method} works on what models change of a base; pass the base they "
        "were finetuned from."
      )
    return Inputs(models, weights, jnp.zeros(models.shape[1:], jnp.float32))
  if base.shape != stack.shape[1:]:
    raise ValueError(
      f"{method}: base {base.shape} and models {stack.shape[1:]} differ in "
      "shape."
    )
  return Inputs(models, weights, jnp.asarray(base).astype(jnp.float32))


def numbers(name: str, values: Any, count: int) -> Any:
  """One float32 number a model.

  Args:
    name: what they are called in errors.
    values: (n,), or one for all.
    count: n.

  Returns:
    (n,) float32, of NumPy where they are known: checks that look at them then
    work under `jit` as well.

  Raises:
    ValueError: another shape, or a value that is known not to be finite.

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
  """Weights divided by their sum.

  Args:
    weights: (n,) float32.

  Returns:
    (n,) float32 of sum 1, of the same library.

  Raises:
    ValueError: a sum of zero. Under `jit` it gives infinities or NaN.

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
  """Whether values can be looked at: not while they are traced.

  Args:
    value: an array, a number, or a list of them.

  Returns:
    bool.

  Example:
    >>> is_known(jnp.ones(2))
    True
  """
  return not any(isinstance(x, Tracer) for x in jax.tree.leaves(value))


def along_models(weights: Any, models: Any) -> Any:
  """Numbers of models, shaped to be multiplied with their stack.

  Args:
    weights: (n,).
    models: (n, ...).

  Returns:
    (n, 1, ...).

  Example:
    >>> along_models(jnp.ones(2), jnp.ones((2, 3, 4))).shape
    (2, 1, 1)
  """
  return weights.reshape(-1, *(1,) * (models.ndim - 1))


def weighted_sum(weights: Any, models: Any) -> Any:
  """`Σ_i weight_i model_i`.

  Args:
    weights: (n,) float32.
    models: (n, ...) float32.

  Returns:
    (...) float32, elementwise: no accelerator's matrix unit rounds it.

  Example:
    >>> weighted_sum(jnp.array([1.0, 2.0]), jnp.ones((2, 2)))
    Array([3., 3.], dtype=float32)
  """
  return over_models(along_models(weights, models) * models)


def over_models(stack: Any) -> Any:
  """The sum over the first axis, one model after the other.

  Not `jnp.sum`: XLA's CPU backend gives that to a library which needs a second
  for a million entries where few are added up, and its own loop 3 ms.

  Args:
    stack: (n, ...) numbers.

  Returns:
    (...).

  Example:
    >>> over_models(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    Array([4., 6.], dtype=float32)
  """
  return functools.reduce(operator.add, (stack[i] for i in range(len(stack))))


def inner(left: Any, right: Any, axis: int | None = None) -> Any:
  """Inner products of tensors read as vectors, their axes kept with length 1.

  Args:
    left: (...) float32.
    right: the same number of axes.
    axis: that along which vectors lie; None is the whole tensor.

  Returns:
    (1, ...), or `axis` of length 1. Summed by rows first: one long sum of
    float32 loses digits.

  Example:
    >>> inner(jnp.ones((2, 3)), jnp.ones((2, 3))), inner(
    ...   jnp.ones((2, 3)), jnp.ones((2, 3)), -1).shape
    (Array([[6.]], dtype=float32), (2, 1))
  """
  product = left * right
  if product.ndim == 0:
    return product
  if axis is not None:
    return jnp.sum(product, axis=axis, keepdims=True)
  for own in reversed(range(product.ndim)):
    product = jnp.sum(product, axis=own, keepdims=True)
  return product


def euclidean_norm(x: Any, axis: int | None = None) -> Any:
  """The Euclidean norms of tensors read as vectors.

  Args:
    x: (...) float32.
    axis: as for `inner`.

  Returns:
    As `inner`.

  Example:
    >>> euclidean_norm(jnp.array([3.0, 4.0]))
    Array([5.], dtype=float32)
  """
  return jnp.sqrt(inner(x, x, axis))


def divided(x: Any, by: Any) -> Any:
  """`x / by`, and x itself where `by` is 0.

  Args:
    x: float32.
    by: float32, broadcasts to x.

  Returns:
    As x.

  Example:
    >>> divided(jnp.array([3.0, 3.0]), jnp.array([0.0, 2.0]))
    Array([3. , 1.5], dtype=float32)
  """
  return x / jnp.where(by == 0, jnp.float32(1), by)


def _check_stack(method: str, stack: Any) -> None:
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
