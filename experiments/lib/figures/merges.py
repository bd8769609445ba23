# SPDX-License-Identifier: Apache-2.0
"""Draws losses of merges on two texts, and losses by depth."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

_COLOURS = (
  "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F",
)  # fmt: skip
_MARKERS = "osD^vPX<>h"
_REACH = 0.25  # nats shown beyond base and finetunes


def draw_losses(
  rows: Sequence[Mapping[str, Any]],
  front: Sequence[Mapping[str, Any]],
  titles: Mapping[str, str],
) -> Figure:
  """Draws loss on one text against the other, a marker for each method.

  Args:
    rows: kind, method, setting, and text -> losses; of kind "beside" black.
    front: those of the Pareto front, joined, numbered and named.
    titles: of the two texts.

  Returns:
    Figure; what lies far above base and finetunes is named, not shown.
  """
  figure = Figure(figsize=(10.0, 6.2))
  axes = figure.add_subplot()
  points = {id(row): _point(row, titles) for row in rows}
  known = [points[id(row)] for row in rows if row["kind"] == "beside"
           and row["method"] != "random"]  # fmt: skip
  high = np.max(known, axis=0) + _REACH
  looks = _looks(rows)
  outside, labelled = [], set()
  for row in rows:
    x, y = points[id(row)]
    if x > high[0] or y > high[1]:
      outside.append(f"{row['method']} {row['setting']}: {x:.2f}, {y:.2f}")
      continue
    name = row["method"] if row["kind"] != "beside" else _beside(row)
    colour, marker = looks[name]
    axes.plot(
      x, y, marker=marker, color=colour, ls="", ms=7, mec="white", mew=0.5,
      label=None if name in labelled else name,
    )  # fmt: skip
    labelled.add(name)
  best = np.array([points[id(row)] for row in front])
  axes.step(best[:, 0], best[:, 1], where="post", color="0.5", lw=1.2,
            zorder=0, label="Pareto front")  # fmt: skip
  _name_front(axes, front, best)
  first, second = titles.values()
  axes.set_xlabel(f"held-out loss on {first}, nats per token")
  axes.set_ylabel(f"held-out loss on {second}, nats per token")
  axes.set_title("Merges of two finetunes: better is down and to the left")
  axes.margins(x=0.12, y=0.1)
  axes.grid(color="0.92", lw=0.6)
  axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=7.5)
  if outside:
    axes.text(
      1.02, 0.0, "not shown:\n" + "\n".join(outside), fontsize=6,
      transform=axes.transAxes, va="bottom", color="0.35",
    )  # fmt: skip
  return figure


def draw_depths(
  rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]
) -> Figure:
  """Draws loss against the layers repeated or left out, a panel per text.

  Args:
    rows: kind, where, slices, and text -> losses; those with `where` of -1 are
      the base, dashed, and what is not drawn.
    titles: of the texts.

  Returns:
    Figure, logarithmic; a point stands at the first layer of its block.
  """
  kinds = dict.fromkeys(
    row["kind"]
    for row in rows
    if row["where"] >= 0 and all(part[0] == "base" for part in row["slices"])
  )
  drawn = [kind for kind in kinds if kind != "overlapping halves"]
  figure = Figure(figsize=(9.4, 4.0))
  panels = figure.subplots(1, len(titles), squeeze=False, sharex=True)[0]
  for axes, (text, title) in zip(panels, titles.items(), strict=True):
    for i, kind in enumerate(drawn):
      own = [row for row in rows if row["kind"] == kind]
      axes.plot(
        [row["where"] for row in own], [np.mean(row[text]) for row in own],
        color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)],
        ms=5, lw=1.3, label=kind,
      )  # fmt: skip
    for row in rows:
      if row["kind"] == "base":
        axes.axhline(np.mean(row[text]), color="0.4", ls="--", lw=1.2,
                     label="as it is")  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.set_xlabel("first layer that is repeated or left out")
    axes.set_title(f"held-out loss on {title}, nats per token")
    axes.grid(color="0.92", lw=0.6, which="both")
  panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
  return figure


def _name_front(axes: Any, front: Sequence[Mapping], points: Any) -> None:
  """Numbers the points of the Pareto front, and lists their names."""
  names = [
    f"{i}  {row['method']}, {row['setting']}".strip(", ")
    for i, row in enumerate(front, 1)
  ]
  for i, point in enumerate(points):
    is_odd = i % 2  # labels of close neighbours must not overlap
    axes.annotate(
      f"{i + 1}", point, xytext=(4, 4) if is_odd else (-4, -4),
      textcoords="offset points", fontsize=7.5, color="0.25",
      ha="left" if is_odd else "right", va="bottom" if is_odd else "top",
    )  # fmt: skip
  axes.text(
    0.97, 0.97, "Pareto front\n" + "\n".join(names), fontsize=7,
    transform=axes.transAxes, ha="right", va="top", color="0.25",
    multialignment="left",
  )  # fmt: skip


def _point(row: Mapping[str, Any], titles: Mapping[str, str]) -> Any:
  """Returns the mean loss on each text."""
  return tuple(float(np.mean(row[name])) for name in titles)


def _beside(row: Mapping[str, Any]) -> str:
  """Returns a row's name in the legend; settings of one finetune share it."""
  return f"{row['method']}: {row['setting'].split(',')[0]}".strip(": ")


def _looks(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
  """Returns each method's colour and marker; references are black."""
  names = dict.fromkeys(
    row["method"] for row in rows if row["kind"] != "beside"
  )
  beside = dict.fromkeys(_beside(row) for row in rows
                         if row["kind"] == "beside")  # fmt: skip
  found = {
    name: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
    for i, name in enumerate(names)
  }
  return found | {
    name: ("#000000", "*<>phdHD8s"[i % 10]) for i, name in enumerate(beside)
  }
