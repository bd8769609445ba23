# SPDX-License-Identifier: Apache-2.0
"""Tables and draws what routers find, means over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.lib.figures.compositions import with_error

#: bed, seed, method, figures.
Row = Mapping[str, Any]

#: Testbed -> the figures that are drawn of it, each with a colour.
SHOWN = {
  "regimes": {"error": "#0072B2"},
  "llama": {"nats": "#0072B2"},
  "modalities": {
    "image": "#0072B2", "tone": "#D55E00", "text": "#009E73",
  },
  "analogies": {"seen": "#0072B2", "unseen": "#D55E00", "other": "#7F7F7F"},
  "analogies_96": {"seen": "#0072B2", "unseen": "#D55E00", "other": "#7F7F7F"},
  "library": {"exact": "#0072B2", "hits": "#E69F00"},
}  # fmt: skip


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Groups rows of a testbed by method, as they first occur.

  Example:
    >>> list(by_method([{"method": "a"}, {"method": "b"}, {"method": "a"}]))
    ['a', 'b']
  """
  found: dict[str, list[Row]] = {}
  for row in rows:
    found.setdefault(row["method"], []).append(row)
  return found


def as_table(rows: Sequence[Row], measures: Mapping[str, str]) -> str:
  """Formats the rows of a testbed as a Markdown table.

  Args:
    rows: of all methods and seeds.
    measures: name of a figure -> title.

  Returns:
    Lines: means over seeds, ± their standard errors, and the largest of each
    seed's first figure; seconds are medians beside whatever else ran.

  Example:
    >>> row = {"method": "a", "figures": {"x": 0.5}, "seconds": 2.0}
    >>> print(as_table([row], {"x": "share"}))
    | method | share | seeds | s |
    |---|---|---|---|
    | a | 0.500 | 0.5000 | 2 |
  """
  lines = [
    f"| method | {' | '.join(measures.values())} | seeds | s |",
    "|" + "---|" * (len(measures) + 3),
  ]
  first = next(iter(measures))
  for method, own in by_method(rows).items():
    cells = [
      with_error(values) if (values := _values(own, name)) else ""
      for name in measures
    ]
    each = " ".join(f"{x:.4f}" for x in _values(own, first))
    seconds = f"{np.median([row['seconds'] for row in own]):.0f}"
    lines.append(f"| {method} | {' | '.join(cells)} | {each} | {seconds} |")
  return "\n".join(lines)


def as_differences(
  rows: Sequence[Row],
  measures: Mapping[str, str],
  compared: Sequence[tuple[str, str]],
) -> str:
  """Formats differences of methods to others as a Markdown table.

  Args:
    rows: of a testbed.
    measures: name of a figure -> title.
    compared: methods, each with the one that is taken off.

  Returns:
    Lines, for what was measured of both: means over seeds of differences within
    each, with standard errors.
  """
  heads = " | ".join(measures.values())
  lines = [f"| method | less | {heads} |", "|" + "---|" * (len(measures) + 2)]
  groups = by_method(rows)
  for names in compared:
    if all(name in groups for name in names):
      one, other = (groups[name] for name in names)
      cells = [_difference(one, other, measure) for measure in measures]
      lines.append(f"| {' | '.join(names)} | {' | '.join(cells)} |")
  return "\n".join(lines)


def as_task_differences(
  rows: Sequence[Row], compared: Sequence[tuple[str, str]]
) -> str:
  """Formats differences of methods, with standard errors over tasks.

  Args:
    rows: of a testbed; those with "tasks", {part: share of each task}, count.
    compared: methods, each with the one that is taken off.

  Returns:
    Lines: means over pairs of a task and a seed, and how many these are; ""
    where no row has tasks.

  Example:
    >>> rows = [{"method": m, "seed": 0, "tasks": {"seen": [x, x + 0.2]}}
    ...         for m, x in (("a", 0.5), ("b", 0.25))]
    >>> print(as_task_differences(rows, [("a", "b")]))
    | method | less | seen, over 2 |
    |---|---|---|
    | a | b | +0.250 ± 0.000 |
  """
  known = {
    (row["method"], row["seed"]): row["tasks"]
    for row in rows
    if row.get("tasks")
  }
  parts = list(next(iter(known.values()), {}))
  lines, counts = [], {}
  for one, other in compared:
    seeds = [s for name, s in known if name == one and (other, s) in known]
    less = {
      part: [
        x - y
        for seed in seeds
        for x, y in zip(known[one, seed][part], known[other, seed][part],
                        strict=True)
      ]
      for part in parts
    }  # fmt: skip
    if seeds:
      counts |= {part: len(values) for part, values in less.items()}
      cells = [with_error(values, sign=True) for values in less.values()]
      lines.append(f"| {one} | {other} | {' | '.join(cells)} |")
  if not lines:
    return ""
  heads = " | ".join(f"{part}, over {count}" for part, count in counts.items())
  return "\n".join(
    [f"| method | less | {heads} |", "|" + "---|" * (len(counts) + 2), *lines]
  )


def _difference(rows: Sequence[Row], others: Sequence[Row], name: str) -> str:
  """Formats the mean difference of a figure, paired by seeds."""
  one, other = (
    {row["seed"]: row["figures"][name] for row in own if name in row["figures"]}
    for own in (rows, others)
  )
  found = [one[seed] - other[seed] for seed in sorted(one.keys() & other)]
  return with_error(found, sign=True) if found else ""


def _values(rows: Sequence[Row], name: str) -> list[float]:
  """Returns a figure of all seeds that have it."""
  return [row["figures"][name] for row in rows if name in row["figures"]]


def draw(rows: Sequence[Row], titles: Mapping[str, str]) -> Figure:
  """Draws all testbeds, and the effective number of adapters in training.

  Args:
    rows: of all testbeds.
    titles: testbed -> title.

  Returns:
    Figure: a panel a testbed, a line a method, a point a seed; and for both
    testbeds of ReMix how softmax's effective number went.
  """
  beds = [name for name in titles if any(x["bed"] == name for x in rows)]
  courses = [
    name
    for name in beds
    if any(x["bed"] == name and x.get("course") for x in rows)
  ]
  count = len(beds) + len(courses)
  columns = min(count, 2)
  lines = -(-count // columns)
  figure = Figure(figsize=(6.2 * columns, 3.4 * lines))
  panels = list(figure.subplots(lines, columns, squeeze=False).flat)
  for axes, name in zip(panels, beds, strict=False):
    own = [row for row in rows if row["bed"] == name]
    _draw_points(axes, own, SHOWN[name])
    axes.set_title(titles[name])
  for axes, name in zip(panels[len(beds) :], courses, strict=False):
    _draw_courses(axes, [row for row in rows if row["bed"] == name])
    axes.set_title(f"{titles[name]}: effective number")
  for axes in panels[count:]:
    axes.set_visible(False)
  return figure


def _draw_points(axes: Any, rows: Sequence[Row], shown: Mapping[str, str]):
  """Draws a point for each seed of each method."""
  groups = by_method(rows)
  for place, own in enumerate(groups.values()):
    for turn, (name, colour) in enumerate(shown.items()):
      values = _values(own, name)
      height = place + 0.16 * (turn - (len(shown) - 1) / 2)
      axes.plot(
        values, [height] * len(values), "o", color=colour, ms=4, alpha=0.7,
        label=name if place == 0 else None, mew=0,
      )  # fmt: skip
  axes.set_yticks(range(len(groups)), list(groups), fontsize=7.5)
  axes.set_ylim(len(groups) - 0.5, -0.5)
  axes.grid(axis="x", color="0.92", lw=0.6)
  if "error" in shown:
    axes.set_xscale("symlog", linthresh=1e-3)
  axes.set_xlim(left=0)
  axes.legend(fontsize=7.5)


def _draw_courses(axes: Any, rows: Sequence[Row]) -> None:
  """Draws the effective number over the training, the mean of all seeds."""
  groups = by_method([row for row in rows if row.get("course")])
  for i, (method, own) in enumerate(groups.items()):
    mean = np.mean([row["course"] for row in own], axis=0)
    first = np.mean(_values(own, "effective at first"))
    axes.plot(
      [0, *(np.arange(len(mean)) + 0.5) / len(mean)], [first, *mean],
      marker="osD^v"[i % 5], ms=4, lw=1.2, label=method,
    )  # fmt: skip
  axes.set_xlabel("share of the training")
  axes.legend(fontsize=7)
