# SPDX-License-Identifier: Apache-2.0
"""A model's own words on fixed text, kept: many others are held against it."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.evaluation import divergence_of

_BATCH = 4  # rows at a time: faster than one, and bounds the memory


class Teacher(NamedTuple):
  """What a model says on text.

  Attributes:
    model: `(params, tokens) -> logits`.
    tokens: (rows, time) int32.
    logits: of each batch of rows, (batch, time, vocab), on the host.
  """

  model: Any
  tokens: np.ndarray
  logits: list[np.ndarray]


def listen(model: Any, params: Any, tokens: np.ndarray) -> Teacher:
  """The teacher that a model with these parameters is.

  Args:
    model: `(params, tokens) -> logits`.
    params: the teacher's.
    tokens: (rows, time) int32.

  Returns:
    Teacher; it holds `4 rows time vocab` bytes.
  """
  say = jax.jit(model)
  logits = [np.asarray(say(params, rows)) for rows in _batches(tokens)]
  return Teacher(model, tokens, logits)


def distance_from(teacher: Teacher, params: Any) -> tuple[float, float]:
  """KL(teacher ‖ other), as `jlora.mean_kl` has it, at half the cost.

  Args:
    teacher: of the same model.
    params: the other's.

  Returns:
    Mean, nats per token, and its standard error over rows (NaN for one row).
  """
  each = []
  for logits, rows in zip(
    teacher.logits, _batches(teacher.tokens), strict=True
  ):
    kl = _divergences(teacher.model, params, logits, rows)
    each.append(np.asarray(kl, np.float64).mean(axis=1))
  means = np.concatenate(each)
  spread = means.std(ddof=1) if len(means) > 1 else np.nan
  return float(means.mean()), float(spread / np.sqrt(len(means)))


@functools.partial(jax.jit, static_argnums=0)
def _divergences(model, params, logits, rows):
  return divergence_of(logits, model(params, rows))[0]


def _batches(tokens: np.ndarray) -> Iterator[jax.Array]:
  for start in range(0, len(tokens), _BATCH):
    yield jnp.asarray(tokens[start : start + _BATCH])
