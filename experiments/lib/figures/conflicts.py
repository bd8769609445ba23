# SPDX-License-Identifier: Apache-2.0
"""Draws and tabulates the conflicts of two adapters by module and layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.lib.figures.grids import layer_of

Rows = dict[str, dict[str, Any]]
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
         "down_proj")  # fmt: skip
#: The kinds of module drawn as one line.
GROUPS = {
  "q": ("q_proj",),
  "k": ("k_proj",),
  "v": ("v_proj",),
  "o": ("o_proj",),
  "MLP": ("gate_proj", "up_proj", "down_proj"),
}
#: Columns of the table: (title, field, field of the random level).
FIGURES = (
  ("cosine", "cosine", None),
  ("column cosine", "column_cosine", None),
  ("signs against", "sign_conflict", None),
  ("of large entries", "sign_conflict_large", None),
  ("read", "read_overlap", "read_level"),
  ("8 strongest read", "read_leading", "read_leading_level"),
  ("written", "write_overlap", "write_level"),
  ("8 strongest written", "write_leading", "write_leading_level"),
)
#: What is written to the stream and read from it: (name, writers, readers,
#: layers between).
LINKS = (
  ("o to q, k, v of the next layer", "o", "[qkv]", 1),
  ("MLP to q, k, v of the next layer", "down", "[qkv]", 1),
  ("o to the MLP of its layer", "o", "(?:gate|up)", 0),
  ("MLP to the MLP of the next layer", "down", "(?:gate|up)", 1),
)
#: (title of a panel, field of a row).
PANELS = (
  ("cosine of the changes", "cosine"),
  ("large entries of opposite signs", "sign_conflict_large"),
  ("8 strongest directions read, shared", "read_leading"),
  ("8 strongest directions written, shared", "write_leading"),
  ("ZipLoRA's column cosine", "column_cosine"),
)
_STYLES = {
  "q": ("#0072B2", "o"),
  "k": ("#D55E00", "s"),
  "v": ("#009E73", "D"),
  "o": ("#CC79A7", "^"),
  "MLP": ("#000000", "v"),
}
_LINK_COLOURS = ("#0072B2", "#000000", "#CC79A7", "#E69F00")


def draw_layers(
  panels: Mapping[str, tuple[Mapping[str, np.ndarray], np.ndarray]],
  links: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> Figure:
  """Draws figures by layer; in grey those of the second adapter, shuffled.

  Args:
    panels: title -> lines by name of GROUPS (layers,), and the shuffled line.
    links: what is written and read -> layer -> `leading` and more.

  Returns:
    Figure of as many panels and one for the links.
  """
  count = len(panels) + 1
  columns = min(3, count)
  rows = -(-count // columns)
  figure = Figure(figsize=(0.6 + 3.3 * columns, 0.6 + 2.4 * rows))
  grid = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes, (title, (lines, shuffled)) in zip(
    grid, panels.items(), strict=False
  ):
    for name, values in lines.items():
      colour, marker = _STYLES[name]
      axes.plot(values, color=colour, marker=marker, ms=3, lw=1.1, label=name)
    axes.plot(shuffled, color="0.6", lw=1.2, ls="--", label="all, shuffled")
    axes.set_title(title, fontsize=9)
  grid[0].legend(fontsize=7, ncols=2)
  last = grid[len(panels)]
  for (name, layers), colour in zip(links.items(), _LINK_COLOURS, strict=True):
    last.plot(
      list(layers), [layer["leading"] for layer in layers.values()],
      color=colour, lw=1.2, label=name,
    )  # fmt: skip
  level = next(iter(links.values())).values()
  last.plot(list(next(iter(links.values()))),
            [layer["leading_level"] for layer in level],
            color="0.6", ls="--", lw=1.2, label="random")  # fmt: skip
  last.set_title("8 strongest: second writes, first reads", fontsize=9)
  last.legend(fontsize=6)
  for axes in grid[:count]:
    axes.grid(color="0.92", lw=0.6)
    axes.set_xlabel("layer")
  for axes in grid[count:]:
    axes.set_visible(False)
  return figure


def by_layer(rows: Rows, kinds: Sequence[str], field: str) -> np.ndarray:
  """Averages a figure over some kinds of module in each layer.

  Args:
    rows: of `compare_adapters`.
    kinds: of KINDS.
    field: of a row.

  Returns:
    (layers,).

  Example:
    >>> rows = {f"layers.{i}.q_proj.weight": {"x": i} for i in range(3)}
    >>> by_layer(rows, ["q_proj"], "x").tolist()
    [0.0, 1.0, 2.0]
  """
  layers: dict[int, list[float]] = {}
  for name, row in rows.items():
    if name.split(".")[-2] in kinds:
      layers.setdefault(layer_of(name) or 0, []).append(row[field])
  return np.array([np.mean(layers[layer]) for layer in sorted(layers)])


def as_table(rows: Rows, shuffled: Rows) -> str:
  """Formats figures by kind of module, means over layers.

  Args:
    rows: of the two adapters.
    shuffled: of the first and the second shuffled.

  Returns:
    A Markdown table, the shuffled figures in brackets; the random levels in the
    last columns are computed, not measured.
  """
  heads = ["module", *(title for title, *_ in FIGURES), "random read, 8",
           "random written, 8"]  # fmt: skip
  lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for kind in KINDS:
    cells = [kind]
    for _, field, _ in FIGURES:
      own, other = (
        np.mean(by_layer(each, [kind], field)) for each in (rows, shuffled)
      )
      cells.append(f"{own:.3f} ({other:.3f})")
    for side in ("read", "write"):
      levels = [
        np.mean(by_layer(rows, [kind], f"{side}_{field}"))
        for field in ("level", "leading_level")
      ]
      cells.append(", ".join(f"{level:.3f}" for level in levels))
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def as_depth_table(rows: Rows) -> str:
  """Formats figures at the ends and in the middle of the network.

  Args:
    rows: of the two adapters.

  Returns:
    A Markdown table: means over the first sixth of the layers, the middle third
    and the last sixth.
  """
  fields = ("cosine", "sign_conflict_large", "read_leading", "write_leading")
  heads = ["modules", "figure", "first sixth", "middle third", "last sixth"]
  lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for name, kinds in GROUPS.items():
    for field in fields:
      values = by_layer(rows, kinds, field)
      n = len(values)
      few = max(n // 6, 1)
      parts = values[:few], values[n // 3 : n - n // 3], values[-few:]
      cells = [f"{np.mean(part):.3f}" for part in parts]
      lines.append(f"| {name} | {field} | {' | '.join(cells)} |")
  return "\n".join(lines)


def as_stream_table(
  streams: Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]],
) -> str:
  """Formats overlaps of what is written with what is read further on.

  Args:
    streams: who writes -> of `follow_stream`.

  Returns:
    A Markdown table, means over layers.
  """
  heads = ["from and to", *(f"{who}: all, 8 strongest" for who in streams),
           "random"]  # fmt: skip
  lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for name, *_ in LINKS:
    cells, levels = [name], []
    for found in streams.values():
      layers = list(found[name].values())
      mean = {
        field: np.mean([layer[field] for layer in layers])
        for field in layers[0]
      }
      cells.append(f"{mean['overlap']:.3f}, {mean['leading']:.3f}")
      levels = [f"{mean['level']:.3f}, {mean['leading_level']:.3f}"]
    lines.append(f"| {' | '.join(cells + levels)} |")
  return "\n".join(lines)
