# SPDX-License-Identifier: Apache-2.0
"""Carries adapters of SmolLM2-135M to what it becomes on Python's library.

Two adapters are trained on the base, one on the Bible and one on Python's help
in items; the base then goes on, all of its matrices, with the source of the
standard library.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from experiments.lib.adapters.ports import CEILING, WEIGHTS, Reading, as_long
from experiments.lib.data import forms, smollm2, texts
from experiments.lib.models import finetunes
from experiments.lib.models.loops import schedule
from experiments.lib.models.updated_strings import merged
from jlora import models
from jlora.extraction import port
from jlora.loras import Lora, Loras
from jlora.paths import flatten, matching
from jlora.training import distil, init_lora, train

#: Path -> a weight (in, out).
Weights = Mapping[str, np.ndarray]


class Size(NamedTuple):
  """The sizes of training and of tests.

  Attributes:
    words: skill -> the text and the form it is about.
    marks: steps of the update after which adapters are carried, rising.
    batch: stretches a step.
    length: tokens that are predicted in each.
    prompt: tokens of a stretch that the source goes on from.
    rank: of an adapter.
    steps: of an adapter's training.
    short: of what has a quarter of them.
    rate: the largest of an adapter's training; twice it for `short` ones.
    drift: the largest rate of the update.
    count: stretches a figure.
  """

  words: tuple[tuple[str, tuple[str, forms.Form]], ...]
  marks: tuple[int, ...] = (20, 60)
  batch: int = 4
  length: int = 64
  prompt: int = 8
  rank: int = 8
  steps: int = 60
  short: int = 15
  rate: float = 1e-3
  drift: float = 1e-4
  count: int = 64


FULL = Size(
  (("the Bible", ("kjv", forms.plain)), ("items", ("pydoc", forms.item)))
)
#: Of a tiny model of bytes, and texts that need no download.
SMOKE = Size(
  (("quoted", ("pydoc", forms.quoted)), ("items", ("pydoc", forms.item))),
  (1, 2), 2, 16, 4, 2, 4, 2, count=4,
)  # fmt: skip
#: The methods that read weights alone.
READ = ("add", "project, three quarters", "a random part, three quarters")
ON_TEXT = "distil from add, on the skill's text"
ON_WRITTEN = "distil from add, on what the source writes"


class Case(NamedTuple):
  """A skill that is to be carried to what the base became.

  Attributes:
    skill: its name.
    seed: of stretches and starts.
    size: how much is computed.
    target: params that the adapter is for.
    loras: the adapter of the base.
  """

  skill: str
  seed: int
  size: Size
  target: Any
  loras: Loras


@functools.cache
def open_base(
  size: Size,
) -> tuple[models.Model, Any, Callable[[str], np.ndarray]]:
  """Loads the base once: its function, its parameters, its tokenizer."""
  if size is FULL:
    folder = smollm2.fetch()
    return *models.load(folder), smollm2.tokenizer(folder)
  return *models.init(finetunes.TINY, jax.random.key(0)), texts.encode_bytes


@functools.cache
def read_parts(name: str, size: Size) -> tuple[str, str]:
  """Returns a skill's text, or the update's: to train on, and held out."""
  if name == "update":
    return texts.split(texts.library())
  text, form = dict(size.words)[name]
  train_on, _, held = forms.split(forms.paragraphs(text))
  return "".join(map(form, train_on)), "".join(map(form, held))


def stretches(
  name: str, seed: int, size: Size, steps: int, turn: int = 0
) -> np.ndarray:
  """Draws a training's batches.

  Args:
    name: of a skill, or "update".
    seed: of the draw.
    size: of the batches.
    steps: how many.
    turn: other stretches for another number.

  Returns:
    (steps, batch, length + 1) int32.
  """
  text, encode = read_parts(name, size)[0], open_base(size)[2]
  names = [*dict(size.words), "update"]
  rows = steps * size.batch
  drawn = texts.excerpts(
    text,
    encode,
    rows=rows,
    length=size.length,
    seed=1000 * seed + 10 * names.index(name) + turn,
  )
  order = np.random.default_rng([seed, turn]).permutation(rows)
  return drawn[order].reshape(steps, size.batch, -1)


@functools.cache
def examiner(size: Size) -> Callable[..., list[float]]:
  """Makes the function that examines parameters on a text's held-out part."""
  apply = open_base(size)[0]

  @jax.jit
  def judge(params, tokens):
    """Computes the share of next tokens that are right, and their nats."""
    logits = apply(params, tokens[:, :-1])
    right = (logits.argmax(-1) == tokens[:, 1:]).mean()
    return right, finetunes.nll(lambda *_: logits, params, tokens)

  def examine(params: Any, name: str) -> list[float]:
    """Examines on the beginnings of equal parts."""
    held, encode = read_parts(name, size)[1], open_base(size)[2]
    drawn = texts.excerpts(held, encode, rows=size.count, length=size.length)
    some = drawn.reshape(-1, size.batch, size.length + 1)
    parts = [judge(params, jnp.asarray(x)) for x in some]
    return np.mean(jax.device_get(parts), axis=0).tolist()

  return examine


#: Places in `_updates`.
_LONG, _SHORT, _DISTIL = range(3)


@functools.cache
def _updates(size: Size) -> tuple[tuple[Callable, Callable], ...]:
  """Compiles steps of training and of distilling, long and short."""
  apply = open_base(size)[0]
  loss = functools.partial(finetunes.nll, apply)
  read = lambda params, tokens: apply(params, tokens[:, :-1])  # noqa: E731
  brisk = schedule(2 * size.rate, size.short)
  made = (
    train(loss, schedule(size.rate, size.steps)),
    train(loss, brisk),
    distil(read, brisk),
  )
  return tuple((init, jax.jit(update)) for init, update in made)


def _trained(which: int, case: Case, start: Loras, source, batches) -> Loras:
  """Takes all steps of one of `_updates` on the target."""
  init, update = _updates(case.size)[which]
  loras, state = start, init(start)
  for tokens in batches:
    tokens = jnp.asarray(tokens)
    loras, state, _ = update(loras, state, case.target, *source, tokens)
  return loras


def _fresh(case: Case, place: int) -> Loras:
  """Makes an adapter of all matrices of the layers that changes nothing yet."""
  rank, key = case.size.rank, jax.random.key(10 * case.seed + place)
  select = matching("layers/.*kernel")
  return init_lora(case.target, rank, key, select=select, alpha=float(rank))


@functools.cache
def train_skill(skill: str, seed: int, size: Size) -> Loras:
  """Trains a skill's adapter on the base."""
  case = Case(skill, seed, size, open_base(size)[1], {})
  return _retrained(case, _fresh(case, 0), size.steps, turn=0)


def _retrained(case: Case, start: Loras, steps: int, turn: int = 2) -> Loras:
  """Trains Loras on texts of the skill."""
  batches = stretches(case.skill, case.seed, case.size, steps, turn)
  which = _LONG if steps == case.size.steps else _SHORT
  return _trained(which, case, start, (), batches)


def _distilled(case: Case, batches: np.ndarray) -> Loras:
  """Trains the adapter to answer on the target as it does on the base."""
  source = open_base(case.size)[1], case.loras
  return _trained(_DISTIL, case, case.loras, source, batches)


def _written(case: Case) -> np.ndarray:
  """Samples what the base with its adapter writes after a few tokens."""
  size, (apply, params, _) = case.size, open_base(case.size)
  drawn = stretches(case.skill, case.seed, size, size.short, 1)
  prompts = drawn.reshape(-1, size.length + 1)[:, : size.prompt]
  more = models.generate(
    apply,
    merged(params, case.loras),
    jnp.asarray(prompts),
    size.length + 1 - size.prompt,
    key=jax.random.key(case.seed),
    temperature=1.0,
  )
  return np.concatenate([prompts, more], axis=1).reshape(drawn.shape)


#: Where something is trained.
TRAINED: dict[str, Callable[[Case], Loras]] = {
  ON_TEXT: lambda case: _distilled(
    case, stretches(case.skill, case.seed, case.size, case.size.short, 1)
  ),
  ON_WRITTEN: lambda case: _distilled(case, _written(case)),
  "retrain from add, a quarter of the steps": lambda case: _retrained(
    case, case.loras, case.size.short
  ),
  "retrain from zero, a quarter of the steps": lambda case: _retrained(
    case, _fresh(case, 1), case.size.short
  ),
  CEILING: lambda case: _retrained(case, _fresh(case, 1), case.size.steps),
}
METHODS = (*READ, *TRAINED)


def _carried(case: Case, how: Reading) -> Loras:
  """Carries an adapter by weights alone."""
  source, target = (
    {path: np.asarray(flatten(x)[path]) for path in case.loras}
    for x in (open_base(case.size)[1], case.target)
  )
  found = _carried_between(case.loras, source, target, how)
  if not how.is_random:
    return found
  noise = {
    path: np.random.default_rng([case.seed, 8, at]).standard_normal(
      x.shape, np.float32
    )
    for at, (path, x) in enumerate(target.items())
  }
  return as_long(_carried_between(case.loras, source, noise, how), found)


def _carried_between(
  loras: Loras, source: Weights, target: Weights, how: Reading
) -> Loras:
  """Carries an adapter between weights, modules side by side on the host."""

  def carry(path: str) -> Lora:
    """Carries the adapter of one weight."""
    k = max(1, int(how.share * min(target[path].shape)))
    return port(loras[path], source[path], target[path], method=how.method, k=k)

  # LAPACK's own threads would spin against each other.
  with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(2) as pool:
    return dict(zip(loras, pool.map(carry, loras), strict=True))


@functools.cache
def update_base(seed: int, size: Size) -> dict[int, Any]:
  """Trains the base on; returns its parameters after every mark.

  The rate rises and falls once up to each mark.
  """
  apply, params, _ = open_base(size)
  batches, taken, found = stretches("update", seed, size, size.marks[-1]), 0, {}
  for mark in size.marks:
    params = found[mark] = finetunes.finetune(
      apply, params, batches[taken:mark], steps=mark - taken,
      learning_rate=size.drift,
    )  # fmt: skip
    taken = mark
  return found


def targets(size: Size) -> list[str]:
  """Names every update with every skill."""
  skills = dict(size.words)
  return [
    f"{steps} steps: {skill}"
    for steps, skill in itertools.product(size.marks, skills)
  ]


def measure(name: str, seed: int, size: Size) -> dict[str, Any]:
  """Measures all methods for one skill on one target.

  Args:
    name: of `targets`.
    seed: of stretches and starts; the base is the same for all.
    size: FULL is SmolLM2-135M, anything else a tiny model.

  Returns:
    "alone", "before" (the base alone), "source" (with its adapter) and
    "methods", each the share of next tokens that are right and their loss in
    nats; "update", the target's on the update's text, and "update, before";
    "drift", |w_t - w_s| / |w_s|, the mean over modules.
  """
  steps, skill = name.split(" steps: ")
  examine, base = examiner(size), open_base(size)[1]
  loras = train_skill(skill, seed, size)
  case = Case(skill, seed, size, update_base(seed, size)[int(steps)], loras)
  made = {x: functools.partial(_carried, how=WEIGHTS[x]) for x in READ}
  methods = {}
  for method, make in {**made, **TRAINED}.items():
    methods[method] = examine(merged(case.target, make(case)), skill)
    print(f"  {name}, {method}: {methods[method]}", flush=True)
  moved = [
    np.linalg.norm(flatten(case.target)[path] - flatten(base)[path])
    / np.linalg.norm(flatten(base)[path])
    for path in loras
  ]
  return {
    "alone": examine(case.target, skill),
    "before": examine(base, skill),
    "source": examine(merged(base, loras), skill),
    "methods": methods,
    "update": examine(case.target, "update"),
    "update, before": examine(base, "update"),
    "drift": float(np.mean(moved)),
  }
