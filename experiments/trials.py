# SPDX-License-Identifier: Apache-2.0
"""A pair of models, its calibration text, and what is costly made once."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

import jlora
from experiments import corpora, finetune, gradients, ladders, smollm2, texts
from experiments.fitting import fit, measure_sensitivity
from jlora.factoring import (
  Moment,
  Weight,
  diagonal,
  full,
  second_moments,
  whitened,
)

Moments = dict[str, Moment]
Weighing = functools.partial[Weight]

_WEIGHED = 32  # rows of calibration text that second moments are taken of


class Units(NamedTuple):
  """Loras of many units, the most important first.

  Attributes:
    loras: path -> Lora of NumPy arrays.
    spectra: path -> what each unit is worth, squared, is error avoided.
  """

  loras: dict[str, jlora.Lora]
  spectra: dict[str, np.ndarray]


@dataclasses.dataclass
class Trial:
  """A pair and its calibration text; what is costly is made once.

  Attributes:
    ladder: the pair, factored.
    calibration: (rows, time) tokens that fitting may see.
    steps: of refining.
    seed: of the order in which refining sees them, and of labels.
    spent: what was made for several variants -> seconds.
  """

  ladder: ladders.Ladder
  calibration: np.ndarray
  steps: int
  seed: int
  spent: dict[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self._kept: dict[Any, Any] = {}

  def max_bytes(self, rank: int) -> int:
    """Of plain SVD in bfloat16."""
    return ladders.bytes_of(self.ladder.shapes, rank)

  def sensitivity(self, rank: int) -> dict[str, float]:
    """Divergence for each unit of squared error, by module."""
    tokens = self.calibration[:2]
    return self._once(
      f"sensitivity at rank {rank}",
      lambda: measure_sensitivity(self.ladder, rank, tokens),
    )

  def refined(self, rank: int) -> jlora.Loras:
    """The first units, refined."""
    start = ladders.cut(self.ladder.loras, rank)
    return self._once(
      f"refined at rank {rank}",
      lambda: fit(self.ladder, start, self.calibration, self.steps, self.seed),
    )

  def inputs(self) -> Moments:
    """Second moments of what the finetune's layers read."""
    rows = self.calibration[:_WEIGHED, None]
    return self._once(
      "moments of inputs",
      lambda: second_moments(self.ladder.model, self.ladder.finetuned, rows),
    )

  def outputs(self) -> Moments:
    """Second moments of gradients by what the finetune's layers write."""
    rows, key = self.calibration[:_WEIGHED, None], jax.random.key(self.seed)
    model, params = self.ladder.model, self.ladder.finetuned
    return self._once(
      "moments of gradients",
      lambda: gradients.gradient_moments(model, params, rows, key),
    )

  def whitened(self, name: str) -> Units:
    """The change taken apart under weights, of `WEIGHINGS`."""
    left, right = WEIGHINGS[name]
    inputs = self.inputs()
    outputs = self.outputs() if right else {}

    def make():
      weighed = weights_of(inputs, left), weights_of(outputs, right or left)
      return _whiten(self.ladder, *weighed)

    return self._once(f"factors, {name}", make)

  def _once(self, name: str, make: Callable[[], Any]) -> Any:
    if name not in self._kept:
      began = time.perf_counter()
      self._kept[name] = jax.block_until_ready(make())
      self.spent[name] = time.perf_counter() - began
    return self._kept[name]


_by_channel = functools.partial(diagonal, ridge=0.01)
_by_direction = functools.partial(full, ridge=0.01)

#: name -> (of the inputs, of the outputs).
WEIGHINGS: dict[str, tuple[Weighing, Weighing | None]] = {
  "diagonal": (_by_channel, None),
  "full": (_by_direction, None),
  "two-sided diagonal": (_by_channel, _by_channel),
  "two-sided full": (_by_direction, _by_direction),
}


def weights_of(
  moments: Mapping[str, Moment], weigh: Weighing
) -> Callable[[str], Weight | None]:
  """A function from paths to weights, that remembers the last one only.

  Args:
    moments: path -> Moment; layers that read the same have the same.
    weigh: moment -> weight.

  Returns:
    path -> Weight of NumPy arrays, None where there is no moment.
  """
  last: list[Any] = [None, None]

  def weight(path: str) -> Weight | None:
    if path not in moments:
      return None
    moment = jax.tree.map(np.asarray, moments[path])
    if last[0] is None or not np.array_equal(last[0], moment.total):
      last[:] = moment.total, weigh(moment)
    return last[1]

  return weight


def _whiten(ladder: ladders.Ladder, inputs: Any, outputs: Any) -> Units:
  """Units of every module; what no layer reads, the embedding, stays plain."""
  base, tuned = (
    traverse_util.flatten_dict(x, sep="/")
    for x in (ladder.base, ladder.finetuned)
  )
  loras: dict[str, Any] = dict(ladder.loras)
  spectra: dict[str, Any] = dict(ladder.spectra)
  for path in sorted(loras):
    left, right = inputs(path), outputs(path)
    if left is None:
      continue
    delta = np.asarray(tuned[path]) - np.asarray(base[path])
    rank = len(spectra[path])
    factors = whitened(delta, rank, inputs=left, outputs=right)
    loras[path], spectra[path] = jlora.loras.from_factors(factors), factors.s
  return Units(loras, spectra)


def smollm2_ladder(
  cache: Any, domain: str, steps: int, learning_rate: float, rank: int
) -> tuple[ladders.Ladder, Callable[[str], np.ndarray]]:
  """A finetune of SmolLM2, factored, and its tokeniser.

  Args:
    cache: as `caches.cache_folder`.
    domain: as `finetune.smollm2_pair`.
    steps: of the finetune.
    learning_rate: of the finetune.
    rank: the highest.

  Returns:
    Ladder, and a function string -> (tokens,) int32.
  """
  base, tuned = finetune.smollm2_pair(
    cache, domain, steps=steps, learning_rate=learning_rate
  )
  return ladders.load_ladder(base, tuned, rank), smollm2.tokenizer(base)


def draw_texts(
  encode: Callable[[str], np.ndarray],
  cache: Any,
  domain: str,
  rows: int,
  seed: int | None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Calibration text of a domain, and held-out text of all.

  Args:
    encode: string -> tokens.
    cache: as `caches.cache_folder`.
    domain: whose training text calibrates.
    rows: of each held-out text, 128 tokens each.
    seed: of where the excerpts begin, as `texts.excerpts`.

  Returns:
    (160, 128) tokens, and label -> (rows, 128) tokens, the domain's first.
  """
  take = functools.partial(texts.excerpts, encode=encode, length=127, seed=seed)
  calibration = take(corpora.parts(domain, cache)[0], rows=160)
  names = sorted(corpora.CORPORA, key=lambda name: name != domain)
  return calibration, {
    corpora.label(name): take(corpora.parts(name, cache)[1], rows=rows)
    for name in names
  }


def tiny_trial(
  work: str, seed: int, steps: int = 20
) -> tuple[Trial, dict[str, np.ndarray]]:
  """The tiny pair with its texts: does it run?

  Args:
    work: a folder for the pair.
    seed: of all that is drawn.
    steps: of refining.

  Returns:
    Trial, and name -> (4, 64) held-out tokens.
  """
  pair = finetune.tiny_pair(work, jax.random.key(seed))
  train, held = texts.split(texts.pydoc())
  take = functools.partial(
    texts.excerpts, encode=texts.encode_bytes, length=63, seed=seed
  )
  ladder = ladders.load_ladder(*pair, 32)
  trial = Trial(ladder, take(train, rows=24), steps, seed)
  return trial, {texts.pydoc_source(): take(held, rows=4)}
