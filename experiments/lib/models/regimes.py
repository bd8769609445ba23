# SPDX-License-Identifier: Apache-2.0
"""Six regimes of one linear layer, each the sum of two of four changes.

    y = x (c_i + c_j),   the pair (i, j) told by a noisy mark beside x

The base is zero. Eight adapters of rank 2 are there, of which two are active:
enough for every regime if the right ones are.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.adapters.routers import (
  METHODS,
  Mixture,
  start_of,
  train_mixture,
)
from jlora.adapting import adapt, bind
from jlora.loras import Loras

WIDTH, MARKS, OUT = 32, 16, 32
PAIRS = tuple(itertools.combinations(range(4), 2))
MEASURES = {
  "error": "relative squared error",
  "effective at first": "effective number at first",
  "effective, least": "least",
  "effective at last": "at last",
}


class Size(NamedTuple):
  """How much is computed.

  Attributes:
    mixture: the adapters, and their training.
    batch: rows a step.
    count: rows of the test.
  """

  mixture: Mixture
  batch: int
  count: int


def reads_mark(x: jax.Array, mask: Any) -> jax.Array:
  """Reads the mark, with zeros in place of x."""
  del mask
  return x.at[..., :WIDTH].set(0)


FULL = Size(Mixture(reads=reads_mark), 64, 2048)
SMOKE = Size(Mixture(4, 1, steps=5, reads=reads_mark), 8, 16)


class Regimes(NamedTuple):
  """The task of one seed.

  Attributes:
    changes: (4, WIDTH, OUT), of rank 2.
    marks: (6, MARKS), one for each pair.
  """

  changes: np.ndarray
  marks: np.ndarray

  def draw(
    self, rng: np.random.Generator, shape: tuple[int, ...]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Draws inputs (*shape, WIDTH + MARKS) and outputs (*shape, OUT)."""
    regime = rng.integers(0, len(PAIRS), shape)
    x = rng.standard_normal((*shape, WIDTH), np.float32)
    noise = rng.standard_normal((*shape, MARKS), np.float32)
    mark = self.marks[regime] + np.float32(0.3) * noise
    each = np.einsum("...i,cio->...co", x, self.changes)
    on = np.zeros((len(PAIRS), 4), np.float32)
    for row, pair in zip(on, PAIRS, strict=True):
      row[list(pair)] = 1
    y = np.einsum("...co,...c->...o", each, on[regime])
    return np.concatenate([x, mark], -1), y


def open_regimes(seed: int) -> Regimes:
  """Draws the changes and the marks of a seed."""
  rng = np.random.default_rng([seed, 0])
  left = rng.standard_normal((4, WIDTH, 2), np.float32)
  right = rng.standard_normal((4, 2, OUT), np.float32)
  changes = left @ right / np.float32(WIDTH**0.5)
  return Regimes(changes, rng.standard_normal((6, MARKS), np.float32))


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  """Computes the mean squared error of every row."""
  return jnp.mean(jnp.square(x @ params["w"] - y), axis=-1)


def start(key: jax.Array, rank: int) -> Loras:
  """Makes adapters that read x alone."""
  loras = start_of(base())(key, rank)
  a = loras["w"].a.at[..., WIDTH:].set(0)
  return {"w": dataclasses.replace(loras["w"], a=a)}


@functools.cache
def base() -> dict[str, jax.Array]:
  """Returns the base: a matrix of zeros."""
  return {"w": jnp.zeros((WIDTH + MARKS, OUT))}


def measure(name: str, seed: int, size: Size) -> dict[str, Any]:
  """Trains a method, and computes its figures.

  Args:
    name: of METHODS.
    seed: of regimes, start and batches.
    size: how much is computed.

  Returns:
    "figures" and "course", the effective number at eleven times.
  """
  regimes = open_regimes(seed)
  rng = np.random.default_rng([seed, 1])
  batches = regimes.draw(rng, (size.mixture.steps, size.batch))
  trained = train_mixture(
    METHODS[name], size.mixture, loss, base(), start, batches, seed
  )
  x, y = regimes.draw(np.random.default_rng([seed, 2]), (size.count,))
  bound = bind(base(), trained.programs)
  error = float(_test(bound, x, y).mean() / np.mean(y**2))
  figures = {"error": error, **trained.numbers()}
  return {"figures": figures, "course": trained.course()}


_test = jax.jit(adapt(loss))
