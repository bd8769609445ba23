# SPDX-License-Identifier: Apache-2.0
"""A small Llama whose texts belong to regimes that no token names.

    [mark, mark, x_1 ... x_6, =, y_1 ... y_6]

The base has learned to copy, whatever the marks. Each of six regimes applies
two of four substitutions of symbols one after the other, and has four marks of
its own, which nobody says belong together.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.lib.adapters import routers
from experiments.lib.adapters.routers import (
  Mixture,
  start_of,
  train_mixture,
)
from experiments.lib.data.strings import LENGTH
from experiments.lib.models.loops import whole_run
from experiments.lib.models.token_skills import token_losses
from jlora import models
from jlora.adapting import adapt, bind
from jlora.paths import matching

SYMBOLS = 16
PAIRS = tuple(itertools.combinations(range(4), 2))
MARKS = 4 * len(PAIRS)
MEASURES = {
  "nats": "nats a symbol",
  "exact": "answers right",
  "effective at first": "effective number at first",
  "effective, least": "least",
  "effective at last": "at last",
}


#: Those of `routers.METHODS` that are compared here.
METHODS = (
  "ReMix",
  "ReMix, frozen random router",
  "softmax top-k, logits of 0.1, routers at 0.001",
  "softmax top-k, logits of 0.1",
  "softmax top-k, logits of 1",
  "softmax top-k, logits of 6",
)


class Size(NamedTuple):
  """How much is computed.

  Attributes:
    width: of the residual stream.
    layers: of the decoder.
    base: training steps of the base.
    batch: texts a step.
    mixture: the adapters.
    count: texts of the test.
  """

  width: int
  layers: int
  base: int
  batch: int
  mixture: Mixture
  count: int


FULL = Size(48, 1, 400, 32, Mixture(steps=800), 2048)
SMOKE = Size(16, 1, 5, 8, Mixture(4, 1, steps=3), 16)


def write(
  rng: np.random.Generator, codes: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """Writes texts of regimes drawn evenly.

  Args:
    rng: generator.
    codes: (4, SYMBOLS), what each symbol becomes.
    shape: of the texts.

  Returns:
    (*shape, 15) int32.

  Example:
    >>> same = np.tile(np.arange(SYMBOLS), (4, 1))
    >>> text = write(np.random.default_rng(0), same, (1,))[0]
    >>> (text[2:8] == text[9:]).all()
    np.True_
  """
  regime = rng.integers(0, len(PAIRS), shape)
  marks = 4 * regime[..., None] + rng.integers(0, 4, (*shape, 2))
  given = rng.integers(0, SYMBOLS, (*shape, LENGTH))
  answer = given
  for turn in (0, 1):
    own = codes[np.asarray(PAIRS)[regime, turn]]
    answer = np.take_along_axis(own, answer, -1)
  equals = np.full((*shape, 1), SYMBOLS + MARKS)
  parts = (SYMBOLS + marks, given, equals, answer)
  return np.concatenate(parts, axis=-1).astype(np.int32)


def draw_codes(seed: int) -> np.ndarray:
  """Draws four substitutions, (4, SYMBOLS)."""
  rng = np.random.default_rng([seed, 0])
  return np.stack([rng.permutation(SYMBOLS) for _ in range(4)])


def _config(size: Size) -> dict[str, Any]:
  """Returns the decoder's config.json."""
  return {
    "model_type": "llama",
    "vocab_size": SYMBOLS + MARKS + 1,
    "hidden_size": size.width,
    "intermediate_size": 2 * size.width,
    "num_hidden_layers": size.layers,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
  }


@functools.cache
def make_losses(size: Size) -> Any:
  """Returns (params, tokens) -> (losses (B, LENGTH), whether each is right)."""
  model = models.build(_config(size))

  def losses(params, tokens):
    """Reads a text and judges its answer."""
    answer = tokens[:, -LENGTH:]
    logits = model(params, tokens[:, :-1])[:, -LENGTH:]
    return token_losses(logits, answer), logits.argmax(-1) == answer

  return losses


@functools.cache
def make_loss(size: Size) -> Any:
  """Returns (params, tokens) -> (B,), the mean loss of each answer."""
  losses = make_losses(size)
  return lambda params, tokens: losses(params, tokens)[0].mean(-1)


@functools.cache
def _mean_loss(size: Size) -> Any:
  """Returns the mean over texts of `make_loss`."""
  loss = make_loss(size)
  return lambda params, tokens: loss(params, tokens).mean()


@functools.cache
def train_base(seed: int, size: Size) -> Any:
  """Trains a base to copy."""
  _, params = models.init(_config(size), jax.random.key(seed))
  same = np.tile(np.arange(SYMBOLS), (4, 1))
  rng = np.random.default_rng([seed, 3])
  texts = write(rng, same, (size.base, size.batch))
  run = whole_run(_mean_loss(size), 3e-3, size.base)
  params, losses = run(params, (), (texts,))
  last = float(np.mean(np.asarray(losses)[-10:]))
  print(f"base of seed {seed}: {last:.4f} nats", flush=True)
  return params


@functools.cache
def _test(size: Size) -> Any:
  """Compiles the judging of texts."""
  return jax.jit(adapt(make_losses(size)))


def measure(name: str, seed: int, size: Size) -> dict[str, Any]:
  """Trains a method, and computes its figures.

  Args:
    name: of METHODS.
    seed: of substitutions, base, start and texts.
    size: how much is computed.

  Returns:
    "figures" and "course", the effective number at ten times.
  """
  codes, params = draw_codes(seed), train_base(seed, size)
  rng = np.random.default_rng([seed, 1])
  texts = write(rng, codes, (size.mixture.steps, size.batch))
  start = start_of(params, matching("layers/.*kernel"))
  loss, method = make_loss(size), routers.METHODS[name]
  trained = train_mixture(
    method, size.mixture, loss, params, start, (texts,), seed
  )
  tokens = write(np.random.default_rng([seed, 2]), codes, (size.count,))
  losses, right = _test(size)(bind(params, trained.programs), tokens)
  figures = {
    "nats": float(losses.mean()),
    "exact": float(right.all(-1).mean()),
  }
  return {"figures": figures | trained.numbers(), "course": trained.course()}
