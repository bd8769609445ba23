# SPDX-License-Identifier: Apache-2.0
"""Does putting hidden units in order remove the barrier between two networks?

  python -m experiments.rebasin [--widths=64,256,1024] [--pairs=3]
    [--cache=FOLDER] [--out=FOLDER] [--smoke]

Pairs of MLPs on scikit-learn's digits and of a tiny Llama on the King James
Bible, trained from different starts: the loss along the line between them as
they are, after weight matching and after activation matching. Then pairs of
finetunes of one base, where nothing should move. Prints held-out barriers in
nats, mean and standard deviation over pairs; --out writes the figure.

Takes 15 minutes on two cores beside other jobs. Expect most of the MLPs'
barrier to go, and most of the Llama's to stay.
"""

import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from experiments.lib.figures import plots
from experiments.lib.models import basins, finetunes, lessons
from jlora.alignment import (
  Permutations,
  match_activations,
  match_weights,
  permute,
)
from jlora.commands import keep_compilations

POINTS = 11
METHODS = ("as they are", "weights matched", "activations matched")
#: A byte-level Llama: two layers of 64 channels, 4 heads on 2 key heads.
LLAMA = {**finetunes.TINY, "tie_word_embeddings": False}
_STYLES = (("#7F7F7F", "s"), ("#0072B2", "o"), ("#D55E00", "^"))


class Outcome(NamedTuple):
  """A pair of networks, and the losses on the line between them.

  Attributes:
    task: what was trained, and from what.
    curves: of each of METHODS, losses along the line.
    moved: share of the units that each method put elsewhere.
    closer: `‖a - π(b)‖ / ‖a - b‖` of each.
  """

  task: str
  curves: dict[str, list[float]]
  moved: dict[str, float]
  closer: dict[str, float]


def compare_pair(task: basins.Task, name: str, a: Any, b: Any) -> Outcome:
  """Measures a pair as it is, and with b's units in two other orders.

  Args:
    task: theirs.
    name: of the pair, for the table.
    a: parameters.
    b: parameters.

  Returns:
    Outcome.
  """
  a, b = (jax.tree.map(np.asarray, tree) for tree in (a, b))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    by_weights = match_weights(a, b, task.symmetry).permutations
  by_outputs = match_activations(
    task.activate(a), task.activate(b), task.symmetry, a
  ).permutations
  orders = dict(zip(METHODS, ({}, by_weights, by_outputs), strict=True))
  others = {
    method: permute(b, order, task.symmetry) for method, order in orders.items()
  }
  apart = _distance(a, b)
  return Outcome(
    name,
    {
      method: basins.walk(task.loss, a, other, POINTS)
      for method, other in others.items()
    },
    {method: moved_share(order) for method, order in orders.items()},
    {method: _distance(a, other) / apart for method, other in others.items()},
  )


def moved_share(orders: Permutations) -> float:
  """Computes the share of units that changed their place.

  Args:
    orders: any permutations.

  Returns:
    Between 0 and 1; 0 for none.

  Example:
    >>> moved_share({"u": np.array([1, 0, 2, 3])})
    0.5
  """
  moved = sum(int((o != np.arange(o.shape[-1])).sum()) for o in orders.values())
  return moved / max(sum(o.size for o in orders.values()), 1)


def _distance(a: Any, b: Any) -> float:
  """Computes the distance of two trees."""
  squares = jax.tree.map(
    lambda x, y: np.sum(np.square(np.asarray(x) - y, dtype=np.float64)), a, b
  )
  return float(sum(jax.tree.leaves(squares))) ** 0.5


def compare_strangers(task: basins.Task, pairs: int) -> list[Outcome]:
  """Compares pairs trained from different starts on different batches.

  Args:
    task: what is trained.
    pairs: how many; no network is in two.

  Returns:
    An Outcome a pair.
  """
  found = []
  for i in range(pairs):
    a, b = (
      task.train(task.start(seed), seed, task.steps)
      for seed in (2 * i, 2 * i + 1)
    )
    found.append(compare_pair(task, f"{task.name}, two starts", a, b))
    _say(found[-1])
  return found


def compare_siblings(task: basins.Task, pairs: int) -> list[Outcome]:
  """Compares pairs of finetunes of one base, on different batches.

  Args:
    task: what is trained.
    pairs: how many, each of a base of its own.

  Returns:
    An Outcome a pair.
  """
  found = []
  for i in range(pairs):
    base = task.train(task.start(100 + i), 100 + i, task.steps)
    a, b = (
      task.train(base, seed, max(task.steps // 3, 1))
      for seed in (200 + 2 * i, 201 + 2 * i)
    )
    found.append(compare_pair(task, f"{task.name}, one base", a, b))
    _say(found[-1])
  return found


def _say(outcome: Outcome) -> None:
  """Prints the barriers of a pair."""
  said = [f"{basins.barrier(c):.3f}" for c in outcome.curves.values()]
  print(f"  {outcome.task}: {', '.join(said)}", flush=True)


def by_task(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
  """Groups outcomes by what was trained.

  Args:
    outcomes: any.

  Returns:
    task -> its pairs, in order.

  Example:
    >>> by_task([Outcome("x", {}, {}, {})]).keys()
    dict_keys(['x'])
  """
  groups: dict[str, list[Outcome]] = {}
  for outcome in outcomes:
    groups.setdefault(outcome.task, []).append(outcome)
  return groups


def as_table(outcomes: Sequence[Outcome]) -> str:
  """Formats losses and barriers, means and deviations over pairs.

  Args:
    outcomes: of any tasks.

  Returns:
    A Markdown table.
  """
  heads = ["pair", "loss of either", *(f"barrier, {m}" for m in METHODS)]
  heads += [f"units moved, {m}" for m in METHODS[1:]]
  heads += [f"distance, {m}" for m in METHODS[1:]]
  lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for name, group in by_task(outcomes).items():
    ends = [
      end for o in group for end in np.array(o.curves[METHODS[0]])[[0, -1]]
    ]
    cells = [name, lessons.mean_and_spread(ends)]
    cells += [
      lessons.mean_and_spread([basins.barrier(o.curves[m]) for o in group])
      for m in METHODS
    ]
    cells += [f"{np.mean([o.moved[m] for o in group]):.0%}"
              for m in METHODS[1:]]  # fmt: skip
    cells += [f"{np.mean([o.closer[m] for o in group]):.2f}"
              for m in METHODS[1:]]  # fmt: skip
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def draw_lines(outcomes: Sequence[Outcome]) -> Figure:
  """Draws the loss along the line, a panel for each task.

  Args:
    outcomes: of any tasks.

  Returns:
    Figure; lines are means over pairs, bands a standard deviation.
  """
  groups = by_task(outcomes)
  columns = min(4, len(groups))
  rows = -(-len(groups) // columns)
  figure = Figure(figsize=(0.6 + 2.6 * columns, 0.8 + 2.3 * rows))
  panels = figure.subplots(rows, columns, squeeze=False)
  along = np.linspace(0, 1, POINTS)
  for axes, (name, group) in zip(panels.flat, groups.items(), strict=False):
    for method, (colour, marker) in zip(METHODS, _STYLES, strict=True):
      curves = np.array([o.curves[method] for o in group])
      mean = curves.mean(0)
      spread = curves.std(0, ddof=1) if len(curves) > 1 else 0 * mean
      axes.plot(along, mean, color=colour, marker=marker, ms=3.5, label=method)
      axes.fill_between(along, mean - spread, mean + spread, color=colour,
                        alpha=0.2, lw=0)  # fmt: skip
    axes.set_title(name, fontsize=8.5)
    axes.grid(color="0.92", lw=0.6)
  for axes in list(panels.flat)[len(groups) :]:
    axes.set_visible(False)
  figure.supxlabel("λ: from one network to the other", fontsize=9)
  figure.supylabel("held-out loss, nats", fontsize=9)
  handles, labels = panels.flat[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside upper right", ncols=3)
  return figure


def tiny_tasks(cache: str | None) -> list[basins.Task]:
  """Makes the tasks of an MLP and a Llama that train in a moment."""
  small = {**LLAMA, "num_hidden_layers": 1, "hidden_size": 16}
  small |= {"intermediate_size": 24}
  text = basins.text_task(small, 6, "pydoc", cache)
  return [basins.digits_task(16, 60), text]


def compare_all(tasks: Sequence[basins.Task], pairs: int) -> list[Outcome]:
  """Compares strangers of all tasks and siblings of two; prints the table.

  Args:
    tasks: what is trained; the last one's network is another family.
    pairs: of each.

  Returns:
    Outcomes; the table is printed.
  """
  outcomes = []
  for task in tasks:
    outcomes += compare_strangers(task, pairs)
  for task in tasks[-2:]:
    outcomes += compare_siblings(task, pairs)
  print(as_table(outcomes))
  return outcomes


def main(_: list[str]) -> None:
  """Trains all pairs, prints the table and draws the figure."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  if values.smoke:
    tasks, pairs = tiny_tasks(values.cache), 1
  else:
    tasks = [basins.digits_task(int(w), values.steps) for w in values.widths]
    steps = values.steps // 2
    tasks.append(basins.text_task(LLAMA, steps, "kjv", values.cache))
    pairs = values.pairs
  outcomes = compare_all(tasks, pairs)
  if values.out:
    path = pathlib.Path(values.out) / "rebasin.png"
    plots.save_figure(path, lambda: draw_lines(outcomes))


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_list("widths", ["64", "256", "1024"], "Of the MLPs.")
  flags.DEFINE_integer("pairs", 3, "Of every network.")
  flags.DEFINE_integer("steps", 1500, "Of an MLP; the Llama takes half.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "Folder of the figure.")
  flags.DEFINE_bool("smoke", False, "Tiny networks, in seconds.")
  app.run(main)
