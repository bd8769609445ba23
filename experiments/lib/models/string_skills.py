# SPDX-License-Identifier: Apache-2.0
"""Two operations on strings: two adapters of one small transformer.

The base knows some operations that move positions and some that substitute
symbols, and any move with any substitution. One adapter learns a new move,
another a new substitution, each beside known ones, and never both. Half of what
they learn from are texts of known operations alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.lib.adapters.works import (
  Figures,
  Functions,
  Recipe,
  Work,
  divergence,
  train_rehearsed,
)
from experiments.lib.data.strings import (
  LENGTH,
  TOKENS,
  Operations,
  code_pairs,
  draw_operations,
  known_pairs,
  move_pairs,
  new_pairs,
  vocabulary,
  write,
)
from experiments.lib.models.loops import Draw, whole_run
from jlora import models
from jlora.loras import Loras
from jlora.paths import matching
from jlora.training import init_lora

#: The first three are shares of answers that are right as a whole.
MEASURES = {
  "both": "both operations",
  "first": "the move kept",
  "second": "the code kept",
  "distance": "KL elsewhere",
  "nats": "nats, both",
}


class Size(NamedTuple):
  """The sizes of the model, of training and of tests.

  Attributes:
    width: of the residual stream.
    layers: of the transformer.
    base: training steps of the base.
    batch: texts a step of it.
    recipe: of adapters.
    moving: operations known to the base that move positions.
    coding: those that substitute symbols.
    count: texts a figure.
  """

  width: int
  layers: int
  base: int
  batch: int
  recipe: Recipe
  moving: int
  coding: int
  count: int


FULL = Size(64, 2, 1500, 48, Recipe(4, 500, 1000, 3e-3, 48, 16), 6, 6, 1024)
SMOKE = Size(16, 1, 10, 8, Recipe(2, 5, 5, 3e-3, 8, 8, 8, 5), 2, 2, 16)


def open_work(seed: int, size: Size) -> Work:
  """Trains the base and both adapters of a seed.

  Args:
    seed: of the operations, of training and of tests.
    size: how much is computed.

  Returns:
    Work.
  """
  known = draw_operations(seed, size.moving, size.coding)
  params, pairs = train_base(seed, size), _pairs(known)
  rng = np.random.default_rng([seed, 1])
  few = write(rng, known, pairs["both"], (size.recipe.few,))
  draws = {
    "first": draw_of(known, pairs["first"]),
    "second": draw_of(known, pairs["second"]),
    "plain": draw_of(known, pairs["distance"]),
    "few": _draw_from(few),
    "five": _draw_from(few[:5]),
    "many": draw_of(known, pairs["both"]),
  }
  adapters = (
    _rehearsed(params, draws["first"], draws["plain"], size, 2 * seed),
    _rehearsed(params, draws["second"], draws["plain"], size, 2 * seed + 1),
  )
  predict = make_functions(size).predict
  texts = write(rng, known, pairs["both"], (256,))
  summed = jlora.apply(params, list(adapters))
  guessed = answered(predict, summed, texts)
  validate, test = (
    Examiner(size, params, known, pairs, 2 * seed + i, count)
    for i, count in ((1, size.count // 2), (0, size.count))
  )
  return Work(
    functions=make_functions(size),
    recipe=size.recipe,
    params=params,
    start=functools.partial(_start, params),
    adapters=adapters,
    draws={**draws, "unlabelled": _draw_from(guessed, is_labelled=False)},
    validate=validate.mean_likelihood,
    test=test.figures,
  )


def _pairs(known: Operations) -> dict[str, list[tuple[int, int]]]:
  """Returns the pairs of operations that each figure is about."""
  return {
    "both": new_pairs(known),
    "first": move_pairs(known),
    "second": code_pairs(known),
    "distance": known_pairs(known),
  }


@functools.cache
def make_functions(size: Size) -> Functions:
  """Makes what methods need of the model, once for all seeds."""
  model = models.build(_config(size))

  def predict(params, tokens) -> Any:
    """Predicts the answer's symbols, each from the text before it."""
    return model(params, tokens[:, :-1])[:, -LENGTH:]

  def loss(params, tokens, answer):
    """Computes the mean loss of a symbol of the answer, in nats."""
    return symbol_losses(predict(params, tokens), answer).mean()

  return Functions(predict, loss, divergence)


def symbol_losses(logits: jax.Array, answer: jax.Array) -> jax.Array:
  """Computes the loss of every symbol of an answer.

  Args:
    logits: (..., length, vocabulary).
    answer: (..., length) integers.

  Returns:
    (..., length) in nats.

  Example:
    >>> symbol_losses(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), int)).round(4)
    Array([[1.3863]], dtype=float32)
  """
  # A comparison, not a gather, whose gradient would be a scatter.
  columns = jnp.arange(logits.shape[-1])
  columns = columns.reshape((1,) * answer.ndim + columns.shape)
  wanted = jnp.where(columns == answer[..., None], logits, 0.0).sum(-1)
  return jax.nn.logsumexp(logits, axis=-1) - wanted


def _config(size: Size) -> dict[str, Any]:
  """Returns the transformer's config.json."""
  count = vocabulary(draw_operations(0, size.moving, size.coding))
  return {
    "model_type": "gpt2",
    "vocab_size": count,
    "n_embd": size.width,
    "n_layer": size.layers,
    "n_head": 4,
    "n_inner": 2 * size.width,
    "n_positions": TOKENS,
    "tie_word_embeddings": False,
  }


@functools.cache
def train_base(seed: int, size: Size) -> Any:
  """Trains a base on all pairs of known operations."""
  known = draw_operations(seed, size.moving, size.coding)
  draw = draw_of(known, known_pairs(known))
  rng = np.random.default_rng([seed, 2])
  params = _init(size, jax.random.key(seed))
  run = whole_run(make_functions(size).loss, 3e-3, size.base)
  params, losses = run(params, (), draw(rng, size.base, size.batch))
  last = np.mean(np.asarray(losses)[-size.base // 20 :])
  print(f"base of seed {seed}: {last:.4f} nats", flush=True)
  return params


def _init(size: Size, key: jax.Array) -> Any:
  """Draws parameters, the embeddings as large as training makes them.

  Those of operations that the base never sees stay as they are drawn.
  """
  _, params = models.init(_config(size), key)
  large = jax.tree.map(lambda x: 25 * x, [params[x] for x in ("wte", "wpe")])
  return {**params, "wte": large[0], "wpe": large[1]}


def _rehearsed(params, own: Draw, plain: Draw, size: Size, seed: int) -> Loras:
  """Trains an adapter on its own texts and on texts of known operations."""
  start = functools.partial(_start, params)
  loss = make_functions(size).loss
  return train_rehearsed(loss, size.recipe, params, start, (own, plain), seed)


def _start(params: Any, key: jax.Array, rank: int) -> Loras:
  """Makes adapters of all matrices of the layers."""
  select = matching("h/.*kernel")
  return init_lora(params, rank, key, select=select, alpha=float(rank))


def draw_of(known: Operations, pairs: Sequence[tuple[int, int]]) -> Draw:
  """Makes a source of texts and their answers."""

  def draw(rng, steps, rows):
    """Writes texts."""
    tokens = write(rng, known, pairs, (steps, rows))
    return tokens, tokens[..., -LENGTH:]

  return draw


def _draw_from(texts: np.ndarray, *, is_labelled: bool = True) -> Draw:
  """Makes a source of texts (n, TOKENS) that are there already."""

  def draw(rng, steps, rows):
    """Draws texts evenly."""
    tokens = texts[rng.integers(0, len(texts), (steps, rows))]
    return (tokens, tokens[..., -LENGTH:]) if is_labelled else (tokens,)

  return draw


def answered(
  predict: Callable[..., jax.Array], params: Any, tokens: np.ndarray
) -> np.ndarray:
  """Replaces the answers of texts by the model's own, the likeliest symbols.

  Args:
    predict: (params, tokens) -> logits (n, LENGTH, vocabulary).
    params: its parameters.
    tokens: (n, TOKENS), of which the answers are not read.

  Returns:
    (n, TOKENS) int32.
  """
  run = _compiled(predict)
  found = tokens.copy()
  found[:, -LENGTH:] = 0
  for i in range(LENGTH):
    best = np.asarray(run(params, found)).argmax(axis=-1)
    found[:, TOKENS - LENGTH + i] = best[:, i]
  return found


class Examiner:
  """Figures of adapters on a base, of the same texts at every call."""

  def __init__(
    self,
    size: Size,
    params: Any,
    known: Operations,
    pairs: dict[str, list[tuple[int, int]]],
    seed: int,
    count: int,
  ):
    """Writes the texts."""
    self.params = params
    self._predict = _compiled(make_functions(size).predict)
    rng = np.random.default_rng([seed, 3])
    self._texts = {
      name: write(rng, known, own, (count,)) for name, own in pairs.items()
    }
    self._base = self._predict(params, self._texts["distance"])

  def mean_likelihood(self, loras: Loras) -> float:
    """Returns minus the nats a symbol, the mean of both, first and second."""
    params = jlora.apply(self.params, loras)
    names = ("both", "first", "second")
    return -float(np.mean([self._examined(params, x)[1] for x in names]))

  def figures(self, loras: Loras) -> Figures:
    """Returns both, first, second, distance and nats.

    The distance is KL(base ‖ base with adapters), nats a symbol, on texts of
    operations that the base knows.
    """
    params = jlora.apply(self.params, loras)
    names = ("both", "first", "second")
    found = {name: self._examined(params, name) for name in names}
    moved = self._predict(params, self._texts["distance"])
    return {
      **{name: right for name, (right, _) in found.items()},
      "distance": float(divergence(self._base, moved)),
      "nats": found["both"][1],
    }

  def _examined(self, params: Any, name: str) -> tuple[float, float]:
    """Returns the share of answers that are right, and nats a symbol."""
    tokens = self._texts[name]
    logits, answer = self._predict(params, tokens), tokens[:, -LENGTH:]
    right = (np.asarray(logits).argmax(axis=-1) == answer).all(axis=-1)
    nats = symbol_losses(logits, jnp.asarray(answer)).mean()
    return float(np.mean(right)), float(nats)


_compiled = functools.cache(jax.jit)
