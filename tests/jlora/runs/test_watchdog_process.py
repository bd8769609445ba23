# SPDX-License-Identifier: Apache-2.0
"""What a guard makes of the states of other processes, and of its own's end."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jlora.runs import watchdog_process
from jlora.runs.watchdog_process import (
  Lookout,
  file_of,
  read_state,
  write_state,
)

TURN = 0.02


@pytest.fixture
def folder(tmp_path):
  return str(tmp_path)


def say(folder, index, state, beats=1, **error):
  write_state(
    file_of(folder, index),
    {"is": state, "beats": beats, **error},
    os.O_CREAT,
  )


@pytest.mark.parametrize(
  ("states", "done", "present", "said"),
  [
    (["working", "working"], False, 2, None),
    (["working", "done"], False, 2, None),
    (["done", "done"], True, 2, None),
    (["left", "done"], True, 1, None),
    (["left", "left"], True, 0, None),
    (["working", "lost"], False, 1, "process 2 ended or was killed"),
    (["lost", "lost"], False, 0, "processes 1, 2 ended or were killed"),
    (["lost", "working"], False, 1, "process 1 ended or was killed"),
    (["lost", "failed"], False, 0, "NaN in w"),  # the cause before its effects
  ],
)
def test_what_others_states_come_to(folder, states, done, present, said):
  for index, state in enumerate(states, start=1):
    error = {"text": "NaN in w", "kind": "input"} if state == "failed" else {}
    say(folder, index, state, **error)
  found = Lookout(folder, [1, 2]).look()
  assert (found["done"], found["present"]) == (done, present)
  assert (said is None) == (found["error"] is None)
  assert said is None or found["error"]["text"].startswith(said)


@pytest.mark.parametrize(
  ("state", "done", "is_lost"),
  [("working", False, True), ("done", True, False)],
)
def test_silence(folder, state, done, is_lost):
  """Counted in one's own turns; a process whose share is done may go."""
  say(folder, 1, state)
  lookout = Lookout(folder, [1])
  for _ in range(watchdog_process._SILENT):
    found = lookout.look()
    assert (found["error"], found["present"]) == (None, 1)
  found = lookout.look()
  assert found["present"] == 0
  assert (found["error"] is not None) == is_lost
  assert not is_lost or "process 1 gave no sign of" in found["error"]["text"]
  assert found["done"] == done


def test_a_sign_of_life_ends_the_silence(folder):
  lookout = Lookout(folder, [1])
  for beats in range(1, 4):
    for _ in range(watchdog_process._SILENT - 1):
      assert lookout.look()["error"] is None
    say(folder, 1, "working", beats)


def test_a_process_that_never_came_is_lost(folder):
  lookout = Lookout(folder, [1])
  found = [lookout.look() for _ in range(watchdog_process._SILENT)][-1]
  assert found["error"]["text"].startswith("process 1 gave no sign of life")


def test_of_a_dead_one_and_a_silent_one_the_dead_one_is_named(folder):
  lookout = Lookout(folder, [1, 2])
  for _ in range(watchdog_process._SILENT - 1):
    say(folder, 1, "lost")
    lookout.look()
  text = lookout.look()["error"]["text"]
  assert text.startswith("process 1 ended or was killed")


def test_a_state_that_is_half_written_is_no_news(folder):
  say(folder, 1, "done")
  lookout = Lookout(folder, [1])
  assert lookout.look()["done"]
  with open(file_of(folder, 1), "w") as file:
    file.write('{"is": "wor')
  assert lookout.look()["done"]


def test_a_long_text_is_cut_to_what_is_written_in_one_go(folder):
  say(folder, 1, "failed", text="é" * 5000, kind="input")
  state = read_state(file_of(folder, 1))
  assert os.path.getsize(file_of(folder, 1)) == watchdog_process._SIZE
  assert state["text"].endswith("...")
  say(folder, 1, "left")
  assert read_state(file_of(folder, 1)) == {"is": "left", "beats": 1}


def test_no_file_is_made_in_a_folder_that_goes(folder):
  with pytest.raises(FileNotFoundError):
    write_state(file_of(folder, 1), {"is": "working"})


def guard(folder, index, lines=()):
  """The last state a guard of three processes writes, what it says to both."""
  say(folder, index, "working", 0)
  done = subprocess.run(
    [
      *(sys.executable, "-I", "-S", watchdog_process.__file__),
      *map(str, (index, 3, folder, TURN)),
    ],
    input="".join(json.dumps(line) + "\n" for line in lines),
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  return read_state(file_of(folder, index)), done.stdout, done.stderr


def test_an_end_without_a_word_is_told(folder):
  state, _, said = guard(folder, 1)
  assert state["is"] == "lost"
  assert said.startswith("error: process 1 ended or was killed before its ")


def test_an_end_with_the_first_process_names_that(folder):
  say(folder, 0, "lost")
  _, heard, said = guard(folder, 1)
  assert "process 0 ended" in json.loads(heard.splitlines()[0])["error"]["text"]
  assert said.startswith("error: process 0 ended or was killed before its ")
  assert said.endswith("Process 1 was ended with it.\n")


def test_what_the_first_ones_guard_sees_is_shown_to_all(folder):
  """The process itself may be stuck, and ended by JAX much later."""
  say(folder, 2, "lost")
  state, _, said = guard(folder, 0)
  assert state["is"] == "failed"
  assert state["text"].startswith("process 2 ended or was killed")
  assert said.startswith("error: process 2 ended or was killed before its ")
  assert said.endswith("Process 0 was ended with it.\n")


@pytest.mark.parametrize(
  ("last", "kept"), [("done", "left"), ("left", "left"), ("failed", "failed")]
)
def test_an_end_that_was_announced_is_quiet(folder, last, kept):
  state, _, said = guard(folder, 1, [{"is": last, "text": "", "kind": "lost"}])
  assert (state["is"], said) == (kept, "")


STOPPED = """
import os, subprocess, sys
guard = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
print("began", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP")
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_is_stopped_is_named_and_told_from_a_dead_one(
  folder, index
):
  """By its guard, which goes on; a short stop is none."""
  say(folder, index, "working", 0)
  words = (
    *(sys.executable, "-I", "-S", watchdog_process.__file__),
    *map(str, (index, 2, folder, 0.05)),
  )
  guarded = subprocess.Popen(
    [sys.executable, "-c", STOPPED, *words],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )

  def state_after(turns):
    time.sleep(turns * 0.05)
    return read_state(file_of(folder, index))

  assert guarded.stdout.readline() == "began\n"
  other = 1 - index
  say(folder, other, "done")
  guarded.send_signal(signal.SIGSTOP)
  state_after(3)
  guarded.send_signal(signal.SIGCONT)
  assert state_after(20)["is"] == "working"
  guarded.send_signal(signal.SIGSTOP)
  end = time.monotonic() + 30
  while (found := state_after(2))["is"] == "working":
    assert time.monotonic() < end
  assert (found["is"], found["kind"]) == ("failed", "lost")
  said = f"process {index} is stopped .SIGSTOP.* process {guarded.pid} on "
  assert re.match(said, found["text"])
  assert f"kill -KILL {guarded.pid}" in found["text"]
  error = Lookout(folder, [index]).look()["error"]
  assert error == {"text": found["text"], "kind": "lost"}
  guarded.send_signal(signal.SIGCONT)  # too late: others were told
  assert state_after(10)["is"] == "failed"
  guarded.communicate(timeout=60)


def test_a_guard_ends_when_the_folder_is_gone(tmp_path):
  gone = subprocess.Popen(
    [
      *(sys.executable, "-I", "-S", watchdog_process.__file__),
      *map(str, (0, 2, tmp_path / "gone", TURN)),
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
  )
  assert gone.wait(60) == 0
  gone.stdin.close()
