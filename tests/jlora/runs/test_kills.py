# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at any step of a run, then resume: the same bytes as without."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jlora.extraction import run
from jlora.runs.journal import FOLDER
from tests.helpers.small_pairs import draw, files_of, write_pair

# Kills itself at the n-th rename, or at the n-th removal in a closed journal:
# every step of a run that another process can see is one of these.
KILLED = """
import io, os, signal, sys
from jlora.extraction import run
step, count, out = sys.argv[1], int(sys.argv[2]), sys.argv[5]
real, calls = getattr(os, step), []
def counted(*args, **kwargs):
  if step == "replace" or os.path.exists(out + "/.journal-done"):
    calls.append(args)
  if len(calls) == count:
    os.kill(os.getpid(), signal.SIGKILL)
  return real(*args, **kwargs)
setattr(os, step, counted)
run.extract_checkpoint(*sys.argv[3:6], rank=2, log=io.StringIO())
"""
NAMES = [f"layers.{at}.q_proj.weight" for at in range(12)]
# The journal's header, then 12 modules, the adapter twice, its configuration,
# the report, and the journal's end.
RENAMES = 1 + len(NAMES) + 3 + 1 + 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  base, finetuned = (
    {name: draw(6, 5, seed=seed + at) for at, name in enumerate(NAMES)}
    for seed in (0, 100)
  )
  return write_pair(tmp_path_factory.mktemp("pair"), base, finetuned)


@pytest.fixture(scope="module")
def expected(pair, tmp_path_factory):
  out = tmp_path_factory.mktemp("whole") / "out"
  run.extract_checkpoint(*pair, out, rank=2, log=io.StringIO())
  return files_of(out)


@pytest.mark.parametrize(
  ("step", "count"),
  [
    ("replace", 2),
    ("replace", 8),
    *(("replace", RENAMES - back) for back in (0, 1, 2, 4)),
    ("unlink", 4),
  ],
)
def test_a_killed_run_resumes(pair, expected, tmp_path, step, count):
  out = tmp_path / "out"
  command = [sys.executable, "-c", KILLED, step, str(count), *pair, out]
  root = pathlib.Path(__file__).parents[3]
  ended = subprocess.run(
    list(map(str, command)),
    cwd=root,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert ended.returncode == -signal.SIGKILL, ended.stderr
  if step == "replace" and count < RENAMES - 3:
    assert not (out / "adapter_model.safetensors").exists()
  assert (out / FOLDER).exists() == (step == "replace")
  run.extract_checkpoint(*pair, out, rank=2, resume=True, log=io.StringIO())
  assert files_of(out) == expected


# Dies wherever it is when the time has come; SIGALRM's default ends a process
# as SIGKILL does, without a word.
TIMED = """
import io, signal, sys
from jlora.extraction import run
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
run.extract_checkpoint(*sys.argv[2:5], rank=2, log=io.StringIO())
"""


@pytest.mark.parametrize("share", [0.15, 0.4, 0.65, 0.9])
def test_a_run_killed_at_some_time_resumes(pair, expected, tmp_path, share):
  """The share is of a whole run's time; where that is, nobody knows."""
  began = time.perf_counter()
  run.extract_checkpoint(*pair, tmp_path / "whole", rank=2, log=io.StringIO())
  delay = share * (time.perf_counter() - began)
  out = tmp_path / "out"
  ended = subprocess.run(
    [sys.executable, "-c", TIMED, str(delay), *map(str, pair), str(out)],
    cwd=pathlib.Path(__file__).parents[3],
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert ended.returncode in (0, -signal.SIGALRM), ended.stderr
  run.extract_checkpoint(*pair, out, rank=2, resume=True, log=io.StringIO())
  assert files_of(out) == expected
