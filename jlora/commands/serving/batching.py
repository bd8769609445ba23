# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: rows of one batch that come and go on their own.

    queue ─► a free row, an adapter in a slot ─► pieces of the prompt ─► tokens

One thread runs all programs. A job that is done or cancelled gives its row and
its adapter back before the next turn.
"""

import collections
import dataclasses
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jlora.adapting.serving import Lease
from jlora.commands.serving.adapters import Adapters, Loading
from jlora.commands.serving.decoding import Bank, Choice, Decoder, Rows
from jlora.commands.serving.refusals import Refused, closing
from jlora.loras import Lora
from jlora.routing.modalities import check_cache


class Said(NamedTuple):
  """What a job hears of its text.

  Attributes:
    tokens: further ones.
    end: "stop" after a token that ends texts, "length" at the limit; None if
      more will come.
    error: why nothing more will come.
  """

  tokens: tuple[int, ...] = ()
  end: str | None = None
  error: Refused | None = None


@dataclasses.dataclass(eq=False)
class Job:
  """One text to be continued.

  Attributes:
    tokens: of the prompt.
    adapter: its name; None for the base.
    limit: tokens that are said at most.
    temperature: 0 for the most likely tokens.
    seed: of the tokens that are drawn; they depend on nothing else.
    ends: tokens after which a text is over; they are not said.
    tell: called with what is said, in the batcher's thread.
    is_cancelled: set it, and nothing more is said.
    loading: of the adapter.
  """

  tokens: Sequence[int]
  adapter: str | None
  limit: int
  temperature: float
  seed: int
  ends: frozenset[int]
  tell: Callable[[Said], None]
  is_cancelled: bool = False
  loading: Loading | None = None


@dataclasses.dataclass(eq=False)
class _Row:
  """A job in a row of the batch.

  Attributes:
    identity: of the adapter, when the first key was cached.
    unread: tokens of the prompt, with its padding, that are to be read.
    at: position of what is read or said next.
  """

  job: Job
  lease: Lease | None
  identity: int
  unread: list[int]
  skip: int
  chance: np.ndarray
  at: int = 0
  last: int = 0
  said: int = 0


class Batcher:
  """A thread that continues texts, each with an adapter of its own.

  Args:
    decoder: the programs.
    adapters: by name.
    queue: jobs that may wait for a row.
  """

  def __init__(self, decoder: Decoder, adapters: Adapters, queue: int = 256):
    self.decoder, self.adapters = decoder, adapters
    self._most = queue
    self._queue: collections.deque[Job] = collections.deque()
    self._rows: list[_Row | None] = [None] * decoder.sizes.rows
    self._news = threading.Condition()
    self._has_news = self._is_closed = self._is_over = False
    self._then: Callable[[], None] = lambda: None
    self.failure: Exception | None = None
    self._thread = threading.Thread(target=self._run, name="batcher")

  def start(self) -> None:
    """Compiles the programs, then begins to take jobs."""
    self.warm_up()
    self._thread.start()

  def warm_up(self) -> None:
    """Runs every program once, on nothing."""
    room, sizes = self.adapters.room, self.decoder.sizes
    name = "nothing yet"
    for path, (*lead, into, out) in [*room.shapes.items()][:1]:
      blank = _zero_lora(lead, into, out)
      room.give_back(room.fill(name, {path: blank}))
      room.forget(name)
    one = _choice(1)
    self.decoder.read(room.bank, 0, -1, [0] * sizes.piece, 0, 0, one)
    self._say([None] * sizes.rows)

  def submit(self, jobs: Sequence[Job]) -> None:
    """Puts jobs at the end of the queue, all or none; begins to read adapters.

    Raises:
      Refused: the queue is too long, an adapter is not known, or the server is
        being stopped.
    """
    with self._news:
      if self._is_closed:
        raise closing()
      if len(self._queue) + len(jobs) > self._most:
        raise Refused(
          503,
          "queue_full",
          f"{len(self._queue)} texts are waiting, of {self._most} that may; "
          "ask again later.",
        )
      for job in jobs:
        if job.adapter is not None:
          self.adapters.check(job.adapter)
      self._queue.extend(jobs)
      for job in [*self._queue][: len(self._rows)]:
        self._ask(job)
    self._wake()

  def cancel(self, jobs: Sequence[Job]) -> None:
    """Stops jobs, wherever they are."""
    for job in jobs:
      job.is_cancelled = True
    self._wake()

  def close(self) -> None:
    """Takes no further jobs; goes on with those there are."""
    with self._news:
      self._is_closed = True
    self._wake()

  def halt(self) -> None:
    """Ends the thread soon; jobs that are not done hear that it is over."""
    with self._news:
      self._is_closed = self._is_over = True
    self._wake()

  def when_over(self, call: Callable[[], None]) -> None:
    """Has something called when the thread ends, however it does."""
    self._then = call

  def stop(self) -> None:
    """Ends the thread, and waits for that."""
    self.halt()
    if self._thread.is_alive():
      self._thread.join()

  @property
  def counts(self) -> dict[str, int]:
    """Returns how many jobs run, and how many wait."""
    with self._news:
      running = sum(row is not None for row in self._rows)
      return {"running": running, "waiting": len(self._queue)}

  def _wake(self, *_) -> None:
    """Tells the thread that something has changed."""
    with self._news:
      self._has_news = True
      self._news.notify()

  def _run(self) -> None:
    """Takes turns until it is stopped."""
    trouble = closing()
    try:
      while not self._is_over:
        if not self._turn():
          with self._news:
            self._news.wait_for(lambda: self._has_news)
            self._has_news = False
    except Exception as error:  # a program failed: nobody is left waiting
      trouble = Refused(500, "failed", f"The server failed: {error!r}")
      self.failure = error
      traceback.print_exception(error)
    finally:
      with self._news:
        self._is_closed = True
        left = [*self._queue, *(row.job for row in self._rows if row)]
        self._queue.clear()
        self._rows = [None] * len(self._rows)
      for job in left:
        job.tell(Said(error=trouble))
      self._then()

  def _turn(self) -> bool:
    """Does something for every row; returns whether there was a row."""
    for place, row in enumerate(self._rows):
      if row is not None and row.job.is_cancelled:
        self._free(place)
    self._admit()
    for place, row in enumerate(self._rows):
      if row is not None and row.unread:
        self._read(place, row)
    speaking = [x if x and not x.unread else None for x in self._rows]
    if any(speaking):
      self._hear(speaking, self._say(speaking))
    return any(self._rows)

  def _admit(self) -> None:
    """Starts waiting jobs, in their order, as far as there is room.

    A job whose adapter is still being read is passed by others. One that waits
    for a slot is passed by jobs of the base alone: others would keep the slots.
    """
    with self._news:
      waiting = list(self._queue)
    is_full = False
    # Those far behind are not read yet: host memory is for those in front.
    for job in waiting[: 2 * len(self._rows)]:
      free = [i for i, row in enumerate(self._rows) if row is None]
      if not job.is_cancelled:
        try:
          lease = self._lease(job) if free and not is_full else self._ask(job)
        except Refused as error:
          job.tell(Said(error=error))
          self._leave_queue(job)
          continue
        if not free:
          continue
        if job.adapter is not None and lease is None:
          is_full = is_full or self._is_read(job)
          continue
        self._rows[free[0]] = self._seat(job, lease)
      self._leave_queue(job)

  def _leave_queue(self, job: Job) -> None:
    """Takes a job out of the queue."""
    with self._news:
      self._queue.remove(job)

  def _ask(self, job: Job) -> None:
    """Begins to read a job's adapter before there is a row for it."""
    adapters = self.adapters
    if job.adapter is None or adapters.is_in_slot(job.adapter):
      return
    if job.loading and adapters.is_current(job.adapter, job.loading):
      return
    job.loading = adapters.ask(job.adapter)
    if not job.loading.future.done():
      job.loading.future.add_done_callback(self._wake)

  def _is_read(self, job: Job) -> bool:
    """Returns whether a job's adapter is in memory."""
    return job.loading is not None and job.loading.future.done()

  def _lease(self, job: Job) -> Lease | None:
    """Brings a job's adapter to a slot; None if it has none, or not yet."""
    if job.adapter is None:
      return None
    if lease := self.adapters.hold(job.adapter):
      return lease
    self._ask(job)
    if job.loading is None or not self._is_read(job):
      return None
    lease = self.adapters.lease(job.adapter, job.loading)
    if not self.adapters.is_current(job.adapter, job.loading):
      self._wake()  # replaced just now: ask again, in the next turn
    return lease

  def _seat(self, job: Job, lease: Lease | None) -> _Row:
    """Gives a job a row."""
    sizes = self.decoder.sizes
    skip = sizes.skip(len(job.tokens))
    chance = np.random.default_rng(job.seed).random(
      job.limit + sizes.steps, np.float32
    )
    identity = int(self.adapters.room.ids([lease])[0])
    unread = [0] * skip + list(job.tokens)
    job.loading = None  # host memory may be needed for others
    return _Row(job, lease, identity, unread, skip, chance)

  def _free(self, place: int) -> None:
    """Takes a job out of its row."""
    row = self._rows[place]
    self._rows[place] = None
    if row is not None and row.lease is not None:
      self.adapters.room.give_back(row.lease)

  def _bank(self, rows: Sequence[_Row | None]) -> tuple[np.ndarray, Bank]:
    """Returns ids and bank, if rows have the adapters of their caches."""
    room = self.adapters.room
    ids = room.ids([row.lease if row else None for row in rows])
    check_cache(ids, [row.identity if row else -1 for row in rows])
    return ids, room.bank

  def _read(self, place: int, row: _Row) -> None:
    """Reads a piece of a row's prompt; after the last one it says a token."""
    piece = self.decoder.sizes.piece
    ids, bank = self._bank([row])
    choice = Choice(np.array([row.job.temperature], np.float32), row.chance[:1])
    part, row.unread = row.unread[:piece], row.unread[piece:]
    token = self.decoder.read(
      bank, place, int(ids[0]), part, row.at, row.skip, choice
    )
    row.at += piece
    if not row.unread:
      self._tell(place, row, [int(token)])

  def _say(self, rows: Sequence[_Row | None]) -> np.ndarray:
    """Says some tokens of every row."""
    count, steps = len(rows), self.decoder.sizes.steps
    ids, bank = self._bank(rows)
    where = Rows(ids, *np.zeros((3, count), np.int32))
    choice = _choice(count, steps)
    for place, row in enumerate(self._rows):
      if row is not None:  # also one that is read: its next piece goes there
        where.at[place] = row.at
    for place, row in enumerate(rows):
      if row is not None:
        where.tokens[place], where.skip[place] = row.last, row.skip
        choice.temperature[place] = row.job.temperature
        choice.chance[place] = row.chance[row.said : row.said + steps]
    return np.asarray(self.decoder.say(bank, where, choice))

  def _hear(self, rows: Sequence[_Row | None], said: np.ndarray) -> None:
    """Hands the tokens of a turn to their jobs."""
    for place, row in enumerate(rows):
      if row is not None:
        row.at += said.shape[1]
        self._tell(place, row, said[place].tolist())

  def _tell(self, place: int, row: _Row, tokens: list[int]) -> None:
    """Tells a job its tokens, as many as it wants; frees its row at the end."""
    job = row.job
    tokens = tokens[: job.limit - row.said]
    over = next((i for i, x in enumerate(tokens) if x in job.ends), None)
    row.said += len(tokens)
    row.last = tokens[-1]
    end = "length" if row.said >= job.limit else None
    if over is not None:
      tokens, end = tokens[:over], "stop"
    if end is not None:
      self._free(place)
    if not job.is_cancelled:
      job.tell(Said(tuple(tokens), end))


def _choice(rows: int, steps: int = 0) -> Choice:
  """Returns a choice of the most likely tokens."""
  shape = (rows, steps) if steps else (rows,)
  return Choice(np.zeros(rows, np.float32), np.zeros(shape, np.float32))


def _zero_lora(lead: Sequence[int], into: int, out: int) -> Lora:
  """Returns a Lora that changes nothing."""
  parts = ((*lead, 1, into), (*lead, 1, out), tuple(lead))
  return Lora(*(np.zeros(shape, np.float32) for shape in parts))  # pyright: ignore
