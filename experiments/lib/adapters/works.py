# SPDX-License-Identifier: Apache-2.0
"""What every work of `composition` provides: a base, two skills, figures.

A work asks for two skills at once of a base whose adapters were trained apart.
Methods know nothing else of it, so that a further one is a further module.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.models.loops import Draw, adapter_run, side_by_side
from jlora.loras import Loras

Figures = dict[str, float]


class Recipe(NamedTuple):
  """How adapters of a work are trained.

  Attributes:
    rank: of one skill's adapter.
    steps: of an adapter's training.
    joint_steps: of a LoRA's on several sources at once.
    rate: the largest learning rate of it.
    batch: rows a step of it.
    shown: rows a step of what is learned with adapters as they are.
    few: examples of the target that weights are learned from.
    few_steps: of learning from them.
  """

  rank: int
  steps: int
  joint_steps: int
  rate: float
  batch: int
  shown: int
  few: int = 64
  few_steps: int = 200


class Functions(NamedTuple):
  """What all seeds of a work have in common, so that they share programs.

  Attributes:
    predict: (params, *inputs) -> prediction.
    loss: (params, *inputs, target) -> ().
    distance: (prediction, prediction) -> (), of `learn_columns`.
  """

  predict: Callable[..., jax.Array]
  loss: Callable[..., jax.Array]
  distance: Callable[..., jax.Array]


class Work(NamedTuple):
  """A work of one seed.

  Attributes:
    functions: of all seeds.
    recipe: of adapters.
    params: of the base.
    start: (key, rank) -> Loras that change nothing yet.
    adapters: the two skills' adapters.
    draws: name of a source -> Draw of (*inputs, target): "first" and "second"
      of one skill, "plain" of neither, "few", "five" and "many" of the target,
      "learned" and "chosen" of four fifths and one fifth of the few; and
      "unlabelled" of inputs alone, where predictions have an entropy.
    validate: params -> a number that is higher for better ones, on data that
      neither training nor `test` sees.
    test: params -> figures: "both" of what asks for both skills, "first" and
      "second" of what is kept of each, "distance" from the base on what neither
      is about.
    library: makes adapters of other skills of the same base.
  """

  functions: Functions
  recipe: Recipe
  params: Any
  start: Callable[[jax.Array, int], Loras]
  adapters: tuple[Loras, Loras]
  draws: Mapping[str, Draw]
  validate: Callable[[Any], float]
  test: Callable[[Any], Figures]
  library: Callable[[], Sequence[Loras]]


def four_fifths(count: int) -> int:
  """Counts those of few examples that are learned from; others choose.

  Example:
    >>> four_fifths(64)
    51
  """
  return count * 4 // 5


def train_rehearsed(
  loss: Callable[..., jax.Array],
  recipe: Recipe,
  params: Any,
  start: Callable[[jax.Array, int], Loras],
  sources: tuple[Draw, Draw],
  seed: int,
) -> Loras:
  """Trains an adapter on its own examples and on as many of neither skill.

  Args:
    loss: (params, *inputs, target) -> ().
    recipe: of the adapter.
    params: of the base.
    start: (key, rank) -> Loras that change nothing yet.
    sources: its own examples, and plain ones.
    seed: of the start and of the batches.

  Returns:
    Loras.
  """
  rng = np.random.default_rng([seed, 4])
  batches = side_by_side(*sources)(rng, recipe.steps, recipe.batch)
  loras = start(jax.random.key(seed), recipe.rank)
  run = adapter_run(loss, recipe.rate, recipe.steps)
  return run(loras, (params,), batches)[0]


def divergence(one: jax.Array, other: jax.Array) -> jax.Array:
  """Computes the mean KL(one ‖ other) of logits, in nats.

  Args:
    one: (..., n).
    other: (..., n).

  Returns:
    () float32.

  Example:
    >>> flat = jnp.zeros((1, 2))
    >>> round(float(divergence(jnp.log(jnp.array([[0.25, 0.75]])), flat)), 4)
    0.1308
  """
  p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (one, other))
  return (jnp.exp(p) * (p - q)).sum(axis=-1).mean()
