# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of a comparison and of `equal_bytes`; saves them as PNG.

Nothing is read from disk and no figure depends on another. Colours come from
cividis and from Okabe and Ito's palette, which colour-blind readers can tell
apart; lines differ in marker as well.
"""

import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.lib.figures.tables import Row, measure

#: The palette of Okabe and Ito (2008) without black and pale yellow.
_COLOURS = (
  "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F",
)  # fmt: skip
_MARKERS = "osD^vPX<>*h"
_STYLE: dict[Any, Any] = {
  "font.size": 9.0,
  "axes.titlesize": 10.0,
  "axes.titlelocation": "left",
  "axes.spines.right": False,
  "axes.spines.top": False,
  "legend.frameon": False,
  "savefig.dpi": 150,
  "figure.constrained_layout.use": True,
}
_MIB = 2**20


def save_figure(path: str | os.PathLike[str], draw: Callable[[], Figure]):
  """Draws in the common style and writes a PNG, always the same bytes.

  Args:
    path: PNG file; its folder is created if missing.
    draw: gives the figure.
  """
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context(_STYLE):
    draw().savefig(path, metadata={"Software": None})


#: Colours of the first, the middle and the last layer.
_DEPTHS = ("#0072B2", "#E69F00", "#000000")
_PANELS = 12


def draw_spectra(kinds: Mapping[str, Sequence[Row]], rank: int) -> Figure:
  """Draws singular values of three modules of every kind, a panel a kind.

  They are those of the first, the middle and the last layer.

  Args:
    kinds: from `by_kind`; beyond twelve, those with the most parameters.
    rank: the chosen one, marked.

  Returns:
    Figure, both axes logarithmic and shared; the noise floor of each module is
    dashed, or told in words where it lies far below.
  """
  names = _largest(kinds)
  columns = min(4, len(names))
  lines = math.ceil(len(names) / columns)
  figure = Figure(figsize=(1.6 + 2.7 * columns, 1.1 + 2.3 * lines))
  panels = figure.subplots(
    lines, columns, sharex=True, sharey=True, squeeze=False
  )
  flat = list(panels.flat)
  rows = [row for name in names for row in _three(kinds[name])]
  values = [row["singular_values"] for row in rows]
  bottom, high = _heights(rows)
  for axes, name in zip(flat, names, strict=False):
    _draw_panel(axes, name, _three(kinds[name]), rank, bottom)
    axes.set_ylim(bottom / 2, high * 2)
  for axes in flat[len(names) :]:
    axes.set_visible(False)
  for axes in flat[max(len(names) - columns, 0) : len(names)]:
    axes.tick_params(labelbottom=True)
  longest = max(map(len, values))
  ticks = [4**i for i in range(longest.bit_length()) if 4**i <= longest]
  flat[0].set_xticks(ticks, [str(tick) for tick in ticks])  # shared by all
  figure.supxlabel("index of the singular value", fontsize=9)
  figure.supylabel("singular value of the change, in units of the weight",
                   fontsize=9)  # fmt: skip
  left = len(kinds) - len(names)
  note = f"; {left} smaller kinds not shown" if left else ""
  figure.suptitle(
    f"Singular values of the change by kind of module. Dotted: chosen rank "
    f"{rank}; dashed: noise floor of the stored dtype{note}",
    x=0.01, ha="left", fontsize=10,
  )  # fmt: skip
  return figure


def draw_errors(
  kinds: Mapping[str, Sequence[Row]],
  rank: int,
  size_at: Callable[[int], int],
) -> Figure:
  """Draws relative error against rank, a line for each kind of module.

  Args:
    kinds: from `by_kind`.
    rank: the chosen one, marked.
    size_at: bytes of the adapter by rank, for the upper axis.

  Returns:
    Figure; the error of a kind is that of its deltas as one vector.
  """
  rows = [row for members in kinds.values() for row in members]
  top = max(len(row["singular_values"]) for row in rows)
  figure = Figure(figsize=(8.2, 4.8))
  axes = figure.add_subplot()
  ranks = sorted(
    {*np.unique(np.geomspace(1, top, 60).astype(int)), *_powers(top)}
  )
  errors = {
    name: [measure(members, int(k))["relative_error"] for k in ranks]
    for name, members in kinds.items()
  }
  # Sorts the legend by where the lines end.
  for i, name in enumerate(sorted(errors, key=lambda n: -errors[n][-1])):
    place = list(kinds).index(name)
    axes.plot(
      ranks, errors[name], color=_COLOURS[place % len(_COLOURS)], lw=1.3,
      marker=_MARKERS[place % len(_MARKERS)], ms=4.5, label=name,
      markevery=_at(ranks, _powers(top)), zorder=2 + 0.01 * i,
      ls="-" if place < len(_COLOURS) else "--",
    )  # fmt: skip
  whole = [measure(rows, int(k))["relative_error"] for k in ranks]
  if len(kinds) > 1:
    axes.plot(ranks, whole, color="black", lw=2.4, label="all modules")
  if 0 < whole[-1] < 0.005:
    axes.set_yscale("log")
  else:
    axes.set_ylim(0, 1.02)
  axes.set_ylabel("relative error of the change, |Δ − Δᵣ| / |Δ|")
  axes.set_title("Error of the weights against rank")
  _finish_ranks(axes, _powers(top), rank, size_at)
  axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
  return figure


def draw_divergences(
  kl: Mapping[str, Any],
  rank: int,
  size_at: Callable[[int], int],
) -> Figure:
  """Draws the KL from the finetune against rank, a line for each text.

  Args:
    kl: text -> {"ranks": rows with rank, kl, kl_error}, rank 0 is the base.
    rank: the chosen one, marked.
    size_at: bytes of the adapter by rank, for the upper axis.

  Returns:
    Figure, logarithmic; bars are one standard error, the base is dashed.
  """
  figure = Figure(figsize=(8.2, 4.6))
  axes = figure.add_subplot()
  shown: set[int] = set()
  for i, (name, found) in enumerate(kl.items()):
    colour = _COLOURS[i % len(_COLOURS)]
    rows = [row for row in found["ranks"] if row["rank"] > 0]
    shown |= {row["rank"] for row in rows}
    axes.errorbar(
      [row["rank"] for row in rows], [row["kl"] for row in rows],
      [row["kl_error"] for row in rows], color=colour, lw=1.5, capsize=3,
      marker=_MARKERS[i % len(_MARKERS)], ms=5, label=f"{name}: base + adapter",
    )  # fmt: skip
    for row in found["ranks"]:
      if row["rank"] == 0:
        axes.axhline(row["kl"], color=colour, ls="--", lw=1.2,
                     label=f"{name}: base alone, {row['kl']:.3g}")  # fmt: skip
  axes.set_yscale("log")
  axes.set_ylabel("KL(finetuned ‖ base + adapter), nats per token")
  axes.set_title("Distance of the predictions from the finetune against rank")
  _finish_ranks(axes, sorted(shown), rank, size_at)
  axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
  return figure


def draw_similarities(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
  """Draws TF-IDF cosines of pairs of models, with standard errors.

  Args:
    rows: `pair`, `cosine`, `cosine_error`, in the order of the report.
    title: what was generated.

  Returns:
    Figure; the axis begins at 0 and ends at 1, or where small cosines end.
  """
  figure = Figure(figsize=(7.4, 1.3 + 0.38 * len(rows)))
  axes = figure.add_subplot()
  places = list(range(len(rows)))[::-1]
  axes.errorbar(
    [row["cosine"] for row in rows], places,
    xerr=[row["cosine_error"] or 0.0 for row in rows],
    fmt="o", color=_COLOURS[0], capsize=4, ms=6,
  )  # fmt: skip
  axes.set_yticks(places, [row["pair"] for row in rows])
  axes.set_ylim(-0.6, len(rows) - 0.4)
  widest = max(row["cosine"] + (row["cosine_error"] or 0) for row in rows)
  axes.set_xlim(0, 1.02 if widest > 0.5 else 1.25 * max(widest, 0.01))
  axes.grid(axis="x", color="0.9")
  axes.set_xlabel(
    "cosine of TF-IDF vectors, mean over prompts ± standard error"
  )
  axes.set_title(title)
  return figure


# Colours and markers of the texts.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))
_TICKS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


def draw_ratios(
  rows: Sequence[Mapping[str, Any]], texts: Sequence[str], title: str
) -> Figure:
  """Draws the divergence of every variant over plain SVD's, a mark per text.

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


def _heights(rows: Sequence[Row]) -> tuple[float, float]:
  """Returns the range of the spectra and of the noise floors near it."""
  positive = [v for row in rows for v in row["singular_values"] if v > 0]
  low, high = min(positive, default=1e-3), max(positive, default=1.0)
  floors = [row["noise_floor"] for row in rows]
  return min([low, *(f for f in floors if f > low / 30)]), high


def _largest(kinds: Mapping[str, Sequence[Row]]) -> list[str]:
  """Returns the kinds with the most parameters, in their own order."""

  def size(name):
    """Counts the parameters of a kind."""
    return sum(math.prod(row["shape"]) for row in kinds[name])

  kept = set(sorted(kinds, key=size, reverse=True)[:_PANELS])
  return [name for name in kinds if name in kept]


def _three(rows: Sequence[Row]) -> list[Row]:
  """Returns the first, the middle and the last row."""
  return [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})]


def _draw_panel(axes: Axes, name, rows, rank: int, bottom: float) -> None:
  """Draws spectra of modules of one kind, and where noise begins."""
  below = []
  for row, colour in zip(rows, _DEPTHS, strict=False):
    sigma = row["singular_values"]
    index = np.arange(1, len(sigma) + 1)
    axes.plot(index, sigma, color=colour, lw=1.4, label=_short(row))
    if row["noise_floor"] >= bottom:
      axes.axhline(row["noise_floor"], color=colour, lw=0.9, ls="--")
    else:
      below.append(row["noise_floor"])
  axes.axvline(rank, color="0.4", lw=1.2, ls=":")
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.grid(color="0.92", lw=0.6)
  axes.set_title(name)
  floor = f"noise floor {max(below):.0e}, below ↓" if below else None
  axes.legend(
    loc="lower left", fontsize=7, title=floor, title_fontsize=7,
    alignment="left",
    handlelength=1.2, borderaxespad=0.2, labelspacing=0.2,
  )  # fmt: skip


def _short(row: Row) -> str:
  """Returns a short name for a module, its layer or shape."""
  numbers = [part for part in row["path"].replace("/", ".").split(".")
             if part.isdigit()]  # fmt: skip
  shape = " x ".join(map(str, row["shape"]))
  return f"layer {'.'.join(numbers)}" if numbers else shape


def _powers(top: int) -> list[int]:
  """Lists the powers of two up to the largest rank, and that rank."""
  return sorted({*(2**i for i in range(top.bit_length())), top})


def _at(ranks: Sequence[int], marked: Sequence[int]) -> list[int]:
  """Returns the positions of the marked ranks."""
  return [i for i, rank in enumerate(ranks) if rank in marked]


def _finish_ranks(axes: Axes, ticks: Sequence[int], rank: int, size_at):
  """Draws axes of ranks (below) and bytes (above); marks the chosen rank."""
  axes.set_xscale("log", base=2)
  axes.set_xticks(ticks, [str(tick) for tick in ticks])
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel("rank")
  axes.grid(color="0.92", lw=0.6)
  axes.axvline(rank, color="0.35", lw=1.2, ls=":", label=f"chosen rank {rank}")
  above = axes.secondary_xaxis("top")
  above.set_xticks(ticks, [_mebibytes(size_at(tick)) for tick in ticks])
  above.xaxis.set_minor_locator(ticker.NullLocator())
  above.set_xlabel("size of the adapter, MiB")


def _mebibytes(size: int) -> str:
  """Formats a size in MiB with two or three figures."""
  mib = size / _MIB
  return f"{mib:.0f}" if mib >= 100 else f"{mib:.2g}"


def _name(row: Mapping[str, Any]) -> str:
  """Returns a variant's name, with its number of seeds if there are several."""
  seeds = row["seeds"]
  return row["variant"] + (f" ({seeds} seeds)" if seeds > 1 else "")
