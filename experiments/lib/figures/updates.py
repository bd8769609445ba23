# SPDX-License-Identifier: Apache-2.0
"""Tables and draws what is left of adapters when their base changes."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.lib.adapters import language_ports
from experiments.lib.adapters.ports import CEILING, SEED, TRAINED, WEIGHTS
from experiments.lib.adapters.rank_interference import MEASURES
from experiments.lib.figures.compositions import with_error
from experiments.lib.measures.orders import area_under_curve, rank_correlation
from experiments.lib.models.constrained_updates import FREE
from experiments.lib.models.updated_strings import OTHERS, TASKS

#: part, seed, name, figures.
Row = Mapping[str, Any]

#: What `as_texts` shows beside the methods: figure -> title.
BESIDE = {
  "before": "base on the skill's text",
  "source": "base with its adapter",
  "alone": "target alone",
  "update, before": "base on the update's text",
  "update": "target on the update's text",
}
#: Losses of the update's text, nats a symbol, at which updates are compared.
LEVELS = (2.0, 1.0, 0.5)
_RISING = ("nonlinearity", "overlap", "disturbance")
_COLOURS = (
  "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F",
  "#000000", "#F0E442", "#882255",
)  # fmt: skip


class Pair(NamedTuple):
  """A skill on a target, and what weights said of it before.

  Attributes:
    is_far: whether the target is of another seed.
    share: of the nats that the adapter is worth on its own base, what adding
      it recovers; below 0 it is worse than nothing.
    kept: right answers with the adapter over those on its own base.
    drift: of the weights, mean over modules.
    reads: 1 - the spaces' likeness.
    writes: likewise.
  """

  is_far: bool
  share: float
  kept: float
  drift: float
  reads: float
  writes: float


def as_ports(rows: Sequence[Row]) -> str:
  """Formats what methods recover as Markdown tables.

  Args:
    rows: of all targets and seeds.

  Returns:
    Lines: recovered shares of nats, shares of right answers, the least of both
    of any skill and seed, projection less the random part, and how well weights
    tell where adding fails.
  """
  methods = [*WEIGHTS, *TRAINED]
  right = lambda task, name: task["methods"][name][0]  # noqa: E731
  parts = [
    _by_target(rows, methods, recovered, "recovered, of nats"),
    _by_target(rows, methods, right, "right answers"),
    _least(rows, recovered, "least recovered, of nats"),
    _least(rows, right, "least right answers"),
    _against_random(rows),
    _decisions(rows),
  ]
  return "\n\n".join(parts)


def recovered(task: Mapping[str, Any], name: str) -> float:
  """Computes (alone - ported) / (alone - retrained) of nats.

  Example:
    >>> task = {"alone": (0, 5.0), "methods": {"add": (0, 2.0),
    ...   CEILING: (1, 1.0)}}
    >>> recovered(task, "add")
    0.75
  """
  alone, ceiling = task["alone"][1], task["methods"][CEILING][1]
  return (alone - task["methods"][name][1]) / (alone - ceiling)


def _targets(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Groups rows by target, in the order in which they occur."""
  found: dict[str, list[Row]] = {}
  for row in rows:
    found.setdefault(row["name"], []).append(row)
  return found


def _each(row: Row, figure: Callable[..., float], name: str) -> list[float]:
  """Returns a figure of a method for both skills."""
  tasks = row["figures"]["tasks"]
  return [figure(tasks[task], name) for task in TASKS]


def _by_target(rows, methods, figure, title: str) -> str:
  """Formats a figure of every method, a column a target."""
  groups = _targets(rows)
  heads, drifts, news, knowns = [], [], [], []
  for target, own in groups.items():
    heads.append(target)
    drifts.append(
      with_error([row["figures"]["weights"]["drift"] for row in own])
    )
    for into, text in ((news, "update"), (knowns, "known")):
      into.append(with_error([row["figures"][text][0] for row in own]))
  lines = [
    *_head(title, heads),
    f"| (drift of the weights) | {' | '.join(drifts)} |",
    f"| (target on the update's text, right) | {' | '.join(news)} |",
    f"| (target on what the base knew, right) | {' | '.join(knowns)} |",
  ]
  for name in methods:
    cells = [
      with_error([float(np.mean(_each(row, figure, name))) for row in own])
      for own in groups.values()
    ]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _head(title: str, columns: Iterable[str]) -> list[str]:
  """Returns the first two lines of a table."""
  names = [title, *columns]
  return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _least(
  rows: Sequence[Row], figure: Callable[..., float], title: str
) -> str:
  """Formats the least figure of any skill and seed, of what is trained."""
  groups = _targets(rows)
  lines = _head(title, groups)
  for name in ("add", *TRAINED):
    cells = [
      f"{min(x for row in own for x in _each(row, figure, name)):.3f}"
      for own in groups.values()
    ]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _against_random(rows: Sequence[Row]) -> str:
  """Formats projection less the random part, and less adding."""
  groups = _targets(rows)
  lines = _head("project, less", groups)
  pairs = [
    (f"project, {of}", other)
    for of in ("half", "three quarters")
    for other in (f"a random part, {of}", "add")
  ]
  for one, other in pairs:
    cells = []
    for own in groups.values():
      less = [
        float(np.mean(_each(row, recovered, one)))
        - float(np.mean(_each(row, recovered, other)))
        for row in own
      ]
      cells.append(with_error(less, sign=True))
    lines.append(f"| {one}: {other} | {' | '.join(cells)} |")
  return "\n".join(lines)


def pairs_of(rows: Sequence[Row]) -> Iterator[Pair]:
  """Lists all skills on all targets, with what weights say of them."""
  for row in rows:
    said = row["figures"]["weights"]
    for task in row["figures"]["tasks"].values():
      alone, source = task["alone"], task["source"]
      right, nats = task["methods"]["add"]
      yield Pair(
        row["name"] == SEED,
        (alone[1] - nats) / (alone[1] - source[1]),
        right / max(source[0], 1e-9),
        said["drift"],
        1 - said["read_alike"],
        1 - said["write_alike"],
      )


#: What may be called a failure of adding.
FAILURES: dict[str, Callable[[Pair], bool]] = {
  "worse than nothing": lambda x: x.share < 0,
  "under 0.9 of the nats": lambda x: x.share < 0.9,
  "under half of the answers": lambda x: x.kept < 0.5,
}


def _decisions(rows: Sequence[Row]) -> str:
  """Formats areas under the curve of what weights say of failures."""
  every = list(pairs_of(rows))
  lines = [
    "| adding fails: | of pairs | fail | drift | reads | writes |",
    "|---|---|---|---|---|---|",
  ]
  near = [x for x in every if not x.is_far]
  for where, own in (("all", every), ("one lineage", near)):
    for title, fails in FAILURES.items():
      bad = [fails(x) for x in own]
      areas = [
        area_under_curve([getattr(x, name) for x in own], bad)
        for name in ("drift", "reads", "writes")
      ]
      cells = " | ".join(f"{x:.3f}" for x in areas)
      lines.append(f"| {title}, {where} | {len(own)} | {sum(bad)} | {cells} |")
  return "\n".join(lines)


def as_ranks(rows: Sequence[Row]) -> str:
  """Formats figures by rank, and their rank correlations with it.

  Args:
    rows: of all ranks and seeds.

  Returns:
    Lines; the last ones are the least correlation of any seed, and the mean.
  """
  groups = _targets(rows)
  names = {**MEASURES, "chance": "chance"}
  lines = [
    f"| rank | {' | '.join(names.values())} |",
    "|---" * (len(names) + 1) + "|",
  ]
  for name, own in groups.items():
    cells = [with_error([row["figures"][x] for row in own]) for x in names]
    lines.append(f"| {name.split()[1]} | {' | '.join(cells)} |")
  for title, how in (("mean", np.mean), ("least", np.min)):
    cells = [
      f"{how(list(correlations(rows, x).values())):.3f}"
      if len(groups) > 1
      else ""
      for x in names
    ]
    lines.append(f"| correlation with rank, {title} | {' | '.join(cells)} |")
  return "\n".join(lines)


def correlations(rows: Sequence[Row], name: str) -> dict[int, float]:
  """Computes the rank correlation of a figure with the rank, a seed each."""
  found = {}
  for seed in sorted({row["seed"] for row in rows}):
    own = [row for row in rows if row["seed"] == seed]
    ranks = [int(row["name"].split()[1]) for row in own]
    values = [row["figures"][name] for row in own]
    found[seed] = rank_correlation(ranks, values)
  return found


def at_level(
  points: Sequence[Mapping[str, Any]], level: float, figure: Callable
) -> float:
  """Finds a figure where the update's text has a loss, between two looks.

  Args:
    points: of one update, in order.
    level: loss in nats.
    figure: point -> number.

  Returns:
    The figure, linear in the logarithm of the loss where it first falls to the
    level; NaN where it never does.

  Example:
    >>> points = [{"update": (0, 4.0), "x": 0}, {"update": (1, 1.0), "x": 2}]
    >>> at_level(points, 2.0, lambda point: point["x"])
    1.0
  """
  for before, after in zip(points, points[1:], strict=False):
    high, low = before["update"][1], after["update"][1]
    if low <= level <= high:
      way = np.log(high / level) / np.log(high / low) if high > low else 1.0
      return float(figure(before) + way * (figure(after) - figure(before)))
  return float("nan")


def _mean_of(tasks: Sequence[str], place: int) -> Callable[..., float]:
  """Makes point -> the mean of a figure of skills."""
  return lambda point: float(np.mean([point[x][place] for x in tasks]))


#: What an update breaks: title -> point -> number.
BROKEN: dict[str, Callable[..., float]] = {
  "skills, right": _mean_of(TASKS, 0),
  "skills, nats": _mean_of(TASKS, 1),
  "other skills, right": _mean_of(OTHERS, 0),
  "other skills, nats": _mean_of(OTHERS, 1),
  "known, right": _mean_of(("known",), 0),
  "drift": lambda point: point["drift"],
  "steps": lambda point: float(point["steps"]),
}


#: Forms, each with the one that it is compared with.
BETWEEN = (
  ("rank 16", FREE),
  ("rank 4", FREE),
  ("both left alone", FREE),
  ("both left alone", "random spaces left alone"),
  ("reads left alone", "random spaces left alone"),
  ("writes left alone", "random spaces left alone"),
  ("a third of the rate", FREE),
)


def as_updates(rows: Sequence[Row]) -> str:
  """Formats what updates break at equal losses of their own text.

  Args:
    rows: of all forms and seeds.

  Returns:
    A table a level, means over the seeds that reach it; and differences of
    forms, paired by seeds.
  """
  tables = []
  for level in LEVELS:
    lines = _head(f"update at {level} nats", [*BROKEN, "seeds"])
    for name, own in _targets(rows).items():
      columns = [
        [at_level(row["figures"]["points"], level, x) for row in own]
        for x in BROKEN.values()
      ]
      there = [~np.isnan(x) for x in np.asarray(columns[0])]
      if any(there):
        cells = [
          with_error([x for x, is_there in zip(own, there, strict=True)
                      if is_there])
          for own in columns
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(there)} |")
    tables.append("\n".join(lines))
  return "\n\n".join([*tables, _between_forms(rows)])


def _between_forms(rows: Sequence[Row]) -> str:
  """Formats what a form breaks less what another does, paired by seeds."""
  names = [name for name in BROKEN if name.endswith("nats")]
  heads = [f"{name} at {level}" for level in LEVELS for name in names]
  lines = _head("form, less another", heads)
  points = {
    (row["name"], row["seed"]): row["figures"]["points"] for row in rows
  }
  for one, other in BETWEEN:
    seeds = [s for name, s in points if name == one and (other, s) in points]
    cells = []
    for level in LEVELS:
      for figure in (BROKEN[name] for name in names):
        less = [
          at_level(points[one, seed], level, figure)
          - at_level(points[other, seed], level, figure)
          for seed in seeds
        ]
        less = [x for x in less if not np.isnan(x)]
        cells.append(with_error(less, sign=True) if less else "")
    lines.append(f"| {one}: {other} | {' | '.join(cells)} |")
  return "\n".join(lines)


def as_texts(rows: Sequence[Row]) -> str:
  """Formats nats of a language model's skills, and what is recovered of them.

  Args:
    rows: of all targets and seeds.

  Returns:
    A table, a column a target.
  """
  groups = _targets(rows)
  lines = _head("SmolLM2-135M", list(groups))

  def add_line(title: str, figure: Callable[[Any], float]) -> None:
    """Adds a figure of every target."""
    cells = [with_error([figure(row["figures"]) for row in own])
             for own in groups.values()]  # fmt: skip
    lines.append(f"| {title} | {' | '.join(cells)} |")

  add_line("(drift of the weights)", lambda x: x["drift"])
  for name, title in BESIDE.items():
    add_line(f"({title}, nats)", lambda x, name=name: x[name][1])
  for name in language_ports.METHODS:
    add_line(f"{name}, nats", lambda x, name=name: x["methods"][name][1])
  for name in language_ports.METHODS:
    add_line(f"{name}, recovered", functools.partial(recovered, name=name))
  return "\n".join(lines)


def as_layers(rows: Sequence[Row]) -> str:
  """Formats what is left with a layer out or replaced.

  Args:
    rows: of all layers, kinds and seeds.

  Returns:
    Lines.
  """
  columns: dict[str, Callable[..., float]] = {
    "known, right": lambda x: x["base"][0],
    "known, nats": lambda x: x["base"][1],
    "known, healed": lambda x: x["healed"][0],
    "skills added": lambda x: _right(x, "add"),
    "added, healed": lambda x: _right(x, "add, healed"),
    "skills distilled": lambda x: _right(x, "distil"),
    "times as fast": lambda x: x["speed"],
  }
  lines = _head("in its place", columns)
  for name, own in _targets(rows).items():
    cells = [with_error([x(row["figures"]) for row in own])
             for x in columns.values()]  # fmt: skip
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _right(figures: Mapping[str, Any], name: str) -> float:
  """Returns the share of right answers to both skills."""
  return float(np.mean([figures[task][name][0] for task in TASKS]))


def draw(rows: Sequence[Row]) -> Figure:
  """Draws every part that has rows, a panel each.

  Args:
    rows: of all parts and seeds.

  Returns:
    Figure.
  """
  panels = {
    "ports": _draw_ports, "ranks": _draw_ranks,
    "updates": _draw_updates, "layers": _draw_layers,
  }  # fmt: skip
  shown = [x for x in panels if any(row["part"] == x for row in rows)]
  lines = -(-len(shown) // 2)
  figure = Figure(figsize=(12.5, 4.2 * lines))
  axes = list(figure.subplots(lines, 2, squeeze=False).flat)
  for panel, name in zip(axes, shown, strict=False):
    panels[name](panel, [row for row in rows if row["part"] == name])
    panel.grid(color="0.92", lw=0.6)
  for panel in axes[len(shown) :]:
    panel.set_visible(False)
  return figure


#: Methods that are drawn.
_DRAWN = (
  "add", "project, three quarters", "a random part, three quarters",
  "both parts, three quarters", "rotate, three quarters", "distil from add",
  "distil from zero", "retrain from zero, a quarter of the steps",
)  # fmt: skip


def _draw_ports(axes: Any, rows: Sequence[Row]) -> None:
  """Draws recovered shares against the drift."""
  groups = _targets(rows)
  drifts = [
    np.mean([row["figures"]["weights"]["drift"] for row in own])
    for own in groups.values()
  ]
  for turn, name in enumerate(_DRAWN):
    each = [
      [float(np.mean(_each(row, recovered, name))) for row in own]
      for own in groups.values()
    ]
    colour = _COLOURS[turn]
    means = [np.mean(x) for x in each]
    axes.plot(drifts, means, "o-", color=colour, ms=3.5, lw=1, label=name)
    for drift, values in zip(drifts, each, strict=True):
      axes.plot([drift] * len(values), values, "_", color=colour, ms=7)
  axes.set_xscale("log")
  axes.set_xlabel("drift of the weights; the last is another seed")
  axes.set_title("recovered share of nats; a dash a seed")
  axes.legend(fontsize=6.5, loc="lower left")


def _draw_ranks(axes: Any, rows: Sequence[Row]) -> None:
  """Draws the measures of interference by rank."""
  groups = _targets(rows)
  ranks = [int(name.split()[1]) for name in groups]
  for turn, name in enumerate((*_RISING, "summed")):
    means = [
      np.mean([row["figures"][name] for row in own]) for own in groups.values()
    ]
    axes.plot(ranks, means, "o-", color=_COLOURS[turn], ms=3.5, lw=1,
              label=MEASURES[name])  # fmt: skip
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.set_xlabel("rank of both adapters")
  axes.set_title("two adapters added")
  axes.legend(fontsize=6.5)


def _draw_updates(axes: Any, rows: Sequence[Row]) -> None:
  """Draws what an update breaks against what it gains."""
  for turn, (name, own) in enumerate(_targets(rows).items()):
    points = [row["figures"]["points"] for row in own]
    gains, broken = (
      np.mean([[figure(x) for x in each] for each in points], axis=0)
      for figure in (_mean_of(("update",), 1), BROKEN["skills, nats"])
    )
    axes.plot(gains, broken, "o-", color=_COLOURS[turn % len(_COLOURS)],
              ms=3, lw=1, label=name)  # fmt: skip
  axes.set_xscale("log")
  axes.invert_xaxis()
  axes.set_xlabel("the update's loss on its own text, nats a symbol")
  axes.set_title("loss of both skills with their adapters added")
  axes.legend(fontsize=6.5)


def _draw_layers(axes: Any, rows: Sequence[Row]) -> None:
  """Draws right answers with a layer out or replaced."""
  groups = _targets(rows)
  shown: dict[str, Callable[..., float]] = {
    "the base": lambda x: x["base"][0],
    "the base, healed": lambda x: x["healed"][0],
    "skills, added": lambda x: _right(x, "add"),
    "skills, distilled": lambda x: _right(x, "distil"),
  }
  places = np.arange(len(groups))
  for turn, (title, figure) in enumerate(shown.items()):
    means = [
      np.mean([figure(row["figures"]) for row in own])
      for own in groups.values()
    ]
    axes.barh(places + 0.2 * (turn - 1.5), means, 0.2, label=title,
              color=_COLOURS[turn])  # fmt: skip
  axes.set_yticks(places, list(groups), fontsize=7)
  axes.invert_yaxis()
  axes.set_title("right answers")
  axes.legend(fontsize=6.5)
