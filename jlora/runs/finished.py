# SPDX-License-Identifier: Apache-2.0
"""What a finished run leaves in its report, so that it is known again.

A result is given out as the same only if everything that made it is the same,
and everything that was written is still there.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.checkpoints.checksums import as_text, checksum_of
from jlora.messages import name_some
from jlora.runs.journal import check_settings

_PARTS = {"fingerprint": dict, "files": dict, "told": str}
_WAY = "Use overwrite=True to make it anew, or another out."


def describe_run(
  out: Path,
  fingerprint: Mapping[str, Any],
  files: Mapping[Path, str],
  told: Mapping[str, Any],
) -> dict[str, Any]:
  """Describes a run whose files are all in place, for its report.

  Args:
    out: the output folder.
    fingerprint: everything that made the result, as JSON values.
    files: what was written, in `out`, with checksums, as `noted` gives them.
    told: the rest of the report, for JSON.

  Returns:
    {fingerprint, files, told}, for JSON: checksums of files by name, and one of
    the report.

  Example:
    >>> describe_run(Path("a"), {"rank": 8}, {Path("a/x"): "00ff"}, {})["files"]
    {'x': '00ff'}
  """
  return {
    "fingerprint": json.loads(json.dumps(fingerprint)),
    "files": {path.name: checksum for path, checksum in sorted(files.items())},
    "told": _checksum(told),
  }


def check_run(
  report: Path,
  described: Any,
  fingerprint: Mapping[str, Any],
  told: Mapping[str, Any],
) -> None:
  """Raises unless a finished run's result is what a new run would make.

  Args:
    report: the report's file, beside all others.
    described: what the report has of `describe_run`.
    fingerprint: of the run that would be made.
    told: the rest of the report.

  Raises:
    ValueError: another run's, or files that are gone or not as written; names
      up to three.

  Example:
    >>> check_run(Path("out/report.json"), None, {}, {})
    Traceback (most recent call last):
    ...
    ValueError: out/report.json does not say what made it. Use overwrite=True to
    make it anew, or another out.
  """
  if not (
    isinstance(described, dict)
    and all(isinstance(described.get(n), k) for n, k in _PARTS.items())
  ):
    raise ValueError(f"{report} does not say what made it. {_WAY}")
  wanted = json.loads(json.dumps(fingerprint))
  check_settings(report, described["fingerprint"], wanted)
  if described["told"] != _checksum(told):
    raise ValueError(f"{report} is not as it was written. {_WAY}")
  lost = [
    f"{name} {why}"
    for name, checksum in described["files"].items()
    if (why := _what_happened(report.parent, name, checksum))
  ]
  if lost:
    raise ValueError(
      f"{report.parent} is not as it was written: {name_some(lost)}. {_WAY}"
    )


def _what_happened(folder: Path, name: str, checksum: str) -> str:
  """Tells what is wrong with a file, "" if it is as it was written."""
  if name != Path(name).name:
    return "is no name of a file"
  if not (folder / name).is_file():
    return "is gone"
  return "" if checksum_of(folder / name) == checksum else "was changed"


def _checksum(told: Mapping[str, Any]) -> str:
  """Returns a checksum of what a report tells."""
  return as_text(zlib.crc32(json.dumps(told, sort_keys=True).encode()))
