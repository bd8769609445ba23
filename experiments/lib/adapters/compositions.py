# SPDX-License-Identifier: Apache-2.0
"""Lists the methods that `composition` compares, each a row of its table."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.lib.adapters.benches import (
  SOURCES,
  Bench,
  Made,
  Rule,
  add,
  choose,
  columns_run,
  constant,
  count_of,
  on_host,
  scaled,
  weights_run,
)
from experiments.lib.adapters.equal_ranks import MERGES, Merge
from experiments.lib.models.loops import schedule
from jlora.loras import Loras
from jlora.merging import (
  by_module,
  entropy,
  free,
  init_columns,
  init_weights,
  leaky,
  mix,
  random_like,
  search_weights,
  softmax,
  unit,
  zip_columns,
)
from jlora.paths import key_for

#: The row that others are compared with.
PLAIN = "1 and 1"
_GRID = (0.75, 1.0, 1.25)
# What is tried on validation: weights of a sum, scales of what was merged, and
# learning rates of a LoRA on few examples.
_SWEPT = (0.75, 1.0, 1.25, 1.5)
_SCALES = (0.75, 1.0, 1.25, 1.5, 2.0)
_RATES = (1e-3, 3e-3, 1e-2)


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


class Mix(NamedTuple):
  """How one weight a module and adapter is learned.

  Attributes:
    pool: as `pool_of` names it.
    activation: of `mix`.
    start: of all z; None draws them from N(0, 1).
    source: of batches.
    rate: learning rate.
    steps: updates.
    rule: of the optimiser.
    is_labelled: whether targets are used; otherwise entropy is made small.
  """

  pool: str
  activation: Callable
  start: float | None
  source: str
  rate: float = 5e-2
  steps: int = 200
  rule: Rule = schedule
  is_labelled: bool = True


def methods(*, has_entropy: bool) -> list[Method]:
  """Lists all rows of a work's table.

  Args:
    has_entropy: whether the work's predictions are distributions.

  Returns:
    Methods, what is to be compared with first.
  """
  mixes = {**MIXES, **(ENTROPIC if has_entropy else {})}
  search = "search of 40, five examples (LoraHub)"
  return [
    *_rows("beside", weighted, "weights", BESIDE),
    *_rows("sum", weighted, "weights", SUMS),
    Method("sum", "best of 16, on validation", best_sum),
    *_rows("rank r", merged, "how", {x.name: x for x in MERGES}),
    *_rows("columns", zipped, "how", {**ZIPS, **SPOILED}),
    *_rows("weights", learned, "how", mixes),
    Method("weights", search, searched),
    *_rows("control", random_sum, "pool", RANDOM),
    Method("control", "LoRA on the 64", trained_on_few),
    *_rows("control", trained, "source", TRAINED),
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
  best, loras = choose(bench, {x: scaled(loras, x) for x in _SCALES})
  return Made(loras, 1, {"scale": best})


#: Ways to learn columns.
ZIPS = {
  "dot 0.01, rate 5e-5, 100 steps (published)": Zip(0.01, 5e-5, 100),
  "no penalty": Zip(),
  "dot 1e-5": Zip(1e-5),
  "dot 1e-4": Zip(1e-4),
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


_OWN = "own and "
_CAT = Mix("skills", softmax, 0.0, "skills")
_RECYCLED = Mix("skills", leaky, 0.0, "few", steps=100)
#: Ways to learn weights.
MIXES = {
  "softmax from N(0, 1), skills' data, rate 1e-4 (CAT, published)": Mix(
    "skills", softmax, None, "skills", 1e-4, 200
  ),
  "softmax, skills' data (CAT)": _CAT,
  "softmax, the 64": _CAT._replace(source="few"),
  "free, skills' data": Mix("skills", free, 1.0, "skills"),
  "free, the 64": Mix("skills", free, 1.0, "few"),
  "free, the 64, random entries": Mix("random entries", free, 1.0, "few"),
  "free, the 64, random directions": Mix("random spectra", free, 1.0, "few"),
  "leaky, the 64 (Recycling)": _RECYCLED,
  "leaky, random entries": _RECYCLED._replace(pool="random entries"),
  "leaky, random directions": _RECYCLED._replace(pool="random spectra"),
  "leaky, with the own LoRA": _RECYCLED._replace(pool="own and skills"),
  "leaky, with the own LoRA, random entries": _RECYCLED._replace(
    pool="own and random entries"
  ),
  "leaky, with the own LoRA, random directions": _RECYCLED._replace(
    pool="own and random spectra"
  ),
}
#: Those that need the entropy of predictions.
ENTROPIC = {
  "clipped from 0.3, unlabelled (AdaMerging)": Mix(
    "skills", unit, 0.3, "unlabelled", 1e-3, 500, constant, is_labelled=False
  ),
  "clipped from 0.3, the 64": Mix(
    "skills", unit, 0.3, "few", 1e-3, 500, constant
  ),
}
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


def learned(bench: Bench, *, how: Mix) -> Made:
  """Learns one weight a module and adapter."""
  work, pool = bench.work, pool_of(bench, how.pool)
  key = jax.random.key(bench.seed) if how.start is None else None
  z = init_weights(pool, how.start or 0.0, key=key)
  loss = work.functions.loss
  if not how.is_labelled:
    loss = entropy_of(work.functions.predict)
  run = weights_run(loss, how.activation, how.rule, how.rate, how.steps)
  batches = bench.batches(how.source, how.steps, work.recipe.shown)
  z, losses = run(z, (work.params, pool), batches)
  shares = {path: how.activation(x) for path, x in z.items()}
  means = np.mean([np.asarray(x) for x in shares.values()], axis=0)
  notes = {
    "weights": [round(float(x), 4) for x in means],
    "loss": float(np.mean(np.asarray(losses)[-10:])),
  }
  loras = mix(pool, z, activation=how.activation)
  own = pool[0] if how.pool.startswith(_OWN) else {}
  return Made(loras, count_of(z) + count_of(own), notes)


@functools.cache
def entropy_of(predict: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Returns the entropy of predictions as a loss, (params, *inputs) -> ()."""

  def loss(params, *inputs):
    """Computes the mean entropy."""
    return entropy(predict(params, *inputs))

  return loss


def pool_of(bench: Bench, name: str) -> list[Loras]:
  """Returns the adapters that a pool's weights are of.

  Args:
    bench: work and seed.
    name: "skills", "random entries", "random spectra"; with "own and " before
      it also the LoRA that was trained on the target's few examples.

  Returns:
    Adapters.
  """
  skills = list(bench.work.adapters)
  pools = {
    "skills": lambda: skills,
    "random entries": lambda: _random(bench, "entries"),
    "random spectra": lambda: _random(bench, "spectrum"),
  }
  own = [few_lora(bench)[1]] if name.startswith(_OWN) else []
  return [*own, *pools[name.removeprefix(_OWN)]()]


def _random(bench: Bench, keep: Literal["entries", "spectrum"]) -> list[Loras]:
  """Draws random adapters in place of both."""
  key = key_for(jax.random.key(bench.seed), keep)
  return random_like(bench.work.adapters, key, keep=keep)


def random_sum(bench: Bench, *, pool: str) -> Made:
  """Adds random adapters."""
  return Made(add(pool_of(bench, pool), (1.0, 1.0)))


@functools.cache
def _sum_loss(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Compiles the loss of a weighted sum of adapters."""

  @jax.jit
  def value(params, adapters, weights, *batch):
    """Computes it."""
    return loss(jlora.apply(params, adapters, list(weights)), *batch)

  return value


def searched(bench: Bench) -> Made:
  """Searches one weight for each adapter, without gradients."""
  work = bench.work
  value = _sum_loss(work.functions.loss)
  batch = tuple(x[0] for x in bench.batches("five", 1, work.recipe.batch))
  pair = list(work.adapters)

  def loss(weights):
    """Computes the loss on five examples, and a little of the weights' size."""
    weights = jnp.asarray(weights, jnp.float32)
    size = float(np.abs(np.asarray(weights)).mean())
    return float(value(work.params, pair, weights, *batch)) + 0.05 * size

  key = jax.random.key(bench.seed)
  weights = np.asarray(search_weights(loss, len(pair), key=key))
  notes = {"weights": [round(float(x), 4) for x in weights]}
  return Made(add(pair, weights.tolist()), len(pair), notes)


def few_lora(bench: Bench) -> tuple[tuple[float, int], Loras]:
  """Trains a LoRA on the target's few examples, as it validates best.

  Args:
    bench: work and seed.

  Returns:
    Learning rate and steps, of several short ones and of that of a skill; and
    the LoRA.
  """
  recipe = bench.work.recipe
  tried = [(rate, recipe.few_steps) for rate in _RATES]
  tried.append((recipe.rate, recipe.steps))

  def make():
    """Trains one for each rate and length."""
    made = {how: bench.train("few", recipe.rank, *how) for how in tried}
    return choose(bench, made)

  return bench.once("few", make)


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
