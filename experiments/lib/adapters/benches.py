# SPDX-License-Identifier: Apache-2.0
"""What all methods of `composition` learn with: batches, programs, choices.

A `Bench` is a work of one seed. Two methods that read the same source see the
same batches, so that they differ in the method alone.
"""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jlora
from experiments.lib.adapters.works import Work
from experiments.lib.models.loops import (
  adapter_run,
  compile_steps,
  side_by_side,
)
from jlora.loras import Loras
from jlora.merging import concat, dot, learn_columns, learn_weights

#: (rate, steps) -> optimiser.
Rule = Callable[[float, int], optax.GradientTransformation]
#: name of a source -> sources that a batch is drawn from in equal shares.
SOURCES = {
  "skills": ("first", "second"),
  "skills, rehearsed": ("first", "second", "plain", "plain"),
  "few and skills": ("few", "first", "second", "plain"),
  "target and skills": ("many", "first", "second", "plain"),
}


class Made(NamedTuple):
  """What a method made.

  Attributes:
    loras: the composed adapter.
    trained: how many numbers data have set, beside the skills' adapters.
    notes: further figures, for the row's file.
    params: the whole model, where it is no adapter on the base.
    others: the same from other starts; the row has the medians of all.
  """

  loras: Loras
  trained: int = 0
  notes: Mapping[str, Any] = {}
  params: Any = None
  others: Sequence[Loras] = ()


class Bench:
  """A work of one seed, and what methods share.

  Attributes:
    work: the work.
    seed: of batches.
    borrowed: seconds that shared parts took, of the method that is timed.
  """

  def __init__(self, work: Work, seed: int):
    """Starts with nothing made."""
    self.work, self.seed, self.borrowed = work, seed, 0.0
    self._made: dict[str, tuple[Any, float]] = {}

  def once(self, name: str, make: Callable[[], Any]) -> Any:
    """Makes a shared part at first, and counts what it took each time."""
    if name not in self._made:
      outer, self.borrowed, began = self.borrowed, 0.0, time.monotonic()
      value = jax.block_until_ready(make())
      whole = time.monotonic() - began + self.borrowed
      self._made[name], self.borrowed = (value, whole), outer
    else:
      self.borrowed += self._made[name][1]
    return self._made[name][0]

  def batches(self, source: str, steps: int, rows: int) -> tuple:
    """Draws batches, the same whenever a source is asked for.

    Args:
      source: of the work's draws or of SOURCES.
      steps: batches.
      rows: of a batch.

    Returns:
      Arrays (steps, rows, ...).
    """
    names = SOURCES.get(source, (source,))
    draw = side_by_side(*(self.work.draws[name] for name in names))
    rng = np.random.default_rng([self.seed, zlib.crc32(source.encode())])
    return draw(rng, steps, rows)

  def train(self, source: str, rank: int, rate: float, steps: int) -> Loras:
    """Trains a new adapter on a source.

    Args:
      source: as for `batches`.
      rank: of the adapter.
      rate: the largest learning rate.
      steps: updates.

    Returns:
      Loras.
    """
    work = self.work
    start = work.start(jax.random.key(1000 + self.seed), rank)
    run = adapter_run(work.functions.loss, rate, steps)
    batches = self.batches(source, steps, work.recipe.batch)
    return run(start, (work.params,), batches)[0]


def measure(bench: Bench, make: Callable[[Bench], Made]) -> dict[str, Any]:
  """Makes a composed adapter and tests it.

  Args:
    bench: work and seed.
    make: the method.

  Returns:
    figures, seconds (with those of shared parts), trained, notes.
  """
  bench.borrowed, began = 0.0, time.monotonic()
  made = jax.block_until_ready(make(bench))
  seconds = time.monotonic() - began + bench.borrowed
  work = bench.work
  if made.params is not None:
    figures, notes = work.test(made.params), dict(made.notes)
  else:
    found = [
      work.test(summed(work.params, x)) for x in (made.loras, *made.others)
    ]
    figures = {
      name: float(np.median([x[name] for x in found])) for name in found[0]
    }
    notes = dict(made.notes)
    if made.others:
      notes["both"] = [round(x["both"], 5) for x in found]
  return {
    "figures": figures,
    "seconds": round(seconds, 3),
    "trained": made.trained,
    "notes": notes,
  }


def choose(bench: Bench, made: Mapping[Any, Loras]) -> tuple[Any, Loras]:
  """Returns what validates best, and under which name.

  Args:
    bench: work and seed.
    made: name -> Loras.

  Returns:
    The name, and the Loras.
  """
  work = bench.work
  scores = {
    name: work.validate(summed(work.params, loras))
    for name, loras in made.items()
  }
  best = max(scores, key=lambda name: scores[name])
  return best, made[best]


@jax.jit
def summed(params: Any, loras: Loras) -> Any:
  """Adds an adapter to the base, as one program for each set of ranks."""
  return jlora.apply(params, loras)


def count_of(tree: Any) -> int:
  """Counts the numbers of a pytree; scales of Loras are not trained.

  Example:
    >>> count_of({"w": np.zeros((2, 3))})
    6
  """
  is_lora = lambda x: hasattr(x, "rank")  # noqa: E731
  leaves = jax.tree.leaves(tree, is_leaf=is_lora)
  return sum(x.a.size + x.b.size if is_lora(x) else np.size(x) for x in leaves)


def on_host(loras: Loras) -> Loras:
  """Copies Loras to NumPy arrays, with which sums compile nothing."""
  return jax.tree.map(np.asarray, loras)


def scaled(loras: Loras, weight: float) -> Loras:
  """Multiplies the scales of Loras."""
  return {
    path: dataclasses.replace(x, scale=np.float32(weight) * np.asarray(x.scale))
    for path, x in loras.items()
  }


def add(adapters: Sequence[Loras], weights: Sequence[float]) -> Loras:
  """Adds adapters of equal paths, exactly.

  Args:
    adapters: n of them.
    weights: (n,).

  Returns:
    Loras of NumPy arrays.
  """
  own = [on_host(x) for x in adapters]
  return {path: concat([x[path] for x in own], weights) for path in own[0]}


def constant(rate: float, steps: int) -> optax.GradientTransformation:
  """Returns Adam with a learning rate that stays as it is."""
  del steps
  return optax.adam(rate)


@functools.cache
def weights_run(loss, activation, rule: Rule, rate: float, steps: int):
  """Compiles the learning of weights, once for each setting.

  Args:
    loss: (params, *batch) -> ().
    activation: of `learn_weights`.
    rule: of the optimiser.
    rate: learning rate.
    steps: updates.

  Returns:
    (z, (params, adapters), batches) -> z and losses.
  """
  learner = learn_weights(loss, rule(rate, steps), activation=activation)
  return compile_steps(learner.init, learner.update)


@functools.cache
def columns_run(
  predict, distance, rate: float, steps: int, granularity: Any = None
):
  """Compiles the learning of columns; the penalty's strength is an argument.

  Args:
    predict: (params, *inputs) -> prediction.
    distance: between predictions.
    rate: Adam's learning rate.
    steps: updates.
    granularity: of `learn_columns`.

  Returns:
    (columns, (params, adapters, strength), (batches of each adapter,)) ->
    columns and Losses.
  """
  optimiser = constant(rate, steps)

  def update(columns, state, params, adapters, strength, batches):
    """Takes a step."""
    learner = learn_columns(
      predict, optimiser, distance=distance, penalty=dot, strength=strength,
      granularity=granularity,
    )  # fmt: skip
    return learner.update(columns, state, params, adapters, batches)

  return compile_steps(optimiser.init, update)
