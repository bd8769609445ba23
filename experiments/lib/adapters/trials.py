# SPDX-License-Identifier: Apache-2.0
"""Prepares the trials of `equal_bytes`: a pair, its texts, what variants share.

A `Trial` makes once what is costly (moments, sensitivities, whitened and
refined factors), for all variants of `variants.py`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import jlora
from experiments.lib.adapters import ladders
from experiments.lib.adapters.moments import gradient_moments
from experiments.lib.data import smollm2, texts
from experiments.lib.models import finetunes
from jlora import training
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
_WEIGHED = 32  # rows of calibration text used for second moments
_by_channel = functools.partial(diagonal, ridge=0.01)
_by_direction = functools.partial(full, ridge=0.01)
#: name -> (weight of the inputs, weight of the outputs).
WEIGHINGS: dict[str, tuple[Weighing, Weighing | None]] = {
  "diagonal": (_by_channel, None),
  "full": (_by_direction, None),
  "two-sided diagonal": (_by_channel, _by_channel),
  "two-sided full": (_by_direction, _by_direction),
}


class Units(NamedTuple):
  """Loras of many units, the most important first.

  Attributes:
    loras: path -> Lora of NumPy arrays.
    spectra: path -> the worth of each unit; its square is the error avoided.
  """

  loras: dict[str, jlora.Lora]
  spectra: dict[str, np.ndarray]


@dataclasses.dataclass
class Trial:
  """A pair and its calibration text; makes costly intermediates once.

  Attributes:
    ladder: the pair, factored.
    calibration: (rows, time) tokens that fitting may see.
    steps: steps of refining.
    seed: seed of the order in which refining sees the rows, and of labels.
    spent: seconds that each intermediate took, by name.
  """

  ladder: ladders.Ladder
  calibration: np.ndarray
  steps: int
  seed: int
  spent: dict[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    """Starts with no intermediates."""
    self._kept: dict[Any, Any] = {}

  def max_bytes(self, rank: int) -> int:
    """Counts the bytes of plain SVD at a rank in bfloat16."""
    return ladders.bytes_of(self.ladder.shapes, rank)

  def sensitivity(self, rank: int) -> dict[str, float]:
    """Returns each module's divergence per squared error."""
    tokens = self.calibration[:2]
    return self._once(
      f"sensitivity at rank {rank}",
      lambda: measure_sensitivity(self.ladder, rank, tokens),
    )

  def refined(self, rank: int) -> jlora.Loras:
    """Returns the first units of every module, refined."""
    start = ladders.cut(self.ladder.loras, rank)
    return self._once(
      f"refined at rank {rank}",
      lambda: fit(self.ladder, start, self.calibration, self.steps, self.seed),
    )

  def inputs(self) -> Moments:
    """Returns second moments of what the finetune's layers read."""
    rows = self.calibration[:_WEIGHED, None]
    return self._once(
      "moments of inputs",
      lambda: second_moments(self.ladder.model, self.ladder.finetuned, rows),
    )

  def outputs(self) -> Moments:
    """Returns second moments of gradients by what the layers write."""
    rows, key = self.calibration[:_WEIGHED, None], jax.random.key(self.seed)
    model, params = self.ladder.model, self.ladder.finetuned
    return self._once(
      "moments of gradients",
      lambda: gradient_moments(model, params, rows, key),
    )

  def whitened(self, name: str) -> Units:
    """Returns the change factored under one of `WEIGHINGS`."""
    left, right = WEIGHINGS[name]
    inputs = self.inputs()
    outputs = self.outputs() if right else {}

    def make():
      weighed = weights_of(inputs, left), weights_of(outputs, right or left)
      return _whiten(self.ladder, *weighed)

    return self._once(f"factors, {name}", make)

  def _once(self, name: str, make: Callable[[], Any]) -> Any:
    """Returns an intermediate; makes and times it on the first call."""
    if name not in self._kept:
      began = time.perf_counter()
      self._kept[name] = jax.block_until_ready(make())
      self.spent[name] = time.perf_counter() - began
    return self._kept[name]


def smollm2_ladder(
  cache: Any, domain: str, steps: int, learning_rate: float, rank: int
) -> tuple[ladders.Ladder, Callable[[str], np.ndarray]]:
  """Factors a finetune of SmolLM2; returns it with its tokeniser.

  Args:
    cache: folder for downloads and models; None is ~/.cache/jlora.
    domain: as `finetunes.smollm2_pair`.
    steps: of the finetune.
    learning_rate: of the finetune.
    rank: the highest.

  Returns:
    Ladder, and a function string -> (tokens,) int32.
  """
  base, tuned = finetunes.smollm2_pair(
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
  """Draws a domain's calibration text, and held-out text of all domains.

  Args:
    encode: string -> tokens.
    cache: folder for downloads and models; None is ~/.cache/jlora.
    domain: whose training text calibrates.
    rows: of each held-out text, 128 tokens each.
    seed: of where the excerpts begin, as `texts.excerpts`.

  Returns:
    (160, 128) tokens, and label -> (rows, 128) tokens, the domain's first.
  """
  take = functools.partial(texts.excerpts, encode=encode, length=127, seed=seed)
  calibration = take(texts.parts(domain, cache)[0], rows=160)
  names = sorted(texts.CORPORA, key=lambda name: name != domain)
  return calibration, {
    texts.label(name): take(texts.parts(name, cache)[1], rows=rows)
    for name in names
  }


def tiny_trial(
  work: str, seed: int, steps: int = 20
) -> tuple[Trial, dict[str, np.ndarray]]:
  """Makes a trial of the tiny pair, to check that everything runs.

  Args:
    work: a folder for the pair.
    seed: of all that is drawn.
    steps: of refining.

  Returns:
    Trial, and name -> (4, 64) held-out tokens.
  """
  pair = finetunes.tiny_pair(work, jax.random.key(seed))
  train, held = texts.split(texts.pydoc())
  take = functools.partial(
    texts.excerpts, encode=texts.encode_bytes, length=63, seed=seed
  )
  ladder = ladders.load_ladder(*pair, 32)
  trial = Trial(ladder, take(train, rows=24), steps, seed)
  return trial, {texts.pydoc_source(): take(held, rows=4)}


def measure_sensitivity(
  ladder: ladders.Ladder, rank: int, tokens: np.ndarray
) -> dict[str, float]:
  """Measures each module's divergence per squared error.

  Args:
    ladder: the pair.
    rank: at which one module at a time is cut; the others are the finetune's.
    tokens: (rows, time).

  Returns:
    path -> nats per token for a squared Frobenius error of 1.
  """
  rows = jnp.asarray(tokens)
  student = jax.jit(
    lambda teacher, params: jnp.sum(
      jnp.exp(teacher)
      * (teacher - jax.nn.log_softmax(ladder.model(params, rows))),
      axis=-1,
    ).mean()
  )
  teacher = jax.jit(
    lambda params: jax.nn.log_softmax(ladder.model(params, rows))
  )(ladder.finetuned)
  found = {}
  for path, lora in ladder.loras.items():
    # The finetune, with only this module truncated.
    rest = ladder.rests[path] ** 2 + np.sum(
      np.square(ladder.spectra[path][rank:], dtype=np.float64)
    )
    at = ladders.with_loras(ladder.base, ladders.cut({path: lora}, rank))
    params = _exchange(ladder.finetuned, at, path)
    found[path] = max(float(student(teacher, params)), 0.0) / max(rest, 1e-12)
  # Modules whose divergence is lost in rounding get a small cost all the same.
  least = float(np.median(list(found.values()))) / 100
  return {path: max(cost, least) for path, cost in found.items()}


def fit(
  ladder: ladders.Ladder,
  loras: jlora.Loras,
  tokens: np.ndarray,
  steps: int,
  seed: int,
  learning_rate: float = 1e-5,
) -> jlora.Loras:
  """Refines Loras by gradient steps on text; returns them on the host.

  Args:
    ladder: the pair.
    loras: to start from.
    tokens: (rows, time); two rows a step, each once in every round.
    steps: updates.
    seed: of the rows' order.
    learning_rate: Adam's largest, after a tenth of the steps; it then falls to
      zero as a cosine. 1e-4, a hundredth of an entry, drove the divergence up.

  Returns:
    path -> Lora of NumPy arrays.
  """
  schedule = optax.warmup_cosine_decay_schedule(
    learning_rate / 10, learning_rate, steps // 10 + 1, steps + 1
  )
  init, update = training.distil(ladder.model, optax.adam(schedule))
  step = jax.jit(update, donate_argnums=(0, 1))
  loras = jax.tree.map(jnp.array, loras)
  state, rng = init(loras), np.random.default_rng(seed)
  order = np.concatenate(
    [rng.permutation(len(tokens)) for _ in range(-(-2 * steps // len(tokens)))]
  )
  for at in range(steps):
    rows = jnp.asarray(tokens[order[2 * at : 2 * at + 2]])
    loras, state, value = step(
      loras, state, ladder.base, ladder.finetuned, {}, rows
    )
    if at % max(steps // 5, 1) == 0:
      print(f"  refining: step {at}, {value:.5f} nats", flush=True)
  return jax.tree.map(np.asarray, loras)


def weights_of(
  moments: Mapping[str, Moment], weigh: Weighing
) -> Callable[[str], Weight | None]:
  """Returns a function from paths to weights that caches the last one.

  Args:
    moments: path -> Moment; layers that read the same have the same.
    weigh: moment -> weight.

  Returns:
    path -> Weight of NumPy arrays, None where there is no moment.
  """
  last: list[Any] = [None, None]

  def weight(path: str) -> Weight | None:
    """Returns a path's weight, None without a moment."""
    if path not in moments:
      return None
    moment = jax.tree.map(np.asarray, moments[path])
    if last[0] is None or not np.array_equal(last[0], moment.total):
      last[:] = moment.total, weigh(moment)
    return last[1]

  return weight


def _whiten(ladder: ladders.Ladder, inputs: Any, outputs: Any) -> Units:
  """Factors every module under weights; the embedding has none."""
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


def _exchange(params: Any, other: Any, path: str) -> Any:
  """Returns parameters with one leaf of another tree."""
  head, _, rest = path.partition("/")
  leaf = _exchange(params[head], other[head], rest) if rest else other[head]
  return {**params, head: leaf}
