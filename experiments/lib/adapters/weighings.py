# SPDX-License-Identifier: Apache-2.0
"""Learns one weight for each adapter and module, or a LoRA, as rows of a table.

Weights of real adapters, and of random ones; of the skills' data, of a few
examples of what asks for both, or without labels.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from experiments.lib.adapters.benches import (
  Bench,
  Made,
  Rule,
  add,
  choose,
  constant,
  count_of,
  weights_run,
)
from experiments.lib.models.loops import schedule
from jlora.loras import Loras
from jlora.merging import (
  entropy,
  free,
  init_weights,
  leaky,
  mix,
  random_like,
  search_weights,
  softmax,
  unit,
)
from jlora.paths import key_for

# Learning rates of a LoRA on few examples.
RATES = (1e-3, 3e-3, 1e-2)
# Updates until the published rate of LoRA Soups is reached.
_WARMUP = 100


class Mix(NamedTuple):
  """How one weight a module and adapter is learned.

  Attributes:
    pool: as `pool_of` names it.
    activation: of `mix`.
    start: of all z; None draws them from N(0, 1).
    source: of batches.
    rate: learning rate.
    steps: updates.
    rows: of a batch; None are those of the recipe.
    rule: of the optimiser.
    is_labelled: whether targets are used; otherwise entropy is made small.
  """

  pool: str
  activation: Callable
  start: float | None
  source: str
  rate: float = 5e-2
  steps: int = 200
  rows: int | None = None
  rule: Rule = schedule
  is_labelled: bool = True


def published(rate: float, steps: int) -> optax.GradientTransformation:
  """Returns LoRA Soups' own: Adam whose rate rises, then falls on a line.

  Args:
    rate: the largest, after 100 updates.
    steps: of the whole training, after which it is zero.

  Returns:
    An optax transformation.
  """
  rising = optax.linear_schedule(0.0, rate, _WARMUP)
  falling = optax.linear_schedule(rate, 0.0, steps - _WARMUP)
  return optax.adam(optax.join_schedules([rising, falling], [_WARMUP]))


_OWN = "own and "
_CAT = Mix("skills", softmax, 0.0, "skills")
_RECYCLED = Mix("skills", leaky, 0.0, "few", steps=100)
#: Ways to learn weights.
MIXES = {
  "softmax from N(0, 1), skills' data, 1e-4, 1647 steps (CAT, published)": Mix(
    "skills", softmax, None, "skills", 1e-4, 1647, 6, published
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
    "skills",
    unit,
    0.3,
    "unlabelled",
    1e-3,
    500,
    rule=constant,
    is_labelled=False,
  ),
  "clipped from 0.3, the 64": Mix(
    "skills", unit, 0.3, "few", 1e-3, 500, rule=constant
  ),
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
  rows = how.rows or work.recipe.shown
  batches = bench.batches(how.source, how.steps, rows)
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
  tried = [(rate, recipe.few_steps) for rate in RATES]
  tried.append((recipe.rate, recipe.steps))

  def make():
    """Trains one for each rate and length."""
    made = {how: bench.train("few", recipe.rank, *how) for how in tried}
    return choose(bench, made)

  return bench.once("few", make)
