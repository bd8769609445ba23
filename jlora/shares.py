# SPDX-License-Identifier: Apache-2.0
"""The modules of a run worked off: split ones by all together, the rest dealt.

missing ─► over the limit: every process, in one order, its own shards
        └► the others: each process its hand, a few at a time in threads
"""

import bisect
import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import IO, Any

import jax
from threadpoolctl import threadpool_limits

from jlora.dealing import cost_of, deal
from jlora.hosts import (
  LostProcess,
  everywhere,
  gather,
  process_count,
  process_index,
)
from jlora.journal import Journal
from jlora.meshes import place
from jlora.modules import Extractor, Outcome
from jlora.pairs import Pair, read_region
from jlora.plans import Plan, bytes_on_disk
from jlora.progress import Progress, Room
from jlora.readings import is_same, stored_dtype
from jlora.splits import can_be_split, share_out
from jlora.watches import Watch

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

  Example:
    See `extract_checkpoint`, which calls it.

    >>> work_off.__name__
    'work_off'
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
        place(pair.shape, sharding, functools.partial(read_region, *side))
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
