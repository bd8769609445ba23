# SPDX-License-Identifier: Apache-2.0
"""The report of an extraction: its file, totals and tables.

modules, ledger ─► total_up ─► Report ─► report.json, tables
"""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from jlora.checkpoints.documents import read_json
from jlora.checkpoints.new_files import replace_text
from jlora.extraction.report_fields import check_report
from jlora.formats.peft.layouts import REPLACES
from jlora.messages import name_some

SCHEMA_VERSION = 1
REPORT = "report.json"
_LARGEST = 2**30  # bytes: curves by rank of every module of the largest models


class Report(NamedTuple):
  """What a run found, module by module and in total; stored as `report.json`.

  Attributes:
    settings: inputs and options.
    modules: one dict per extracted module: path, shape, rank, relative_error,
      energy, mse, cosine_distance, mean_abs_delta, relative_change,
      stable_rank, effective_rank, rank_90, rank_95, rank_99, noise_floor,
      noise_floor_rank, learnt_norm, rounding_share, unchanged, spectral_bound,
      optimality, bytes, singular_values, relative_errors (by rank, 0..).
    totals: sums over the model; of a run from disk also `floating_bytes` and
      `unmatched_bytes` of both checkpoints, those that have no partner.
    ledger: rows {base, finetuned, status, why}; every tensor of both
      checkpoints is in exactly one row.
    verified: {by, version, modules, worst_difference} of a check in the
      consumer itself that found nothing wrong; else None.
    run: what made it, as hashes, checksums of the files beside it, and figures
      of modules that are in no row: by these a resumed run knows it again.

  Example:
    >>> Report({}, [], {"modules": 0}, []).totals["modules"]
    0
  """

  settings: dict[str, Any]
  modules: list[dict[str, Any]]
  totals: dict[str, Any]
  ledger: list[dict[str, Any]]
  verified: dict[str, Any] | None = None
  run: dict[str, Any] | None = None


def write_report(folder: str | os.PathLike, report: Report) -> None:
  """Writes `report.json` into a folder, atomically.

  Args:
    folder: an existing folder.
    report: the report. The same report gives the same bytes.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_report(folder, Report({"rank": 1}, [], total_up([], []), []))
    ...   read_report(folder).settings
    {'rank': 1}
  """
  text = json.dumps({"schema_version": SCHEMA_VERSION} | report._asdict())
  replace_text(Path(folder) / REPORT, text + "\n")


def read_report(folder: str | os.PathLike) -> Report:
  """Reads the report of a finished run.

  Args:
    folder: the run's output folder.

  Returns:
    Report.

  Raises:
    ValueError: there is no report, or it is damaged or of another schema
      version.

  Example:
    >>> read_report("/nowhere")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere holds no report.json; the run did not finish.
  """
  path = Path(folder) / REPORT
  if not path.exists():
    raise ValueError(f"{folder} holds no {REPORT}; the run did not finish.")
  found = read_json(path, largest=_LARGEST)
  return Report(**check_report(found, str(path), SCHEMA_VERSION))


_STATUSES = ("extracted", "unchanged", "kept whole", "not representable")
NO_PARAMETER = "no parameter"  # counted only where there is one


def total_up(
  modules: Iterable[Mapping[str, Any]], ledger: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
  """Computes a report's totals from its rows.

      relative error = √(Σ ‖error‖² / Σ ‖delta‖²),   energy = 1 - its square

  Args:
    modules: rows with `norm`, `error`, `bytes` and `parameter_bytes`, and
      optionally `shape`, `learnt_norm`, `rounding_share` and `unchanged`.
    ledger: rows with `status`.

  Returns:
    `modules` (their number), `relative_error` and `energy` (of all deltas as
    one vector), `learnt_norm` and `rounding_share` (of all modules whose learnt
    change is known, as one vector; None if there are none), `not_identifiable`
    (the number of the others), `unchanged` (share of all entries, None where
    rows lack it), `adapter_bytes`, `parameter_bytes` (of these matrices in the
    base) and `ledger` (the number of rows by status).

  Example:
    >>> row = {"norm": 5.0, "error": 3.0, "bytes": 8, "parameter_bytes": 16}
    >>> total_up([row], [])["relative_error"]
    0.6
  """
  modules, ledger = list(modules), list(ledger)
  statuses = [row["status"] for row in ledger]
  told = [*_STATUSES, *([NO_PARAMETER] if NO_PARAMETER in statuses else [])]
  norm2 = sum(row["norm"] ** 2 for row in modules)
  error2 = sum(row["error"] ** 2 for row in modules)
  share = error2 / norm2 if norm2 else 0.0
  return {
    "modules": len(modules),
    "relative_error": math.sqrt(share),
    "energy": 1 - share,
    **_total_rounding(modules),
    "adapter_bytes": sum(row["bytes"] for row in modules),
    "parameter_bytes": sum(row["parameter_bytes"] for row in modules),
    "ledger": {status: statuses.count(status) for status in told},
  }


def change_of_weights(modules: Iterable[Mapping[str, Any]]) -> float | None:
  """Computes how large the changes of some modules are beside their weights.

      √(Σ ‖delta‖² / Σ ‖base‖²),   ‖base‖ = ‖delta‖ / relative change

  Args:
    modules: rows with `norm` and `relative_change`, None where a base is zero.

  Returns:
    The ratio for all modules as one vector; None where all bases are zero.

  Example:
    >>> rows = [{"norm": 3.0, "relative_change": 0.3},
    ...         {"norm": 4.0, "relative_change": None}]
    >>> change_of_weights(rows)
    0.5
  """
  rows = list(modules)
  bases = [
    row["norm"] / row["relative_change"]
    for row in rows
    if row["relative_change"]
  ]
  norm = math.hypot(*(row["norm"] for row in rows))
  return norm / math.hypot(*bases) if bases else None


def module_type(path: str) -> str:
  """Returns the kind of module a path names: `q_proj`, `down_proj`, ...

  Args:
    path: a parameter's name.

  Returns:
    The last part of the path that is no number, without a final `weight`,
    `kernel`, `embedding` or `w`.

  Example:
    >>> module_type("model.layers.3.mlp.down_proj.weight")
    'down_proj'
    >>> module_type("layers/0/attn/q/kernel")
    'q'
  """
  parts = [part for part in re.split(r"[./]", path) if not part.isdigit()]
  if len(parts) > 1 and parts[-1] in ("weight", "kernel", "embedding", "w"):
    parts.pop()
  return parts[-1] if parts else path


def noise_rank(row: Mapping[str, Any]) -> str:
  """Counts the singular values found that exceed rounding noise.

  Args:
    row: a module's row of a report.

  Returns:
    The count; `≥ count` if all values found exceed it, as the next may too.

  Example:
    >>> noise_rank({"noise_floor_rank": 2, "singular_values": [3.0, 2.0],
    ...             "shape": [4, 6]})
    '≥ 2'
  """
  count, found = row["noise_floor_rank"], len(row["singular_values"])
  is_clipped = count == found < min(row["shape"][-2:])
  return f"≥ {count}" if is_clipped else str(count)


_MIB = 2**20


def type_table(report: Report) -> str:
  """Formats the figures by module type as a table of text.

  Args:
    report: the report.

  Returns:
    Lines: type, modules, shape of the first, rank, relative error (of all
    deltas of the type as one vector, and of the worst module), energy kept,
    relative change of the weights (all of the type as one vector as well),
    singular values above rounding noise, MiB.

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
        _above_noise(members),
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
  """Formats the modules of largest relative error as a table of text.

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
  """Lists how many tensors had each status, and those that need a look.

  Args:
    report: the report.
    count: the most rows to list; the others are only counted.

  Returns:
    Lines: the number of rows by status, then the rows that were kept whole, are
    not representable, or were matched by something else than their name.

  Example:
    >>> ledger_lines(Report({}, [], total_up([], []), []))
    'ledger: 0 extracted, 0 unchanged, 0 kept whole, 0 not representable'
  """
  counts = report.totals["ledger"]
  lines = [
    "ledger: " + ", ".join(f"{n} {status}" for status, n in counts.items())
  ]
  noted = [
    row
    for row in report.ledger
    if row["why"] and row["status"] not in ("unchanged", NO_PARAMETER)
  ]
  # Lost tensors come first.
  noted.sort(key=lambda row: row["status"] != "not representable")
  for row in noted[:count]:
    name = (row["base"] or row["finetuned"])[0]
    lines.append(f"  {row['status']}: {name} ({row['why']})")
  if len(noted) > count:
    lines.append(f"  and {len(noted) - count} more in {REPORT}")
  if regex := whole_of(report):
    lines.append(
      f"  --whole={shlex.quote(regex)} carries what needs its module"
    )
  return "\n".join(lines)


def whole_of(report: Report) -> str | None:
  r"""Returns the regex of the modules that have to be stored whole, if any.

  PEFT replaces modules, not parameters: a parameter that lies beside matrices
  with LoRAs is left out, unless all of its module is stored whole.

  Args:
    report: the report.

  Returns:
    A regex of names, to be used as `whole` of `extract_checkpoint`; None where
    nothing is left out for that reason, or no matrix would keep a Lora.

  Example:
    >>> rows = [{"base": [f"h.{at}.attn.{name}"], "status": status, "why": why}
    ...         for at in range(2) for name, status, why in (
    ...           ("bias_u", "not representable", f"{REPLACES}; ..."),
    ...           ("q.weight", "extracted", ""))]
    >>> rows += [{"base": ["head"], "status": "extracted", "why": ""}]
    >>> whole_of(Report({}, [], {}, rows))
    'h\\.\\d+\\.attn\\..*'
  """
  rows = report.ledger
  names = [name for row in rows for name in row["base"]]
  carried = [n for r in rows if r["status"] == "extracted" for n in r["base"]]
  missing = {
    name.rpartition(".")[0]
    for row in rows
    if row["status"] == "not representable" and REPLACES in row["why"]
    for name in row["base"]
  }
  missing = {  # but not the module that is the whole model
    module
    for module in missing
    if module and not all(name.startswith(f"{module}.") for name in carried)
  }
  outer = {
    module
    for module in missing
    if not any(module.startswith(f"{other}.") for other in missing)
  }
  some = _like(outer, names)
  if not some or all(re.fullmatch(some, name) for name in carried):
    return None
  return some


def _like(modules: Set[str], names: Iterable[str]) -> str:
  """Returns a regex of all names inside modules, any number where all are."""
  every = {
    name[: d.start()] for name in names for d in re.finditer(r"\.", name)
  }
  found = {}
  for module in sorted(modules):
    like = re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(module))
    fitting = {other for other in every if re.fullmatch(like, other)}
    found[like if fitting <= modules else re.escape(module)] = None
  some = "|".join(found)
  return (
    (rf"{some}\..*" if len(found) == 1 else rf"(?:{some})\..*") if some else ""
  )


def larger_line(report: Report) -> str:
  """Names the modules whose factors take more bytes than their weights.

  Args:
    report: the report.

  Returns:
    A line that names up to three, the largest first; "" where there are none.

  Example:
    >>> row = {"path": "q", "rank": 8, "bytes": 512, "parameter_bytes": 256}
    >>> larger_line(Report({}, [row], {}, []))
    'larger than their weights: 1 of 1 modules: q (rank 8, 512 of 256 bytes)'
  """
  large = sorted(
    (row for row in report.modules if row["bytes"] > row["parameter_bytes"]),
    key=lambda row: row["parameter_bytes"] - row["bytes"],
  )
  if not large:
    return ""
  named = name_some(
    f"{row['path']} (rank {row['rank']}, {row['bytes']} of "
    f"{row['parameter_bytes']} bytes)"
    for row in large
  )
  return (
    f"larger than their weights: {len(large)} of {len(report.modules)} "
    f"modules: {named}"
  )


def rounding_line(report: Report) -> str:
  """Tells in one line what was learnt and what rounding did to it.

  Args:
    report: the report.

  Returns:
    The estimated norm of the change before it was rounded, and the norm of the
    same modules as stored; modules where no estimate is possible are counted as
    not identifiable.

  Example:
    >>> rounding_line(Report({}, [], total_up([], []), []))
    'rounding: what was learnt is not identifiable in 0 of 0 modules'
  """
  totals = report.totals
  learnt, parts = totals.get("learnt_norm"), []
  if learnt is not None and totals.get("rounding_share") is not None:
    told = [r for r in report.modules if r.get("learnt_norm") is not None]
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


def verified_line(report: Report) -> str:
  """Tells in one line whether the adapter was tried in its consumer.

  Args:
    report: the report.

  Returns:
    What loaded it, how many modules it changes, and the largest difference
    between a module's relative error as measured there and in the report.

  Example:
    >>> verified_line(Report({}, [], {}, []))
    'not verified'
    >>> verified_line(Report({}, [], {}, [], {"by": "PEFT", "version": "0.21.2",
    ...                      "modules": 211, "worst_difference": 3.1e-8}))
    'verified: PEFT 0.21.2 loads 211 modules, worst difference 3e-08'
  """
  found = report.verified
  if found is None:
    return "not verified"
  worst = found["worst_difference"]
  against = "not compared with a finetune"
  if worst is not None:
    against = f"worst difference {worst:.0e}"
  return (
    f"verified: {found['by']} {found['version']} loads {found['modules']} "
    f"modules, {against}"
  )


def _total_rounding(
  modules: Sequence[Mapping[str, Any]],
) -> dict[str, float | int | None]:
  """Sums up what was learnt and rounded, over the rows that know it."""
  both = ("learnt_norm", "rounding_share")
  told = [row for row in modules if None not in map(row.get, both)]
  learnt2 = [row["learnt_norm"] ** 2 for row in told]
  lost2 = sum(
    row["rounding_share"] * square
    for row, square in zip(told, learnt2, strict=True)
  )
  has_zeros = all(row.get("unchanged") is not None for row in modules)
  sizes = [math.prod(row["shape"]) for row in modules] if has_zeros else []
  equal = sum(
    row["unchanged"] * size for row, size in zip(modules, sizes, strict=False)
  )
  whole = sum(learnt2)
  return {
    "learnt_norm": math.sqrt(whole) if told else None,
    "rounding_share": (lost2 / whole if whole else 0.0) if told else None,
    "not_identifiable": len(modules) - len(told),
    "unchanged": equal / sum(sizes) if sizes else None,
  }


def _above_noise(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the smallest and the largest `noise_rank` of some modules."""
  order = sorted(rows, key=lambda row: row["noise_floor_rank"])
  low, high = noise_rank(order[0]), noise_rank(order[-1])
  if low == high:
    return low
  return f"{low}-{high}" if "≥" not in low + high else f"{low} to {high}"


def _span(values: Iterable[int]) -> str:
  """Formats the range of some integers, `4` or `4-8`."""
  values = sorted(values)
  low, high = values[0], values[-1]
  return str(low) if low == high else f"{low}-{high}"


def _align(rows: Sequence[Sequence[str]]) -> str:
  """Aligns cells in columns: the first to the left, the others right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if place == 0 else cell.rjust(width)
      for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  )
