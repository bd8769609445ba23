# SPDX-License-Identifier: Apache-2.0
"""The modules of a run worked off: split ones by all together, the rest dealt.

missing ─► over the limit: every process, in one order, its own shards
        └► the others: each process its hand, a few at a time in threads
"""

import bisect
import contextlib
import functools
import heapq
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from threadpoolctl import threadpool_limits

from jlora.extraction.module import Extractor, Outcome
from jlora.extraction.planning import Plan, bytes_on_disk
from jlora.numerics.meshes import place_array
from jlora.pairing.comparison import is_same, stored_dtype
from jlora.pairing.pairs import Pair, TensorPart, read_region_of_side
from jlora.runs.journal import Journal
from jlora.runs.processes import (
  LostProcess,
  everywhere,
  gather,
  process_count,
  process_index,
)
from jlora.runs.progress import Progress, Room
from jlora.runs.watchdog import Watch
from jlora.selection import is_floating

# Entries of the Krylov space's blocks a module is multiplied with: 11 products
# of rank + 16 rows each. A short side below that many is multiplied once.
_PRODUCTS, _OVERSAMPLE = 11, 16
# Operations of a product that take as long as reading an entry of both tensors
# and all that is done to it once. Only the ratio matters, and only roughly.
_PER_ENTRY = 160


def deal(costs: Sequence[int], hands: int) -> list[list[int]]:
  """Which item goes to whom, so that the last is done soon.

  The longest processing time first: items in descending order, each to whoever
  has least so far; ties go to the earlier item and the earlier hand. The
  largest load is at most `4/3 - 1/(3 hands)` times the smallest possible.

  Args:
    costs: of every item, integers of any unit.
    hands: how many there are to deal to.

  Returns:
    For every hand the positions of its items, in the order they were dealt;
    every item is in one hand. The same costs give the same hands everywhere.

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


def cost_of(shape: Sequence[int], rank: int) -> int:
  """What a tensor of a pair costs a run, roughly, for `deal`.

  Args:
    shape: (..., in, out) of a module; of what is not factored any shape.
    rank: triplets to find; 0: the tensor is only read.

  Returns:
    Operations of matrix products that would take as long.

  Example:
    >>> cost_of((4096, 4096), 64) > 10 * cost_of((4096, 4096), 0)
    True
  """
  entries = math.prod(shape)
  if not rank:
    return entries * _PER_ENTRY
  rows = min(_PRODUCTS * (rank + _OVERSAMPLE), *shape[-2:])
  return entries * (_PER_ENTRY + 2 * rows)


_AXIS = "shards"


class Cut(NamedTuple):
  """Into how many equal parts, and along which axis of the file's tensor."""

  axis: int
  parts: int


def cut(shape: tuple[int, ...], devices: int) -> Cut:
  """How a tensor is cut: over as many devices as divide one of its axes.

  Args:
    shape: as it lies in the file.
    devices: how many there are.

  Returns:
    Cut; the first axis where several can be cut into as many, as its parts are
    one run of bytes each. Of other axes every process reads whole rows.

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


def share_out(shape: tuple[int, ...]) -> NamedSharding | None:
  """Where the parts of a tensor go; None if there is only one.

  Args:
    shape: as it lies in the file.

  Returns:
    A sharding over a mesh of one axis of the first devices of all processes.

  Example:
    >>> share_out((1, 1)) is None
    True
  """
  devices = jax.devices()
  axis, parts = cut(shape, len(devices))
  if parts == 1:
    return None
  mesh = Mesh(
    np.asarray(devices[:parts]), (_AXIS,), axis_types=(AxisType.Auto,)
  )
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, _AXIS))


def can_be_split(plan: Plan, pair: Pair) -> bool:
  """Whether a pair is two whole floating matrices that are to be factored.

  Args:
    plan: the run's.
    pair: one of its pairs.

  Returns:
    bool; False of stacks, of parts and of what is kept whole.
  """
  if pair.whole or not plan.views[pair.path] or pair.path in plan.refused:
    return False
  return all(
    isinstance(side, TensorPart)
    and not (side.index or side.swap)
    and is_floating(checkpoint.spec[side.name].dtype)
    and checkpoint.spec[side.name].shape == pair.shape
    for checkpoint, side in (
      (plan.base, pair.base),
      (plan.finetuned, pair.finetuned),
    )
  )


_THREADS = 3  # two factor, one reads ahead
# Bytes of tensors and their float32 copies in work at a time; more where two
# modules of the usual size need more: one alone would leave cores idle.
_MEMORY = 512 * 2**20
_POLL = 0.5  # seconds between two looks at how the other processes are


def work_off(
  plan: Plan,
  journal: Journal,
  missing: Sequence[Pair],
  extractor: Extractor,
  *,
  rank: int,
  split_bytes: int,
  watch: Watch,
  log: IO[str] | None,
) -> None:
  """Brings this process's share of the missing pairs into the journal.

  Args:
    plan: the run's.
    journal: shared by all processes.
    missing: pairs that are not in it, the same on all processes.
    extractor: what factors them.
    rank: of every module.
    split_bytes: a tensor that is larger in float32 is cut over all devices.
    watch: of the other processes.
    log: where progress goes, None is standard error.

  Raises:
    ValueError: inputs that are damaged, on any process.
    LostProcess: another process ended.
  """
  count, index = process_count(), process_index()
  large = [pair for pair in missing if _is_large(plan, pair, split_bytes)]
  split = [pair for pair in large if share_out(pair.shape)]
  rest = [pair for pair in missing if pair not in split] if split else missing
  costs = [_cost(plan, pair, rank) for pair in rest]
  mine = [rest[at] for at in deal(costs, count)[index]]
  told = {pair.path for pair in missing}
  done = [pair for pair in plan.pairing.pairs if pair.path not in told]
  total = sum(bytes_on_disk(plan, pair) for pair in mine)
  total += sum(bytes_on_disk(plan, pair) // count for pair in split)
  if index == 0:
    total += sum(bytes_on_disk(plan, pair) for pair in done)
  who = index if count > 1 else None
  with Progress(total, log, who=who) as progress:
    room = Room(_memory([_bytes_in_work(plan, pair) for pair in mine]))
    share = _Share(plan, journal, extractor, rank, progress, room)
    if index == 0:
      for pair in done:
        share.tell(pair, bytes_on_disk(plan, pair), journal[pair.path])
    try:
      for pair in split:
        watch.check()
        share.factor_split(pair)
    except (jax.errors.JaxRuntimeError, LostProcess) as error:
      watch.explain(error)
    _in_threads(share.factor_whole, mine, extractor, watch)


class _Share:
  """What one process does with a pair."""

  def __init__(self, plan, journal, extractor, rank, progress, room):
    self._plan, self._journal, self._rank = plan, journal, rank
    self._extractor, self._progress = extractor, progress
    self._room, self._saying = room, threading.Lock()

  def factor_whole(self, pair: Pair) -> None:
    """Puts a pair into the journal."""
    plan = self._plan
    nbytes = bytes_on_disk(plan, pair)
    if is_same(pair, plan.base, plan.finetuned):
      outcome = Outcome("unchanged")
    else:
      rank = 0 if pair.path in plan.refused else self._rank
      with self._room.taken(_bytes_in_work(plan, pair)):
        outcome = self._extractor(
          pair, plan.views[pair.path], rank, plan.base, plan.finetuned
        )
    self._keep(pair, nbytes, outcome, True)

  def factor_split(self, pair: Pair) -> None:
    """Puts a pair into the journal, together with all other processes."""
    plan, part = self._plan, (process_index(), process_count())
    sharding: Any = share_out(pair.shape)
    sides = (plan.base, pair.base), (plan.finetuned, pair.finetuned)
    nbytes = bytes_on_disk(plan, pair) // process_count()
    same = everywhere(lambda: is_same(pair, plan.base, plan.finetuned, part))
    is_writer = sharding.mesh.devices.flat[0].process_index == process_index()
    if all(gather(bool(same))):
      self._keep(pair, nbytes, Outcome("unchanged"), is_writer)
      return
    takes_part = bool(sharding.addressable_devices)

    def load():
      one, two = (
        place_array(
          pair.shape, sharding, functools.partial(read_region_of_side, *side)
        )
        for side in sides
      )
      return one, two

    arrays: Any = everywhere(load if takes_part else lambda: None)
    if takes_part:
      view: Any = plan.views[pair.path]
      stored = stored_dtype(plan.finetuned, pair.finetuned)
      outcome = self._extractor.split(pair, view, self._rank, arrays, stored)
      self._keep(pair, nbytes, outcome, is_writer)

  def _keep(self, pair, nbytes, outcome: Outcome, is_writer: bool) -> None:
    record = {
      "status": outcome.status,
      "why": outcome.why,
      "figures": dict(outcome.figures),
    }
    if is_writer:
      self._journal.put(pair.path, outcome.arrays, record)
    self.tell(pair, nbytes, record)

  def tell(self, pair: Pair, nbytes: int, record: dict[str, Any]) -> None:
    """Counts a finished pair."""
    figures = record["figures"]
    with self._saying:
      if not figures:
        self._progress.update(nbytes, pair.path)
        return
      errors = figures["errors"]
      self._progress.update(
        nbytes,
        pair.path,
        len(errors) - 1,
        error=errors[-1],
        norm=figures["norm"],
      )


def _bytes_in_work(plan: Plan, pair: Pair) -> int:
  """Both tensors and the float32 arrays that are made of them."""
  return bytes_on_disk(plan, pair) + 12 * math.prod(pair.shape)


def _memory(needs: Sequence[int]) -> int:
  """Bytes that may be in work at a time."""
  needs = sorted(needs)
  sums = list(itertools.accumulate(needs, initial=0))
  # The usual size: in modules up to it lies half of all bytes.
  usual = needs[bisect.bisect_left(sums[1:], sums[-1] / 2)] if needs else 0
  return max(_MEMORY, 2 * usual)


def _is_large(plan: Plan, pair: Pair, split_bytes: int) -> bool:
  return 4 * math.prod(pair.shape) > split_bytes and can_be_split(plan, pair)


def _cost(plan: Plan, pair: Pair, rank: int) -> int:
  view = plan.views[pair.path]
  if view is None or pair.whole or pair.path in plan.refused:
    return cost_of(pair.shape, 0)
  return cost_of(view.shape(pair.shape), rank)


def _in_threads(
  work: Callable[[Pair], None],
  pairs: Sequence[Pair],
  extractor: Extractor,
  watch: Watch,
) -> None:
  """Does some work on pairs, a few at a time, as long as all is well."""
  devices = extractor.devices
  turns, lock = itertools.cycle(devices), threading.Lock()

  def begin() -> None:
    if devices:
      with lock:
        extractor.use(next(turns))

  # A module a thread: BLAS's own threads would fight over the same cores.
  threads = _THREADS + 2 * max(len(devices) - 1, 0)
  pool = ThreadPoolExecutor(threads, initializer=begin)
  # The largest first: at the end no thread waits long for another's.
  with threadpool_limits(1, user_api="blas"), _ended(pool, watch):
    order = sorted(pairs, key=lambda pair: -math.prod(pair.shape))
    pending = {pool.submit(work, pair) for pair in order}
    while pending:
      pending = _wait(pending, None if process_count() == 1 else _POLL)
      watch.check()


def _wait(pending: set[Future], seconds: float | None) -> set[Future]:
  """The work that is not finished after a time; raises what failed."""
  done, rest = wait(pending, seconds, FIRST_EXCEPTION)
  for future in done:
    future.result()
  return rest


@contextlib.contextmanager
def _ended(pool: ThreadPoolExecutor, watch: Watch):
  """Ends a pool: after work in progress, unless a lost process ends the run."""
  try:
    yield
  finally:
    pool.shutdown(wait=not watch.is_lost, cancel_futures=True)
