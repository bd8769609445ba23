# SPDX-License-Identifier: Apache-2.0
"""Programs compiled once for each signature, whichever thread asks first."""

import threading
from collections.abc import Callable, Hashable
from typing import Any


class Programs:
  """Compiled programs by signature; safe to ask from several threads.

  Threads that ask for a program that another one is compiling wait for it;
  different programs compile side by side.

  Example:
    >>> programs = Programs()
    >>> programs.get("double", lambda: lambda x: 2 * x)(3), len(programs)
    (6, 1)
  """

  def __init__(self):
    self._programs: dict[Hashable, Any] = {}
    self._locks: dict[Hashable, threading.Lock] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._programs)

  def get(self, signature: Hashable, compile: Callable[[], Any]) -> Any:
    """Returns the program of a signature, compiled if it is the first call.

    Args:
      signature: all that the program hangs on: shapes, dtypes, options.
      compile: makes the program; called at most once for a signature.

    Returns:
      What `compile` gave.
    """
    with self._lock:
      lock = self._locks.setdefault(signature, threading.Lock())
    with lock:
      if signature not in self._programs:
        self._programs[signature] = compile()
    return self._programs[signature]
