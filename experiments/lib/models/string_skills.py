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
import numpy as np

import jlora
from experiments.lib.adapters.works import (
  Figures,
  Functions,
  Recipe,
  Work,
  four_fifths,
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
from experiments.lib.models.token_skills import (
  Examiner,
  compiled,
  draw_from,
  functions_of,
)
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
    others: further moves, and further codes, of which there are adapters.
  """

  width: int
  layers: int
  base: int
  batch: int
  recipe: Recipe
  moving: int
  coding: int
  count: int
  others: int = 1


FULL = Size(64, 2, 2000, 48, Recipe(8, 1000, 1000, 3e-3, 32, 8), 16, 6, 512)
SMOKE = Size(16, 1, 10, 8, Recipe(2, 5, 5, 3e-3, 8, 8, 8, 5), 2, 2, 16, 1)


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
  cut = four_fifths(len(few))
  draws = {
    "first": draw_of(known, pairs["first"]),
    "second": draw_of(known, pairs["second"]),
    "plain": draw_of(known, pairs["distance"]),
    "few": draw_from(few, LENGTH),
    "five": draw_from(few[:5], LENGTH),
    "learned": draw_from(few[:cut], LENGTH),
    "chosen": draw_from(few[cut:], LENGTH),
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
    _examiner(size, params, known, 2 * seed + i, count)
    for i, count in ((1, size.count // 2), (0, size.count))
  )
  return Work(
    functions=make_functions(size),
    recipe=size.recipe,
    params=params,
    start=functools.partial(_start, params),
    adapters=adapters,
    draws={**draws, "unlabelled": draw_from(guessed, None)},
    validate=validate.mean_likelihood,
    test=functools.partial(_examine, test),
    library=functools.partial(_library, seed, size),
  )


def _library(seed: int, size: Size) -> list[Loras]:
  """Trains adapters of other moves and other codes under the new names."""
  known = draw_operations(seed, size.moving, size.coding)
  params, made = train_base(seed, size), []
  plain = draw_of(known, known_pairs(known))
  for turn in range(size.others):
    # Those of another seed, which nobody has learned.
    there = draw_operations(1000 * (turn + 1) + seed, size.moving, size.coding)
    moves, codes = known.moves.copy(), known.codes.copy()
    moves[known.mover] = there.moves[there.mover]
    codes[known.coder] = there.codes[there.coder]
    other = known._replace(moves=moves, codes=codes)
    for i, pairs in enumerate((move_pairs(other), code_pairs(other))):
      own = draw_of(other, pairs)
      start = 1000 * (turn + 1) + 2 * seed + i
      made.append(_rehearsed(params, own, plain, size, start))
  return made


def _pairs(known: Operations) -> dict[str, list[tuple[int, int]]]:
  """Returns the pairs of operations that each figure is about."""
  return {
    "both": new_pairs(known),
    "first": move_pairs(known),
    "second": code_pairs(known),
    "distance": known_pairs(known),
  }


def make_functions(size: Size) -> Functions:
  """Makes what methods need of the model, once for all seeds."""
  return functions_of(_config(size), LENGTH)


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
  run = compiled(predict)
  found = tokens.copy()
  found[:, -LENGTH:] = 0
  for i in range(LENGTH):
    best = np.asarray(run(params, found)).argmax(axis=-1)
    found[:, TOKENS - LENGTH + i] = best[:, i]
  return found


def _examiner(
  size: Size, params: Any, known: Operations, seed: int, count: int
) -> Examiner:
  """Writes the texts of all figures."""
  rng = np.random.default_rng([seed, 3])
  texts = {
    name: write(rng, known, own, (count,))
    for name, own in _pairs(known).items()
  }
  return Examiner(make_functions(size).predict, params, texts, LENGTH)


def _examine(examiner: Examiner, params: Any) -> Figures:
  """Returns both, first, second, distance and nats.

  The distance is KL(base ‖ parameters), nats a symbol, on texts of operations
  that the base knows.
  """
  names = ("both", "first", "second")
  found = {name: examiner.examined(params, name) for name in names}
  return {
    **{name: right for name, (right, _) in found.items()},
    "distance": examiner.distance(params),
    "nats": found["both"][1],
  }
