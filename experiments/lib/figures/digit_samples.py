# SPDX-License-Identifier: Apache-2.0
"""Draws samples of digits, a row for each model that made them."""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.lib.data.digits import CLASSES
from experiments.lib.figures.plots import save_figure


def draw_rows(rows: Sequence[tuple[str, np.ndarray]]) -> Figure:
  """Draws a row of images for each model, the digits asked for above.

  Args:
    rows: name and images (n, 64) in [-1, 1], n one for all; the digit asked
      for is the column's, counted by tens.

  Returns:
    Figure; column i of every row began as the same noise.
  """
  count = len(rows[0][1])
  figure = Figure(figsize=(0.48 * count + 1.9, 0.52 * len(rows) + 0.2))
  axes = figure.subplots(len(rows), count, squeeze=False)
  for i, ax in enumerate(axes[0]):
    ax.set_title(str(i % CLASSES), loc="center", fontsize=9)
  for (name, images), line in zip(rows, axes, strict=True):
    for image, ax in zip(images, line, strict=True):
      ax.imshow(image.reshape(8, 8), cmap="gray_r", vmin=-1, vmax=1)
      ax.set(xticks=[], yticks=[])
      for spine in ax.spines.values():
        spine.set(visible=True, color="#bbbbbb", linewidth=0.5)
    line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
  return figure


def save(
  path: str | os.PathLike[str], rows: Sequence[tuple[str, np.ndarray]]
) -> None:
  """Writes the figure of `draw_rows`.

  Args:
    path: PNG file.
    rows: as for `draw_rows`.
  """
  save_figure(path, lambda: draw_rows(rows))
