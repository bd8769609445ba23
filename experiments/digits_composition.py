# SPDX-License-Identifier: Apache-2.0
r"""Do a style LoRA and a control branch, trained apart, work together?

  python -m experiments.digits_composition [--seed=N] [--out=FOLDER] [--smoke]

A small diffusion model of handwritten digits is trained and frozen. A LoRA
learns a style from one half of the images, unlabelled; a branch learns to obey
a class from the other half, plain. Neither sees the other. Both are bound to
the base in one call and judged by two classifiers of real images, style and
digit.

    y = x w + w₁ ((x aᵀ) g) b + w₂ f(x, class)

Takes a minute of processor time. Expect thick strokes and digits to compose in
two thirds of the samples, and a rotation to override the control.
"""

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import jlora
from experiments.lib.data.digits import (
  CLASSES,
  PIXELS,
  Cell,
  Digits,
  Judges,
  Style,
  join,
  judge,
  rotate,
  split_digits,
  thicken,
  train_judges,
)
from experiments.lib.figures import digit_samples
from experiments.lib.models.digit_models import (
  Denoiser,
  Model,
  denoise,
  init_control,
  init_model,
  make_loss,
  make_program_trainer,
  make_trainer,
  obeying,
  shuffle,
  unasked,
  with_hint,
)
from jlora.training import init_lora

STYLES: dict[str, Style] = {"thick": thicken, "rotated": rotate}
RANK = 8
BOTH = "style and control"
#: Weights of the style and of the control, by name.
WEIGHTS = {
  "base": (0.0, 0.0),
  "style": (1.0, 0.0),
  "control": (0.0, 1.0),
  BOTH: (1.0, 1.0),
  f"0.5 {BOTH}": (0.5, 1.0),
  "style and 0.5 control": (1.0, 0.5),
  "0.5 style and 0.5 control": (0.5, 0.5),
  f"1.5 {BOTH}": (1.5, 1.0),
  "2 control": (0.0, 2.0),
  "style and 2 control": (1.0, 2.0),
  "style and 4 control": (1.0, 4.0),
}


class Size(NamedTuple):
  """The sizes of models, training and samples.

  Attributes:
    net: the denoiser.
    base: training steps of the base.
    program: training steps of a LoRA or a branch.
    batch: images a step.
    sampling: evaluations of the model for a sample.
    count: samples a cell, a multiple of ten.
  """

  net: Denoiser
  base: int
  program: int
  batch: int
  sampling: int
  count: int


FULL = Size(Denoiser(), 5000, 1500, 64, 20, 1000)
SMOKE = Size(Denoiser(16, 1), 20, 10, 16, 3, 20)


class Trained(NamedTuple):
  """The base and the programs that are compared in one style.

  Attributes:
    params: the base's.
    style: the LoRA.
    control: the branches, trained on the base.
    after: the branches, trained on styled images with the LoRA in place.
  """

  params: Any
  style: jlora.Loras
  control: Any
  after: Any


class Sampler:
  """A compiled sampler of the base with any programs and weights.

  Every call begins from the same noise and asks for the same digits.
  """

  def __init__(self, model: Model, size: Size, key: jax.Array):
    """Compiles the sampling."""
    self.labels = np.arange(size.count) % CLASSES
    hint = jax.nn.one_hot(jnp.asarray(self.labels), CLASSES)
    noise = jax.random.normal(key, (size.count, PIXELS))
    adapted = jlora.adapt(model, strict=True)

    @jax.jit
    def draw(params, style, control, weights):
      """Binds the programs and denoises."""
      sets = [style, with_hint(control, hint)]
      bound = jlora.bind(params, sets, list(weights))
      return denoise(adapted, bound, noise, size.sampling)

    self._draw = draw

  def __call__(self, params, style, control, weights) -> np.ndarray:
    """Samples (n, 64) images."""
    weights = tuple(jnp.float32(weight) for weight in weights)
    return np.asarray(self._draw(params, style, control, weights))


def sample(draw: Sampler, own: Trained, key: jax.Array) -> dict[str, Any]:
  """Samples all programs and weights that are compared, from one noise.

  Args:
    draw: the sampler.
    own: base and programs.
    key: PRNG key, of the shuffled LoRA.

  Returns:
    name -> images.
  """
  params, style, control, after = own
  found = {
    name: draw(params, style, control, weights)
    for name, weights in WEIGHTS.items()
  }
  noise = shuffle(style, key)
  return found | {
    "shuffled style": draw(params, noise, control, (1, 0)),
    "shuffled style and control": draw(params, noise, control, (1, 1)),
    "style, control trained after it": draw(params, style, after, (1, 1)),
  }


def as_table(cells: Mapping[str, Cell]) -> str:
  """Formats the cells as a Markdown table; ± is a binomial standard error.

  Args:
    cells: of one style.

  Returns:
    Lines.
  """
  lines = ["| programs | styled | digit asked | both |", "|---|---|---|---|"]
  for name, cell in cells.items():
    found = (cell.styled, cell.asked, cell.styled & cell.asked)
    lines.append(f"| {name} | {' | '.join(map(_share, found))} |")
  return "\n".join(lines)


def _share(found: np.ndarray) -> str:
  """Formats a share with its binomial standard error."""
  share = float(np.mean(found))
  error = (share * (1 - share) / len(found)) ** 0.5
  return f"{share:.1%} ± {error:.1%}"


def compose(seed: int, size: Size) -> dict[str, dict[str, Cell]]:
  """Trains and judges all programs of every style, and prints the tables.

  Args:
    seed: of the split, of training and of the samples.
    size: how much is computed.

  Returns:
    style -> name -> Cell.
  """
  one, two, held = split_digits(seed)
  keys = iter(jax.random.split(jax.random.key(seed), 5 + 3 * len(STYLES)))
  model, params = init_model(size.net, next(keys))
  loss = make_loss(model)
  learn = make_trainer(loss, size.base, 2e-3, size.batch)
  many = (size.program, 3e-3, size.batch)
  obey = make_program_trainer(loss, obeying, *many)
  restyle = make_program_trainer(loss, unasked, *many)
  params, first = learn(params, join(one, two), next(keys))
  fresh = init_control(params, next(keys))
  control, value = obey(fresh, params, two, next(keys))
  print(f"base: loss {first:.4f}; control: loss {value:.4f}", flush=True)
  draw = Sampler(model, size, next(keys))
  cells = {}
  for name, style in STYLES.items():
    left, right = (Digits(style(x.images), x.labels) for x in (one, two))
    start = init_lora(params, RANK, next(keys))
    loras, value = restyle(start, params, left, next(keys))
    bound = jlora.bind(params, loras)
    after, late = obey(fresh, bound, right, next(keys))
    own = Trained(params, loras, control, after)
    judges = train_judges(join(one, two), held, style)
    images = sample(draw, own, jax.random.key(seed))
    cells[name] = judge(images, judges, draw.labels)
    merged = draw(jlora.apply(params, loras), loras, control, (0, 1))
    off = np.abs(merged - images[BOTH]).max()
    print(f"\n{name}: loss {value:.4f}, of the control after it {late:.4f}")
    _tell(cells[name], judges, float(off))
  return cells


def _tell(cells: Mapping[str, Cell], judges: Judges, off: float) -> None:
  """Prints the results of a style."""
  print("held out:", {k: round(x, 4) for k, x in judges.accuracy.items()})
  print(as_table(cells))
  print(f"LoRA merged, largest difference of a pixel: {off:.1e}", flush=True)


def figure_rows(
  cells: Mapping[str, Mapping[str, Cell]], count: int = 20
) -> list[tuple[str, np.ndarray]]:
  """Lists the figure's rows: the base and the control, then each style's.

  Args:
    cells: as `compose` gives them.
    count: images of a row.

  Returns:
    Names and images (count, 64).
  """
  first: Mapping[str, Cell] = next(iter(cells.values()))
  rows: Sequence[Any] = [(name, first[name]) for name in ("base", "control")]
  for style, own in cells.items():
    rows = [
      *rows,
      (style, own["style"]),
      (f"{style} + control", own[BOTH]),
      (f"{style}, then control", own["style, control trained after it"]),
    ]
  return [(name, cell.images[:count]) for name, cell in rows]


def main(_: list[str]) -> None:
  """Prints the tables; with --out, writes them and the figure."""
  values = flags.FLAGS
  began = time.process_time()
  cells = compose(values.seed, SMOKE if values.smoke else FULL)
  if values.out:
    folder = pathlib.Path(values.out)
    folder.mkdir(parents=True, exist_ok=True)
    figure = folder / "digits_composition.png"
    digit_samples.save(figure, figure_rows(cells))
    shares = {
      style: {
        name: [float(np.mean(x)) for x in (cell.styled, cell.asked)]
        for name, cell in own.items()
      }
      for style, own in cells.items()
    }
    table = folder / "digits_composition.json"
    table.write_text(json.dumps(shares, indent=1) + "\n")
  print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_integer("seed", 0, "Of the split, of training and sampling.")
  flags.DEFINE_string("out", None, "Folder for the figure and its numbers.")
  flags.DEFINE_bool("smoke", False, "A tiny model, in seconds.")
  app.run(main)
