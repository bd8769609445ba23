# SPDX-License-Identifier: Apache-2.0
"""A small transformer of strings, adapters of it, and what it becomes later.

The base knows some operations on strings of six symbols. Each adapter learns
one that moves positions or substitutes symbols. An update trains the base on
for operations of its own, beside those it knew.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.lib.data.strings import (
  LENGTH,
  TOKENS,
  Operations,
  draw_operations,
  vocabulary,
  write,
)
from experiments.lib.models.loops import (
  Draw,
  adapter_run,
  side_by_side,
  whole_run,
)
from experiments.lib.models.string_skills import answered, draw_of
from experiments.lib.models.token_skills import (
  Examiner,
  token_losses,
)
from jlora import models
from jlora.loras import Loras
from jlora.paths import matching
from jlora.training import init_lora

#: The two skills that are carried over, and two that nobody knew of.
TASKS = ("move", "code")
OTHERS = ("other move", "other code")


class Size(NamedTuple):
  """The sizes of the model, of training and of tests.

  Attributes:
    width: of the residual stream.
    layers: of the transformer.
    heads: of attention.
    base: training steps of the base.
    batch: texts a step.
    known: operations of either kind that the base knows.
    news: operations of either kind that the update is about.
    rank: of an adapter.
    steps: of an adapter's training.
    short: of what has to do with a quarter of them.
    rate: the largest learning rate, of all but what follows.
    brisk: the largest learning rate of `short` trainings.
    drift: the constant rate of an update.
    count: texts a figure.
    marks: steps of an update after which adapters are ported to it.
    looks: steps after which forms of updates are compared.
    ranks: of the curve of ranks.
    curve: training steps of an adapter of that curve.
  """

  width: int
  layers: int
  heads: int
  base: int
  batch: int
  known: int
  news: int
  rank: int
  steps: int
  short: int
  rate: float
  brisk: float
  drift: float
  count: int
  marks: tuple[int, ...]
  looks: tuple[int, ...]
  ranks: tuple[int, ...]
  curve: int


FULL = Size(
  64, 3, 4, 1000, 16, 5, 3, 8, 500, 125, 5e-3, 2e-2, 1e-3, 512,
  (50, 200, 500, 1000), (50, 100, 200, 350, 500),
  (1, 2, 4, 8, 16, 32, 64), 250,
)  # fmt: skip
SMOKE = Size(
  16, 2, 2, 6, 4, 1, 1, 2, 4, 2, 5e-3, 2e-2, 1e-3, 16, (2, 4), (2, 4),
  (1, 4), 4,
)  # fmt: skip


class Texts(NamedTuple):
  """What texts ask for.

  Attributes:
    operations: what each does.
    pairs: name -> pairs of operations: "known" to the base, "update" new in the
      update, and one name for each skill.
  """

  operations: Operations
  pairs: dict[str, list[tuple[int, int]]]


@functools.cache
def draw_texts(seed: int, size: Size) -> Texts:
  """Draws operations, and says what each is for.

  Args:
    seed: of the draw.
    size: how many there are.

  Returns:
    Texts.
  """
  each = size.known + size.news + 1
  drawn = draw_operations(seed, each, each)
  kinds = np.arange(1, 1 + 2 * each).reshape(2, each)
  known, news, last = np.split(kinds, [size.known, each - 1], axis=1)
  single = {
    "known": [0, *known.ravel()],
    "update": [*news.ravel()],
    "move": [drawn.mover],
    "code": [drawn.coder],
    "other move": [last[0, 0]],
    "other code": [last[1, 0]],
  }
  pairs = {name: [(int(x), 0) for x in own] for name, own in single.items()}
  return Texts(drawn, pairs)


def source_of(name: str, seed: int, size: Size) -> Draw:
  """Makes a source of texts of one name, with their answers."""
  texts = draw_texts(seed, size)
  return draw_of(texts.operations, texts.pairs[name])


class Model(NamedTuple):
  """A transformer as functions of its parameters, whatever their layers.

  Attributes:
    config: of config.json.
    predict: (params, tokens) -> logits of the last LENGTH tokens.
    loss: (params, tokens, answers) -> ().
    stream: (params, tokens, layers) -> the residual stream before that layer.
  """

  config: dict[str, Any]
  predict: Callable[..., Any]
  loss: Callable[..., jax.Array]
  stream: Callable[..., Any]


@functools.cache
def make_model(size: Size) -> Model:
  """Makes the functions of a transformer once for all seeds.

  They read from the parameters which layers there are, so that one may be left
  out; a layer that has a "map" is x + (x a) b + bias, position by position.
  """
  config = _config(size)

  def stream(params, tokens, layers: Sequence[str]) -> Any:
    """Computes the residual stream after some layers."""
    wte, wpe = (params[name]["embedding"] for name in ("wte", "wpe"))
    x = wte[tokens] + wpe[None, : tokens.shape[1]]
    for name in layers:
      own = params["h"][name]
      if "map" in own:
        low = own["map"]
        x = x + (x @ low["a"]) @ low["b"] + low["bias"][None, None]
      else:
        x = x + _attention(own["attn"], _norm(own["ln_1"], x), size.heads)
        x = x + _mlp(own["mlp"], _norm(own["ln_2"], x))
    return x

  def predict(params, tokens) -> Any:
    """Predicts the last tokens, each from the text before it."""
    x: Any = stream(params, tokens[:, :-1], sorted(params["h"]))
    x = _norm(params["ln_f"], x)
    return (x @ params["head"]["kernel"])[:, -LENGTH:]

  def loss(params, tokens, answer):
    """Computes the mean loss of a predicted token, in nats."""
    return token_losses(predict(params, tokens), answer).mean()

  return Model(config, predict, loss, stream)


def _norm(own: Any, x: jax.Array) -> jax.Array:
  """Normalises the stream x (batch, time, width), as GPT-2 does."""
  y = x - x.mean(-1, keepdims=True)
  y *= jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)
  return y * own["scale"][None, None] + own["bias"][None, None]


def _linear(own: Any, x: jax.Array) -> jax.Array:
  """Multiplies x (batch, time, in) by a kernel, and adds a bias."""
  return x @ own["kernel"] + own["bias"][None, None]


def _attention(own: Any, x: jax.Array, heads: int) -> jax.Array:
  """Mixes x (batch, time, width) along time, each position what is before."""
  batch, time, width = x.shape
  fused = _linear(own["c_attn"], x).reshape(batch, time, 3, heads, -1)
  q, k, v = fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]
  scores = jnp.einsum("bthd,bshd->bhts", q, k) / (width // heads) ** 0.5
  is_before = jnp.tril(jnp.ones((time, time), bool))[None, None]
  weights = jax.nn.softmax(jnp.where(is_before, scores, -1e30), axis=-1)
  mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
  return _linear(own["c_proj"], mixed.reshape(batch, time, width))


def _mlp(own: Any, x: jax.Array) -> jax.Array:
  """Maps x (batch, time, width), each position by itself."""
  return _linear(own["c_proj"], jax.nn.gelu(_linear(own["c_fc"], x)))


def _config(size: Size) -> dict[str, Any]:
  """Returns the transformer's config.json."""
  return {
    "model_type": "gpt2",
    "vocab_size": vocabulary(draw_texts(0, size).operations),
    "n_embd": size.width,
    "n_layer": size.layers,
    "n_head": size.heads,
    "n_inner": 2 * size.width,
    "n_positions": TOKENS,
    "tie_word_embeddings": False,
  }


@functools.cache
def train_base(seed: int, size: Size, *, other: bool = False) -> Any:
  """Trains a base on the known operations.

  Args:
    seed: of the operations, of the start and of the batches.
    size: how much is computed.
    other: another start and other batches for the same operations.

  Returns:
    Params. Embeddings are as large as training makes them, also those of
    operations that the base never sees.
  """
  model, start = make_model(size), seed + 1000 * other
  _, params = models.init(model.config, jax.random.key(start))
  large = {
    name: jax.tree.map(lambda x: 25 * x, params[name])
    for name in ("wte", "wpe")
  }
  rng = np.random.default_rng([start, 2])
  batches = source_of("known", seed, size)(rng, size.base, size.batch)
  run = whole_run(model.loss, size.rate, size.base)
  params, losses = run({**params, **large}, (), batches)
  last = float(np.asarray(losses)[-1])
  print(f"base of seed {seed}{', other' * other}: {last:.4f}", flush=True)
  return params


def start_loras(params: Any, key: jax.Array, rank: int) -> Loras:
  """Makes adapters of all matrices of the layers that change nothing yet."""
  select = matching("h/.*kernel")
  return init_lora(params, rank, key, select=select, alpha=float(rank))


def rehearsed(
  name: str, seed: int, size: Size, steps: int, turn: int = 0
) -> tuple[np.ndarray, ...]:
  """Draws batches of a skill's texts and as many of what the base knows.

  Args:
    name: of the skill.
    seed: of the operations and the draw.
    size: texts a step.
    steps: batches.
    turn: other texts for another number.

  Returns:
    Tokens (steps, batch, TOKENS), and their answers.
  """
  both = source_of(name, seed, size), source_of("known", seed, size)
  place = list(draw_texts(seed, size).pairs).index(name)
  rng = np.random.default_rng([seed, 4, place, turn])
  return side_by_side(*both)(rng, steps, size.batch)


def learn(
  params: Any, start: Loras, batches: tuple[np.ndarray, ...], size: Size
) -> Loras:
  """Trains an adapter on labelled batches, with a rate that falls to zero."""
  steps = len(batches[0])
  rate = size.brisk if steps == size.short else size.rate
  run = adapter_run(make_model(size).loss, rate, steps)
  return run(start, (params,), batches)[0]


@functools.cache
def train_skill(name: str, seed: int, size: Size) -> Loras:
  """Trains a skill's adapter on the base."""
  params = train_base(seed, size)
  place = list(draw_texts(seed, size).pairs).index(name)
  start = start_loras(params, jax.random.key(10 * seed + place), size.rank)
  return learn(params, start, rehearsed(name, seed, size, size.steps), size)


@functools.cache
def unlabelled(name: str, seed: int, size: Size) -> tuple[np.ndarray]:
  """Draws a skill's batches whose answers the base with its adapter wrote."""
  tokens, _ = rehearsed(name, seed, size, size.short, turn=1)
  source = merged(train_base(seed, size), train_skill(name, seed, size))
  flat = tokens.reshape(-1, TOKENS)
  found = answered(make_model(size).predict, source, flat)
  return (found.reshape(tokens.shape),)


def merged(params: Any, loras: Loras) -> Any:
  """Adds an adapter to the parameters."""
  return _merge(params, loras)


@jax.jit
def _merge(params, loras):
  """Adds an adapter as one program."""
  return jlora.apply(params, loras)


@functools.cache
def open_exam(seed: int, size: Size) -> Examiner:
  """Writes the texts of all figures, `size.count` of each name."""
  rng = np.random.default_rng([seed, 3])
  texts = draw_texts(seed, size)
  written = {
    name: write(rng, texts.operations, own, (size.count,))
    for name, own in texts.pairs.items()
  }
  written["distance"] = written["known"]
  predict = make_model(size).predict
  return Examiner(predict, train_base(seed, size), written, LENGTH)


def update_batches(seed: int, size: Size) -> tuple[np.ndarray, ...]:
  """Draws an update's batches: half new operations, half known ones."""
  return rehearsed("update", seed, size, max(*size.marks, *size.looks))
