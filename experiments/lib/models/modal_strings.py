# SPDX-License-Identifier: Apache-2.0
"""Images and tones beside text: a projector and an adapter for each modality.

    [word, word, x_1 ... x_6, =, y_1 ... y_6]

The base is the transformer of `string_skills`. In place of x_1 ... x_6 come six
vectors that a projector makes of a digit's image or of a tone; the answer is
the digit, or the tone's number, in base 8.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.data.digits import join, split_digits
from experiments.lib.data.strings import (
  LENGTH,
  SYMBOLS,
  TOKENS,
  Operations,
  draw_operations,
  known_pairs,
  vocabulary,
  write,
)
from experiments.lib.models import string_skills
from experiments.lib.models.loops import compile_steps, schedule, whole_run
from experiments.lib.models.token_skills import token_losses
from jlora.adapting import Branch, Rows, adapt, adapt_rows, bind
from jlora.loras import Loras
from jlora.merging import concat
from jlora.paths import matching
from jlora.routing import Routes, routes
from jlora.training import init_lora, train

#: Numbers of a projector's input for one of six vectors: 6 x 11 hold an image.
PATCH = 11
PROJECTOR = "projector"
TABLE = "wte/embedding"
MODALITIES = ("image", "tone")
MEASURES = {
  "image": "images",
  "tone": "tones",
  "text": "text (after images)",
  "text, tone": "text (after tones)",
  "moved": "largest change of text's logits",
}


class Size(NamedTuple):
  """How much is computed.

  Attributes:
    text: sizes of the transformer, and of its training.
    rank: of an adapter.
    hidden: width of a projector.
    steps: of each training.
    batch: rows a step.
    rate: largest learning rate.
    count: texts of the test; images are the held-out ones, up to as many.
  """

  text: string_skills.Size
  rank: int
  hidden: int
  steps: int
  batch: int
  rate: float
  count: int


_TEXT = string_skills.FULL._replace(base=1000, moving=6)
FULL = Size(_TEXT, 8, 64, 1500, 48, 3e-3, 360)
SMOKE = Size(string_skills.SMOKE, 2, 8, 3, 8, 3e-3, 6)


class Task(NamedTuple):
  """What there is to answer, of one seed.

  Attributes:
    known: operations of the texts.
    params: of the base.
    images: (n, 64) and labels (n,) to learn from, then held out.
    seed: of all of it.
  """

  known: Operations
  params: Any
  images: tuple[tuple[np.ndarray, np.ndarray], ...]
  seed: int

  def draw(
    self, modality: str, rng: np.random.Generator, shape: tuple[int, ...]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Draws features (*shape, 6, PATCH) and tokens (*shape, TOKENS)."""
    images, labels = self.images[0]
    at = rng.integers(0, len(labels), shape)
    shown = images[at] if modality == "image" else tones(rng, labels[at])
    return as_patches(shown), self.answer(labels[at])

  def held_out(self, modality: str, count: int) -> tuple[np.ndarray, ...]:
    """Returns held-out features and tokens."""
    images, labels = (x[:count] for x in self.images[1])
    rng = np.random.default_rng([self.seed, 2])
    shown = images if modality == "image" else tones(rng, labels)
    return as_patches(shown), self.answer(labels)

  def answer(self, labels: np.ndarray) -> np.ndarray:
    """Writes tokens whose x are zeros and whose answer is a label."""
    tokens = np.zeros((*labels.shape, TOKENS), np.int32)
    tokens[..., :2] = SYMBOLS + self.known.mover  # a word new to the base
    tokens[..., 2 + LENGTH] = vocabulary(self.known) - 1
    tokens[..., -LENGTH] = labels // SYMBOLS
    tokens[..., 1 - LENGTH] = labels % SYMBOLS
    return tokens

  def texts(self, count: int) -> np.ndarray:
    """Returns texts that the base knows, never seen by it."""
    rng = np.random.default_rng([self.seed, 4])
    return write(rng, self.known, known_pairs(self.known), (count,))


def tones(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
  """Draws noisy tones of ten frequencies, at any phase, 66 samples each.

  Args:
    rng: generator.
    labels: (...) integers below ten.

  Returns:
    (..., 66) float32.

  Example:
    >>> tones(np.random.default_rng(0), np.array([3])).shape
    (1, 66)
  """
  size = LENGTH * PATCH
  time = np.arange(size) * np.pi / size
  phase = rng.uniform(0, 2 * np.pi, (*labels.shape, 1))
  wave = np.sin((labels[..., None] + 2) * time + phase)
  noise = rng.standard_normal((*labels.shape, size))
  return (wave + 0.3 * noise).astype(np.float32)


def as_patches(rows: np.ndarray) -> np.ndarray:
  """Cuts rows of at most 66 numbers into (..., 6, PATCH), zeros at the end."""
  short = LENGTH * PATCH - rows.shape[-1]
  wide = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, short)])
  return wide.reshape(*rows.shape[:-1], LENGTH, PATCH)


@functools.cache
def open_task(seed: int, size: Size) -> Task:
  """Trains the base of a seed, and splits the digits."""
  one, two, held = split_digits(seed)
  own = join(one, two)
  return Task(
    draw_operations(seed, size.text.moving, size.text.coding),
    string_skills.train_base(seed, size.text),
    ((own.images, own.labels), (held.images, held.labels)),
    seed,
  )


def project(params: Any, features: jax.Array) -> jax.Array:
  """Computes what stands in place of embeddings, (..., PATCH) -> (..., d)."""
  return jax.nn.gelu(features @ params["a"] + params["b"]) @ params["c"]


def project_both(params: Any, features: jax.Array) -> jax.Array:
  """Projects a first half of images and a second one of tones."""
  half = len(features) // 2
  return jnp.concatenate(
    [
      project(params[name], part)
      for name, part in zip(
        MODALITIES, (features[:half], features[half:]), strict=True
      )
    ]
  )


def init_projector(size: Size, key: jax.Array) -> dict[str, jax.Array]:
  """Draws a projector whose vectors are about as long as embeddings."""
  first, second = jax.random.split(key)
  width = size.text.width
  spread = 0.5 / size.hidden**0.5
  return {
    "a": jax.random.normal(first, (PATCH, size.hidden)) / PATCH**0.5,
    "b": jnp.zeros((1, size.hidden))[0],
    "c": spread * jax.random.normal(second, (size.hidden, width)),
  }


def spliced(
  loss: Callable[..., jax.Array],
  params: Any,
  programs: Mapping[str, Any],
  batch: tuple[Any, ...],
  dropout: Any = None,
) -> Any:
  """Calls a function with vectors in place of x; a `through` of `train`.

  Args:
    loss: (params, tokens) -> anything.
    params: of the base.
    programs: path -> Lora, and the projector, a Branch.
    batch: features (B, 6, PATCH) and tokens (B, TOKENS).
    dropout: None.

  Returns:
    What the function returns.
  """
  del dropout
  features, tokens = batch
  branch = programs[PROJECTOR]
  rows = branch.function(branch.params, features)
  others = {path: x for path, x in programs.items() if path != PROJECTOR}
  return adapt(loss)(*as_rows(params, rows, tokens, others))


def as_rows(
  params: Any, rows: jax.Array, tokens: jax.Array, others: Mapping[str, Any]
) -> tuple[Any, jax.Array]:
  """Adds vectors (B, 6, d) to the embeddings, and puts their ids into texts.

  Args:
    params: of the base.
    rows: a projector's.
    tokens: (B, TOKENS).
    others: programs beside them.

  Returns:
    Bound parameters, and tokens.
  """
  first = params["wte"]["embedding"].shape[0]
  ids = first + jnp.arange(rows.shape[0] * LENGTH, dtype=tokens.dtype)
  table = Rows(rows.reshape(-1, rows.shape[-1]))
  text = jnp.concatenate(
    [tokens[:, :2], ids.reshape(-1, LENGTH), tokens[:, 2 + LENGTH :]], axis=1
  )
  return bind(params, {TABLE: table, **others}), text


@functools.cache
def make_functions(size: Size) -> tuple[Any, Any]:
  """Returns (params, tokens) -> loss (), and -> logits of the answer."""
  predict = string_skills.make_functions(size.text).predict

  def loss(params, tokens):
    """Computes the mean loss of a symbol."""
    return token_losses(predict(params, tokens), tokens[:, -LENGTH:]).mean()

  return loss, predict


@functools.cache
def _adapter_run(size: Size):
  """Compiles the training of adapters and projectors."""
  loss, _ = make_functions(size)
  rule = schedule(size.rate, size.steps)
  return compile_steps(*train(loss, rule, through=spliced))


@functools.cache
def _whole_run(size: Size):
  """Compiles the training of everything and a projector."""
  loss, _ = make_functions(size)

  def everything(part, features, tokens):
    """Computes the loss of all parameters."""
    programs = {PROJECTOR: Branch(project, part["projector"])}
    return spliced(loss, part["params"], programs, (features, tokens))

  return whole_run(everything, size.rate, size.steps)


def _start(task: Task, size: Size, name: str, rank: int) -> dict[str, Any]:
  """Makes a projector, and adapters of all matrices of the layers."""
  place = [*MODALITIES, "both"].index(name)
  own = jax.random.fold_in(jax.random.key(task.seed), place)
  first, second, third = jax.random.split(own, 3)
  if name == "both":
    params: Any = {
      name: init_projector(size, key)
      for name, key in zip(MODALITIES, (first, third), strict=True)
    }
    branch = Branch(project_both, params)
  else:
    branch = Branch(project, init_projector(size, first))
  found: dict[str, Any] = {PROJECTOR: branch}
  if rank:
    select = matching("h/.*kernel")
    found |= init_lora(
      task.params, rank, second, select=select, alpha=float(rank)
    )
  return found


def _batches(task: Task, size: Size, name: str) -> tuple[np.ndarray, ...]:
  """Draws all batches of a modality, or of both."""
  rng = np.random.default_rng([task.seed, 1])
  shape = size.steps, size.batch
  if name != "both":
    return task.draw(name, rng, shape)
  half = size.steps, size.batch // 2
  parts = [task.draw(name, rng, half) for name in MODALITIES]
  return tuple(np.concatenate(x, axis=1) for x in zip(*parts, strict=True))


@functools.cache
def train_programs(
  seed: int, size: Size, name: str, rank: int
) -> dict[str, Any]:
  """Trains a projector, and an adapter unless the rank is 0.

  Args:
    seed: of the task.
    size: how much is computed.
    name: a modality, or "both".
    rank: of the adapter.

  Returns:
    path -> Lora, and the projector.
  """
  task = open_task(seed, size)
  start = _start(task, size, name, rank)
  batches = _batches(task, size, name)
  return _adapter_run(size)(start, (task.params,), batches)[0]


@functools.cache
def train_everything(seed: int, size: Size, name: str) -> tuple[Any, Any]:
  """Finetunes all parameters for a modality; returns them and a projector."""
  task = open_task(seed, size)
  part = {
    "params": task.params,
    "projector": _start(task, size, name, 0)[PROJECTOR].params,
  }
  part, _ = _whole_run(size)(part, (), _batches(task, size, name))
  return part["params"], Branch(project, part["projector"])


class Judge:
  """Judges mixed batches: as many images, tones and texts."""

  def __init__(self, task: Task, size: Size):
    """Writes the texts."""
    self.task = task
    shown = [task.held_out(name, size.count) for name in MODALITIES]
    self.count = len(shown[0][0])
    blank = np.zeros_like(shown[0][0])
    self.features = [*(x for x, _ in shown), blank]
    texts = task.texts(self.count)
    self.tokens = np.concatenate([*(x for _, x in shown), texts])
    self.predict = make_functions(size)[1]

  def mixed(
    self, params: Any, projectors: Mapping[str, Any], bank: Loras, ids: Any
  ) -> np.ndarray:
    """Computes logits of a mixed batch, each row with its own adapters.

    Args:
      params: of the base.
      projectors: modality -> Branch.
      bank: of adapters.
      ids: (B,) or (B, s).

    Returns:
      (B, LENGTH, vocabulary).
    """
    parts = [projectors[name].params for name in MODALITIES]
    run = _mixed(self.predict)
    found = run(params, parts, bank, ids, self.features, self.tokens)
    return np.asarray(found)

  def shares(self, logits: np.ndarray) -> dict[str, float]:
    """Returns how many images, tones and texts are answered right."""
    answers = self.tokens[:, -LENGTH:]
    right = (logits.argmax(-1) == answers).all(-1)
    each = np.split(right, 3)
    names = (*MODALITIES, "text")
    return {x: float(y.mean()) for x, y in zip(names, each, strict=True)}


@functools.cache
def _mixed(predict: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Compiles a mixed batch, once for all ids and adapters of a shape."""

  @jax.jit
  def run(params, projectors, bank, ids, features, tokens):
    """Computes logits; the last third are texts as they are."""
    image, tone, _ = features
    half = len(image)
    each = zip(projectors, (image, tone), strict=True)
    rows = jnp.concatenate([project(own, x) for own, x in each])
    bound, spoken = as_rows(params, rows, tokens[: 2 * half], {})
    texts = jnp.concatenate([spoken, tokens[2 * half :]])
    return adapt_rows(predict)(bound, bank, ids, texts)

  return run


def table_of(seed: int, size: Size) -> tuple[Loras, Routes, dict[str, Any]]:
  """Returns both modalities' adapters as a bank, their table and projectors."""
  trained = {x: train_programs(seed, size, x, size.rank) for x in MODALITIES}
  adapters = {
    name: {path: x for path, x in own.items() if path != PROJECTOR}
    for name, own in trained.items()
  }
  bank, ways = routes(
    adapters, {(): None, "image": "image", "tone": "tone",
               ("image", "tone"): "image"},
  )  # fmt: skip
  return bank, ways, {name: own[PROJECTOR] for name, own in trained.items()}


def _judged(seed: int, size: Size, ids_of: Callable) -> dict[str, float]:
  """Judges the bank with ids made of the right ones."""
  judge = Judge(open_task(seed, size), size)
  bank, ways, projectors = table_of(seed, size)
  present = np.zeros((3 * judge.count, 2), bool)
  present[: judge.count, 0] = present[judge.count : -judge.count, 1] = True
  ids = np.asarray(ways.ids(present))
  params = judge.task.params
  logits = judge.mixed(params, projectors, bank, ids_of(ids))
  shares = judge.shares(logits)
  texts = judge.tokens[-judge.count :]
  # Row by row: XLA rounds products of all rows otherwise, without any adapter.
  base = np.asarray(_alone(judge.predict)(params, texts))
  moved = float(np.abs(logits[-judge.count :] - base).max())
  return {**shares, "text, tone": shares["text"], "moved": moved}


@functools.cache
def _alone(predict):
  """Compiles the base, row by row."""
  return jax.jit(
    lambda params, tokens: jax.vmap(lambda row: predict(params, row[None])[0])(
      tokens
    )
  )


def _apart(seed: int, size: Size) -> dict[str, float]:
  """Judges projectors that were trained without adapters."""
  judge = Judge(open_task(seed, size), size)
  bank, _, _ = table_of(seed, size)
  own = {x: train_programs(seed, size, x, 0)[PROJECTOR] for x in MODALITIES}
  none = np.full(3 * judge.count, -1, np.int32)
  shares = judge.shares(judge.mixed(judge.task.params, own, bank, none))
  return {**shares, "text, tone": shares["text"]}


def _everything(seed: int, size: Size) -> dict[str, float]:
  """Judges full finetuning for each modality, on it and on text."""
  judge = Judge(open_task(seed, size), size)
  bank, _, _ = table_of(seed, size)
  none = np.full(3 * judge.count, -1, np.int32)
  found = {}
  for name, text in zip(MODALITIES, ("text", "text, tone"), strict=True):
    params, branch = train_everything(seed, size, name)
    own: dict[str, Any] = {x: branch for x in MODALITIES}
    shares = judge.shares(judge.mixed(params, own, bank, none))
    found |= {name: shares[name], text: shares["text"]}
  return found


def _shared(seed: int, size: Size) -> dict[str, float]:
  """Judges one adapter of both ranks that was trained on both modalities."""
  judge = Judge(open_task(seed, size), size)
  trained = train_programs(seed, size, "both", 2 * size.rank)
  branch = trained[PROJECTOR]
  own = {x: Branch(project, branch.params[x]) for x in MODALITIES}
  loras = {path: x for path, x in trained.items() if path != PROJECTOR}
  bank, _ = routes({"one": loras}, {(): None, "any": "one"})
  ids = np.repeat([0, 0, -1], judge.count).astype(np.int32)
  shares = judge.shares(judge.mixed(judge.task.params, own, bank, ids))
  return {**shares, "text, tone": shares["text"]}


def _summed(seed: int, size: Size) -> dict[str, float]:
  """Judges the sum of both adapters on every row."""
  judge = Judge(open_task(seed, size), size)
  bank, _, projectors = table_of(seed, size)
  each = [jax.tree.map(lambda x, i=i: x[i], bank) for i in range(2)]
  both = {path: concat([x[path] for x in each], [1.0, 1.0]) for path in bank}
  one, _ = routes({"sum": both}, {"any": "sum", (): None})
  ids = np.zeros(3 * judge.count, np.int32)
  shares = judge.shares(judge.mixed(judge.task.params, projectors, one, ids))
  return {**shares, "text, tone": shares["text"]}


def _wrong(seed: int, size: Size) -> dict[str, float]:
  """Judges every row with the other modality's adapter; texts with each."""
  swapped = _judged(seed, size, lambda ids: np.where(ids < 0, 0, 1 - ids))
  other = _judged(seed, size, lambda ids: np.where(ids < 0, 1, ids))
  return {**swapped, "text, tone": other["text"]}


#: name -> (seed, size) -> figures.
METHODS: dict[str, Callable[[int, Size], dict[str, float]]] = {
  "adapters by the table": functools.partial(_judged, ids_of=lambda ids: ids),
  "projectors alone": _apart,
  "everything finetuned, each": _everything,
  "one adapter of both ranks for both": _shared,
  "the other modality's adapter": _wrong,
  "the sum of both adapters": _summed,
}


def measure(name: str, seed: int, size: Size) -> dict[str, Any]:
  """Trains what a method needs, and computes its figures.

  Args:
    name: of METHODS.
    seed: of the task, starts and batches.
    size: how much is computed.

  Returns:
    "figures".
  """
  return {"figures": METHODS[name](seed, size)}
