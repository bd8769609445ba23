# SPDX-License-Identifier: Apache-2.0
"""The report of a merge: written, read, and known again by a resumed run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.checkpoints.documents import (
  NULL,
  OBJECT,
  SIZE,
  TEXT,
  check_fields,
  either,
  list_of,
  read_object,
  record_of,
)
from jlora.checkpoints.new_files import replace_text
from jlora.merging.checkpoints.recipes import Recipe
from jlora.runs.fingerprints import name_of
from jlora.runs.finished import check_run, describe_run
from jlora.runs.journal import check_settings

MERGE = "merge.json"


class MergeReport(NamedTuple):
  """What a merge did; stored as `merge.json`.

  Attributes:
    settings: the recipe and versions.
    tensors: how many were written.
    nbytes: their bytes.
    notes: what was unusual, by name of the tensor or model.
    run: what made it, as hashes, and checksums of the files beside it: by these
      a resumed run knows it again.
  """

  settings: dict[str, Any]
  tensors: int
  nbytes: int
  notes: list[str]
  run: dict[str, Any] | None = None


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
  """Returns a recipe as values that JSON can hold.

  Args:
    recipe: the merge.

  Returns:
    Its fields, functions by name.

  Example:
    >>> from jlora.merging.checkpoints.recipes import Slice
    >>> describe_recipe(Recipe(max, (Slice(()),)))["method"]
    'max'
  """
  slices = [
    {
      "inputs": [
        {**one._asdict(), "settings": dict(one.settings)} for one in part.inputs
      ],
      "settings": dict(part.settings),
      "base": part.base,
    }
    for part in recipe.slices
  ]
  plain = {
    **recipe._asdict(),
    "method": name_of(recipe.method),
    "vocabulary": name_of(recipe.vocabulary),
    "settings": dict(recipe.settings),
    "slices": slices,
  }
  return json.loads(json.dumps(plain, default=_plain))


def _plain(value: Any) -> Any:
  """Returns a number of NumPy, or whatever else JSON has not, as it has it."""
  return value.item() if hasattr(value, "item") else str(value)


def write_merge(
  out: Path,
  report: MergeReport,
  marks: dict[str, Any],
  files: Mapping[Path, str],
) -> MergeReport:
  """Writes the report of a merge whose files are all in place.

  Args:
    out: the output folder.
    report: without `run`.
    marks: what the merge hangs on.
    files: what was written, with checksums, as `noted` gives them.

  Returns:
    The report with `run`.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   report = MergeReport({"method": "linear"}, 0, 0, [])
    ...   report = write_merge(Path(tmp), report, {}, {})
    ...   read_merge(f"{tmp}/merge.json") == report
    True
  """
  made = describe_run(out, marks, files, _results(report))
  report = report._replace(run=made)
  replace_text(out / MERGE, json.dumps(report._asdict(), indent=2) + "\n")
  return report


_INPUT = record_of({"model": TEXT})
_SLICE = record_of({"inputs": list_of(_INPUT)})
_FIELDS = {
  "settings": OBJECT,
  "tensors": SIZE,
  "nbytes": SIZE,
  "notes": list_of(TEXT),
  "run": either(OBJECT, NULL),
}
_SETTINGS = {
  "base": either(TEXT, NULL),
  "method": TEXT,
  "slices": list_of(_SLICE),
}


def read_merge(path: str | os.PathLike) -> MergeReport:
  """Reads the report of a merge.

  Args:
    path: a `merge.json`.

  Returns:
    MergeReport.

  Raises:
    ValueError: no such file, or it is no report of a merge.

  Example:
    >>> read_merge("/nowhere/merge.json")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere/merge.json cannot be read: No such file or directory
  """
  found = read_object(path, _FIELDS, required=_FIELDS.keys() - {"run"})
  check_fields(found["settings"], _SETTINGS, f"{path}: settings")
  return MergeReport(**{name: found[name] for name in found.keys() & _FIELDS})


def finished_merge(
  file: Path, settings: dict[str, Any], marks: dict[str, Any]
) -> MergeReport:
  """Returns the report of a finished merge if it is the one asked for.

  Args:
    file: its `merge.json`, beside all that it wrote.
    settings: of the merge that is asked for.
    marks: what that hangs on, as `describe_run` takes it.

  Returns:
    MergeReport.

  Raises:
    ValueError: the report cannot be read, is another merge's, or files are gone
      or not as written.

  Example:
    >>> finished_merge(Path("/nowhere/merge.json"), {}, {})
    Traceback (most recent call last):
    ...
    ValueError: /nowhere/merge.json cannot be read: No such file or directory.
    Use overwrite=True.
  """
  try:
    report = read_merge(file)
  except ValueError as error:
    raise ValueError(f"{error}. Use overwrite=True.") from error
  check_settings(file, report.settings, settings)
  check_run(file, report.run, marks, _results(report))
  return report


def _results(report: MergeReport) -> dict[str, Any]:
  """Returns what a report tells, without what made it."""
  return {k: v for k, v in report._asdict().items() if k != "run"}
