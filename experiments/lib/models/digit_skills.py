# SPDX-License-Identifier: Apache-2.0
"""A subject and a style of digits: two adapters of one diffusion model.

The base draws the classes 0 to 8 as it is asked. One adapter adds a class, 9,
which the base has never seen; the other draws in a style where a flag is set,
and never sees a 9. Half of what either learns from are plain digits of other
classes: without them the style would not listen to its flag.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.adapters.works import (
  Figures,
  Functions,
  Recipe,
  Work,
  four_fifths,
  train_rehearsed,
)
from experiments.lib.data.digits import (
  CLASSES,
  PIXELS,
  Digits,
  Judges,
  Style,
  join,
  rotate,
  split_digits,
  thicken,
  train_judges,
)
from experiments.lib.models.digit_models import Denoiser, blur_all, denoise
from experiments.lib.models.loops import Draw, whole_run
from jlora.loras import Loras
from jlora.merging import mean_square
from jlora.paths import matching
from jlora.training import init_lora

STYLES: dict[str, Style] = {"thick": thicken, "turned": rotate}
#: Styles of which there are adapters that nothing asks for.
OTHERS: dict[str, Style] = {
  "mirrored": lambda images: _rows(images)[..., ::-1].reshape(images.shape),
  "upside down": lambda images: _rows(images)[:, ::-1].reshape(images.shape),
  "lowered": lambda images: np.roll(_rows(images), 2, 1).reshape(images.shape),
}
SUBJECT = 9
#: Sample and image figures; the first three are shares.
MEASURES = {
  "both": "9 in the style",
  "first": "plain 9 kept",
  "second": "style kept",
  "distance": "moved elsewhere",
}


class Size(NamedTuple):
  """The sizes of the model, of training and of samples.

  Attributes:
    net: the denoiser.
    base: training steps of the base.
    recipe: of adapters.
    sampling: evaluations of the model for a sample.
    count: samples a figure; validation has half as many.
  """

  net: Denoiser
  base: int
  recipe: Recipe
  sampling: int
  count: int


FULL = Size(Denoiser(), 5000, Recipe(8, 1500, 1500, 3e-3, 64, 64), 12, 450)
SMOKE = Size(Denoiser(16, 1), 20, Recipe(2, 10, 10, 3e-3, 16, 8, 8, 5), 3, 18)


class Parts(NamedTuple):
  """Digits of one seed: the subject, and the others in halves.

  Attributes:
    subject: all 9s to learn from.
    others: all digits of other classes.
    styled: the half of them that the style is learned from.
    judged: the half of all that judges of the validation learn from.
    known: all digits to learn from.
    held: held out.
  """

  subject: Digits
  others: Digits
  styled: Digits
  judged: Digits
  known: Digits
  held: Digits


def open_work(style: str, seed: int, size: Size) -> Work:
  """Trains the base and both adapters of a seed; of styles one base is shared.

  Args:
    style: of STYLES.
    seed: of the split, of training and of samples.
    size: how much is computed.

  Returns:
    Work.
  """
  change, parts = STYLES[style], split_parts(seed)
  params = train_base(seed, size)
  draws = _sources(change, parts, size.recipe.few, seed)
  own = _rehearsed(params, draws["second"], draws["plain"], size, 2 * seed + 1)
  half, samplers = size._replace(count=size.count // 2), []
  for turn, (known, extent) in enumerate(
    ((parts.known, size), (parts.judged, half))
  ):
    judges = train_judges(known, parts.held, change)
    sampler = Sampler(extent, params, judges, parts.held, 2 * seed + turn)
    samplers.append(sampler)
    print(f"{style}, real images judged right: {judges.accuracy}", flush=True)
  return Work(
    functions=make_functions(size),
    recipe=size.recipe,
    params=params,
    start=functools.partial(_start, params),
    adapters=(train_subject(seed, size), own),
    draws=draws,
    validate=samplers[1].mean_share,
    test=samplers[0].figures,
    library=functools.partial(_library, style, seed, size),
  )


def _library(style: str, seed: int, size: Size) -> list[Loras]:
  """Trains adapters of other styles, which listen to the same flag."""
  parts, params = split_parts(seed), train_base(seed, size)
  plain, made = draw_of(parts.others, 0), []
  others = {
    name: x for name, x in {**STYLES, **OTHERS}.items() if name != style
  }
  for turn, change in enumerate(others.values()):
    own = Digits(change(parts.styled.images), parts.styled.labels)
    start = 1000 * (turn + 1) + seed
    made.append(_rehearsed(params, draw_of(own, 1), plain, size, start))
  return made


def _sources(change: Style, parts: Parts, few: int, seed: int):
  """Returns the sources of batches of a style."""
  styled, target = (
    Digits(change(x.images), x.labels) for x in (parts.styled, parts.subject)
  )
  rng = np.random.default_rng([seed, 1])
  some = rng.choice(len(target.labels), few, replace=False)
  cut = four_fifths(few)
  return {
    "first": draw_of(parts.subject, 0),
    "second": draw_of(styled, 1),
    "plain": draw_of(parts.others, 0),
    "few": draw_of(_at(target, some), 1),
    "five": draw_of(_at(target, some[:5]), 1),
    "learned": draw_of(_at(target, some[:cut]), 1),
    "chosen": draw_of(_at(target, some[cut:]), 1),
    "many": draw_of(target, 1),
  }


class Model(NamedTuple):
  """A denoiser as functions of its parameters.

  Attributes:
    init: key -> params.
    sample: (params, noise (n, 64), asked (n, 11)) -> images (n, 64), compiled.
    predict: (params, x_t, t, asked) -> x.
  """

  init: Callable[[jax.Array], Any]
  sample: Callable[..., jax.Array]
  predict: Callable[..., jax.Array]


@functools.cache
def make_model(size: Size) -> Model:
  """Makes the functions of a denoiser once for all seeds."""
  net = size.net

  def init(key):
    """Draws parameters."""
    none = jnp.zeros((1, CLASSES + 1))
    return net.init(key, jnp.zeros((1, PIXELS)), jnp.zeros(1), none)["params"]

  def predict(params, x, time, asked) -> Any:
    """Predicts clean images."""
    return net.apply({"params": params}, x, time, asked)

  @jax.jit
  def sample(params, noise, asked):
    """Denoises what is asked for."""
    model = lambda params, x, time: predict(params, x, time, asked)  # noqa: E731
    return denoise(model, params, noise, size.sampling)

  return Model(init, sample, predict)


@functools.cache
def make_functions(size: Size) -> Functions:
  """Makes what methods need of the model, once for all seeds."""
  predict = make_model(size).predict

  def loss(params, x, time, asked, clean):
    """Computes the mean squared error of the images."""
    return mean_square(predict(params, x, time, asked), clean)

  return Functions(predict, loss, mean_square)


@functools.cache
def split_parts(seed: int) -> Parts:
  """Splits the digits into what each learns from."""
  one, two, held = split_digits(seed)
  known = join(one, two)
  others = _with(known, lambda labels: labels != SUBJECT)
  return Parts(
    subject=_with(known, lambda labels: labels == SUBJECT),
    others=others,
    styled=_with(two, lambda labels: labels != SUBJECT),
    judged=one,
    known=known,
    held=held,
  )


@functools.cache
def train_base(seed: int, size: Size) -> Any:
  """Trains a base on plain digits of all classes but the subject's."""
  rng = np.random.default_rng([seed, 0])
  draw = draw_of(split_parts(seed).others, 0)
  run = whole_run(make_functions(size).loss, 2e-3, size.base)
  params = make_model(size).init(jax.random.key(seed))
  batches = draw(rng, size.base, size.recipe.batch)
  params, losses = run(params, (), batches)
  last = np.mean(np.asarray(losses)[-size.base // 10 :])
  print(f"base of seed {seed}: loss {last:.4f}", flush=True)
  return params


@functools.cache
def train_subject(seed: int, size: Size) -> Loras:
  """Trains the subject's adapter, which all styles share."""
  parts, params = split_parts(seed), train_base(seed, size)
  own, plain = draw_of(parts.subject, 0), draw_of(parts.others, 0)
  return _rehearsed(params, own, plain, size, 2 * seed)


def _rehearsed(params, own: Draw, plain: Draw, size: Size, seed: int) -> Loras:
  """Trains an adapter on its own digits and on plain ones of others."""
  start = functools.partial(_start, params)
  loss = make_functions(size).loss
  return train_rehearsed(loss, size.recipe, params, start, (own, plain), seed)


def _start(params: Any, key: jax.Array, rank: int) -> Loras:
  """Makes adapters of all layers but the one that hears what is asked."""
  select = matching(".*kernel", exclude="hear/.*")
  return init_lora(params, rank, key, select=select, alpha=float(rank))


def asks(labels: np.ndarray, styled: int) -> np.ndarray:
  """Writes what is asked for as rows of numbers: the class, then the flag.

  Args:
    labels: (...) integers.
    styled: 1 asks for the style.

  Returns:
    (..., 11) float32.

  Example:
    >>> asks(np.array([2]), 1)
    array([[0., 0., 1., 0., 0., 0., 0., 0., 0., 0., 1.]], dtype=float32)
  """
  rows = np.eye(CLASSES, CLASSES + 1, dtype=np.float32)[labels]
  rows[..., -1] = styled
  return rows


def draw_of(data: Digits, styled: int) -> Draw:
  """Makes a source of noisy images, their times and what was asked for.

  Args:
    data: digits.
    styled: the flag that is asked with.

  Returns:
    Draw of x_t, t, what is asked for, and x.
  """

  def draw(rng, steps, rows):
    """Draws images evenly."""
    at = rng.integers(0, len(data.labels), (steps, rows))
    images = data.images[at]
    noisy, time = blur_all(rng, images)
    return noisy, time, asks(data.labels[at], styled), images

  return draw


class Sampler:
  """Figures of parameters: what is drawn, and how far from the base it is.

  Every call begins from the same noise.
  """

  def __init__(
    self, size: Size, params: Any, judges: Judges, held: Digits, seed: int
  ):
    """Draws the noise, and images of what neither skill is about."""
    self.judges = judges
    self._model = make_model(size)
    rng = np.random.default_rng([seed, 3])
    self._noise = rng.standard_normal((size.count, PIXELS), np.float32)
    self._others = np.arange(size.count) % SUBJECT
    plain = _with(held, lambda labels: labels != SUBJECT)
    *inputs, clean = (x[0] for x in draw_of(plain, 0)(rng, 1, 2 * size.count))
    self._inputs = inputs
    self._predict = _compiled(self._model.predict)
    self._base = np.asarray(self._predict(params, *inputs))
    self._error = float(np.mean((self._base - clean) ** 2))

  def mean_share(self, params: Any) -> float:
    """Returns the mean of the shares of both, of first and of second."""
    return float(np.mean([*self._shares(params).values()]))

  def figures(self, params: Any) -> Figures:
    """Returns both, first, second and distance.

    The distance is that of predictions for held-out plain digits of other
    classes, as a share of the base's own error.
    """
    moved = np.asarray(self._predict(params, *self._inputs)) - self._base
    distance = float(np.mean(moved**2)) / self._error
    return {**self._shares(params), "distance": distance}

  def _shares(self, params: Any) -> Figures:
    """Returns how often what was asked for is drawn."""
    subject = np.full(len(self._others), SUBJECT)
    asked = {
      "both": (subject, 1),
      "first": (subject, 0),
      "second": (self._others, 1),
    }
    return {
      name: float(np.mean(self._right(params, *own)))
      for name, own in asked.items()
    }

  def _right(self, params, labels, styled) -> np.ndarray:
    """Returns which samples are of the class and style that is asked for."""
    asked = asks(labels, styled)
    images = np.asarray(self._model.sample(params, self._noise, asked))
    is_styled = self.judges.style(images) == bool(styled)
    return is_styled & (self.judges.digit(images) == labels)


_compiled = functools.cache(jax.jit)


def _rows(images: np.ndarray) -> np.ndarray:
  """Returns images (n, 64) as (n, 8, 8)."""
  return images.reshape(-1, 8, 8)


def _with(data: Digits, wanted: Callable[[np.ndarray], np.ndarray]) -> Digits:
  """Returns the digits whose labels are wanted."""
  return _at(data, wanted(data.labels))


def _at(data: Digits, at: np.ndarray) -> Digits:
  """Returns some of the digits."""
  return Digits(data.images[at], data.labels[at])
