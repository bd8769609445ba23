# SPDX-License-Identifier: Apache-2.0
"""A report as people read it: tables of text, and the adapter's card."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jlora.reporting import (
  REPORT,
  Report,
  change_of_weights,
  module_type,
  replace_text,
  total_up,
)

CARD = "README.md"
_MIB = 2**20


def type_table(report: Report) -> str:
  """The figures by module type, as a table of text.

  Args:
    report: the report.

  Returns:
    Lines: type, modules, shape of the first, rank, relative error (of all
    deltas of the type as one vector, and of the worst module), energy kept,
    relative change of the weights (all of the type as one vector as well),
    noise floor rank, MiB.

  Example:
    >>> type_table(Report({}, [], total_up([], []), [])).splitlines()[0][:4]
    'type'
  """
  groups: dict[str, list[dict[str, Any]]] = {}
  for row in report.modules:
    groups.setdefault(module_type(row["path"]), []).append(row)
  header = (
    "type", "modules", "shape", "rank", "rel. error", "worst", "energy",
    "|dW|/|W|", "above noise", "MiB",
  )  # fmt: skip
  rows: list[Sequence[str]] = [header]
  for name, members in groups.items():
    both = total_up(members, [])
    change = change_of_weights(members)
    rows.append(
      (
        name,
        str(len(members)),
        "x".join(map(str, members[0]["shape"])),
        _span(m["rank"] for m in members),
        f"{both['relative_error']:.4f}",
        f"{max(m['relative_error'] for m in members):.4f}",
        f"{both['energy']:.1%}",
        f"{change:.1e}" if change else "-",
        _span(m["noise_floor_rank"] for m in members),
        f"{both['adapter_bytes'] / _MIB:.2f}",
      )
    )
  totals = report.totals
  rows.append(
    (
      "all",
      str(totals["modules"]),
      "",
      "",
      f"{totals['relative_error']:.4f}",
      "",
      f"{totals['energy']:.1%}",
      "",
      "",
      f"{totals['adapter_bytes'] / _MIB:.2f}",
    )
  )
  return _align(rows)


def worst_table(report: Report, count: int = 5) -> str:
  """The modules with the largest relative error, as a table of text.

  Args:
    report: the report.
    count: how many.

  Returns:
    Lines: path, shape, rank, relative error, energy, stable rank and an upper
    bound on error / best error at that rank.

  Example:
    >>> worst_table(Report({}, [], {}, [])).split()[:2]
    ['worst', 'modules']
  """
  header = (
    "worst modules", "shape", "rank", "rel. error", "energy", "stable rank",
    "error/best at most",
  )  # fmt: skip
  worst = sorted(report.modules, key=lambda row: -row["relative_error"])[:count]
  return _align(
    [
      header,
      *(
        (
          row["path"],
          "x".join(map(str, row["shape"])),
          str(row["rank"]),
          f"{row['relative_error']:.4f}",
          f"{row['energy']:.1%}",
          f"{row['stable_rank']:.1f}",
          f"{row['optimality']:.3f}" if row["optimality"] else "-",
        )
        for row in worst
      ),
    ]
  )


def ledger_lines(report: Report, count: int = 8) -> str:
  """What became of every tensor: counts, and what needs a reader's eye.

  Args:
    report: the report.
    count: how many rows are listed; the rest is counted.

  Returns:
    Lines: the number of rows by status, then rows kept whole, not
    representable or matched otherwise than by name.

  Example:
    >>> ledger_lines(Report({}, [], total_up([], []), []))
    'ledger: 0 extracted, 0 unchanged, 0 kept whole, 0 not representable'
  """
  counts = report.totals["ledger"]
  lines = [
    "ledger: " + ", ".join(f"{n} {status}" for status, n in counts.items())
  ]
  noted = [
    row for row in report.ledger if row["why"] and row["status"] != "unchanged"
  ]
  # What is lost comes first.
  noted.sort(key=lambda row: row["status"] != "not representable")
  for row in noted[:count]:
    name = (row["base"] or row["finetuned"])[0]
    lines.append(f"  {row['status']}: {name} ({row['why']})")
  if len(noted) > count:
    lines.append(f"  and {len(noted) - count} more in {REPORT}")
  return "\n".join(lines)


def rounding_line(report: Report) -> str:
  """What was learnt and what rounding did to it, as a line of text.

  Args:
    report: the report.

  Returns:
    The norm of the change before it was rounded, beside that of the same
    modules as stored; those that cannot tell are counted as not identifiable.

  Example:
    >>> rounding_line(Report({}, [], total_up([], []), []))
    'rounding: what was learnt is not identifiable in 0 of 0 modules'
  """
  totals = report.totals
  learnt, parts = totals.get("learnt_norm"), []
  if learnt is not None:
    told = [r for r in report.modules if r["learnt_norm"] is not None]
    stored = sum(row["norm"] ** 2 for row in told) ** 0.5
    parts.append(
      f"learnt {learnt:.4g} (norm, estimated), stored {stored:.4g}; "
      f"{totals['rounding_share']:.1%} of its energy lost or covered"
    )
  if (missing := totals.get("not_identifiable", 0)) or not parts:
    parts.append(
      f"what was learnt is not identifiable in {missing} of "
      f"{totals['modules']} modules"
    )
  if totals.get("unchanged") is not None:
    parts.append(f"{totals['unchanged']:.1%} of all entries did not change")
  return "rounding: " + "; ".join(parts)


def write_card(folder: str | os.PathLike, report: Report, command: str) -> None:
  """Writes the adapter's model card, `README.md`.

  Args:
    folder: an existing folder.
    report: the report.
    command: what made the adapter, to be repeated.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_card(folder, Report({"base": "b", "finetuned": "f"}, [],
    ...                             total_up([], []), []), "jlora ...")
    ...   (Path(folder) / CARD).read_text().splitlines()[0]
    '---'
  """
  settings = report.settings
  text = f"""---
library_name: peft
base_model: {json.dumps(str(settings["base"]))}
tags: [lora, jlora]
---

# LoRA extracted from `{settings["finetuned"]}`

The low-rank part of what a finetune changed in `{settings["base"]}`. All deltas
together, it misses {report.totals["relative_error"]:.2%} of their norm
({report.totals["energy"]:.2%} of the energy is kept).

```
{command}
```

```
{type_table(report)}

{worst_table(report)}

{rounding_line(report)}
{ledger_lines(report)}
```

`{REPORT}` has every module and every tensor. Load with
`peft.PeftModel.from_pretrained(base_model, folder)`.
"""
  replace_text(Path(folder) / CARD, text)


def _span(values: Iterable[int]) -> str:
  values = sorted(values)
  low, high = values[0], values[-1]
  return str(low) if low == high else f"{low}-{high}"


def _align(rows: Sequence[Sequence[str]]) -> str:
  """Columns of text: the first to the left, figures to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if place == 0 else cell.rjust(width)
      for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  )
