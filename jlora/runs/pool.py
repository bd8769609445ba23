# SPDX-License-Identifier: Apache-2.0
"""Works on a run's tensors in threads, within a bound of memory.

`finish_all` waits for work in any order and runs a check meanwhile;
`finish_in_order` yields results in the order of the tasks.
"""

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from threadpoolctl import threadpool_limits

THREADS = 3  # two compute, one reads ahead
MEMORY = 512 * 2**20  # bytes of tensors and their float32 copies in work


class Task(NamedTuple):
  """One piece of work for a pool.

  Attributes:
    name: the tensor it is for.
    nbytes: memory that it takes, in bytes.
    begin: submits it to the pool.
  """

  name: str
  nbytes: int
  begin: Callable[[], Future]


class Room:
  """A budget of bytes in work at a time; a larger item goes alone.

  Args:
    limit: bytes.
  """

  def __init__(self, limit: int):
    self._limit, self._used = limit, 0
    self._changed = threading.Condition()

  @contextlib.contextmanager
  def taken(self, nbytes: int) -> Iterator[None]:
    """Waits until there is room, and frees it at the end of the context."""
    with self._changed:
      self._changed.wait_for(
        lambda: self._used == 0 or self._used + nbytes <= self._limit
      )
      self._used += nbytes
    try:
      yield
    finally:
      with self._changed:
        self._used -= nbytes
        self._changed.notify_all()


@contextlib.contextmanager
def open_pool(
  threads: int = THREADS,
  begin: Callable[[], None] | None = None,
  is_lost: Callable[[], bool] = lambda: False,
) -> Iterator[ThreadPoolExecutor]:
  """Opens a pool of threads in which BLAS uses one thread each.

  BLAS's own threads would compete with the pool's for the cores. At the end the
  pool waits for work in progress, unless `is_lost` says that it will never end.
  """
  pool = ThreadPoolExecutor(threads, initializer=begin)
  with threadpool_limits(1, user_api="blas"):
    try:
      yield pool
    finally:
      pool.shutdown(wait=not is_lost(), cancel_futures=True)


def finish_all(
  pending: set[Future],
  check: Callable[[], None],
  seconds: float | None,
) -> None:
  """Waits for all work, calling `check` between; raises the first failure."""
  while pending:
    done, pending = wait(pending, seconds, FIRST_EXCEPTION)
    for future in done:
      future.result()
    check()


def finish_in_order(
  tasks: Iterable[Task], memory: int = MEMORY, ahead: int = 2 * THREADS
) -> Iterator[tuple[Task, Any]]:
  """Yields each task with its result, in order; begins some ahead.

  Args:
    tasks: taken one at a time, as there is room for them.
    memory: bytes of the tasks begun and not yet consumed; a larger task is
      begun alone.
    ahead: the most tasks begun at a time.

  Yields:
    (task, result). A task counts as in work until the next one is asked for.

  Example:
    >>> with open_pool(1) as pool:
    ...   tasks = [Task(n, 8, lambda n=n: pool.submit(len, n)) for n in "ab"]
    ...   [(task.name, result) for task, result in finish_in_order(tasks)]
    [('a', 1), ('b', 1)]
  """
  begun: deque[tuple[Task, Future]] = deque()
  used = 0
  try:
    for task in itertools.chain(tasks, [None]):
      while begun and (
        task is None or len(begun) >= ahead or used + task.nbytes > memory
      ):
        done, future = begun.popleft()
        result = future.result()
        del future
        yield done, result
        used -= done.nbytes
        del result
      if task is not None:
        used += task.nbytes
        begun.append((task, task.begin()))
  finally:
    for _, future in begun:
      future.cancel()
