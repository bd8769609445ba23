# SPDX-License-Identifier: Apache-2.0
"""Carries adapters to what a base became, by every method, with controls.

recovered = (alone - ported) / (alone - retrained),   of nats a symbol
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.models.constrained_updates import all_snapshots
from experiments.lib.models.loops import compile_steps, schedule
from experiments.lib.models.updated_strings import (
  OTHERS,
  TASKS,
  Size,
  learn,
  make_model,
  merged,
  open_exam,
  rehearsed,
  start_loras,
  train_base,
  train_skill,
  unlabelled,
)
from jlora.extraction import (
  add,
  both_parts,
  port,
  port_adapter,
  project,
  rotate,
)
from jlora.loras import Lora, Loras, dense
from jlora.paths import flatten
from jlora.training import distil

#: The far end: a base that was trained apart.
SEED = "another seed"


class Case(NamedTuple):
  """A skill that is to be carried from its base to a target.

  Attributes:
    task: name of the skill.
    seed: of the bases.
    size: how much is computed.
    source: params of the base that the adapter was made on.
    target: params that it is for.
    loras: the adapter.
  """

  task: str
  seed: int
  size: Size
  source: Any
  target: Any
  loras: Loras


class Reading(NamedTuple):
  """How an adapter is carried by weights alone.

  Attributes:
    method: of `jlora.extraction.port`.
    share: of all directions that a space has.
    is_random: whether spaces are those of random weights in place of the
      target's, and what is left is as long as by the target's.
  """

  method: Callable[..., Lora]
  share: float = 1.0
  is_random: bool = False


def carry(case: Case, how: Reading) -> Loras:
  """Carries a case's adapter by weights alone."""
  k = max(1, int(how.share * case.size.width))
  run = _carry_run(how.method, k)
  paths = list(case.loras)
  source, target = (
    {path: flatten(x)[path] for path in paths}
    for x in (case.source, case.target)
  )
  found = run(case.loras, source, target)
  if how.is_random:
    rng = np.random.default_rng([case.seed, 8])
    noise = {
      path: rng.standard_normal(x.shape, np.float32)
      for path, x in target.items()
    }
    found = as_long(run(case.loras, source, noise), found)
  return found


@functools.cache
def _carry_run(method: Callable[..., Lora], k: int):
  """Compiles the carrying of a whole adapter."""

  @jax.jit
  def run(loras, source, target):
    """Carries every module."""
    return {
      path: port(x, source[path], target[path], method=method, k=k)
      for path, x in loras.items()
    }

  return run


@jax.jit
def as_long(loras: Loras, others: Loras) -> Loras:
  """Scales every change to the length of another."""
  return {
    path: Lora(x.a, x.b * (_length(others[path]) / _length(x)), x.scale)
    for path, x in loras.items()
  }


def distilled(case: Case, start: Loras) -> Loras:
  """Trains Loras to answer as the source with its adapter, from inputs."""
  run = _distil_run(case.size)
  batches = unlabelled(case.task, case.seed, case.size)
  frozen = case.target, case.source, case.loras
  return run(start, frozen, batches)[0]


@functools.cache
def _distil_run(size: Size):
  """Compiles distillation once for all cases."""
  optimiser = schedule(size.brisk, size.short)
  return compile_steps(*distil(make_model(size).predict, optimiser))


def _fresh(case: Case) -> Loras:
  """Makes an adapter that changes nothing yet."""
  key = jax.random.key(100 * case.seed + 77)
  return start_loras(case.target, key, case.size.rank)


def _retrained(case: Case, start: Loras, steps: int) -> Loras:
  """Trains Loras on labelled texts of the skill."""
  batches = rehearsed(case.task, case.seed, case.size, steps, turn=2)
  return learn(case.target, start, batches, case.size)


#: Where nothing but weights is read.
WEIGHTS = {
  "add": Reading(add),
  "project, half": Reading(project, 0.5),
  "a random part, half": Reading(project, 0.5, is_random=True),
  "project, three quarters": Reading(project, 0.75),
  "a random part, three quarters": Reading(project, 0.75, is_random=True),
  "both parts, three quarters": Reading(both_parts, 0.75),
  "rotate, three quarters": Reading(rotate, 0.75),
}
#: The row that shares are of.
CEILING = "retrain"
#: Where something is trained: on inputs, or on labelled texts.
TRAINED = {
  "distil from add": lambda case: distilled(case, case.loras),
  "distil from zero": lambda case: distilled(case, _fresh(case)),
  "retrain from add, a quarter of the steps": lambda case: _retrained(
    case, case.loras, case.size.short
  ),
  "retrain from zero, a quarter of the steps": lambda case: _retrained(
    case, _fresh(case), case.size.short
  ),
  CEILING: lambda case: _retrained(case, _fresh(case), case.size.steps),
}


def targets(size: Size) -> list[str]:
  """Names what a base becomes: after steps of an update, and another seed."""
  return [*(f"{steps} steps" for steps in size.marks), SEED]


def open_case(target: str, task: str, seed: int, size: Size) -> Case:
  """Trains what a case needs, or finds it trained already."""
  source = train_base(seed, size)
  if target == SEED:
    there = train_base(seed, size, other=True)
  else:
    there = all_snapshots(seed, size)[int(target.split()[0])]
  loras = train_skill(task, seed, size)
  return Case(task, seed, size, source, there, loras)


def measure(target: str, seed: int, size: Size) -> dict[str, Any]:
  """Measures all methods on one target.

  Args:
    target: of `targets`.
    seed: of the bases.
    size: how much is computed.

  Returns:
    "tasks": task -> "alone", "source" and "methods", each (right, nats), and
    "kept", the mean of |Δ_t| / |Δ_s| by "project, half"; of the skills in
    OTHERS only `add` is measured. "weights": drift, read_alike and write_alike
    as `port_adapter` has them, means over modules. "known" and "update": what
    the target has of either text.
  """
  tasks = {}
  for task in (*TASKS, *OTHERS):
    case = open_case(target, task, seed, size)
    tasks[task] = _examine(case, is_whole=task in TASKS)
    said = {
      name: round(pair[1], 3) for name, pair in tasks[task]["methods"].items()
    }
    print(f"  {target}, {task}: {said}", flush=True)
  case = open_case(target, TASKS[0], seed, size)
  texts = {
    name: open_exam(seed, size).examined(case.target, name)
    for name in ("known", "update")
  }
  rows = list(port_adapter(case.loras, case.source, case.target).rows.values())
  weights = {
    name: float(np.mean([row[name] for row in rows]))
    for name in ("drift", "read_alike", "write_alike")
  }
  return {"tasks": tasks, "weights": weights, **texts}


def _examine(case: Case, *, is_whole: bool) -> dict[str, Any]:
  """Measures a case: by all methods, or by `add` alone."""
  exam = open_exam(case.seed, case.size)
  methods = {"add": case.loras}
  if is_whole:
    methods = {name: carry(case, how) for name, how in WEIGHTS.items()}
    methods |= {name: make(case) for name, make in TRAINED.items()}
  shown = {name: merged(case.target, x) for name, x in methods.items()}
  half = carry(case, WEIGHTS["project, half"])
  return {
    "alone": exam.examined(case.target, case.task),
    "source": exam.examined(merged(case.source, case.loras), case.task),
    "methods": {
      name: exam.examined(params, case.task) for name, params in shown.items()
    },
    "kept": float(
      np.mean([_length(half[path]) / _length(x)
               for path, x in case.loras.items()])
    ),
  }  # fmt: skip


def _length(lora: Lora) -> jax.Array:
  """Returns the length of a change."""
  return jnp.linalg.norm(dense(lora))
