# SPDX-License-Identifier: Apache-2.0
"""Lists the methods that `composition` compares, each a row of its table."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.lib.adapters import pools, unit_ranks
from experiments.lib.adapters.benches import (
  SOURCES,
  Bench,
  Made,
  add,
  choose,
  columns_run,
  count_of,
  on_host,
  scaled,
)
from experiments.lib.adapters.equal_ranks import MERGES, SCALES, Merge
from experiments.lib.adapters.weighings import (
  ENTROPIC,
  MIXES,
  few_lora,
  learned,
  pool_of,
  searched,
)
from experiments.lib.models.loops import whole_run
from jlora.merging import by_module, init_columns, zip_columns

#: The row that others are compared with.
PLAIN = "1 and 1"
#: Rows of which there is one.
SEARCH = "search of 40, five examples (LoraHub)"
FEW = "LoRA on the 64"
_GRID = (0.75, 1.0, 1.25)
# Weights of a sum that are tried on validation.
_SWEPT = (0.75, 1.0, 1.25, 1.5)


class Method(NamedTuple):
  """A row of the table.

  Attributes:
    kind: of the method.
    name: of the row, unique.
    make: composes the two adapters of a work.
  """

  kind: str
  name: str
  make: Callable[[Bench], Made]


class Zip(NamedTuple):
  """How columns are learned.

  Attributes:
    strength: of the penalty.
    rate: Adam's learning rate.
    steps: updates.
    granularity: of `learn_columns`.
    then: (columns (n, in) of a module, generator) -> what is put in their
      place after learning.
  """

  strength: float = 0.0
  rate: float = 1e-2
  steps: int = 300
  granularity: Any = None
  then: Callable[..., np.ndarray] | None = None


def methods(*, has_entropy: bool) -> list[Method]:
  """Lists all rows of a work's table.

  Args:
    has_entropy: whether the work's predictions are distributions.

  Returns:
    Methods, what is to be compared with first.
  """
  mixes = {**MIXES, **(ENTROPIC if has_entropy else {})}
  return [
    *_rows("beside", weighted, "weights", BESIDE),
    *_rows("sum", weighted, "weights", SUMS),
    Method("sum", "best of 16, on validation", best_sum),
    *_rows("rank r", merged, "how", {x.name: x for x in MERGES}),
    *_rows("units", unit_ranks.by_units, "how", unit_ranks.ROWS),
    *_rows("columns", zipped, "how", {**ZIPS, **SPOILED}),
    *_rows("weights", learned, "how", mixes),
    Method("weights", SEARCH, searched),
    Method("pool", pools.OWN, pools.alone),
    *_rows("pool", pools.recycled, "how", pools.ROWS),
    *_rows("control", random_sum, "pool", RANDOM),
    Method("control", FEW, trained_on_few),
    *_rows("control", trained, "source", TRAINED),
    *_rows("control", trained_whole, "source", WHOLE),
  ]  # fmt: skip


def _rows(
  kind: str, make: Callable, option: str, settings: Mapping[str, Any]
) -> list[Method]:
  """Makes rows that differ in one option of a method."""
  return [
    Method(kind, name, functools.partial(make, **{option: value}))
    for name, value in settings.items()
  ]


#: Weights of the first and of the second adapter.
BESIDE = {
  "base": (0.0, 0.0),
  "first skill alone": (1.0, 0.0),
  "second skill alone": (0.0, 1.0),
}
SUMS = {f"{x:g} and {y:g}": (x, y) for x in _GRID for y in _GRID}


def weighted(bench: Bench, *, weights: Sequence[float]) -> Made:
  """Adds the two adapters."""
  return Made(add(bench.work.adapters, weights))


def best_sum(bench: Bench) -> Made:
  """Adds the two adapters with the weights that validate best."""
  made = {
    (x, y): add(bench.work.adapters, (x, y)) for x in _SWEPT for y in _SWEPT
  }
  best, loras = choose(bench, made)
  return Made(loras, 2, {"weights": best})


def merged(bench: Bench, *, how: Merge) -> Made:
  """Merges to the rank of one adapter, and scales as it validates best."""
  pair = [on_host(x) for x in bench.work.adapters]
  rank = bench.work.recipe.rank
  key = jax.random.key(bench.seed)
  settings = {"rank": rank}
  loras = on_host(
    jlora.merge(pair, method=how.call, key=key, settings=settings)
  )
  if how.then is not None:
    rng = np.random.default_rng([bench.seed, 6])
    loras = {
      path: how.then(x, [own[path] for own in pair], rng)
      for path, x in loras.items()
    }
  best, loras = choose(bench, {x: scaled(loras, x) for x in SCALES})
  return Made(loras, 1, {"scale": best})


#: Ways to learn columns.
ZIPS = {
  "dot 0.01, rate 5e-5, 100 steps (published)": Zip(0.01, 5e-5, 100),
  "no penalty": Zip(),
  "dot 1e-6": Zip(1e-6),
  "dot 1e-5": Zip(1e-5),
  "dot 1e-4": Zip(1e-4),
  "dot 1e-3": Zip(1e-3),
  "dot 0.01": Zip(1e-2),
  "no penalty, one number a module": Zip(granularity=by_module),
}


def shuffled(columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Shuffles each adapter's columns (n, in) of a module.

  Example:
    >>> sorted(shuffled(np.arange(3.0)[None], np.random.default_rng(0))[0])
    [np.float64(0.0), np.float64(1.0), np.float64(2.0)]
  """
  return rng.permuted(columns, axis=1)


def averaged(columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Replaces each adapter's columns (n, in) of a module by their mean.

  Example:
    >>> averaged(np.float32([[1, 3]]), np.random.default_rng(0))
    array([[2., 2.]], dtype=float32)
  """
  del rng
  means = columns.mean(axis=1, keepdims=True)
  return np.broadcast_to(means, columns.shape).copy()


#: Learned columns in whose place others are put.
SPOILED = {
  f"{name}: {title}": ZIPS[name]._replace(then=then)
  for name in ("no penalty", "dot 1e-5")
  for title, then in (("shuffled", shuffled), ("their means", averaged))
}


def zipped(bench: Bench, *, how: Zip) -> Made:
  """Learns columns, and puts something else in their place if asked to."""
  known = how._replace(then=None)
  columns, notes = bench.once(f"{known}", lambda: learn(bench, known))
  count = count_of(columns)
  if how.then is not None:
    rng = np.random.default_rng([bench.seed, 5])
    columns = {
      path: how.then(np.asarray(x), rng) for path, x in columns.items()
    }
  loras = zip_columns(bench.work.adapters, columns, granularity=how.granularity)
  return Made(loras, count, notes)


def learn(bench: Bench, how: Zip) -> tuple[Any, dict[str, float]]:
  """Learns columns on inputs of both skills.

  Args:
    bench: work and seed.
    how: settings.

  Returns:
    Columns; and figures: the losses of the last steps, the penalty's share of
    the whole, the mean cosine, and how far any column moved from 1.
  """
  work, functions = bench.work, bench.work.functions
  columns = init_columns(work.adapters, granularity=how.granularity)
  run = columns_run(
    functions.predict, functions.distance, how.rate, how.steps, how.granularity
  )
  rows = work.recipe.shown
  batches = tuple(
    bench.batches(name, how.steps, rows)[:-1] for name in ("first", "second")
  )
  frozen = work.params, work.adapters, jnp.float32(how.strength)
  columns, losses = run(columns, frozen, (batches,))
  last = jax.tree.map(lambda x: np.asarray(x)[-10:].mean(0), losses)
  keep = float(np.sum(last.keep))
  whole = keep + how.strength * float(last.overlap)
  moved = max(float(np.abs(np.asarray(x) - 1).max()) for x in columns.values())
  notes = {
    "keep": keep,
    "penalty's share": 1 - keep / whole if whole else 0.0,
    "cosine": float(last.cosine),
    "moved": moved,
  }
  return columns, notes


#: Random adapters that are added.
RANDOM = {
  "random entries, 1 and 1": "random entries",
  "random directions, 1 and 1": "random spectra",
}
#: What LoRAs of rank 2r are trained on.
TRAINED = {
  "LoRA on both skills' data": "skills, rehearsed",
  "LoRA on the 64 and both skills' data": "few and skills",
  "LoRA on much target data": "many",
  "LoRA on much target data and the skills'": "target and skills",
}


#: What all parameters are trained on.
WHOLE = {
  "everything trained on both skills' data": "skills, rehearsed",
  "everything trained on much target data and the skills'": "target and skills",
}


def random_sum(bench: Bench, *, pool: str) -> Made:
  """Adds random adapters."""
  return Made(add(pool_of(bench, pool), (1.0, 1.0)))


def trained_on_few(bench: Bench) -> Made:
  """Trains a LoRA on the examples that weights are learned from."""
  how, loras = few_lora(bench)
  return Made(loras, count_of(loras), {"rate and steps": how})


def trained(bench: Bench, *, source: str) -> Made:
  """Trains a LoRA of both ranks together on a source."""
  recipe = bench.work.recipe
  steps = recipe.joint_steps if source in SOURCES else recipe.steps
  loras = bench.train(source, 2 * recipe.rank, recipe.rate, steps)
  return Made(loras, count_of(loras))


def trained_whole(bench: Bench, *, source: str) -> Made:
  """Trains all parameters of the base on a source, at a third of the rate."""
  work = bench.work
  recipe = work.recipe
  run = whole_run(work.functions.loss, recipe.rate / 3, recipe.joint_steps)
  batches = bench.batches(source, recipe.joint_steps, recipe.batch)
  params, _ = run(work.params, (), batches)
  return Made({}, count_of(params), params=params)
