# SPDX-License-Identifier: Apache-2.0
"""Summarises a comparison in sentences and in rows of cells."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.lib.figures.tables import Row, by_kind, measure
from jlora.extraction import (
  Report,
  change_of_weights,
  noise_rank,
  total_up,
)

Table = tuple[Sequence[str], list[Sequence[str]]]
_MIB = 2**20


def headline(report: Report, results: Mapping[str, Any]) -> list[str]:
  """Summarises the comparison in a few sentences.

  Args:
    report: cut to the chosen rank.
    results: of results.json; `kl` and `generation` may be missing.

  Returns:
    Sentences of plain text.
  """
  totals, rank = report.totals, report.settings["rank"]
  size, whole = totals["adapter_bytes"], totals["parameter_bytes"]
  said = [
    f"At rank {rank} the adapter takes {size / _MIB:.1f} MiB, "
    f"{size / whole:.1%} of the {whole / _MIB:.1f} MiB of the matrices that "
    f"changed. It misses {_share(totals['relative_error'])} of the norm of "
    f"their change and keeps {totals['energy']:.2%} of its energy."
  ]
  for name, found in results.get("kl", {}).items():
    rows = {row["rank"]: row for row in found["ranks"]}
    row, base = rows.get(rank), rows.get(0)
    if row and base:
      said.append(
        f"On {name} it leaves KL(finetuned ‖ base + adapter) = "
        f"{write_with_error(row['kl'], row['kl_error'])} of "
        f"{write_with_error(base['kl'], base['kl_error'])} nats per token"
        + (
          f": {row['recovered']:.1%} recovered."
          if row["recovered"] is not None
          else "."
        )
      )
  return said


def type_rows(report: Report) -> Table:
  """Tabulates the figures by kind of module, all of a kind as one vector.

  Args:
    report: cut to the chosen rank.

  Returns:
    Header and rows of text; all modules together come last.
  """
  header = (
    "kind", "modules", "shape", "relative error", "worst",
    "cosine distance", "energy kept", "|Δ|/|W|", "MiB",
  )  # fmt: skip
  kinds: dict[str, Sequence[Row]] = {**by_kind(report.modules)}
  if len(kinds) > 1:
    kinds["all"] = report.modules
  return header, [_type_row(kind, members) for kind, members in kinds.items()]


def module_rows(report: Report, count: int | None = None) -> Table:
  """Tabulates the modules, largest relative error first.

  Args:
    report: cut to the chosen rank.
    count: how many; None for all.

  Returns:
    Header and rows of text.
  """
  header = (
    "module", "shape", "rank", "relative error", "cosine distance", "mse",
    "mean |Δ|", "stable rank", "effective rank", "noise floor",
    "ranks above it",
  )  # fmt: skip
  worst = sorted(report.modules, key=lambda row: -row["relative_error"])
  return header, [
    (
      row["path"],
      " x ".join(map(str, row["shape"])),
      str(row["rank"]),
      _figure(row["relative_error"]),
      _figure(row["cosine_distance"]),
      f"{row['mse']:.2e}",
      f"{row['mean_abs_delta']:.2e}",
      f"{row['stable_rank']:.1f}",
      f"{row['effective_rank']:.1f}",
      f"{row['noise_floor']:.1e}",
      noise_rank(row),
    )
    for row in worst[:count]
  ]


def kl_rows(found: Mapping[str, Any], sizes: Mapping[int, int]) -> Table:
  """Tabulates the divergence and loss by rank, on one text.

  Args:
    found: of one text, from results.json.
    sizes: bytes of the adapter by rank.

  Returns:
    Header and rows of text; the base first, the finetune last.
  """
  header = (
    "rank", "MiB", "KL(ft ‖ base + adapter)", "KL the other way",
    "recovered", "same top token", "loss", "± over texts", "perplexity",
  )  # fmt: skip
  rows = [
    (
      str(row["rank"]) if row["rank"] else "0 (base)",
      f"{sizes.get(row['rank'], 0) / _MIB:.1f}",
      write_with_error(row["kl"], row["kl_error"]),
      write_with_error(row["reverse_kl"], row["reverse_kl_error"]),
      "–" if row["recovered"] is None else f"{row['recovered']:.2%}",
      f"{row['agreement']:.2%}",
      *_loss(row),
    )
    for row in found["ranks"]
  ]
  tuned = found["finetuned"]
  last = ("finetuned", "–", "0", "0", "100%", "100%")
  return header, [*rows, (*last, *_loss(tuned))]


def similarity_rows(rows: Sequence[Mapping[str, Any]]) -> Table:
  """Tabulates the TF-IDF cosines of pairs of models.

  Args:
    rows: of results.json.

  Returns:
    Header and rows of text.
  """
  header = ("texts of", "cosine", "below the ceiling", "what it tells")
  return header, [
    (
      row["pair"],
      write_with_error(row["cosine"], row["cosine_error"]),
      write_with_error(row["below_ceiling"], row["below_ceiling_error"]),
      row["what"],
    )
    for row in rows
  ]


def ledger_rows(report: Report, count: int = 200) -> Table:
  """Tabulates tensors that changed but are not in the adapter as a LoRA.

  Args:
    report: any.
    count: how many are listed; the rest is counted in a last row.

  Returns:
    Header and rows of text; what is lost comes first.
  """
  header = ("tensor", "what became of it", "why")
  noted = [
    row
    for status in ("not representable", "kept whole")
    for row in report.ledger
    if row["status"] == status
  ]
  rows: list[Sequence[str]] = [
    ((row["base"] or row["finetuned"])[0], row["status"], row["why"])
    for row in noted[:count]
  ]
  if len(noted) > count:
    rows.append((f"and {len(noted) - count} more in report.json", "", ""))
  return header, rows


def align_table(table: Table) -> str:
  """Formats a table for the terminal.

  Args:
    table: header and rows.

  Returns:
    Lines; the first column to the left, the others to the right.

  Example:
    >>> print(align_table((("a", "b"), [("xyz", "1")])))
    a    b
    xyz  1
  """
  lines = [table[0], *table[1]]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if place else cell.ljust(width)
      for place, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def write_with_error(value: float, error: float | None) -> str:
  """Formats a value with its standard error, to two figures of the error.

  Args:
    value: any.
    error: its standard error; None or 0 where there is none.

  Returns:
    Text.

  Example:
    >>> write_with_error(0.25, 0.03125)
    '0.250 ± 0.031'
  """
  if not error:
    return f"{value:.4g}"
  places = max(0, 1 - _exponent(error))
  if places <= 6:
    return f"{value:.{places}f} ± {error:.{places}f}"
  power = _exponent(max(abs(value), error))
  places = max(0, places + power)
  value, error = value / 10.0**power, error / 10.0**power
  return f"({value:.{places}f} ± {error:.{places}f})e{power}"


def _type_row(kind: str, members: Sequence[Mapping[str, Any]]) -> Sequence[str]:
  """Makes the row of one kind."""
  both = total_up(members, [])
  change = change_of_weights(members)
  distance = measure(members, max(m["rank"] for m in members))
  shapes = {" x ".join(map(str, m["shape"])) for m in members}
  return (
    kind,
    str(len(members)),
    shapes.pop() if len(shapes) == 1 else "several",
    _figure(both["relative_error"]),
    _figure(max(m["relative_error"] for m in members)),
    _figure(distance["cosine_distance"]),
    f"{both['energy']:.2%}",
    f"{change:.1e}" if change else "–",
    f"{both['adapter_bytes'] / _MIB:.2f}",
  )


def _loss(row: Mapping[str, Any]) -> tuple[str, str, str]:
  """Formats loss, its error and perplexity.

  Rows are of the same texts, so differences between them are smaller than the
  errors suggest.
  """
  return (
    f"{row['loss']:.4f}",
    f"{row['loss_error']:.2g}",
    f"{row['perplexity']:.3f}",
  )


def _share(value: float) -> str:
  """Formats a share in per cent, with an exponent if it is tiny."""
  small = 0 < value < 5e-4
  return f"{100 * value:.1e}%" if small else f"{value:.2%}"


def _figure(value: float) -> str:
  """Formats a number with four decimals, with an exponent if it is tiny."""
  return f"{value:.4f}" if value >= 0.005 or value == 0 else f"{value:.1e}"


def _exponent(value: float) -> int:
  """Returns a number's decimal exponent."""
  return int(f"{value:e}".partition("e")[2])
