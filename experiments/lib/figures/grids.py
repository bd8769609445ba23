# SPDX-License-Identifier: Apache-2.0
"""Draws one figure of every module of a report, by kind and layer."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from experiments.lib.figures.tables import Row, by_kind, measure, pattern_of
from jlora.extraction import Report

#: The mark of a cell without a module, by the ledger's status.
MARKS = {"unchanged": "=", "kept whole": "w", "not representable": "x"}


class Grid(NamedTuple):
  """One figure of every module, by kind and layer.

  Attributes:
    kinds: names of the rows.
    layers: numbers of the columns; None, first if it is there, for modules
      outside the layers.
    values: (kinds, layers) float64, NaN where no module was extracted.
    marks: (kinds, layers) of str: one of `MARKS` where the ledger has a matrix
      that was not extracted; "" elsewhere.
  """

  kinds: list[str]
  layers: list[int | None]
  values: np.ndarray
  marks: np.ndarray


def layer_of(path: str) -> int | None:
  """Returns the layer a path names: its first whole number.

  Args:
    path: a parameter's name.

  Returns:
    The number, None for a module outside the layers.

  Example:
    >>> layer_of("model.layers.12.mlp.experts.3.w1.weight")
    12
  """
  found = re.search(r"(?:^|[./])(\d+)(?=[./]|$)", path)
  return int(found[1]) if found else None


def fill_grid(report: Report, figure: str) -> Grid:
  """Sorts a figure of every module by kind and layer.

  Args:
    report: as `cut` leaves it.
    figure: `relative_error` or `cosine_distance`; several modules in one cell
      (experts) count as one vector.

  Returns:
    Grid, kinds in the order of a forward pass, layers in theirs. The layers are
    all that the ledger knows, so that one without any module shows.

  Example:
    >>> row = {"path": "h.1.q.weight", "norm": 5.0, "singular_values": [4.0],
    ...        "rank": 1, "relative_errors": [1.0, 0.6],
    ...        "relative_error": 0.6, "cosine_distance": 0.2}
    >>> lost = {"base": ["h.0.q.weight"], "finetuned": ["h.0.q.weight"],
    ...         "status": "unchanged", "why": ""}
    >>> grid = fill_grid(Report({}, [row], {}, [lost]), "relative_error")
    >>> grid.layers, grid.values.tolist(), grid.marks.tolist()
    ([0, 1], [[nan, 0.6]], [['=', '']])
  """
  kinds = by_kind(report.modules)
  statuses = {
    name: row["status"]
    for row in report.ledger
    for name in row["base"] or row["finetuned"]
  }
  # Tensors outside the layers get a column only if something is drawn there.
  layers = {layer_of(path) for path in statuses} - {None}
  layers |= {layer_of(row["path"]) for row in report.modules}
  ordered = sorted(layers, key=lambda layer: -1 if layer is None else layer)
  column = {layer: i for i, layer in enumerate(ordered)}
  values = np.full((len(kinds), len(ordered)), np.nan)
  marks = np.full(values.shape, "", dtype=object)
  for i, rows in enumerate(kinds.values()):
    pattern = pattern_of(rows[0]["path"])
    for name, status in statuses.items():
      if pattern_of(name) == pattern:
        marks[i, column[layer_of(name)]] = MARKS.get(status, "")
    for layer in {layer_of(row["path"]) for row in rows}:
      cell = [row for row in rows if layer_of(row["path"]) == layer]
      j = column[layer]
      values[i, j] = _figure(cell, figure)
      marks[i, j] = ""
  return Grid(list(kinds), ordered, values, marks)


def _figure(cell: Sequence[Row], figure: str) -> float:
  """Returns a module's figure; that of several modules as one vector."""
  if len(cell) == 1:
    return cell[0][figure]
  return measure(cell, max(row["rank"] for row in cell))[figure]


def draw_grid(grid: Grid, title: str, label: str) -> Figure:
  """Draws the heat map of one figure: kinds of modules down, layers across.

  Cells hold their number where there is room. The scale is linear from 0,
  logarithmic where the values span more than a factor of 100.

  Args:
    grid: from `fill_grid`.
    title: of the figure, with the rank.
    label: of the colour bar, with the unit.

  Returns:
    Figure. A module that was not extracted is hatched, with the mark that says
    why; where there is none the cell is white.
  """
  rows, columns = grid.values.shape
  width = min(max(3.2 + 0.36 * columns, 5.5), 15.0)
  figure = Figure(figsize=(width, 1.7 + 0.42 * rows))
  axes = figure.add_subplot()
  scale = _scale(grid.values)
  image = axes.imshow(
    np.ma.masked_invalid(grid.values), "cividis", scale, aspect="auto"
  )
  _mark_missing(axes, grid)
  _write_cells(axes, grid, scale, (width - 3.2) / columns)
  axes.set_yticks(range(rows), grid.kinds)
  step = math.ceil(columns / max(1, (width - 3.2) / 0.3))
  shown = [
    i
    for i, layer in enumerate(grid.layers)
    if layer is None or layer % step == 0
  ]
  axes.set_xticks(shown, [_layer_name(grid.layers[i]) for i in shown])
  axes.set_xlabel(
    "layer" + (" (–: outside the layers)" * (None in grid.layers))
  )
  axes.set_title(title)
  axes.tick_params(length=0)
  for side in axes.spines.values():
    side.set_visible(False)
  figure.colorbar(image, ax=axes, label=label, pad=0.01, fraction=0.05)
  return figure


def _layer_name(layer: int | None) -> str:
  """Returns the label of a column."""
  return "–" if layer is None else str(layer)


def _scale(values: np.ndarray) -> Normalize:
  """Chooses a scale from 0, or a logarithmic one for a wide range."""
  found = values[np.isfinite(values) & (values > 0)]
  if not found.size:
    return Normalize(0.0, 1.0)
  low, high = float(found.min()), float(found.max())
  if high > 100 * low:
    return LogNorm(low, high)
  return Normalize(0.0, high)


def _mark_missing(axes: Axes, grid: Grid) -> None:
  """Hatches and marks the modules that were not extracted."""
  style: dict[str, Any] = {
    "facecolor": "0.93",
    "edgecolor": "0.6",
    "hatch": "////",
  }
  found = set()
  for (i, j), mark in np.ndenumerate(grid.marks):
    if mark:
      found.add(mark)
      axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, lw=0, **style))
      box = {"boxstyle": "square,pad=0.1", "color": "0.97"}
      axes.text(j, i, mark, ha="center", va="center", fontsize=8, bbox=box)
  if found:
    said = [f"{m} {status}" for status, m in MARKS.items() if m in found]
    axes.figure.legend(
      handles=[Patch(lw=0, **style)],
      labels=[f"not extracted: {', '.join(said)}"],
      loc="outside lower right",
      fontsize=8,
    )


def _write_cells(axes: Axes, grid: Grid, scale: Normalize, inches: float):
  """Writes the number into each cell, dark on light or light on dark."""
  if inches < 0.3:
    return
  small = isinstance(scale, LogNorm) or float(scale.vmax or 0) < 0.05
  write = "{:.0e}".format if small else "{:.2f}".format
  for (i, j), value in np.ndenumerate(grid.values):
    if np.isfinite(value):
      text = write(value).replace("e-0", "e-").replace("e+0", "e")
      text = text.removeprefix("0") if text.startswith("0.") else text
      shade = "black" if float(scale(max(value, 1e-300))) > 0.5 else "white"
      axes.text(j, i, text, ha="center", va="center", fontsize=7, color=shade)
