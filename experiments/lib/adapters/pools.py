# SPDX-License-Identifier: Apache-2.0
"""Recycles a pool of adapters for a target of few examples, as published.

The pool has both skills and adapters of other skills. Four fifths of the few
examples are learned from, one fifth chooses: adapters of the pool, and the rate
of the target's own LoRA. Then one weight a module and adapter is learned.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.lib.adapters.benches import Bench, Made, count_of, weights_run
from experiments.lib.adapters.weighings import RATES
from experiments.lib.models.loops import schedule
from jlora.loras import Lora, Loras
from jlora.merging import (
  closeness,
  init_weights,
  leaky,
  mix,
  random_like,
  select,
)
from jlora.paths import key_for

#: The target's own LoRA, without a pool.
OWN = "own LoRA, four fifths of the 64"
CHOSEN = 3
_RATE, _STEPS = 5e-2, 100
# Examples that choose, drawn once for all that are compared.
_JUDGED = 64


class Recycle(NamedTuple):
  """How a pool is used.

  Attributes:
    choose: (bench, pool) -> places of those that are used.
    keep: what random adapters in their place keep; None takes the real ones.
    has_own: whether the target's own LoRA is among them.
  """

  choose: Callable[[Bench, Sequence[Loras]], Sequence[int]]
  keep: Literal["entries", "spectrum"] | None = None
  has_own: bool = False


def by_loss(bench: Bench, pool: Sequence[Loras]) -> list[int]:
  """Chooses those of the least loss on a fifth of the examples."""
  return select(pool, lambda one: judged(bench, one), CHOSEN)


def at_random(bench: Bench, pool: Sequence[Loras]) -> list[int]:
  """Chooses some."""
  rng = np.random.default_rng([bench.seed, 7])
  return rng.choice(len(pool), CHOSEN, replace=False).tolist()


def by_closeness(bench: Bench, pool: Sequence[Loras]) -> list[int]:
  """Chooses those whose changes are like the own LoRA's."""
  own = own_lora(bench)[1]
  return select(pool, lambda one: -closeness(one, own), CHOSEN)


def everything(bench: Bench, pool: Sequence[Loras]) -> list[int]:
  """Takes all."""
  del bench
  return [*range(len(pool))]


def but_skills(bench: Bench, pool: Sequence[Loras]) -> list[int]:
  """Takes all but the two skills that the target asks for."""
  return [*range(len(bench.work.adapters), len(pool))]


_POOLS = {
  f"{CHOSEN} of least loss": Recycle(by_loss),
  f"{CHOSEN} at random": Recycle(at_random),
  f"{CHOSEN} closest": Recycle(by_closeness),
  "all": Recycle(everything),
  "all but the skills": Recycle(but_skills),
  f"{CHOSEN} of random entries": Recycle(by_loss, "entries"),
  f"{CHOSEN} of random directions": Recycle(by_loss, "spectrum"),
}
#: Rows: what the pool is, without the target's own LoRA and with it.
ROWS = {
  f"{title}{name}": how._replace(has_own=has_own)
  for title, how in _POOLS.items()
  for name, has_own in (("", False), (", with own", True))
}


def alone(bench: Bench) -> Made:
  """Trains the target's own LoRA."""
  how, loras = own_lora(bench)
  return Made(loras, count_of(loras), {"rate and steps": how})


def recycled(bench: Bench, *, how: Recycle) -> Made:
  """Learns weights of adapters of the pool, from 0."""
  work = bench.work
  whole = [*work.adapters, *bench.once("library", work.library)]
  places = how.choose(bench, whole)
  chosen = [whole[at] for at in places]
  if how.keep is not None:
    key = key_for(jax.random.key(bench.seed), how.keep)
    chosen = random_like(chosen, key, keep=how.keep)
  own = own_lora(bench)[1]
  # Adapters of zeros in all other places: one program learns every row.
  none = jax.tree.map(jnp.zeros_like, own)
  pool = [own if how.has_own else none, *chosen]
  pool += [none] * (1 + len(whole) - len(pool))
  run = weights_run(work.functions.loss, leaky, schedule, _RATE, _STEPS)
  batches = bench.batches("learned", _STEPS, work.recipe.shown)
  z, losses = run(init_weights(pool, 0.0), (work.params, pool), batches)
  means = np.mean([np.asarray(leaky(x)) for x in z.values()], axis=0)
  used = (1 if how.has_own else 0) + len(places)
  notes = {
    "chosen": [int(at) for at in places],
    "weights": [round(float(x), 4) for x in means[: 1 + len(places)]],
    "loss": float(np.mean(np.asarray(losses)[-10:])),
  }
  count = used * len(z) + (count_of(own) if how.has_own else 0)
  return Made(mix(pool, z, activation=leaky), count, notes)


def own_lora(bench: Bench) -> tuple[tuple[float, int], Loras]:
  """Trains the target's own LoRA, as a fifth of the examples judges best.

  Args:
    bench: work and seed.

  Returns:
    Learning rate and steps, and the LoRA.
  """
  recipe = bench.work.recipe
  tried = [(rate, recipe.few_steps) for rate in RATES]

  def make():
    """Trains one for each rate."""
    made = {how: bench.train("learned", recipe.rank, *how) for how in tried}
    best = min(made, key=lambda how: judged(bench, made[how]))
    return best, made[best]

  return bench.once("own", make)


def judged(bench: Bench, loras: Mapping[str, Lora]) -> float:
  """Computes the loss on the fifth of the examples that chooses."""
  work = bench.work
  batch = tuple(x[0] for x in bench.batches("chosen", 1, _JUDGED))
  return float(_loss_of(work.functions.loss)(work.params, loras, *batch))


@functools.cache
def _loss_of(loss: Callable[..., Any]) -> Callable[..., Any]:
  """Compiles the loss of a base with an adapter."""
  return jax.jit(
    lambda params, loras, *batch: loss(jlora.apply(params, loras), *batch)
  )
