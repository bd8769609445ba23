# SPDX-License-Identifier: Apache-2.0
"""Words and a form of text: two adapters of one small language model.

The base has read Python's help, each paragraph a line. One adapter learns the
Bible's words, a paragraph a line; the other learns to write the help as its
lists are written: short lines with a mark, indented. Neither sees the Bible so
written. Half of what they learn from is the help in lines.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.lib.adapters.works import (
  Figures,
  Functions,
  Recipe,
  Work,
  divergence,
  four_fifths,
  train_rehearsed,
)
from experiments.lib.data import forms
from experiments.lib.data.forms import Form
from experiments.lib.models import finetunes
from experiments.lib.models.loops import Draw, whole_run
from experiments.lib.models.token_skills import (
  Examiner,
  draw_from,
  functions_of,
)
from jlora import models
from jlora.loras import Loras
from jlora.paths import matching
from jlora.training import init_lora

#: All are nats a token: less is better.
MEASURES = {
  "both": "the Bible in items",
  "first": "the Bible in lines",
  "second": "help in items",
  "distance": "KL elsewhere",
}
#: Words and form of each figure.
ASKED = {
  "both": ("kjv", forms.item),
  "first": ("kjv", forms.plain),
  "second": ("pydoc", forms.item),
  "distance": ("pydoc", forms.plain),
}
#: Forms of the help of which there are adapters that nothing asks for.
OTHERS = (forms.quoted, forms.loud, forms.joined, forms.titled)
TRAIN, VALIDATION, TEST = range(3)


class Size(NamedTuple):
  """The sizes of the model, of training and of tests.

  Attributes:
    width: of the residual stream, a multiple of 16.
    layers: of the Llama.
    vocabulary: tokens.
    base: training steps of the base.
    batch: stretches of text a step of it.
    recipe: of adapters.
    tokens: of a stretch.
    length: of them are predicted, the last; those before are only read.
    count: stretches a figure.
    others: how many of OTHERS.
  """

  width: int
  layers: int
  vocabulary: int
  base: int
  batch: int
  recipe: Recipe
  tokens: int = 49
  length: int = 32
  count: int = 192
  others: int = 4


FULL = Size(48, 2, 384, 3000, 8, Recipe(8, 600, 800, 3e-3, 8, 8))
SMOKE = Size(
  16, 1, 260, 10, 8, Recipe(2, 5, 5, 3e-3, 8, 8, 8, 5), 17, 12, 16, 1
)


def open_work(seed: int, size: Size) -> Work:
  """Trains the base and both adapters of a seed.

  Args:
    seed: of training and of stretches; the texts are the same for all.
    size: how much is computed.

  Returns:
    Work.
  """
  params, recipe = train_base(seed, size), size.recipe
  sources = {
    name: _source(size, *asked, TRAIN) for name, asked in ASKED.items()
  }
  rng = np.random.default_rng([seed, 1])
  stream = _stream(size, *ASKED["both"], TRAIN)
  few = forms.windows(rng, stream, recipe.few, size.tokens)
  unlabelled = forms.windows(rng, stream, 256, size.tokens)
  cut, plain = four_fifths(recipe.few), sources.pop("distance")
  adapters = (
    _rehearsed(params, sources["first"], plain, size, 2 * seed),
    _rehearsed(params, sources["second"], plain, size, 2 * seed + 1),
  )
  validate, test = (
    _examiner(size, params, seed, part) for part in (VALIDATION, TEST)
  )
  return Work(
    functions=make_functions(size),
    recipe=recipe,
    params=params,
    start=functools.partial(_start, params),
    adapters=adapters,
    draws={
      "first": sources["first"],
      "second": sources["second"],
      "plain": plain,
      "few": draw_from(few, size.length),
      "five": draw_from(few[:5], size.length),
      "learned": draw_from(few[:cut], size.length),
      "chosen": draw_from(few[cut:], size.length),
      "many": sources["both"],
      "unlabelled": draw_from(unlabelled, None),
    },
    validate=validate.mean_likelihood,
    test=functools.partial(_examine, test),
    library=functools.partial(_library, seed, size),
  )


def make_functions(size: Size) -> Functions:
  """Makes what methods need of the model, once for all seeds."""
  return functions_of(_config(size), size.length, _missed)


def _missed(found: jax.Array, wanted: jax.Array) -> jax.Array:
  """Computes KL(wanted ‖ found): what is likely alone must be in the sum.

  The other direction lets a sum leave out what is unsure, and costs nats.
  """
  return divergence(wanted, found)


def _config(size: Size) -> dict[str, Any]:
  """Returns the Llama's config.json."""
  return {
    **finetunes.TINY,
    "vocab_size": size.vocabulary,
    "hidden_size": size.width,
    "intermediate_size": 3 * size.width,
    "num_hidden_layers": size.layers,
    "num_attention_heads": size.width // 16,
    "num_key_value_heads": size.width // 16,
  }


@functools.cache
def _stream(size: Size, name: str, form: Form, part: int) -> np.ndarray:
  """Returns a part of a text in a form, as tokens (tokens,).

  The tokens are learned from what the base is trained on.
  """
  known = forms.split(forms.paragraphs("pydoc"))[TRAIN]
  encode = forms.tokenizer("".join(map(forms.plain, known)), size.vocabulary)
  found = known if (name, part) == ("pydoc", TRAIN) else None
  found = found or forms.split(forms.paragraphs(name))[part]
  return encode("".join(map(form, found)))


def _source(size: Size, name: str, form: Form, part: int) -> Draw:
  """Makes a source of a text's stretches and their ends."""
  stream = _stream(size, name, form, part)

  def draw(rng, steps, rows):
    """Draws stretches evenly."""
    found = forms.windows(rng, stream, steps * rows, size.tokens)
    found = found.reshape(steps, rows, size.tokens)
    return found, found[..., -size.length :]

  return draw


@functools.cache
def train_base(seed: int, size: Size) -> Any:
  """Trains a base on the help in lines."""
  draw = _source(size, *ASKED["distance"], TRAIN)
  rng = np.random.default_rng([seed, 2])
  _, params = models.init(_config(size), jax.random.key(seed))
  run = whole_run(make_functions(size).loss, 3e-3, size.base)
  params, losses = run(params, (), draw(rng, size.base, size.batch))
  last = np.mean(np.asarray(losses)[-size.base // 20 :])
  print(f"base of seed {seed}: {last:.3f} nats", flush=True)
  return params


def _rehearsed(params, own: Draw, plain: Draw, size: Size, seed: int) -> Loras:
  """Trains an adapter on its own texts and on the help in lines."""
  start = functools.partial(_start, params)
  loss = make_functions(size).loss
  return train_rehearsed(loss, size.recipe, params, start, (own, plain), seed)


def _start(params: Any, key: jax.Array, rank: int) -> Loras:
  """Makes adapters of all matrices of the layers."""
  select = matching("layers/.*kernel")
  return init_lora(params, rank, key, select=select, alpha=float(rank))


def _library(seed: int, size: Size) -> list[Loras]:
  """Trains adapters of other forms of the help."""
  params = train_base(seed, size)
  plain = _source(size, *ASKED["distance"], TRAIN)
  return [
    _rehearsed(
      params,
      _source(size, "pydoc", form, TRAIN),
      plain,
      size,
      1000 * (turn + 1) + seed,
    )
    for turn, form in enumerate(OTHERS[: size.others])
  ]


def _examiner(size: Size, params: Any, seed: int, part: int) -> Examiner:
  """Draws the stretches of all figures."""
  rng = np.random.default_rng([seed, 3, part])
  texts = {
    name: forms.windows(
      rng, _stream(size, *asked, part), size.count, size.tokens
    )
    for name, asked in ASKED.items()
  }
  return Examiner(make_functions(size).predict, params, texts, size.length)


def _examine(examiner: Examiner, params: Any) -> Figures:
  """Returns both, first, second and distance, in nats a token."""
  names = ("both", "first", "second")
  found = {name: examiner.examined(params, name)[1] for name in names}
  return {**found, "distance": examiner.distance(params)}
