# SPDX-License-Identifier: Apache-2.0
"""What a run says: its report, written to report.json and read again."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA_VERSION = 1
REPORT = "report.json"
_STATUSES = ("extracted", "unchanged", "kept whole", "not representable")


class Report(NamedTuple):
  """Everything a run found; `report.json` is its fields.

  Attributes:
    settings: inputs and options.
    modules: one dict per extracted module: path, shape, rank, relative_error,
      energy, mse, cosine_distance, mean_abs_delta, relative_change,
      stable_rank, effective_rank, rank_90, rank_95, rank_99, noise_floor,
      noise_floor_rank, learnt_norm, rounding_share, unchanged, spectral_bound,
      optimality, bytes, singular_values, relative_errors (by rank, 0..).
    totals: sums over the model.
    ledger: rows {base, finetuned, status, why}; every tensor of both
      checkpoints is in exactly one row.

  Example:
    >>> Report({}, [], {"modules": 0}, []).totals["modules"]
    0
  """

  settings: dict[str, Any]
  modules: list[dict[str, Any]]
  totals: dict[str, Any]
  ledger: list[dict[str, Any]]


def total_up(
  modules: Iterable[Mapping[str, Any]], ledger: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
  """The totals of a report from its rows.

  Args:
    modules: rows with `norm`, `error`, `bytes` and `parameter_bytes`; of rows
      with `shape`, `learnt_norm`, `rounding_share` and `unchanged` those too.
    ledger: rows with `status`.

  Returns:
    `modules`, `relative_error` (of all deltas as one vector), `energy`,
    `learnt_norm` and `rounding_share` (of all modules that tell what they
    learnt, as one vector; None if none does), `not_identifiable` (the number of
    the others), `unchanged` (share of all entries, None where rows lack it),
    `adapter_bytes`, `parameter_bytes` (of these matrices in the base) and the
    number of ledger rows by status.

  Example:
    >>> row = {"norm": 5.0, "error": 3.0, "bytes": 8, "parameter_bytes": 16}
    >>> total_up([row], [])["relative_error"]
    0.6
  """
  modules, ledger = list(modules), list(ledger)
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
    "ledger": {
      status: sum(row["status"] == status for row in ledger)
      for status in _STATUSES
    },
  }


def change_of_weights(modules: Iterable[Mapping[str, Any]]) -> float | None:
  """How large the changes of some modules are beside their weights.

      √(Σ ‖delta‖² / Σ ‖base‖²),   ‖base‖ = ‖delta‖ / relative change

  Args:
    modules: rows with `norm` and `relative_change`, None where a base is zero.

  Returns:
    That of all modules as one vector; None where all bases are zero.

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


def _total_rounding(
  modules: Sequence[Mapping[str, Any]],
) -> dict[str, float | int | None]:
  """What was learnt and what was rounded, of the rows that know."""
  told = [row for row in modules if row.get("learnt_norm") is not None]
  learnt2 = [row["learnt_norm"] ** 2 for row in told]
  lost2 = sum(
    row["rounding_share"] * square
    for row, square in zip(told, learnt2, strict=True)
  )
  has_zeros = all("unchanged" in row for row in modules)
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


def write_report(folder: str | os.PathLike, report: Report) -> None:
  """Writes `report.json` into a folder, whole or not at all.

  Args:
    folder: an existing folder.
    report: the report. Its bytes depend on nothing else.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_report(folder, Report({"rank": 1}, [], {}, []))
    ...   read_report(folder).settings
    {'rank': 1}
  """
  text = json.dumps({"schema_version": SCHEMA_VERSION} | report._asdict())
  replace_text(Path(folder) / REPORT, text + "\n")


def read_report(folder: str | os.PathLike) -> Report:
  """The report of a finished run.

  Args:
    folder: the run's output folder.

  Returns:
    Report.

  Raises:
    ValueError: there is no report, a damaged one, or of another schema version.

  Example:
    >>> read_report("/nowhere")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere holds no report.json; the run did not finish.
  """
  path = Path(folder) / REPORT
  if not path.exists():
    raise ValueError(f"{folder} holds no {REPORT}; the run did not finish.")
  try:
    data = dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path} is no report: {error}. Run again.") from error
  version = data.pop("schema_version", None)
  if version != SCHEMA_VERSION:
    raise ValueError(
      f"{path} has schema version {version}, this jlora reads {SCHEMA_VERSION}."
    )
  return Report(**data)


def replace_text(path: Path, text: str) -> None:
  """Puts a text file in its place, whole or not at all.

  Args:
    path: the file.
    text: its contents.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   replace_text(Path(folder) / "x", "y")
    ...   (Path(folder) / "x").read_text()
    'y'
  """
  partial = path.with_name(f".{path.name}.partial")
  with open(partial, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def module_type(path: str) -> str:
  """What kind of module a path names: its last part, `weight` and such off.

  Args:
    path: a parameter's name.

  Returns:
    `q_proj`, `down_proj`, `embed_tokens`, ...; of an expert's matrix the part
    after the expert's number.

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
