# SPDX-License-Identifier: Apache-2.0
"""Trains by compiled loops over batches that were drawn before.

XLA takes long to compile a loop for CPUs that draws its own batches; here NumPy
draws them all, and a loop only reads.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from jlora.training import train

#: (generator, steps, rows a step) -> arrays (steps, rows, ...).
Draw = Callable[[np.random.Generator, int, int], tuple[np.ndarray, ...]]


def schedule(rate: float, steps: int) -> optax.GradientTransformation:
  """Returns Adam with a learning rate that rises briefly, then falls to zero.

  Args:
    rate: the largest, after a twentieth of the steps.
    steps: of the whole training.

  Returns:
    An optax transformation.
  """
  return optax.adam(
    optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20 + 1, steps + 1)
  )


def compile_steps(
  init: Callable[[Any], Any], update: Callable[..., tuple]
) -> Callable[..., tuple[Any, Any]]:
  """Compiles all steps of a training as one program.

  Args:
    init: trained -> state.
    update: (trained, state, *frozen, *batch) -> (trained, state, value).

  Returns:
    (trained, frozen, batches) -> trained and all values, first axis steps;
    batches has that axis first as well.

  Example:
    >>> run = compile_steps(lambda x: (), lambda x, s, k, b: (x + k * b, s, x))
    >>> run(0, (10,), (np.arange(3),))[0].tolist()
    30
  """
  part = compile_part(update)

  @jax.jit
  def run(trained, frozen, batches):
    """Takes all steps."""
    trained, _, values = part(trained, init(trained), frozen, batches)
    return trained, values

  return run


def compile_part(update: Callable[..., tuple]) -> Callable[..., tuple]:
  """Compiles some steps of a training that goes on after them.

  Args:
    update: (trained, state, *frozen, *batch) -> (trained, state, value).

  Returns:
    (trained, state, frozen, batches) -> trained, state and all values; batches
    as for `compile_steps`.

  Example:
    >>> part = compile_part(lambda x, s, k, b: (x + k * b, s + 1, x))
    >>> [x.tolist() for x in part(0, 0, (10,), (np.arange(3),))]
    [30, 3, [0, 0, 10]]
  """

  @jax.jit
  def part(trained, state, frozen, batches):
    """Takes the steps."""

    def step(carry, batch):
      """Takes one."""
      trained, state, value = update(*carry, *frozen, *batch)
      return (trained, state), value

    (trained, state), values = jax.lax.scan(step, (trained, state), batches)
    return trained, state, values

  return part


@functools.cache
def adapter_run(
  loss: Callable[..., jax.Array], rate: float, steps: int
) -> Callable[..., tuple[Any, Any]]:
  """Compiles the training of adapters, once for each loss and schedule.

  Args:
    loss: (params, *batch) -> ().
    rate: the largest learning rate.
    steps: of the whole training.

  Returns:
    (loras, (params,), batches) -> loras and losses.
  """
  return compile_steps(*train(loss, schedule(rate, steps)))


@functools.cache
def whole_run(
  loss: Callable[..., jax.Array], rate: float, steps: int
) -> Callable[..., tuple[Any, Any]]:
  """Compiles the training of all parameters, once for each loss and schedule.

  Args:
    loss: (params, *batch) -> ().
    rate: the largest learning rate.
    steps: of the whole training.

  Returns:
    (params, (), batches) -> params and losses.
  """
  optimiser = schedule(rate, steps)

  def update(params, state, *batch):
    """Takes one step."""
    value, gradient = jax.value_and_grad(loss)(params, *batch)
    change, state = optimiser.update(gradient, state, params)
    return optax.apply_updates(params, change), state, value

  return compile_steps(optimiser.init, update)


def side_by_side(*draws: Draw) -> Draw:
  """Draws equal shares of every batch from several sources.

  Args:
    *draws: sources of equal shapes.

  Returns:
    Draw; rows are a multiple of the number of sources, or fewer are drawn.

  Example:
    >>> ones = lambda rng, steps, rows: (np.ones((steps, rows)),)
    >>> side_by_side(ones, ones)(None, 1, 5)[0].shape
    (1, 4)
  """

  def draw(rng, steps, rows):
    """Draws from each in turn."""
    parts = [own(rng, steps, rows // len(draws)) for own in draws]
    return tuple(np.concatenate(x, axis=1) for x in zip(*parts, strict=True))

  return draw
