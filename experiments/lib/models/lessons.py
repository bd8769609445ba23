# SPDX-License-Identifier: Apache-2.0
"""Trains a small base model, then programs on it on a second text."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.lib.data import llamas, smollm2, texts
from experiments.lib.models import finetunes
from jlora import models
from jlora.training import Trainer, train


class School(NamedTuple):
  """A base model, and a text that it has not been trained on.

  Attributes:
    model: `(params, tokens) -> logits`.
    params: of the base, trained on technical English.
    lessons: (rows, time + 1) tokens of the Bible to learn from.
    exam: (rows, time + 1) held-out tokens of it.
  """

  model: Any
  params: Any
  lessons: np.ndarray
  exam: np.ndarray


def open_school(
  width: int, steps: int, rows: int, cache: str | None, *, text: str = ""
) -> School:
  """Trains a byte-level Llama of four layers on Python's help.

  Args:
    width: hidden size, a multiple of 32.
    steps: of its training, 4 rows of 128 tokens each.
    rows: to learn from.
    cache: folder for downloads and models; None is ~/.cache/jlora.
    text: to learn; the Bible without it.

  Returns:
    School.
  """
  config = llamas.config_of(width)
  model, params = models.init(config, jax.random.key(0))
  take = functools.partial(
    texts.excerpts, encode=texts.encode_bytes, length=128
  )
  first = take(texts.split(texts.pydoc())[0], rows=4 * steps)
  params = finetunes.finetune(
    model, params, texts.batches(first, 4), steps=steps, learning_rate=3e-3
  )
  train_text, held_out = texts.split(text or smollm2.kjv(cache))
  return School(
    model, params, take(train_text, rows=rows), take(held_out, rows=32)
  )


def hire(school: School, rate: float, steps: int) -> Trainer:
  """Makes a compiled trainer: Adam with a rate that rises and falls.

  Args:
    school: whose model is trained.
    rate: the largest learning rate.
    steps: of the schedule.

  Returns:
    Trainer; programs of equal shapes share what it compiled.
  """
  schedule = optax.warmup_cosine_decay_schedule(
    rate / 5, rate, steps // 5, steps + 1
  )

  def loss(params, tokens):
    """Computes the loss."""
    return finetunes.nll(school.model, params, tokens)

  chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
  init, update = train(loss, chain)
  return Trainer(init, jax.jit(update))


def teach(
  school: School,
  trainer: Trainer,
  programs: Mapping[str, Any],
  steps: int,
  seed: int,
) -> dict[str, Any]:
  """Trains programs for some steps of 4 rows each.

  Args:
    school: base and text.
    trainer: as `hire` gives it.
    programs: path -> program, to begin with.
    steps: updates.
    seed: of the order of the rows.

  Returns:
    path -> program.
  """
  rows = np.random.default_rng(seed).permutation(len(school.lessons))
  taught, state = dict(programs), trainer.init(programs)
  for at in range(steps):
    own = rows[np.arange(4 * at, 4 * at + 4) % len(rows)]
    tokens = jnp.asarray(school.lessons[own])
    taught, state, _ = trainer.update(taught, state, school.params, tokens)
  return taught


_loss = jax.jit(finetunes.nll, static_argnums=0)


def examine(model: Callable, params: Any, tokens: np.ndarray) -> float:
  """Computes the loss on held-out text, in nats per byte.

  Args:
    model: `(params, tokens) -> logits`.
    params: its parameters, programs summed in.
    tokens: (rows, time + 1).

  Returns:
    The mean.
  """
  return float(_loss(model, params, jnp.asarray(tokens)))


def mean_and_spread(values: Any) -> str:
  """Formats a few numbers as `mean ± standard deviation`.

  Args:
    values: over seeds.

  Returns:
    A table's cell.

  Example:
    >>> mean_and_spread([1.0, 2.0])
    '1.500 ± 0.707'
  """
  values = list(values)
  if len(values) < 2:
    return f"{values[0]:.3f}"
  return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
