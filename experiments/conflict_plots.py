# SPDX-License-Identifier: Apache-2.0
"""Conflicts of two adapters by layer, a panel for each figure."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

#: What is one line.
GROUPS = {
  "q": ("q_proj",),
  "k": ("k_proj",),
  "v": ("v_proj",),
  "o": ("o_proj",),
  "MLP": ("gate_proj", "up_proj", "down_proj"),
}
#: Title, field of a row.
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
  """Figures by layer; in grey those of the second adapter, shuffled.

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
