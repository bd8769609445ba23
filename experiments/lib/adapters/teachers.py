# SPDX-License-Identifier: Apache-2.0
"""Keeps a model's logits on fixed text, to compare many other models with."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.evaluation import divergence_of

_BATCH = 4  # rows at a time: faster than one, with bounded memory


class Teacher(NamedTuple):
  """A model's logits on fixed text.

  Attributes:
    model: `(params, tokens) -> logits`.
    tokens: (rows, time) int32.
    logits: of each batch of rows, (batch, time, vocab), on the host.
  """

  model: Any
  tokens: np.ndarray
  logits: list[np.ndarray]


def listen(model: Any, params: Any, tokens: np.ndarray) -> Teacher:
  """Computes the logits of a model on text; returns it as a Teacher.

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
  """Computes KL(teacher ‖ other), as `jlora.mean_kl` does, at half the cost.

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
  """Computes the divergence at every position."""
  return divergence_of(logits, model(params, rows))[0]


def _batches(tokens: np.ndarray) -> Iterator[jax.Array]:
  """Yields rows a few at a time."""
  for start in range(0, len(tokens), _BATCH):
    yield jnp.asarray(tokens[start : start + _BATCH])
