# SPDX-License-Identifier: Apache-2.0
"""An extraction killed at any of its steps, then resumed: the same bytes.

Every operation on a file is one, before and after it; a few are real kills.
"""

import functools
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jlora.extraction import run, workers
from jlora.runs.journal import FOLDER
from jlora.runs.pool import open_pool
from tests.helpers.kills import Killed, count_operations, killed_at
from tests.helpers.small_pairs import draw, files_of, write_pair

# Kills itself at the n-th rename, or at the n-th removal in a closed journal.
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


def write_some(folder, names):
  """A pair of checkpoints of these matrices."""
  base, finetuned = (
    {name: draw(6, 5, seed=seed + at) for at, name in enumerate(names)}
    for seed in (0, 100)
  )
  return write_pair(folder, base, finetuned)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  return write_some(tmp_path_factory.mktemp("pair"), NAMES)


@pytest.fixture(scope="module")
def expected(pair, tmp_path_factory):
  out = tmp_path_factory.mktemp("whole") / "out"
  run.extract_checkpoint(*pair, out, rank=2, log=io.StringIO())
  return files_of(out)


@pytest.fixture
def one_thread(monkeypatch):
  """Operations come in the same order each time."""
  monkeypatch.setattr(
    workers, "open_pool", lambda _, *rest: open_pool(1, *rest)
  )


def go_on(extract, out, over):
  """Resumes; a run that was to overwrite may have been killed before it began.

  Then the folder holds the other run's result, or is none of a run.
  """
  refused = ""
  try:
    extract(out, resume=True)
  except ValueError as error:
    refused = str(error)
  if refused:
    assert over
    assert not (out / FOLDER).exists()
    assert "Use overwrite=True" in refused or "rank was 1, is 2" in refused
    extract(out, overwrite=True)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("over", [False, True], ids=["new", "overwriting"])
def test_a_run_killed_at_any_operation_resumes(
  tmp_path, one_thread, over, after
):
  """In a new folder, and over another run's result, which never passes."""
  pair = write_some(tmp_path, NAMES[:2])
  extract = functools.partial(
    run.extract_checkpoint, *pair, rank=2, log=io.StringIO()
  )

  def prepare(name):
    if over:
      run.extract_checkpoint(*pair, tmp_path / name, rank=1, log=io.StringIO())
    return tmp_path / name

  out = prepare("whole")
  count = count_operations(lambda: extract(out, overwrite=over))
  expected = files_of(out)
  assert count > 40
  for at in range(over, count, 1 + over):
    out = prepare(f"out{at}")
    with pytest.raises(Killed), killed_at(at, after=after):
      extract(out, overwrite=over)
    go_on(extract, out, over)
    assert files_of(out) == expected, at


@pytest.mark.parametrize(
  ("step", "count"),
  [("replace", 8), ("replace", RENAMES - 1), ("unlink", 4)],
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


@pytest.mark.parametrize("share", [0.4, 0.9])
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
