# SPDX-License-Identifier: Apache-2.0
"""Compiles each program once, whichever thread asks first."""

import threading
from collections.abc import Callable, Hashable
from typing import Any


class Programs:
  """Compiled programs by signature; several threads may ask at once.

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
    """Returns the program of a signature; compiles it on the first call.

    Args:
      signature: all that the program depends on: shapes, dtypes, options.
      compile: makes the program; called once for a signature.

    Returns:
      What `compile` returned.
    """
    with self._lock:
      lock = self._locks.setdefault(signature, threading.Lock())
    with lock:
      if signature not in self._programs:
        self._programs[signature] = compile()
    return self._programs[signature]
