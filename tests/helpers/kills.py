# SPDX-License-Identifier: Apache-2.0
"""Kills a run at each of its operations on files, without a process for each.

After the operation at which it dies a run changes nothing more, whatever its
`finally` clauses try, as if its process were gone; the memory it leaves behind
is not looked at.
"""

import contextlib
import os
import threading
from unittest import mock

# Everything of `os` that changes what is on the disk; `pathlib` and `shutil`
# call these too.
OPERATIONS = (
  *("open", "mkdir", "replace", "rename", "link", "symlink"),
  *("unlink", "remove", "rmdir", "truncate", "ftruncate"),
  *("write", "pwrite", "fsync", "fdatasync"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killed(BaseException):
  """What a process that is gone would not raise."""


@contextlib.contextmanager
def killed_at(count, *, after=False):
  """Ends the block at its count-th operation, before or after it is done.

  Yields the names of the operations so far, which fills up.
  """
  done, lock, is_dead = [], threading.Lock(), threading.Event()

  def watched(name, real):
    def operation(*args, **kwargs):
      if name == "open" and not (args[1] & _WRITING):
        return real(*args, **kwargs)
      with lock:
        if is_dead.is_set():
          raise Killed
        done.append(name)
        if len(done) - 1 == count:
          is_dead.set()
          if after:
            with contextlib.suppress(OSError):  # nobody is there to be told
              real(*args, **kwargs)
          raise Killed
      return real(*args, **kwargs)

    return operation

  with contextlib.ExitStack() as patched:
    for name in OPERATIONS:
      real = getattr(os, name)
      patched.enter_context(mock.patch.object(os, name, watched(name, real)))
    yield done


def count_operations(run):
  """How often a run changes something on the disk."""
  with killed_at(-1) as done:
    run()
  return len(done)
