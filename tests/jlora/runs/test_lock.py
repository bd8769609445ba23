# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder, whatever becomes of those before."""

import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from jlora.runs.lock import LOCK, hold_folder

ROOT = pathlib.Path(__file__).parents[3]
HOLDS = """
import pathlib, sys
from jlora.runs.lock import hold_folder
with hold_folder(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  sys.stdin.read()
"""


def other(folder):
  """Another process that holds a folder until its input ends."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDS, str(folder)],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  return process


def is_free(folder):
  with hold_folder(folder):
    return True


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_lock_dies_with_its_process(tmp_path, end):
  out = tmp_path / "a" / "out"
  process = other(out)
  said = f"being written by another run .process {process.pid} on"
  for _ in range(2):  # a refusal leaves the lock where it is
    with pytest.raises(ValueError, match=said):
      is_free(out)
  process.stdin.close() if end == "close" else process.kill()
  assert process.wait() == (0 if end == "close" else -signal.SIGKILL)
  process.stdout.close()
  process.stdin.close()
  assert (out / LOCK).exists() == (end == "kill")
  assert is_free(out)
  assert not (out / LOCK).exists()


def test_a_folder_that_was_made_in_vain_goes(tmp_path):
  with hold_folder(tmp_path / "a" / "b"):
    pass
  assert not list(tmp_path.iterdir())
  (tmp_path / "mine").mkdir()
  with hold_folder(tmp_path / "mine" / "b"):
    (tmp_path / "mine" / "b" / "x").touch()
  with hold_folder(tmp_path / "mine"):
    pass
  assert (tmp_path / "mine" / "b" / "x").exists()


@pytest.mark.parametrize("there", ["file", "link to nowhere"])
def test_a_folder_must_be_one(tmp_path, there):
  if there == "file":
    (tmp_path / "out").touch()
  else:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="is a file; give a folder"):
    is_free(tmp_path / "out")


def test_a_lock_that_is_a_link_is_not_opened(tmp_path):
  (tmp_path / "mine").write_text("precious")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / LOCK).symlink_to(tmp_path / "mine")
  with pytest.raises(ValueError, match="is a link; remove it"):
    is_free(tmp_path / "out")
  assert (tmp_path / "mine").read_text() == "precious"


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch):
  def lacking(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", lacking)
  with (
    pytest.warns(UserWarning, match="without locks .No locks available"),
    hold_folder(tmp_path / "out"),
  ):
    (tmp_path / "out" / "x").touch()
  assert os.listdir(tmp_path / "out") == ["x"]


def test_a_folder_that_goes_while_it_is_made_is_made_again(
  tmp_path, monkeypatch
):
  mkdir, calls = pathlib.Path.mkdir, []

  def gone(self, *args, **options):
    calls.append(self)
    if len(calls) == 1:  # it was there, and no longer is when mkdir looks
      raise FileExistsError(self)
    mkdir(self, *args, **options)

  monkeypatch.setattr(pathlib.Path, "mkdir", gone)
  with hold_folder(tmp_path / "out"):
    assert (tmp_path / "out" / LOCK).exists()
  assert len(calls) == 2


def test_of_many_at_once_one_has_it(tmp_path):
  """A file that is removed and made anew is not locked twice."""
  inside, most, got = [], [], []
  start = threading.Barrier(8)

  def work():
    start.wait()
    for _ in range(200):
      try:
        with hold_folder(tmp_path / "out"):
          inside.append(1)
          most.append(len(inside))
          inside.pop()
          got.append(1)
      except ValueError:
        pass

  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert got
  assert set(most) == {1}
