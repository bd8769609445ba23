# SPDX-License-Identifier: Apache-2.0
"""One figure of every module of a report, by kind and layer."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.tables import Row, by_kind, measure, pattern_of
from jlora.extraction import Report

#: What a cell without a module says, by the ledger's status.
MARKS = {"unchanged": "=", "kept whole": "w", "not representable": "x"}


class Grid(NamedTuple):
  """One figure of every module, by kind and layer.

  Attributes:
    kinds: names of the rows.
    layers: numbers of the columns; None, first if it is there, for modules
      outside the layers.
    values: (kinds, layers) float64, NaN where no module was extracted.
    marks: (kinds, layers) of str, of `MARKS` where the ledger knows a matrix
      that was not extracted; "" elsewhere.
  """

  kinds: list[str]
  layers: list[int | None]
  values: np.ndarray
  marks: np.ndarray


def layer_of(path: str) -> int | None:
  """The layer a path names: its first whole number.

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
  """A figure of every module at the report's rank, by kind and layer.

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
  # A tensor beside the layers is a column only if something is drawn there.
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
  """A module's own figure; of several, that of all as one vector."""
  if len(cell) == 1:
    return cell[0][figure]
  return measure(cell, max(row["rank"] for row in cell))[figure]
