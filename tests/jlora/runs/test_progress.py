# SPDX-License-Identifier: Apache-2.0
"""What a run says while it works, by a clock that the test turns."""

import functools
import io
import types

import pytest

from jlora.runs import progress
from jlora.runs.progress import Progress


class Terminal(io.StringIO):
  """A file that says it is a terminal."""

  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """Seconds in a list of one; nothing but the test moves them."""
  seconds = [1000.0]
  fake = types.SimpleNamespace(monotonic=lambda: seconds[0])
  monkeypatch.setattr(progress, "time", fake)
  return seconds


def test_a_line_now_and_then_and_at_the_end(clock):
  log = io.StringIO()
  with Progress(1000, log) as bar:
    for at in range(1, 101):
      clock[0] += 1
      bar.update(10, f"m.{at}", 8, error=1.0, norm=2.0)
  lines = log.getvalue().splitlines()
  assert len(lines) == 10
  assert lines[0].startswith("10% m.10 rank 8, ")
  assert lines[-1].startswith("100% m.100 rank 8, ")
  assert lines[-1].endswith(", 0 s left")


def test_a_short_run_says_only_that_it_is_done(clock):
  log = io.StringIO()
  with Progress(100, log) as bar:
    bar.update(99, "first", 8)
    clock[0] += 9.9
    assert not log.getvalue()
    bar.update(1, "last", 8)
  assert log.getvalue().startswith("100% last rank 8")


def test_time_left_goes_by_bytes(clock):
  log = io.StringIO()
  bar = Progress(400, log)
  clock[0] += 30
  bar.update(100, "m", 8)
  assert log.getvalue().endswith("25% m rank 8, relative error so far 0.0000, "
                                 "90 s left\n")  # fmt: skip


def test_the_error_is_that_of_all_deltas_so_far(clock):
  log = io.StringIO()
  bar = Progress(300, log)
  for error, norm in ((3.0, 5.0), (0.0, 12.0)):
    clock[0] += 10
    bar.update(100, "m", 8, error=error, norm=norm)
  bar.update(100, "norm.weight")  # not factored: the error stays
  lines = log.getvalue().splitlines()
  shown = ["so far 0.6000", "so far 0.2308", "so far 0.2308"]  # 3/5, 3/13
  assert all(text in line for text, line in zip(shown, lines, strict=True))
  assert lines[-1].startswith("100% norm.weight, ")


@pytest.mark.parametrize("total", [0, 100])
def test_empty_tensors_divide_by_nothing(clock, total):
  log = io.StringIO()
  bar = Progress(total, log)
  clock[0] += 10
  bar.update(0, "empty")
  assert f"{0 if total else 100}% empty" in log.getvalue()
  assert f"{'inf' if total else 0} s left" in log.getvalue()


def test_lines_go_to_standard_error(clock, capsys):
  del clock
  with Progress(1) as bar:
    bar.update(1, "m")
  printed = capsys.readouterr()
  assert printed.err.startswith("100% m, ")
  assert not printed.out


def test_a_terminal_shows_module_rank_and_error(monkeypatch):
  # Otherwise tqdm draws ten times a second at most.
  eager = functools.partial(progress.tqdm, mininterval=0, miniters=0)
  monkeypatch.setattr(progress, "tqdm", eager)
  screen = Terminal()
  with Progress(200, screen) as bar:
    bar.update(100, "mlp.up_proj", 64, error=3.0, norm=5.0)
    bar.update(100, "norm.weight")
  drawn = screen.getvalue().split("\r")
  (first,) = [text for text in drawn if "mlp.up_proj" in text]
  assert "mlp.up_proj rank 64, error 0.6000" in first
  assert "50%" in first
  assert any("norm.weight, error 0.6000" in text for text in drawn)
  assert "s left" not in screen.getvalue()  # the lines of a log file
  assert not drawn[-1].strip()
  assert not drawn[-2].strip()  # nothing of the bar stays


def test_several_processes_tell_their_own_and_the_first_draws(clock):
  del clock
  seen = []
  for who in (0, 2):
    for file in (io.StringIO(), Terminal()):
      with Progress(10, file, who=who) as bar:
        bar.update(10, "m", 8)
      seen.append(file.getvalue())
  assert seen[0].startswith("process 0: 100% m rank 8")
  assert "process" not in seen[1]  # a bar
  assert all(text.startswith("process 2: 100% m rank 8") for text in seen[2:])
