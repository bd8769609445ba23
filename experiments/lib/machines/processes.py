# SPDX-License-Identifier: Apache-2.0
"""Measures a command: wall time, processor time and peak resident memory."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Linux counts the memory that a process held before `exec`, so a small
# interpreter starts the command, not this large one.
_METER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
wall = time.perf_counter() - began
use = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
seconds = use.ru_utime + use.ru_stime
print(json.dumps([code, wall, seconds, use.ru_maxrss * unit]))
"""


class Usage(NamedTuple):
  """What a finished command used.

  Attributes:
    wall: seconds from start to end.
    processor: seconds of all its cores, user and system.
    peak: largest resident memory, bytes.
  """

  wall: float
  processor: float
  peak: int


def measure(
  command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Usage:
  """Runs a command; measures what it and its children use.

  Args:
    command: the program and its arguments; its output is dropped.
    environment: variables beside this process's own.

  Returns:
    Usage.

  Raises:
    RuntimeError: the command failed; shows the end of its output.

  Example:
    >>> measure([sys.executable, "-S", "-c", "pass"]).peak > 2**20
    True
  """
  done = subprocess.run(
    [sys.executable, "-I", "-S", "-c", _METER, *command],
    env={**os.environ, **(environment or {})},
    capture_output=True,
    text=True,
  )
  code, wall, processor, peak = json.loads(done.stdout or "[1, 0, 0, 0]")
  if code:
    raise RuntimeError(
      f"{' '.join(command)} ended with {code}: {done.stderr[-800:]}"
    )
  return Usage(wall, processor, peak)
