# SPDX-License-Identifier: Apache-2.0
"""A small process beside each process of a run on several: is all well?

  python -I -S watchdog_process.py INDEX COUNT FOLDER SECONDS

It needs the standard library alone, so that it starts in no time and JAX's
runtime cannot take it along. Its standard input is a pipe from the process it
guards: the lines are states, and the end is that process's own. Every few
seconds it writes the state into a file of the shared folder and reads others':
the first process those of all, all others that of the first, which shows them
what it finds. That also goes to its standard output, as lines of JSON.

A process that is stopped (SIGSTOP, Ctrl-Z) keeps its pipe open while it does
nothing. Its guard goes on, asks the system, and after a while tells the others:
they end with its name before JAX aborts them.

Files are written in place: on network file systems a file is looked at anew
when it is opened, while a name may be taken from a cache for a minute.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any

TURN = 1.0  # seconds
# So many turns of one's own without a sign of life: a file system that stops
# for all stops these too, and nobody is called lost.
_SILENT = 30
# So many turns of a stopped process, before JAX's own patience ends.
_STOPPED = 15
_PATIENCE = 8  # turns in which a lost process's guard finds out why
_SIZE = 4096  # bytes of a file: one write
_WORKING, _DONE, _LEFT = "working", "done", "left"
_FAILED, _LOST = "failed", "lost"
HINT = "Run the same command with --resume (resume=True)"


def file_of(folder: str, index: int) -> str:
  """Returns the file of a process's state.

  Args:
    folder: of the run's states.
    index: of the process.

  Returns:
    A path.

  Example:
    >>> file_of("states", 3)
    'states/3.json'
  """
  return os.path.join(folder, f"{index}.json")


def write_state(file: str, state: dict[str, Any], flags: int = 0) -> None:
  """Writes a state in place, in one go.

  Args:
    file: where; made by `flags=os.O_CREAT` alone.
    state: for JSON; a text that is too long is cut.
    flags: for `os.open`.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_state(folder + "/0.json", {"is": "working"}, os.O_CREAT)
    ...   read_state(folder + "/0.json")
    {'is': 'working'}
  """
  text = str(state.get("text", ""))
  while len(line := json.dumps(state).encode()) > _SIZE:
    text = text[: len(text) // 2]
    state = {**state, "text": text + "..."}
  handle = os.open(file, os.O_WRONLY | os.O_NOFOLLOW | flags, 0o644)
  try:
    os.pwrite(handle, line.ljust(_SIZE), 0)
  finally:
    os.close(handle)


def read_state(file: str) -> dict[str, Any]:
  """Reads a state, empty where there is none or it is half written.

  Args:
    file: of `file_of`.

  Returns:
    `is`, "working", "done" (its share), "left", "failed" or "lost"; `beats`, a
    number that grows; `text` and `kind` of an error.

  Example:
    >>> read_state("/nowhere/0.json")
    {}
  """
  try:
    with open(file, "rb") as stream:
      return json.loads(stream.read())
  except (OSError, ValueError):
    return {}


class Lookout:
  """Reads other processes' states, and counts who is silent for how long.

  Args:
    folder: of the run's states.
    watched: whose.

  Example:
    >>> Lookout("/nowhere", [0]).look()["present"]
    1
  """

  def __init__(self, folder: str, watched: Iterable[int]):
    self._files = {index: file_of(folder, index) for index in watched}
    self._states = dict.fromkeys(self._files, {"is": _WORKING, "beats": -1})
    self._silent = dict.fromkeys(self._files, 0)

  def look(self) -> dict[str, Any]:
    """Looks at all states, which it should once a turn.

    Returns:
      `error`, the first failed process's {text, kind}, or of lost ones; None.
      `done`, whether all have done their share. `present`, how many may still
      be waiting for something.
    """
    for index, file in self._files.items():
      state = read_state(file) or self._states[index]
      is_new = state.get("beats") != self._states[index].get("beats")
      self._silent[index] = 0 if is_new else self._silent[index] + 1
      self._states[index] = state
    of = {index: self._state_of(index) for index in self._files}
    here = [index for index in of if of[index] in (_WORKING, _DONE)]
    return {
      "error": self._error(of),
      "done": all(state in (_DONE, _LEFT) for state in of.values()),
      "present": len(here),
    }

  def _state_of(self, index: int) -> str:
    """Returns a process's state, which is over after a long silence."""
    state = str(self._states[index]["is"])
    if self._silent[index] < _SILENT:
      return state
    return {_WORKING: _LOST, _DONE: _LEFT}.get(state, state)

  def _error(self, of: dict[int, str]) -> dict[str, Any] | None:
    """Returns what went wrong, causes before effects."""
    for index, state in of.items():
      if state == _FAILED:
        return {key: self._states[index][key] for key in ("text", "kind")}
    lost = [index for index in of if of[index] == _LOST]
    known = [at for at in lost if self._states[at].get("is") == _LOST]
    if not lost:
      return None
    # One that is known to have ended is the cause of another's silence.
    text = tell_lost(known) if known else tell_silent(lost)
    return {"text": text, "kind": _LOST}


def tell_lost(lost: list[int]) -> str:
  """Returns the sentence about processes that are no more.

  Args:
    lost: their indices, at least one.

  Returns:
    What happened and what to do.

  Example:
    >>> tell_lost([2])
    'process 2 ended or was killed before its share was done. Run the same \
command with --resume (resume=True): what is finished is kept.'
  """
  whose = "its share was" if len(lost) == 1 else "their shares were"
  return (
    f"{_name(lost)} ended or {'was' if len(lost) == 1 else 'were'} killed "
    f"before {whose} done. {HINT}: what is finished is kept."
  )


def tell_silent(lost: list[int]) -> str:
  """Returns the sentence about processes whose guards say nothing any more.

  Args:
    lost: their indices, at least one.

  Returns:
    What happened and what to do.

  Example:
    >>> tell_silent([1, 2])[:44]
    'processes 1, 2 gave no sign of life for 30 s'
  """
  whose = "its host is" if len(lost) == 1 else "their hosts are"
  return (
    f"{_name(lost)} gave no sign of life for {_SILENT * TURN:.0f} s: {whose} "
    "gone, suspended or cut off from the shared folder. "
    f"{HINT}: what is finished is kept."
  )


def tell_stopped(index: int, pid: int) -> str:
  """Returns the sentence about a process that is stopped and still there.

  Args:
    index: of the process.
    pid: its number on this machine.

  Returns:
    What happened and what to do.

  Example:
    >>> tell_stopped(2, 4711)[:48]
    'process 2 is stopped (SIGSTOP or Ctrl-Z; not end'
  """
  return (
    f"process {index} is stopped (SIGSTOP or Ctrl-Z; not ended: it is process "
    f"{pid} on {os.uname().nodename}). End it, by `kill -KILL {pid}` there. "
    f"{HINT}: what is finished is kept."
  )


def is_stopped(pid: int) -> bool:
  """Returns whether a process is stopped, as the system says.

  Args:
    pid: its number.

  Returns:
    bool; False if there is no such process.

  Example:
    >>> is_stopped(os.getpid())
    False
  """
  try:
    if os.path.isdir("/proc/self"):
      with open(f"/proc/{pid}/stat", "rb") as file:
        state = file.read().rpartition(b")")[2].split()[0]
    else:
      with os.popen(f"ps -o state= -p {pid}") as said:
        state = said.read().strip().encode()
  except (OSError, IndexError):
    return False
  return state[:1] == b"T"


def _name(indices: list[int]) -> str:
  """Names processes, the first three."""
  few = ", ".join(map(str, indices[:3])) + (", ..." if len(indices) > 3 else "")
  return f"process {few}" if len(indices) == 1 else f"processes {few}"


def main(argv: list[str]) -> None:
  """Guards until the pipe ends or the folder is gone.

  Args:
    argv: index, count, folder and seconds of a turn.
  """
  index, count, folder, turn = int(argv[0]), int(argv[1]), argv[2], argv[3]
  # The pipe tells the end, and a Ctrl-Z is for the process alone.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP):
    signal.signal(number, signal.SIG_IGN)
  watched = range(1, count) if index == 0 else [0]
  try:
    _guard(index, folder, Lookout(folder, watched), float(turn))
  except OSError:
    return  # the folder is gone, or nobody listens


def _guard(index: int, folder: str, lookout: Lookout, turn: float) -> None:
  """Shows the process's state and reads others', turn by turn until it ends."""
  file, state, beats, said = file_of(folder, index), {"is": _WORKING}, 0, None
  pid, stopped = os.getppid(), 0
  while True:
    found = lookout.look()
    if stopped < _STOPPED:  # what the others were told stays so
      stopped = stopped + 1 if is_stopped(pid) else 0
    if found != said:
      said = found
      os.write(1, json.dumps(found).encode() + b"\n")
    lines, is_over = _listen(turn)
    if is_over:
      break
    state = json.loads(lines[-1]) if lines else state
    beats += 1
    shown = state
    if index == 0 and state["is"] == _WORKING and found["error"]:
      # The others see this state alone, and it may be stuck in a collective.
      shown = {"is": _FAILED, **found["error"]}
    elif state["is"] == _WORKING and stopped == _STOPPED:
      told = {"text": tell_stopped(index, pid), "kind": _LOST}
      shown = {"is": _FAILED, **told}
    write_state(file, {**shown, "beats": beats})
  # Over without a word: killed, or ended by JAX's runtime.
  if state["is"] == _WORKING:
    error = found["error"]
    shown = {"is": _FAILED, **error} if error else {"is": _LOST}
    write_state(file, {**shown, "beats": beats + 1})
    _tell(index, error, lookout, turn)
  elif state["is"] == _DONE:
    write_state(file, {"is": _LEFT, "beats": beats + 1})
  # Otherwise all is said, and the folder may be removed.


def _tell(
  index: int, error: dict[str, Any] | None, lookout: Lookout, turn: float
) -> None:
  """Says on standard error why the guarded process is no more."""
  for _ in range(_PATIENCE if index else 0):
    error = error or lookout.look()["error"]
    if error:
      break
    time.sleep(turn)
  text = tell_lost([index])
  if error and error["text"] != text:
    text = f"{error['text']} Process {index} was ended with it."
  print(f"error: {text}", file=sys.stderr, flush=True)


def _listen(seconds: float) -> tuple[list[bytes], bool]:
  """Returns lines that came within a time, and whether the pipe has ended."""
  if not select.select([0], [], [], seconds)[0]:
    return [], False
  came = os.read(0, 2**16)
  return came.splitlines(), not came


if __name__ == "__main__":
  main(sys.argv[1:])
