# SPDX-License-Identifier: Apache-2.0
"""Shares out modules among processes and factors this process's part.

missing ─► over the limit: all processes together, each its own shards
        └► the others: dealt out by cost, a few at a time in threads
"""

import bisect
import functools
import heapq
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.extraction.module import Extractor, Outcome
from jlora.extraction.planning import ModuleJob, Plan
from jlora.numerics.meshes import place_array
from jlora.pairing.comparison import is_same, stored_dtype
from jlora.pairing.pairs import read_region_of_side
from jlora.runs.journal import Journal
from jlora.runs.pool import MEMORY, THREADS, Room, finish_all, open_pool
from jlora.runs.processes import (
  LostProcess,
  everywhere,
  gather,
  is_of_collective,
  process_count,
  process_index,
)
from jlora.runs.progress import Progress
from jlora.runs.watchdog import Watch


class Cut(NamedTuple):
  """The axis of a stored tensor to cut, and the number of equal parts."""

  axis: int
  parts: int


def factor_missing(
  plan: Plan,
  journal: Journal,
  missing: Sequence[int],
  extractor: Extractor,
  *,
  split_bytes: int,
  watch: Watch,
  log: IO[str] | None,
) -> None:
  """Factors this process's share of the missing modules into the journal.

  Args:
    plan: the run's plan.
    journal: shared by all processes.
    missing: positions of the plan's jobs that are not in it, the same on all
      processes.
    extractor: what factors them.
    split_bytes: a tensor that takes more bytes in float32 is cut over all
      devices.
    watch: tells whether another process was lost.
    log: where progress goes; None is standard error.

  Raises:
    ValueError: damaged inputs, on any process.
    LostProcess: another process ended.
  """
  count, index = process_count(), process_index()
  split, rest = _sort_by_size([plan.jobs[at] for at in missing], split_bytes)
  mine = [rest[at] for at in deal([job.cost for job in rest], count)[index]]
  done = [job for at, job in enumerate(plan.jobs) if at not in {*missing}]
  if index:  # the first process reports what was done before
    done = []
  total = sum(job.nbytes for job in (*mine, *done))
  total += sum(job.nbytes // count for job in split)
  with Progress(total, log, who=index if count > 1 else None) as progress:
    room = Room(_memory([job.bytes_in_work for job in mine]))
    share = _Share(plan, journal, extractor, progress, room)
    for job in done:
      share.tell(job, job.nbytes, journal[job.pair.path])
    try:
      for job in split:
        watch.check()
        share.factor_split(job)
    except Exception as error:
      if isinstance(error, LostProcess) or is_of_collective(error):
        watch.explain(error)
      raise
    _in_threads(share.factor_whole, mine, extractor, watch)


def deal(costs: Sequence[int], hands: int) -> list[list[int]]:
  """Deals items to hands so that the largest load is small.

  Longest processing time first: items in descending order, each to the hand
  with the least so far; ties go to the earlier item and the earlier hand. The
  largest load is at most `4/3 - 1/(3 hands)` times the smallest possible.

  Args:
    costs: cost of every item, integers of any unit.
    hands: how many there are to deal to.

  Returns:
    For every hand the positions of its items, in the order they were dealt;
    every item is in one hand. Equal costs give equal hands on every process.

  Raises:
    ValueError: fewer than one hand, or a negative cost.

  Example:
    >>> deal([3, 5, 4, 4], 2)
    [[1, 0], [2, 3]]

  References:
    Graham (1969), bounds on multiprocessing timing anomalies.
  """
  if hands < 1:
    raise ValueError(f"There must be a hand to deal to, got {hands}.")
  if any(cost < 0 for cost in costs):
    raise ValueError(f"Costs must not be negative, got {min(costs)}.")
  dealt: list[list[int]] = [[] for _ in range(hands)]
  loads = [(0, hand) for hand in range(hands)]
  for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
    load, hand = loads[0]
    dealt[hand].append(item)
    heapq.heapreplace(loads, (load + costs[item], hand))
  return dealt


def cut(shape: tuple[int, ...], devices: int) -> Cut:
  """Chooses how to cut a tensor: into as many parts as divide one axis.

  Args:
    shape: the tensor's shape in its file.
    devices: how many there are.

  Returns:
    Cut. If several axes allow as many parts, the first: its parts are one run
    of bytes each, while for other axes every process reads whole rows.

  Example:
    >>> cut((6, 8), 4), cut((6, 9), 4), cut((5, 7), 4)
    (Cut(axis=1, parts=4), Cut(axis=0, parts=3), Cut(axis=0, parts=1))
  """
  return min(
    (
      Cut(axis, math.gcd(parts, size))
      for parts in range(1, devices + 1)
      for axis, size in enumerate(shape)
      if size
    ),
    key=lambda found: (-found.parts, found.axis),
    default=Cut(0, 1),
  )


_AXIS = "shards"


def share_out(shape: tuple[int, ...]) -> NamedSharding | None:
  """Returns how a tensor is sharded over all devices; None if it is not cut.

  Args:
    shape: the tensor's shape in its file.

  Returns:
    A sharding over a mesh of one axis, of the first devices of all processes.
  """
  devices = jax.devices()
  axis, parts = cut(shape, len(devices))
  if parts == 1:
    return None
  mesh = Mesh(
    np.asarray(devices[:parts]), (_AXIS,), axis_types=(AxisType.Auto,)
  )
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, _AXIS))


class _Share:
  """One process's share of the work: factors, journals and reports modules."""

  def __init__(self, plan, journal, extractor, progress, room):
    self._base, self._finetuned = plan.base, plan.finetuned
    self._journal, self._extractor = journal, extractor
    self._progress, self._room = progress, room
    self._saying = threading.Lock()

  def factor_whole(self, job: ModuleJob) -> None:
    """Factors a module alone and puts it into the journal."""
    if is_same(job.pair, self._base, self._finetuned):
      outcome = Outcome("unchanged")
    else:
      with self._room.taken(job.bytes_in_work):
        outcome = self._extractor(job, self._base, self._finetuned)
    self._keep(job, job.nbytes, outcome, True)

  def factor_split(self, job: ModuleJob) -> None:
    """Factors a module together with all processes; one journals it."""
    pair, part = job.pair, (process_index(), process_count())
    sharding: Any = share_out(pair.shape)
    sides = (self._base, pair.base), (self._finetuned, pair.finetuned)
    nbytes = job.nbytes // process_count()
    same = everywhere(lambda: is_same(pair, self._base, self._finetuned, part))
    is_writer = sharding.mesh.devices.flat[0].process_index == process_index()
    if all(gather(bool(same))):
      self._keep(job, nbytes, Outcome("unchanged"), is_writer)
      return
    takes_part = bool(sharding.addressable_devices)

    def load():
      """Reads this process's shards of both sides."""
      one, two = (
        place_array(
          pair.shape, sharding, functools.partial(read_region_of_side, *side)
        )
        for side in sides
      )
      return one, two

    arrays: Any = everywhere(load if takes_part else lambda: None)
    if takes_part:
      stored = stored_dtype(self._finetuned, pair.finetuned)
      outcome = self._extractor.split(job, arrays, stored)
      self._keep(job, nbytes, outcome, is_writer)

  def _keep(self, job, nbytes, outcome: Outcome, is_writer: bool) -> None:
    """Journals what became of a module, and reports it."""
    record = {
      "status": outcome.status,
      "why": outcome.why,
      "figures": dict(outcome.figures),
    }
    if is_writer:
      self._journal.put(job.pair.path, outcome.arrays, record)
    self.tell(job, nbytes, record)

  def tell(self, job: ModuleJob, nbytes: int, record: dict[str, Any]) -> None:
    """Reports a finished module to the progress."""
    figures, path = record["figures"], job.pair.path
    with self._saying:
      if not figures:
        self._progress.update(nbytes, path)
        return
      errors = figures["errors"]
      self._progress.update(
        nbytes,
        path,
        len(errors) - 1,
        error=errors[-1],
        norm=figures["norm"],
      )


def _sort_by_size(
  jobs: Sequence[ModuleJob], split_bytes: int
) -> tuple[list[ModuleJob], list[ModuleJob]]:
  """Splits jobs into those that all processes do together, and the others."""
  split, rest = [], []
  for job in jobs:
    shape = job.pair.shape
    is_large = 4 * math.prod(shape) > split_bytes and job.can_be_split
    (split if is_large and share_out(shape) else rest).append(job)
  return split, rest


def _memory(needs: Sequence[int]) -> int:
  """Returns how many bytes may be in work at a time.

  It is a pool's default, or more if two modules of the usual size need more:
  working on one at a time would leave cores idle.
  """
  needs = sorted(needs)
  sums = list(itertools.accumulate(needs, initial=0))
  # The usual size: modules up to it hold half of all bytes.
  usual = needs[bisect.bisect_left(sums[1:], sums[-1] / 2)] if needs else 0
  return max(MEMORY, 2 * usual)


_POLL = 0.5  # seconds between two looks at how the other processes are


def _in_threads(
  work: Callable[[ModuleJob], None],
  jobs: Sequence[ModuleJob],
  extractor: Extractor,
  watch: Watch,
) -> None:
  """Runs `work` on every job in threads; stops if a process is lost."""
  devices = extractor.devices
  turns, lock = itertools.cycle(devices), threading.Lock()

  def begin() -> None:
    """Gives a new thread the next device."""
    if devices:
      with lock:
        extractor.use(next(turns))

  threads = THREADS + 2 * max(len(devices) - 1, 0)
  # The largest first, so that no thread waits long at the end.
  order = sorted(jobs, key=lambda job: -math.prod(job.pair.shape))
  with open_pool(threads, begin, lambda: watch.is_lost) as pool:
    pending = {pool.submit(work, job) for job in order}
    seconds = None if process_count() == 1 else _POLL
    finish_all(pending, watch.check, seconds)
