# SPDX-License-Identifier: Apache-2.0
"""Two adapters of one rank, added: what they do to each other and to others."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.data.strings import LENGTH, write
from experiments.lib.models.token_skills import token_losses
from experiments.lib.models.updated_strings import (
  TASKS,
  Size,
  draw_texts,
  learn,
  make_model,
  merged,
  open_exam,
  rehearsed,
  start_loras,
  train_base,
)
from jlora.evaluation import interference, overlap
from jlora.loras import Lora, Loras

#: Name of a figure -> its title in tables.
MEASURES = {
  "own": "own loss",
  "summed": "loss of the sum",
  "penalty": "penalty of the sum",
  "right": "right by the sum",
  "nonlinearity": "non-linearity, third",
  "overlap": "read overlap",
  "disturbance": "disturbance of third",
}


def train_at(rank: int, task: str, seed: int, size: Size) -> Loras:
  """Trains a skill's adapter at a rank.

  All ranks are as large as the largest: units beyond a rank begin as zero on
  both sides, so that they have no gradient, and one program trains them all.

  Args:
    rank: of the adapter.
    task: name of the skill.
    seed: of the base and the batches.
    size: how much is computed.

  Returns:
    Loras of `max(size.ranks)` units, of which `rank` are not zero.
  """
  params, most = train_base(seed, size), max(size.ranks)
  place = TASKS.index(task)
  with warnings.catch_warnings():
    # Ranks at which an adapter is larger than its weight are asked for here.
    warnings.filterwarnings("ignore", ".*more numbers than their weights")
    start = start_loras(params, jax.random.key(10 * seed + 5 + place), most)
  start = {path: cut(x, rank) for path, x in start.items()}
  return learn(params, start, rehearsed(task, seed, size, size.curve), size)


def cut(lora: Lora, rank: int) -> Lora:
  """Sets what units beyond a rank read to zero.

  Example:
    >>> cut(Lora(jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.float32(1)), 1).a
    Array([[1.],
           [0.]], dtype=float32)
  """
  is_kept = jnp.arange(lora.rank)[:, None] < rank
  return Lora(jnp.where(is_kept, lora.a, 0.0), lora.b, lora.scale)


def measure(rank: int, seed: int, size: Size) -> dict[str, float]:
  """Trains both adapters at a rank, adds them, and measures.

  Args:
    rank: of both.
    seed: of base and adapters.
    size: how much is computed.

  Returns:
    Figures of MEASURES: losses in nats a symbol, means of both skills' texts
    but of the third text, which both leave to the base, and "chance", the read
    overlap of random spaces.
  """
  params = train_base(seed, size)
  both = {task: train_at(rank, task, seed, size) for task in TASKS}
  (row,) = interference(
    make_model(size).predict,
    lambda logits, answer: token_losses(logits, answer).mean(),
    params,
    both,
    _batches(seed, size),
    [rank],
  )
  exam, summed = open_exam(seed, size), params
  for loras in both.values():
    summed = merged(summed, loras)
  own = float(np.mean([row.alone[task][task] for task in TASKS]))
  together = float(np.mean([row.together[task] for task in TASKS]))
  apart = np.mean([row.alone["known"][task] for task in TASKS])
  return {
    "own": own,
    "summed": together,
    "penalty": together - own,
    "right": float(np.mean([exam.examined(summed, x)[0] for x in TASKS])),
    "nonlinearity": row.nonlinearity["known"],
    "disturbance": row.together["known"] - row.none["known"],
    "disturbance alone": float(apart) - row.none["known"],
    **_overlaps(both, rank),
  }


@functools.cache
def _batches(seed: int, size: Size):
  """Writes the texts of both skills and those of neither."""
  texts = draw_texts(seed, size)
  rng = np.random.default_rng([seed, 9])
  found = {}
  for name in (*TASKS, "known"):
    tokens = write(rng, texts.operations, texts.pairs[name], (size.count,))
    found[name] = ((tokens,), tokens[:, -LENGTH:])
  return found


def _overlaps(both: Mapping[str, Loras], rank: int) -> dict[str, float]:
  """Returns the mean read overlap of all modules, and that of chance."""
  first, second = both.values()
  found, chance = [], []
  for path, one in first.items():
    most = min(rank, *one.a.shape[-1:], one.b.shape[-1])
    pair = [_kept(x, rank) for x in (one, second[path])]
    found.append(float(np.asarray(overlap(*pair))[most - 1, most - 1]))
    chance.append(most / one.a.shape[-1])
  return {"overlap": float(np.mean(found)), "chance": float(np.mean(chance))}


def _kept(lora: Lora, rank: int) -> Lora:
  """Returns the first units of an adapter on the host."""
  host: Any = jax.tree.map(np.asarray, lora)
  return Lora(host.a[:rank], host.b[:rank], host.scale)
