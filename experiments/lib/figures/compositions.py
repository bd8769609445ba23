# SPDX-License-Identifier: Apache-2.0
"""Tables and draws compositions of two skills, means over seeds."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

#: work, seed, kind, method, figures, seconds, trained.
Row = Mapping[str, Any]

_LOOKS = {
  "beside": ("#000000", "*"),
  "sum": ("#0072B2", "o"),
  "rank r": ("#E69F00", "s"),
  "units": ("#F0E442", "h"),
  "columns": ("#009E73", "D"),
  "weights": ("#D55E00", "^"),
  "pool": ("#CC79A7", "v"),
  "control": ("#7F7F7F", "P"),
}


def group(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
  """Groups rows by method: kinds in their order, then as they first occur.

  Args:
    rows: of one work or several.

  Returns:
    (kind, method) -> rows, one a seed.

  Example:
    >>> list(group([{"kind": "sum", "method": "1 and 1"}]))
    [('sum', '1 and 1')]
  """
  found: dict[tuple[str, str], list[Row]] = {}
  place = {kind: i for i, kind in enumerate(_LOOKS)}
  for row in sorted(rows, key=lambda row: place[row["kind"]]):
    found.setdefault((row["kind"], row["method"]), []).append(row)
  return found


def as_table(
  rows: Sequence[Row], measures: Mapping[str, str], plain: tuple[str, str]
) -> str:
  """Formats the rows of a work, or of like works, as a Markdown table.

  ± is the standard error of the mean over works and seeds. The second column
  of figures is the difference of the first to a plain sum of the same adapters.

  Args:
    rows: of one work, all seeds, or of works with the same measures.
    measures: name of a figure -> title.
    plain: kind and method of the plain sum.

  Returns:
    Lines.
  """
  first, *others = measures
  heads = [measures[first], "more than plain", *(measures[x] for x in others)]
  lines = [
    f"| of | method | {' | '.join(heads)} | trained | s |",
    "|" + "---|" * (len(heads) + 4),
  ]
  groups = group(rows)
  base = _by_pair(groups.get(plain, []), first)
  for (kind, method), own in groups.items():
    values = _by_pair(own, first)
    pairs = [values[pair] - base[pair] for pair in values if pair in base]
    cells = [with_error(list(values.values()))]
    cells.append(with_error(pairs, sign=True) if pairs else "")
    cells += [with_error(list(_by_pair(own, x).values())) for x in others]
    trained = f"{own[0]['trained']:,}"
    seconds = f"{np.median([row['seconds'] for row in own]):.1f}"
    lines.append(
      f"| {kind} | {method} | {' | '.join(cells)} | {trained} | {seconds} |"
    )
  return "\n".join(lines)


def as_differences(
  rows: Sequence[Row],
  measures: Mapping[str, str],
  compared: Sequence[tuple[str, str]],
) -> str:
  """Formats differences of methods to others as a Markdown table.

  Args:
    rows: of works with the same measures.
    measures: name of a figure -> title.
    compared: methods, each with the one that is taken off.

  Returns:
    Lines, for what was measured of both: means over the same adapters, with
    standard errors.
  """
  heads = " | ".join(measures.values())
  lines = [f"| method | less | {heads} |", "|" + "---|" * (len(measures) + 2)]
  for names in compared:
    found = []
    for measure in measures:
      one, other = (
        _by_pair([row for row in rows if row["method"] == name], measure)
        for name in names
      )
      both = one.keys() & other.keys()
      found.append([one[pair] - other[pair] for pair in sorted(both)])
    if found[0]:
      cells = " | ".join(with_error(each, sign=True) for each in found)
      lines.append(f"| {' | '.join(names)} | {cells} |")
  return "\n".join(lines)


def as_overview(
  rows: Sequence[Row], titles: Mapping[str, str], named: Sequence[str]
) -> str:
  """Formats rows of all works as one Markdown table.

  Args:
    rows: of all works and seeds.
    titles: work -> title.
    named: methods that have a row.

  Returns:
    Lines: for each work what asks for both, with the standard error over seeds,
    and what is kept of the first and of the second skill.
  """
  works = [name for name in titles if any(r["work"] == name for r in rows)]
  heads = [f"{titles[name]}: both | kept" for name in works]
  lines = [
    f"| of | method | {' | '.join(heads)} |",
    "|" + "---|" * (2 + 2 * len(works)),
  ]
  for (kind, method), own in group(rows).items():
    if method not in named:
      continue
    cells = []
    for name in works:
      there = [row for row in own if row["work"] == name]
      cells += _overview_cells(there) if there else ["", ""]
    lines.append(f"| {kind} | {method} | {' | '.join(cells)} |")
  return "\n".join(lines)


def as_units(rows: Sequence[Row], titles: Mapping[str, str], best: str) -> str:
  """Formats merges at several ranks: how far from the sum, what they compose.

  Args:
    rows: of all works and seeds; those of kind "units" are used, whose methods
      are "rank, name" and whose figures are medians over starts.
    titles: work -> title.
    best: the name whose errors others are divided by.

  Returns:
    Lines: for each work the relative distance to the plain sum with the best
    number before the merge, how often that of `best` at the same rank it is,
    and what asks for both; means over seeds.
  """
  own = [row for row in rows if row["kind"] == "units"]
  works = [name for name in titles if any(r["work"] == name for r in own)]
  heads = " | ".join(f"{titles[name]}: error | x | both" for name in works)
  lines = [f"| method | {heads} |", "|" + "---|" * (1 + 3 * len(works))]
  errors = {
    (row["method"], row["work"], row["seed"]): row["notes"]["error, best scale"]
    for row in own
  }
  for (_, method), found in group(own).items():
    least, cells = f"{method.split(', ')[0]}, {best}", []
    for name in works:
      there = [row for row in found if row["work"] == name]
      pairs = [
        (errors[method, name, seed], errors.get((least, name, seed)))
        for seed in (row["seed"] for row in there)
      ]
      ratios = [one / other for one, other in pairs if other]
      cells.append(with_error([one for one, _ in pairs]))
      cells.append(f"{np.mean(ratios):.2f}" if ratios else "")
      cells.append(_overview_cells(there)[0] if there else "")
    lines.append(f"| {method} | {' | '.join(cells)} |")
  return "\n".join(lines)


def as_gaps(
  rows: Sequence[Row],
  titles: Mapping[str, str],
  figures: Mapping[str, str],
  ends: tuple[str, str],
) -> str:
  """Formats which share of the way from one method to another pools go.

      (pool - base) / (own - base), a figure of each

  Args:
    rows: of all works and seeds; those of kind "pool" are used.
    titles: work -> title.
    figures: work -> its figure.
    ends: methods at whose figures the way begins and ends.

  Returns:
    Lines: the figure and the share, means over seeds.
  """
  works = [
    name for name in titles
    if any(r["work"] == name and r["kind"] == "pool" for r in rows)
  ]  # fmt: skip
  heads = " | ".join(f"{titles[x]}: {figures[x]} | share" for x in works)
  lines = [f"| pool | {heads} |", "|" + "---|" * (1 + 2 * len(works))]
  methods = dict.fromkeys(
    [*ends, *(row["method"] for row in rows if row["kind"] == "pool")]
  )
  for method in methods:
    cells = []
    for name in works:
      there = [row for row in rows if row["work"] == name]
      first, last, values = (
        _by_pair([row for row in there if row["method"] == x], figures[name])
        for x in (*ends, method)
      )
      shares = [
        (value - first[pair]) / (last[pair] - first[pair])
        for pair, value in values.items()
        if pair in first.keys() & last.keys() and first[pair] != last[pair]
      ]
      cells += [with_error(list(values.values())), with_error(shares)]
    lines.append(f"| {method} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _overview_cells(rows: Sequence[Row]) -> list[str]:
  """Formats what asks for both, and what is kept of each."""
  kept = [
    f"{np.mean(list(_by_pair(rows, name).values())):.3f}"
    for name in ("first", "second")
  ]
  both = with_error(list(_by_pair(rows, "both").values()))
  return [both, ", ".join(kept)]


def with_error(values: Sequence[float], *, sign: bool = False) -> str:
  """Formats a mean with its standard error.

  Args:
    values: over seeds.
    sign: whether a plus is written.

  Returns:
    A table's cell; of one value, no error.

  Example:
    >>> with_error([1.0, 2.0, 3.0]), with_error([0.5], sign=True)
    ('2.000 ± 0.577', '+0.500')
  """
  if not values:
    return ""
  mean = f"{np.mean(values):{'+' if sign else ''}.3f}"
  if len(values) < 2:
    return mean
  return f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def _by_pair(rows: Sequence[Row], name: str) -> dict[tuple[str, int], float]:
  """Returns a figure of each work and seed, which has its own two adapters."""
  return {(row["work"], row["seed"]): row["figures"][name] for row in rows}


def draw(
  rows: Sequence[Row],
  titles: Mapping[str, str],
  named: Sequence[str],
  losses: Collection[str] = (),
) -> Figure:
  """Draws what is composed against what is kept, a panel a work.

  Args:
    rows: of all works, which need "both", "first" and "second"; those of kinds
      "units" and "pool" are left out.
    titles: work -> title.
    named: methods that are numbered, and named beside the panels.
    losses: works whose figures are better if they are smaller.

  Returns:
    Figure: a point a method, means over seeds, bars of one standard error;
    better is right and up.
  """
  rows = [row for row in rows if row["kind"] not in ("units", "pool")]
  works = [name for name in titles if any(r["work"] == name for r in rows)]
  figure = Figure(figsize=(3.4 * len(works) + 2.9, 4.4), layout="constrained")
  panels = figure.subplots(1, len(works), squeeze=False)[0]
  for axes, name in zip(panels, works, strict=True):
    own = [row for row in rows if row["work"] == name]
    for (kind, method), group_rows in group(own).items():
      number = named.index(method) + 1 if method in named else None
      _draw_point(axes, kind, number, group_rows)
    axes.set_title(titles[name], fontsize=9)
    axes.set_xlabel("kept: the mean of both skills alone")
    axes.grid(color="0.92", lw=0.6)
    axes.margins(0.06)
    if name in losses:
      axes.invert_xaxis()
      axes.invert_yaxis()
    else:
      axes.set_ylim(-0.04, 1.04)
  panels[0].set_ylabel("composed: both skills asked for at once")
  known = {}  # a work may lack a kind
  for axes in panels:
    handles, labels = axes.get_legend_handles_labels()
    known.update(zip(labels, handles, strict=True))
  panels[-1].legend(
    known.values(), known.keys(), loc="upper left", bbox_to_anchor=(1.01, 1.0),
    fontsize=8,
  )  # fmt: skip
  names = "\n".join(f"{i}  {name}" for i, name in enumerate(named, 1))
  panels[-1].text(
    1.04, 0.0, names, transform=panels[-1].transAxes, va="bottom", fontsize=7,
    color="0.25",
  )  # fmt: skip
  return figure


def _draw_point(axes: Any, kind: str, number: int | None, rows) -> None:
  """Draws one method's mean and standard errors."""
  points = np.array(
    [
      ((own["first"] + own["second"]) / 2, own["both"])
      for own in (row["figures"] for row in rows)
    ]
  )
  x, y = points.mean(axis=0)
  count = len(points)
  errors = points.std(axis=0, ddof=1) / count**0.5 if count > 1 else (0.0, 0.0)
  colour, marker = _LOOKS[kind]
  known = axes.get_legend_handles_labels()[1]
  axes.errorbar(
    x, y, xerr=errors[0], yerr=errors[1], marker=marker, color=colour, ls="",
    ms=6, mec="white", mew=0.4, elinewidth=0.6,
    label=None if kind in known else kind,
  )  # fmt: skip
  if number:
    is_odd = number % 2  # numbers of close neighbours must not overlap
    axes.annotate(
      f"{number}", (x, y), xytext=(5, 3) if is_odd else (-5, -3),
      textcoords="offset points", fontsize=7.5, color="0.25",
      ha="left" if is_odd else "right", va="bottom" if is_odd else "top",
    )  # fmt: skip
