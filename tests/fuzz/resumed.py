# SPDX-License-Identifier: Apache-2.0
"""Runs that go on in a damaged folder: a new run's result, or an error."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from jlora.extraction.port_run import PORT
from jlora.extraction.report import REPORT
from jlora.merging.checkpoints.report import MERGE
from jlora.runs.journal import FOLDER, Journal
from tests.helpers.small_pairs import files_of

Run = Callable[[Path, Path, bool], object]
_LAST = (REPORT, MERGE, PORT)


def build_killed(
  build: Callable[[Path], None], run: Run
) -> Callable[[Path], None]:
  """Makes a run's folder as a kill leaves it, before the last file is there.

  Every third entry of the journal is missing too, the same ones each time.
  """

  def built(folder: Path) -> None:
    build(folder)
    with mock.patch.object(Journal, "close"):
      run(folder, folder / "out", False)
    entries = sorted((folder / "out" / FOLDER).glob("*.safetensors"))
    ends = [folder / "out" / name for name in _LAST]
    for file in [*entries[::3], *ends]:
      file.unlink(missing_ok=True)

  return built


def build_finished(
  build: Callable[[Path], None], run: Run
) -> Callable[[Path], None]:
  """Makes the folder of a finished run."""

  def built(folder: Path) -> None:
    build(folder)
    run(folder, folder / "out", False)

  return built


def enter_resumed(run: Run) -> Callable[[Path], None]:
  """Resumes; what is given out must be what a new run makes of these inputs."""

  def enter(folder: Path) -> None:
    run(folder, folder / "out", True)
    try:
      run(folder, folder / "new", False)
    except (ValueError, OSError) as error:
      raise AssertionError(f"resumed, but not made anew: {error}") from error
    resumed, new = (_contents(folder / name) for name in ("out", "new"))
    other = [n for n in resumed | new if resumed.get(n) != new.get(n)]
    assert not other, f"not what a new run makes: {other[:3]}"

  return enter


def _contents(folder: Path) -> dict[str, object]:
  """Files by name; reports as they are read: spaces in them say nothing."""
  files: dict[str, object] = {**files_of(folder)}
  for name in files.keys() & set(_LAST):
    files[name] = json.loads((folder / name).read_bytes())
  return files
