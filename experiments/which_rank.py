# SPDX-License-Identifier: Apache-2.0
"""What rank does an adapter need, and do ranks and seeds agree on directions?

  python -m experiments.which_rank [--seeds=3] [--steps=60] [--out=FOLDER]

The LoRA paper's table 6 and figure 3 on a byte-level Llama of four layers and
128 channels, trained on Python's help: adapters of ranks 1 to 64 on q and v
learn the King James Bible. Prints held-out loss by rank, and how much the
leading input directions of the trained changes overlap, between ranks from one
start and between two starts; --out writes the figure.

Takes a minute on an H100, over 11 on two loaded cores. Expect rank 1 to gain
two thirds of what rank 64 gains.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from experiments.lib.data import texts
from experiments.lib.figures import plots
from experiments.lib.models import lessons
from jlora.adapting import apply
from jlora.commands import keep_compilations
from jlora.evaluation import overlap
from jlora.loras import Loras
from jlora.paths import matching
from jlora.training import by_root, init_lora

RANKS = (1, 2, 4, 8, 16, 32, 64)
WIDTH = 128
#: (rank and seed, rank and seed, title of the pair).
PAIRS = (
  ((8, 0), (64, 0), "rank 8 and rank 64, one seed"),
  ((64, 0), (64, 1), "rank 64, two seeds"),
)


def train_adapter(
  school: lessons.School, trainer: Any, rank: int, steps: int, seed: int
) -> Loras:
  """Trains an adapter of q and v.

  Args:
    school: base and text.
    trainer: as `lessons.hire` gives it.
    rank: of every module.
    steps: updates.
    seed: of the start and of the order of texts.

  Returns:
    path -> Lora of NumPy arrays.
  """
  loras = init_lora(
    school.params, rank, jax.random.key(seed), alpha=4.0, scaling=by_root,
    select=matching(r".*/attn/[qv]/kernel"),
  )  # fmt: skip
  taught = lessons.teach(school, trainer, loras, steps, seed)
  return jax.tree.map(np.asarray, taught)


def mean_overlap(left: Loras, right: Loras, part: str) -> np.ndarray:
  """Computes the overlap of two adapters' input directions, mean over layers.

  Args:
    left: path -> Lora.
    right: the same paths.
    part: "q" or "v".

  Returns:
    (rank of left, rank of right).
  """
  paths = [path for path in left if f"/attn/{part}/" in path]
  return np.mean([overlap(left[path], right[path]) for path in paths], axis=0)


def draw_overlaps(grids: Mapping[str, np.ndarray]) -> Figure:
  """Draws heat maps of overlaps side by side.

  Args:
    grids: title -> (r, r'), entry [i-1, j-1] for the first i and j directions.

  Returns:
    Figure; one colour scale from 0 to 1.
  """
  figure = Figure(figsize=(1.0 + 3.2 * len(grids), 3.3))
  panels = figure.subplots(1, len(grids), squeeze=False)[0]
  image: Any = None
  for axes, (title, grid) in zip(panels, grids.items(), strict=True):
    rows, columns = grid.shape
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    image = axes.imshow(
      grid, "cividis", vmin=0, vmax=1, aspect="auto", extent=extent
    )
    axes.set_title(title)
    axes.set_xlabel("first j directions of the second")
    axes.set_ylabel("first i directions of the first")
  figure.colorbar(image, ax=list(panels), label="φ(i, j), mean over layers")
  return figure


def as_tables(
  losses: Mapping[int, Iterable[float]],
  grids: Mapping[str, np.ndarray],
  base: float,
) -> str:
  """Formats losses by rank, and overlaps of the first few directions.

  Args:
    losses: rank -> by seed.
    grids: as for `draw_overlaps`.
    base: loss without an adapter.

  Returns:
    Two Markdown tables.
  """
  lines = ["| rank | held-out loss |", "|---|---|", f"| 0 | {base:.3f} |"]
  for rank, values in losses.items():
    lines.append(f"| {rank} | {lessons.mean_and_spread(values)} |")
  lines += ["", "| pair | φ(1, 1) | φ(4, 4) | φ(8, 8) | of chance at 8 |"]
  lines.append("|---" * 5 + "|")
  for title, grid in grids.items():
    cells = [f"{grid[i - 1, i - 1]:.2f}" for i in (1, 4, 8)]
    lines.append(f"| {title} | {' | '.join(cells)} | {8 / WIDTH:.2f} |")
  return "\n".join(lines)


def main(_: list[str]) -> None:
  """Trains all ranks, prints the tables and draws the figure."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  print(texts.pydoc_source())
  steps = values.steps
  school = lessons.open_school(WIDTH, 200, 4 * steps, values.cache)
  base = lessons.examine(school.model, school.params, school.exam)
  trainer = lessons.hire(school, values.learning_rate, steps)
  losses: dict[int, list[float]] = {}
  trained: dict[tuple[int, int], Loras] = {}
  for rank in RANKS:
    for seed in range(values.seeds):
      loras = train_adapter(school, trainer, rank, steps, seed)
      tuned = apply(school.params, loras)
      loss = lessons.examine(school.model, tuned, school.exam)
      losses.setdefault(rank, []).append(loss)
      trained[rank, seed] = loras
      print(f"  rank {rank}, seed {seed}: {loss:.4f}", flush=True)
  grids = {
    f"{part}: {title}": mean_overlap(trained[left], trained[right], part)
    for part in ("q", "v")
    for left, right, title in PAIRS
    if left in trained and right in trained
  }
  print(as_tables(losses, grids, base))
  if values.out:
    path = pathlib.Path(values.out) / "overlap_of_ranks_and_seeds.png"
    plots.save_figure(path, lambda: draw_overlaps(grids))


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_integer("seeds", 3, "Runs of every rank.")
  flags.DEFINE_integer("steps", 60, "Updates of 4 x 128 bytes.")
  flags.DEFINE_float("learning_rate", 1e-2, "The largest.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "Folder of the figure.")
  app.run(main)
