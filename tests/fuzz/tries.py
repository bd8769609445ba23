# SPDX-License-Identifier: Apache-2.0
"""One damaged folder after the other sent through a door, with a time limit."""

import random
import signal
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.doors import Door
from tests.fuzz.mutations import damage, read, times_of, write

SECONDS = 10
GOOD = ("read", "ValueError", "OSError")


class Try(NamedTuple):
  """What came of one damaged folder."""

  door: str
  number: int
  outcome: str
  said: str


class _TooLong(BaseException):
  """Raised by the alarm; no handler of errors takes it."""


def _ring(*_) -> None:
  raise _TooLong


def try_all(
  doors: Mapping[str, Door], count: int, seed: int, case: str | None = None
) -> Iterator[Try]:
  """Yields tries of all doors, the same for the same seed and number."""
  signal.signal(signal.SIGALRM, _ring)
  total = sum(door.weight for door in doors.values())
  wanted = case.rpartition("/") if case else None
  for name, door in doors.items():
    if wanted and wanted[0] != name:
      continue
    own = max(1, round(count * door.weight / total))
    numbers = [int(wanted[2])] if wanted else range(own)
    # All in one folder: runs that are resumed know where their inputs lie.
    with tempfile.TemporaryDirectory() as folder:
      yield from _try_one(name, door, Path(folder), numbers, seed, bool(case))


def _try_one(
  name: str,
  door: Door,
  folder: Path,
  numbers: Iterable[int],
  seed: int,
  is_told: bool,
) -> Iterator[Try]:
  """Yields tries of one door, with these numbers, made in a folder."""
  door.build(folder)
  files, times = read(folder), times_of(folder)
  write(files, {}, times, folder)
  door.enter(folder)  # else nothing that follows would say anything
  for number in numbers:
    dice = random.Random(f"{seed}/{name}/{number}")
    changed, places = damage(files, dice)
    same = {n: t for n, t in times.items() if changed[n] == files[n]}
    write(changed, places, same, folder)
    yield Try(name, number, *_outcome(door, folder, is_told))


def _outcome(door: Door, folder: Path, is_told: bool) -> tuple[str, str]:
  """Enters a door; returns what came of it, and what was said."""
  started = time.monotonic()
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  outcome, said = "read", ""
  try:
    door.enter(folder)
  except (ValueError, OSError) as error:
    kind = ValueError if isinstance(error, ValueError) else OSError
    outcome, said = kind.__name__, str(error)
  except _TooLong:
    outcome, said = "too long", traceback.format_exc(limit=-2)
  except BaseException as error:
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if "/jlora/" in one.filename][-1:] or frames[
      -1:
    ]
    place = f"{own[0].filename.rpartition('/jlora/')[2]}:{own[0].lineno}"
    outcome = type(error).__name__
    said = f"{place}: {str(error)[:150]}"
    if is_told:
      said += f"\n{traceback.format_exc()}"
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
  seconds = time.monotonic() - started
  if outcome in GOOD and seconds > SECONDS / 2:
    return "slow", f"{seconds:.1f} s: {said[:150]}"
  return outcome, said
