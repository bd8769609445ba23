# SPDX-License-Identifier: Apache-2.0
"""Threads for a run's tensors, within a bound of memory.

`finish_all` waits for work in any order and looks around meanwhile;
`finish_in_order` hands results on in the order they were asked for.
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
    name: of the tensor it is for.
    nbytes: of memory that it takes.
    begin: asks the pool to do it.
  """

  name: str
  nbytes: int
  begin: Callable[[], Future]


class Room:
  """Bytes that may be in work at a time; what is larger is let in alone.

  Args:
    limit: bytes.

  Example:
    >>> room = Room(10)
    >>> with room.taken(25):
    ...   pass
  """

  def __init__(self, limit: int):
    self._limit, self._used = limit, 0
    self._changed = threading.Condition()

  @contextlib.contextmanager
  def taken(self, nbytes: int) -> Iterator[None]:
    """Waits until there is room, and gives it back in the end."""
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
  """Opens a pool of threads, each of which has BLAS to itself.

  BLAS's own threads would fight over the cores that the pool's work on. At the
  end work in progress is waited for, unless `is_lost` says that it never ends.
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
  """Waits for all work, calling `check` between; raises what failed first."""
  while pending:
    done, pending = wait(pending, seconds, FIRST_EXCEPTION)
    for future in done:
      future.result()
    check()


def finish_in_order(
  tasks: Iterable[Task], memory: int = MEMORY, ahead: int = 2 * THREADS
) -> Iterator[tuple[Task, Any]]:
  """Yields each task with its result, in their order, some begun ahead.

  Args:
    tasks: asked for one at a time, as there is room for them.
    memory: bytes of the tasks that are begun and not yet taken; a larger one
      is begun alone.
    ahead: the most tasks that are begun.

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
