# SPDX-License-Identifier: Apache-2.0
"""How far each variant is from the finetune, as a share of plain SVD."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

# Okabe and Ito's, safe for the colour-blind; markers tell them apart as well.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))
_TICKS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


def draw_ratios(
  rows: Sequence[Mapping[str, Any]], texts: Sequence[str], title: str
) -> Figure:
  """Divergence of every variant over plain SVD's, a mark for each text.

  Args:
    rows: as `equal_bytes.summarise` gives them, of one rank; what has no bytes
      is left out.
    texts: names.
    title: of the figure.

  Returns:
    Figure, logarithmic; bars are one standard deviation over seeds, and left
    out for a single one.
  """
  rows = [row for row in rows if row["bytes"]]
  places = np.arange(len(rows))[::-1]
  figure = Figure(figsize=(8.6, 1.6 + 0.36 * len(rows)))
  axes = figure.add_subplot()
  axes.axvline(1, color="0.35", lw=1.2, ls=":", label="plain SVD")
  for at, (text, (colour, marker)) in enumerate(
    zip(texts, _STYLES, strict=False)
  ):
    shift = 0.12 * (len(texts) - 1 - 2 * at)
    axes.errorbar(
      [row[text]["ratio"] for row in rows], places + shift,
      xerr=np.nan_to_num([row[text]["ratio_error"] for row in rows]),
      fmt=marker, color=colour, ms=5, capsize=3, lw=1.2, label=text,
    )  # fmt: skip
  axes.set_xscale("log")
  low, high = axes.get_xlim()
  ticks = [tick for tick in _TICKS if low <= tick <= high]
  axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_yticks(places, [_name(row) for row in rows])
  axes.grid(axis="x", color="0.92", lw=0.6)
  axes.set_xlabel("KL(finetuned ‖ base + adapter) over plain SVD's")
  axes.set_title(title)
  axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
  return figure


def _name(row: Mapping[str, Any]) -> str:
  seeds = row["seeds"]
  return row["variant"] + (f" ({seeds} seeds)" if seeds > 1 else "")
