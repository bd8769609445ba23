# SPDX-License-Identifier: Apache-2.0
"""Keeps measured rows in files, one each, so that a later run goes on."""

import json
import pathlib
import re
import zlib
from collections.abc import Mapping
from typing import Any


def file_of(
  folder: pathlib.Path, bed: str, seed: int, method: str
) -> pathlib.Path:
  """Names the file of a row.

  Args:
    folder: of all rows.
    bed: what the method is measured on.
    seed: of it.
    method: any text; two that differ have two files.

  Returns:
    A path that may not exist yet. It does not tell sizes or settings: begin in
    another folder when these change.

  Example:
    >>> file_of(pathlib.Path("rows"), "tasks", 0, "N = 32, r = 1").as_posix()
    'rows/tasks/0/n-32-r-1-e8a1b5a9.json'
  """
  short = re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")
  name = f"{short[:48].strip('-')}-{zlib.crc32(method.encode()):08x}"
  return folder / bed / str(seed) / f"{name}.json"


def keep(file: pathlib.Path, row: Mapping[str, Any]) -> None:
  """Writes a row whole or not at all, whenever the run ends.

  Args:
    file: from `file_of`; its folder is made.
    row: what JSON holds.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = file_of(pathlib.Path(folder), "tasks", 0, "one")
    ...   keep(file, {"error": 0.5})
    ...   json.loads(file.read_text())
    {'error': 0.5}
  """
  file.parent.mkdir(parents=True, exist_ok=True)
  half = file.with_suffix(".part")
  half.write_text(json.dumps(row, indent=1) + "\n")
  half.replace(file)
