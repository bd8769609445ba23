# SPDX-License-Identifier: Apache-2.0
"""One journal for all processes of a run, in a folder that they share."""

import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jlora.messages import name_some
from jlora.runs import processes
from jlora.runs.journal import FOLDER, Journal, begin_journal, check_folder
from jlora.runs.watchdog import Watch

T = TypeVar("T")
_STATES = "states-"
# A network file system may show a new file to others only after a minute.
_SECONDS_TO_SEE = 90.0


def share_journal(
  out: Path,
  finished: str,
  fingerprint: Mapping[str, Any],
  *,
  resume: bool,
  overwrite: bool,
) -> tuple[Journal, Watch]:
  """Opens a run's journal and the watch of its processes; all must call it.

  Args:
    out: the run's output folder.
    finished: as for `check_folder`.
    fingerprint: as for `open_journal`.
    resume: whether to take up a journal that is there.
    overwrite: whether files may be replaced.

  Returns:
    The journal, with the entries that are there on process 0 alone, and a Watch
    that is not yet entered.

  Raises:
    ValueError: on all, as `check_folder` and `open_journal`, or where another
      process does not see the folder of process 0.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   journal, watch = share_journal(
    ...     Path(tmp), "x", {"rank": 8}, resume=False, overwrite=False)
    ...   len(journal)
    0
  """
  index, count = processes.process_index(), processes.process_count()

  def begin() -> str:
    check_folder(out, finished, resume=resume, overwrite=overwrite)
    folder = begin_journal(out, fingerprint, resume=resume)
    for stale in folder.glob(f"{_STATES}*"):
      shutil.rmtree(stale, ignore_errors=True)
    name = f"{_STATES}{secrets.token_hex(8)}"
    if count > 1:
      (folder / name).mkdir()
    return name

  states = out / FOLDER / processes.from_first(begin)
  journal = processes.everywhere(lambda: _join(states))
  return journal, Watch(states, index, count)


def _join(states: Path) -> Journal:
  """Opens the journal that the first process has begun."""
  if processes.process_index() == 0:
    return Journal(states.parent)
  end = time.monotonic() + _SECONDS_TO_SEE / 3
  while not states.exists():
    if time.monotonic() > end:
      out = states.parent.parent
      raise ValueError(
        f"{out} is not the folder that process 0 writes to: {states} is not "
        "there. Give a folder that all share"
      )
    time.sleep(0.5)
  return Journal(states.parent, is_new=True)


def complete_journal(journal: Journal, paths: Iterable[str]) -> None:
  """Waits until a journal shows what other processes have put into it.

  Args:
    journal: of a run whose processes have all done their shares.
    paths: of all its modules.

  Raises:
    ValueError: entries are missing, and do not come in time.

  Example:
    >>> complete_journal(Journal(Path("nowhere")), [])
  """
  paths = list(paths)

  def look() -> None:
    unseen = [path for path in paths if not journal.find(path)]
    if unseen:
      raise ValueError(
        f"{journal.folder} lacks {len(unseen)} modules that are said to be "
        f"finished: {name_some(unseen)}. Is it one file system for all?"
      )

  wait_for_files(look)


def wait_for_files(look: Callable[[], T]) -> T:
  """Calls a function until it sees other processes' files, or they are late.

  Args:
    look: reads what another process has written; a ValueError if it is not
      there.

  Returns:
    Its result.

  Example:
    >>> wait_for_files(lambda: 3)
    3
  """
  end = time.monotonic() + _SECONDS_TO_SEE
  while True:
    try:
      return look()
    except ValueError:
      if processes.process_count() == 1 or time.monotonic() > end:
        raise
    time.sleep(0.5)
