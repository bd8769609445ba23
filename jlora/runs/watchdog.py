# SPDX-License-Identifier: Apache-2.0
"""A process's view of the others while a run works: its guard's other end.

What JAX's coordination service does, measured with jax 0.10.2 and three CPU
processes, heartbeat_timeout_seconds=50 (in brackets 10):

  one is              the others are     after        and get
  killed              in a collective    at once      ValueError: UNKNOWN: Gloo
  killed              computing          47 s (6-8)   an abort
  stopped             doing either       47 s (7)     an abort
  killed, process 0   doing either       0.2 s        an abort
  stopped, process 0  doing either       48 s         an abort

An abort is SIGABRT after "Terminating process because the JAX distributed
service detected fatal errors": no line of Python runs any more. An ordinary
exit after the ValueError ends in one too. `jax_enable_recoverability`, set
before JAX is initialised, spares the others unless process 0 is killed, but
then nothing tells them, and a collective waits for ever. No sooner, and if all
call it together, `multihost_utils.live_devices`, "not stable", tells who lives.

So what is here: within seconds, or half a minute for a host, an exception that
names the process and says to resume, however JAX was initialised; after an
abort, the same words; and what is wrong on one process, said by all.
"""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jlora.runs import watchdog_process
from jlora.runs.processes import LostProcess

_LINGER = 30.0  # seconds that the first process stays for the others at the end
_TEXT = 600  # characters of an error that others are told: a line of a pipe
_NOTHING = {"error": None, "done": True, "present": 0}


class Watch:
  """Tells others how this process is doing, and raises when one of them ends.

  Used in a `with`: what is raised inside is told to all, on whom it comes out
  as the same ValueError, or as LostProcess. With one process it does nothing.

  Args:
    folder: of the run's states, on a file system that all share; it is there.
    index: of this process.
    count: of processes.
    turn: seconds between two signs of life; None is `watchdog_process.TURN`.

  Example:
    >>> with Watch(Path("states"), 0, 1) as watch:
    ...   watch.check()
  """

  def __init__(
    self, folder: Path, index: int, count: int, turn: float | None = None
  ):
    self._folder, self._index, self._count = folder, index, count
    self._turn = watchdog_process.TURN if turn is None else turn
    self._guard, self._heard, self._found = None, b"", dict(_NOTHING)

  def __enter__(self) -> "Watch":
    if self._count > 1:
      self._found = {"error": None, "done": False, "present": self._count}
      self._start()
    return self

  def _start(self) -> None:
    """Starts the guard."""
    state = watchdog_process.file_of(str(self._folder), self._index)
    watchdog_process.write_state(
      state, {"is": "working", "beats": 0}, os.O_CREAT
    )
    words = self._index, self._count, self._folder, self._turn
    self._guard = subprocess.Popen(
      [sys.executable, "-I", "-S", watchdog_process.__file__, *map(str, words)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )

  def __exit__(self, _, error: BaseException | None, __) -> None:
    if self._guard is None:
      return
    if error is None:
      self._say({"is": "left"})
    else:
      self._say({"is": "failed", **self._told(error)})
    if self._index == 0:
      # JAX's coordinator is here: without it the others are ended at once.
      self._wait(lambda found: not found["present"], _LINGER)
    self._close()

  @property
  def is_lost(self) -> bool:
    """Returns whether a process is known to be lost."""
    error = self._found["error"]
    return error is not None and error["kind"] == "lost"

  def check(self) -> None:
    """Raises what is known to be wrong with the others, if anything.

    Raises:
      ValueError: another process found something wrong with the inputs.
      LostProcess: another one ended or was killed.
    """
    self._hear(0.0)
    if error := self._found["error"]:
      kinds = {"input": ValueError}
      raise kinds.get(error["kind"], LostProcess)(error["text"])

  def done(self) -> None:
    """Tells the others that this process has done its share."""
    self._say({"is": "done"})

  def wait(self) -> None:
    """Waits until the others have done their shares.

    The others wait for the first alone, which writes the results.

    Raises:
      ValueError, LostProcess: as `check`.
    """
    while True:
      self.check()
      if self._found["done"]:
        return
      self._hear(self._turn)

  def explain(self, error: Exception) -> None:
    """Raises why JAX failed, once the guard must know it.

    Args:
      error: of a collective.

    Raises:
      ValueError, LostProcess: as `check`; the error itself, if all is well.
    """
    self._wait(lambda found: found["error"], 20 * self._turn)
    try:
      self.check()
    except (ValueError, LostProcess) as known:
      raise known from error
    raise error

  def _wait(self, is_enough, seconds: float) -> None:
    """Listens until the guard has said enough, or for some seconds."""
    end = time.monotonic() + seconds
    while not is_enough(self._found) and time.monotonic() < end:
      if not self._hear(self._turn):
        return

  def _hear(self, seconds: float) -> bool:
    """Takes what the guard has said; returns False if it has ended."""
    if self._guard is None or self._guard.stdout is None:
      return False
    pipe = self._guard.stdout.fileno()
    while select.select([pipe], [], [], seconds)[0]:
      came = os.read(pipe, 2**16)
      if not came:
        hint = watchdog_process.HINT
        text = f"The guard of process {self._index} has ended. {hint}."
        known = self._found["error"] or {"text": text, "kind": "lost"}
        self._found = {**self._found, "error": known}
        return False
      *lines, self._heard = (self._heard + came).split(b"\n")
      if lines:
        self._found = json.loads(lines[-1])
      seconds = 0.0
    return True

  def _say(self, state: dict[str, Any]) -> None:
    """Gives the guard a state to show."""
    if self._guard is None or self._guard.stdin is None:
      return
    try:
      self._guard.stdin.write(json.dumps(state).encode() + b"\n")
      self._guard.stdin.flush()
    except BrokenPipeError:
      pass  # the others see its silence

  def _told(self, error: BaseException) -> dict[str, Any]:
    """Returns what the others are told of an error."""
    known, text = self._found["error"], str(error)
    if known and known["text"] == text:
      return known
    if isinstance(error, LostProcess):
      return {"text": text[:_TEXT], "kind": "lost"}
    if isinstance(error, ValueError):
      return {"text": f"process {self._index}: {text}"[:_TEXT], "kind": "input"}
    how = f"{type(error).__name__} {text}".strip()[:_TEXT]
    text = f"process {self._index} ended by {how}. {watchdog_process.HINT}."
    return {"text": text, "kind": "lost"}

  def _close(self) -> None:
    """Ends the guard."""
    if self._guard is None:
      return
    try:
      self._guard.communicate(timeout=10 * self._turn)
    except subprocess.TimeoutExpired:
      self._guard.kill()
