# SPDX-License-Identifier: Apache-2.0
"""Eight skills of one small Llama, of which texts ask without naming them.

The base is that of `hidden_regimes`: it copies, whatever the two marks before a
string. A skill substitutes symbols in texts with three marks of its own; its
LoRA saw those, and as many texts with the others' marks, which it has to copy.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.data.strings import LENGTH
from experiments.lib.models import hidden_regimes
from experiments.lib.models.hidden_regimes import MARKS, SYMBOLS
from experiments.lib.models.loops import adapter_run
from jlora.adapting import Gated, adapt, adapt_rows, bind, make_bank
from jlora.loras import Loras
from jlora.paths import key_for, matching
from jlora.routing import arrow, given, prototypes
from jlora.training import init_lora

COUNT = 8
_EACH = MARKS // COUNT
MEASURES = {
  "exact": "answers right",
  "nats": "nats a symbol",
  "hits": "largest gate is the right one",
}


class Size(NamedTuple):
  """How much is computed.

  Attributes:
    base: sizes of the Llama and its training.
    rank: of an adapter.
    steps: of its training.
    rate: largest learning rate.
    count: texts of each skill in the test.
  """

  base: hidden_regimes.Size
  rank: int
  steps: int
  rate: float
  count: int


FULL = Size(hidden_regimes.FULL, 4, 400, 1e-2, 128)
SMOKE = Size(hidden_regimes.SMOKE, 1, 3, 1e-2, 2)


def write(
  rng: np.random.Generator,
  codes: np.ndarray,
  skills: np.ndarray,
  active: Sequence[int],
) -> np.ndarray:
  """Writes texts with the marks of skills.

  Args:
    rng: generator.
    codes: (8, SYMBOLS), what each symbol becomes.
    skills: (...) integers, whose marks a text has.
    active: skills that are answered; texts of others are copied.

  Returns:
    (..., TOKENS) int32.
  """
  marks = _EACH * skills[..., None] + rng.integers(0, _EACH, (*skills.shape, 2))
  given = rng.integers(0, SYMBOLS, (*skills.shape, LENGTH))
  own = np.tile(np.arange(SYMBOLS), (COUNT, 1))
  own[list(active)] = codes[list(active)]
  answer = np.take_along_axis(own[skills], given, -1)
  equals = np.full((*skills.shape, 1), SYMBOLS + MARKS)
  parts = (SYMBOLS + marks, given, equals, answer)
  return np.concatenate(parts, axis=-1).astype(np.int32)


class Library(NamedTuple):
  """A base and its adapters.

  Attributes:
    params: of the base.
    bank: of all adapters.
    texts: (8 count, TOKENS), of skills in turn.
    skills: (8 count,), which is asked for.
  """

  params: Any
  bank: Loras
  texts: np.ndarray
  skills: np.ndarray


@functools.cache
def _mean_loss(size: hidden_regimes.Size):
  """Returns (params, tokens) -> ()."""
  loss = hidden_regimes.make_loss(size)
  return lambda params, tokens: loss(params, tokens).mean()


@functools.cache
def open_library(seed: int, size: Size) -> Library:
  """Trains the base and all adapters of a seed."""
  params = hidden_regimes.train_base(seed, size.base)
  rng = np.random.default_rng([seed, 5])
  codes = np.stack([rng.permutation(SYMBOLS) for _ in range(COUNT)])
  run = adapter_run(_mean_loss(size.base), size.rate, size.steps)
  select, adapters = matching("layers/.*kernel"), []
  for skill in range(COUNT):
    half = size.steps, size.base.batch // 2
    own = np.full(half, skill)
    others = (skill + rng.integers(1, COUNT, half)) % COUNT
    which = np.concatenate([own, others], axis=1)
    texts = write(rng, codes, which, [skill])
    key = jax.random.fold_in(jax.random.key(seed), skill)
    loras = init_lora(
      params, size.rank, key, select=select, alpha=float(size.rank)
    )
    loras, _ = run(loras, (params,), (texts,))
    adapters.append(loras)
  skills = np.repeat(np.arange(COUNT), size.count)
  tested = write(np.random.default_rng([seed, 6]), codes, skills, range(COUNT))
  return Library(params, make_bank(adapters), tested, skills)


def noted(gate: Callable[[jax.Array], jax.Array], x: jax.Array) -> Any:
  """Calls a gate, and notes what it says."""
  found = gate(x)
  return found, found


def random_like(
  rows: dict[str, jax.Array], key: jax.Array
) -> dict[str, jax.Array]:
  """Draws directions at random, as long as prototypes."""
  found = {}
  for path, own in rows.items():
    drawn = jax.random.normal(key_for(key, path), own.shape)
    sizes = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (own, drawn))
    long, now = sizes
    found[path] = drawn * long / now
  return found


def others_of(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Gives every adapter the prototype of the next."""
  return {path: jnp.roll(x, 1, axis=0) for path, x in rows.items()}


@functools.cache
def _gated(size: Size):
  """Compiles the judging of texts by programs, with notes of their gates."""
  losses = hidden_regimes.make_losses(size.base)

  @jax.jit
  def run(params, programs, texts):
    """Judges texts; returns losses, what is right, and notes."""
    bound = bind(params, programs)
    return adapt(losses, has_notes=True)(bound, texts)

  return run


@functools.cache
def _by_row(size: Size):
  """Compiles the judging of texts, each with an adapter of its own."""
  return jax.jit(adapt_rows(hidden_regimes.make_losses(size.base)))


def _judged(losses: Any, right: Any) -> dict[str, float]:
  """Returns the share of answers that are right as a whole, and nats."""
  return {
    "exact": float(np.asarray(right).all(-1).mean()),
    "nats": float(np.asarray(losses).mean()),
  }


def by_ids(seed: int, size: Size) -> dict[str, Any]:
  """Judges every text with the adapter of its skill."""
  library = open_library(seed, size)
  found = _by_row(size)(
    library.params, library.bank, library.skills, library.texts
  )
  return {"figures": _judged(*found)}


def best_one(seed: int, size: Size) -> dict[str, Any]:
  """Judges all texts with each adapter alone; the best of them."""
  library = open_library(seed, size)
  each = [
    _judged(
      *_by_row(size)(
        library.params, library.bank, np.full_like(library.skills, i),
        library.texts,
      )
    )
    for i in range(COUNT)
  ]  # fmt: skip
  return {"figures": max(each, key=lambda x: x["exact"])}


def weighed(seed: int, size: Size, weight: float) -> dict[str, Any]:
  """Judges all texts with all adapters, of one weight."""
  library = open_library(seed, size)
  programs = {
    path: Gated(x, jnp.full(COUNT, weight), given)
    for path, x in library.bank.items()
  }
  losses_right, _ = _gated(size)(library.params, programs, library.texts)
  return {"figures": _judged(*losses_right)}


def by_arrow(
  seed: int,
  size: Size,
  change: Callable[..., dict[str, jax.Array]] | None = None,
  **options: Any,
) -> dict[str, Any]:
  """Judges all texts routed by prototypes.

  Args:
    seed: of the library.
    size: how much is computed.
    change: (prototypes) -> what stands in their place.
    **options: of `arrow`.

  Returns:
    "figures", and "hits" of every module: in how many tokens the largest gate
    is that of the adapter that is asked for.
  """
  library = open_library(seed, size)
  rows = prototypes(library.bank)
  if change is random_like:
    rows = random_like(rows, jax.random.key(seed))
  elif change is not None:
    rows = change(rows)
  programs = {
    path: Gated(x, arrow(rows[path], **options), noted)
    for path, x in library.bank.items()
  }
  found, notes = _gated(size)(library.params, programs, library.texts)
  asked = library.skills[:, None]
  hits = {
    path: float(np.mean(np.asarray(own[0]).argmax(-1) == asked))
    for path, own in notes.items()
  }
  figures = {**_judged(*found), "hits": float(np.mean([*hits.values()]))}
  return {"figures": figures, "hits": hits}


def _arrow(**options: Any) -> Callable[[int, Size], dict[str, Any]]:
  """Makes a row of METHODS."""
  return functools.partial(by_arrow, **options)


#: name -> (seed, size) -> row.
METHODS: dict[str, Callable[[int, Size], dict[str, Any]]] = {
  "the adapter that is asked for": by_ids,
  "the best single one": best_one,
  "the plain sum": functools.partial(weighed, weight=1.0),
  "all alike, an eighth each": functools.partial(weighed, weight=1 / COUNT),
  "Arrow, all (the authors' default)": _arrow(),
  "Arrow, 1 chosen": _arrow(chosen=1),
  "Arrow, 2 chosen": _arrow(chosen=2),
  "Arrow, 4 chosen": _arrow(chosen=4),
  "Arrow by cosines, temperature 0.1": _arrow(unit=True, temperature=0.1),
  "random prototypes, all": _arrow(change=random_like),
  "random prototypes, 1 chosen": _arrow(change=random_like, chosen=1),
  "random prototypes, 2 chosen": _arrow(change=random_like, chosen=2),
  "others' prototypes, 1 chosen": _arrow(change=others_of, chosen=1),
}


def measure(name: str, seed: int, size: Size) -> dict[str, Any]:
  """Computes the figures of a method.

  Args:
    name: of METHODS.
    seed: of the base, the skills and the texts.
    size: how much is computed.

  Returns:
    "figures", and of Arrow the "hits" of every module.
  """
  return METHODS[name](seed, size)
