# SPDX-License-Identifier: Apache-2.0
"""What works of tokens share: a transformer's functions, sources, figures."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.adapters.works import Functions, divergence
from experiments.lib.models.loops import Draw
from jlora import models


def functions_of(
  config: Mapping[str, Any],
  length: int,
  distance: Callable[..., jax.Array] = divergence,
) -> Functions:
  """Makes what methods need of a transformer, once for all seeds.

  Args:
    config: of config.json.
    length: tokens at the end of each text that are predicted.
    distance: (found, wanted) -> (), of `learn_columns`.

  Returns:
    Functions of texts (n, tokens), and of their ends (n, length) as targets.
  """
  return _functions(json.dumps(config, sort_keys=True), length, distance)


@functools.cache
def _functions(
  config: str, length: int, distance: Callable[..., jax.Array]
) -> Functions:
  """Makes them for a config as text."""
  model = models.build(json.loads(config))

  def predict(params, tokens) -> Any:
    """Predicts the last tokens, each from the text before it."""
    return model(params, tokens[:, :-1])[:, -length:]

  def loss(params, tokens, answer):
    """Computes the mean loss of a predicted token, in nats."""
    return token_losses(predict(params, tokens), answer).mean()

  return Functions(predict, loss, distance)


def token_losses(logits: jax.Array, answer: jax.Array) -> jax.Array:
  """Computes the loss of every token.

  Args:
    logits: (..., tokens, vocabulary).
    answer: (..., tokens) integers.

  Returns:
    (..., tokens), nats.

  Example:
    >>> token_losses(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), int)).round(4)
    Array([[0.6931]], dtype=float32)
  """
  # A comparison, not a gather, whose gradient would be a scatter.
  columns = jnp.arange(logits.shape[-1])
  columns = columns.reshape((1,) * answer.ndim + columns.shape)
  wanted = jnp.where(columns == answer[..., None], logits, 0.0).sum(-1)
  return jax.nn.logsumexp(logits, axis=-1) - wanted


def draw_from(texts: np.ndarray, length: int | None) -> Draw:
  """Makes a source of texts that are there already.

  Args:
    texts: (n, tokens).
    length: of the ends that are targets; None draws no targets.

  Returns:
    Draw.

  Example:
    >>> source = draw_from(np.arange(3)[None], 1)
    >>> [x.shape for x in source(np.random.default_rng(0), 2, 4)]
    [(2, 4, 3), (2, 4, 1)]
  """

  def draw(rng, steps, rows):
    """Draws texts evenly."""
    tokens = texts[rng.integers(0, len(texts), (steps, rows))]
    return (tokens,) if length is None else (tokens, tokens[..., -length:])

  return draw


class Examiner:
  """Figures of parameters, of the same texts at every call."""

  def __init__(
    self,
    predict: Callable[..., jax.Array],
    base: Any,
    texts: Mapping[str, np.ndarray],
    length: int,
  ):
    """Keeps what the base says of the texts called "distance".

    Args:
      predict: (params, texts) -> logits.
      base: its parameters.
      texts: "both", "first", "second" and "distance" -> (n, tokens).
      length: of the ends that are predicted.
    """
    self._examine, self._texts = _examiner_of(predict, length), texts
    self._moved = _distance_of(predict)
    self._base = compiled(predict)(base, texts["distance"])

  def mean_likelihood(self, params: Any) -> float:
    """Returns minus the nats a token, the mean of both, first and second."""
    names = ("both", "first", "second")
    return -float(np.mean([self.examined(params, x)[1] for x in names]))

  def distance(self, params: Any) -> float:
    """Returns KL(base ‖ parameters), nats a token."""
    return float(self._moved(params, self._base, self._texts["distance"]))

  def examined(self, params: Any, name: str) -> tuple[float, float]:
    """Returns the share of ends that are right as a whole, and nats a token."""
    right, nats = self._examine(params, self._texts[name])
    return float(right), float(nats)


@functools.cache
def _examiner_of(
  predict: Callable[..., jax.Array], length: int
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Compiles (params, tokens) -> the share of right ends, and nats a token."""

  @jax.jit
  def examine(params, tokens):
    """Computes both."""
    logits, answer = predict(params, tokens), tokens[:, -length:]
    right = (logits.argmax(axis=-1) == answer).all(axis=-1)
    return right.mean(), token_losses(logits, answer).mean()

  return examine


@functools.cache
def _distance_of(predict: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Compiles (params, logits of the base, tokens) -> KL, nats a token."""

  @jax.jit
  def distance(params, base, tokens):
    """Computes it."""
    return divergence(base, predict(params, tokens))

  return distance


compiled = functools.cache(jax.jit)
