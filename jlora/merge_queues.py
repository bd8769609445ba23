# SPDX-License-Identifier: Apache-2.0
"""Tensors of a merge in work: a few at a time, by threads, out in order."""

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from jlora.merge_inputs import Piece
from jlora.merge_jobs import Job
from jlora.merge_steps import Merger
from jlora.progress import Progress

THREADS = 3  # two merge, one reads
_AHEAD = 2 * THREADS
_MEMORY = 512 * 2**20  # of tensors and their float32 copies in work at a time


class _Task(NamedTuple):
  """A tensor, or a piece of one, to be made: `begin` has the pool do it."""

  name: str
  cost: int
  begin: Callable[[], Future]


def merge_all(
  merger: Merger,
  jobs: Sequence[Job],
  pool: ThreadPoolExecutor,
  progress: Progress,
) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
  """Tensors in turn, the largest first, each as an iterator of its parts.

  Args:
    merger: makes them.
    jobs: what they are made of.
    pool: that works. It takes up what is asked of it in order.
    progress: told of every part once it has been taken.

  Yields:
    (name, parts); what is in work is within 512 MiB, or one task.

  Example:
    >>> import io
    >>> from jlora.merge_jobs import Source
    >>> from jlora.merging.averages import linear
    >>> from jlora.pairs import Part
    >>> job = Job("w", (1,), np.dtype(np.float32),
    ...           (Source("a", Part("w")),), None, (("weights", (1.0,)),))
    >>> merger = Merger(linear, {"a": {"w": np.ones(1)}}, None)
    >>> with ThreadPoolExecutor(1) as pool, Progress(4, io.StringIO()) as bar:
    ...   for name, parts in merge_all(merger, [job], pool, bar):
    ...     print(name, list(parts))
    w [array([1.], dtype=float32)]
  """
  jobs = sorted(jobs, key=lambda job: -_cost(job))
  tasks = (task for job in jobs for task in _tasks(merger, job, pool))
  parts = _in_order(tasks, progress)
  for name, group in itertools.groupby(parts, key=lambda part: part[0]):
    yield name, (array for _, array in group)


def _cost(job: Job, piece: Piece | None = None) -> int:
  """Bytes in work: of all inputs, and of float32 copies of them."""
  size = math.prod(job.shape) if piece is None else piece.size
  return (4 + 8) * size * (len(job.sources) + (job.base is not None))


def _tasks(
  merger: Merger, job: Job, pool: ThreadPoolExecutor
) -> Iterator[_Task]:
  """A tensor's pieces; what they must be told is begun before the first."""
  pieces = merger.pieces(job)
  measured = [
    pool.submit(merger.measure, job, piece)
    for piece in pieces
    if piece is not None and merger.is_measured(job)
  ]
  for piece in pieces:
    make = functools.partial(_make, merger, job, piece, measured)
    yield _Task(
      job.name, _cost(job, piece), functools.partial(pool.submit, make)
    )


def _make(merger, job, piece, measured) -> np.ndarray:
  # The pool has begun them all, so the wait is short and ends.
  return merger(job, piece, [future.result() for future in measured])


def _in_order(
  tasks: Iterator[_Task], progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
  """What tasks make, with some begun ahead and none waiting long."""
  begun: deque[tuple[_Task, Future]] = deque()
  used = 0
  try:
    for task in itertools.chain(tasks, [None]):
      while begun and (
        task is None or len(begun) >= _AHEAD or used + task.cost > _MEMORY
      ):
        done, future = begun.popleft()
        array = future.result()
        del future
        yield done.name, array
        used -= done.cost
        progress.update(array.nbytes, done.name)
        del array
      if task is not None:
        used += task.cost
        begun.append((task, task.begin()))
  finally:
    for _, future in begun:
      future.cancel()
