# SPDX-License-Identifier: Apache-2.0
"""A bank of fixed room, whose slots are filled and replaced while programs run.

    folder, or anything read  ─►  Shelf, host memory  ─►  Room, device memory

`Room` is the bank: its arrays never change their shapes, so that a program that
takes them is compiled once. `Shelf` keeps more adapters in host memory, and
reads what it lacks in the background.
"""

import collections
import concurrent.futures
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.loras import Lora, Loras, check_loras
from jlora.messages import name_some

Shapes = Mapping[str, tuple[int, ...]]


class Lease(NamedTuple):
  """An adapter in use: its slot is not replaced until it is given back.

  Attributes:
    name: of the adapter.
    slot: of the room; the id of its rows.
    filling: which filling of any slot it was. Keys and values that were cached
      under one filling are wrong under another.
  """

  name: str
  slot: int
  filling: int


class Room:
  """A bank with a fixed number of slots, filled by name.

  Each slot holds an adapter padded with zeros to the room's rank and modules,
  or zeros. To fill one moves that adapter to the device and writes it in place:
  the others are not copied, and nothing is compiled after the first time. When
  all slots are taken, the least recently used one goes that nobody holds.

  The bookkeeping may be called from any thread. `fill` gives the arrays of
  `bank` away, so call it in the thread that runs the programs, and ask for
  `bank` anew each time.

  Args:
    shapes: path -> (..., in, out), of the modules that adapters may change; a
      room without modules is for the base alone.
    slots: adapters that it holds at once.
    rank: the largest of an adapter's modules.
    dtype: of the factors; adapters are rounded to it.

  Raises:
    ValueError: slots or a rank below 1, or a module that is no matrix.

  Example:
    >>> room = Room({"w": (3, 2)}, slots=2, rank=4)
    >>> one = {"w": Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(1))}
    >>> lease = room.fill("one", one)
    >>> room.bank["w"].a.shape, room.ids([lease, None]).tolist()
    ((2, 4, 3), [0, -1])
  """

  def __init__(
    self,
    shapes: Shapes,
    *,
    slots: int = 64,
    rank: int = 16,
    dtype: Any = jnp.float32,
  ):
    short = [f"{p} {shape}" for p, shape in shapes.items() if len(shape) < 2]
    if short or slots < 1 or rank < 1:
      raise ValueError(
        f"A room of {slots} slots of rank {rank} cannot be made; needed are at "
        f"least 1 of each, and (..., in, out) for all of {len(shapes)} modules"
        f"{'' if not short else f', not {name_some(short)}'}."
      )
    self.shapes = dict(shapes)
    self.slots, self.rank, self.dtype = slots, rank, jnp.dtype(dtype)
    self._bank = _empty_bank(self.shapes, slots, rank, self.dtype)
    self._lock = threading.RLock()
    self._free = list(range(slots))[::-1]
    # name -> its lease; the least recently used come first.
    self._held: collections.OrderedDict[str, Lease] = collections.OrderedDict()
    self._users: collections.Counter[int] = collections.Counter()
    self._live: dict[int, Lease] = {}  # slot -> what is in it
    self._fillings = 0

  @property
  def bank(self) -> Loras:
    """Returns the arrays, as of `make_bank`; valid until the next `fill`."""
    return self._bank

  @property
  def names(self) -> list[str]:
    """Lists the adapters in slots, the least recently used first."""
    with self._lock:
      return list(self._held)

  def has(self, name: str) -> bool:
    """Returns whether an adapter is in a slot.

    Args:
      name: of the adapter.
    """
    with self._lock:
      return name in self._held

  @property
  def is_full(self) -> bool:
    """Returns whether every slot is in use, so that `fill` would raise."""
    with self._lock:
      return not self._free and self._idle() is None

  def check(self, loras: Mapping[str, Lora], name: str = "the adapter") -> None:
    """Raises unless an adapter fits into a slot.

    Args:
      loras: path -> Lora, of NumPy or JAX.
      name: of the adapter, for errors.

    Raises:
      ValueError: a module that the room does not have, another shape, a rank
        above the room's, or a number that is not finite, which would spoil
        every row of a batch; names up to three.
    """
    check_loras(loras)
    wrong = [why for path in loras if (why := self._misfit(path, loras[path]))]
    if wrong or not loras:
      raise ValueError(
        f"{name} does not fit the room of rank {self.rank} for "
        f"{len(self.shapes)} modules: {name_some(wrong) or 'it changes none'}."
      )

  def hold(self, name: str) -> Lease | None:
    """Takes an adapter into use if it is in a slot.

    Args:
      name: of the adapter.

    Returns:
      Its Lease, to be given back once for each call; None if it must be filled.
    """
    with self._lock:
      lease = self._held.get(name)
      if lease is not None:
        self._users[lease.filling] += 1
        self._held.move_to_end(name)
      return lease

  def fill(self, name: str, loras: Mapping[str, Lora]) -> Lease:
    """Puts an adapter into a slot, in place of the least recently used one.

    Args:
      name: of the adapter. If it has a slot already, it gets another one; the
        former is free once it is given back.
      loras: path -> Lora; may lack modules, and have smaller ranks.

    Returns:
      Its Lease, in use. Moves the bytes of one slot to the device.

    Raises:
      ValueError: as `check`, or all slots are in use.
    """
    self.check(loras, name)
    with self._lock:
      if self.is_full:
        used = [lease.name for lease in self._live.values()]
        raise ValueError(
          f"All {self.slots} slots are in use, by {name_some(sorted(used))}; "
          "give one back, or make a larger room."
        )
      self.forget(name)
      if not self._free:
        self.forget(self._idle() or "")
      slot = self._free.pop()
      self._fillings += 1
      lease = Lease(name, slot, self._fillings)
      self._held[name] = self._live[slot] = lease
      self._users[lease.filling] += 1
    padded = {path: self._padded(path, loras.get(path)) for path in self.shapes}
    self._bank = _put(self._bank, np.int32(slot), padded)
    return lease

  def give_back(self, lease: Lease) -> None:
    """Ends one use of an adapter.

    Args:
      lease: from `hold` or `fill`.

    Raises:
      ValueError: it was given back already.
    """
    with self._lock:
      if not self._users[lease.filling]:
        raise ValueError(f"{lease} was given back; take it once for each use.")
      self._users[lease.filling] -= 1
      if self._held.get(lease.name) == lease:
        self._held.move_to_end(lease.name)
      self._clear_out(lease)

  def forget(self, name: str) -> None:
    """Takes an adapter out; those who hold it keep it until they give it back.

    Args:
      name: of an adapter; nothing happens if it has no slot.
    """
    with self._lock:
      lease = self._held.pop(name, None)
      if lease is not None:
        self._clear_out(lease)

  def ids(self, leases: Sequence[Lease | None]) -> np.ndarray:
    """Looks up each row's id, and makes sure that its cache is still valid.

    Args:
      leases: of each row, with which its keys and values were cached; None for
        the base.

    Returns:
      (B,) int32, slots; -1 for the base.

    Raises:
      ValueError: a lease that was given back: its slot may hold another adapter
        now, under which the row's cache is wrong; names up to three.
    """
    with self._lock:
      wrong = [
        f"row {row}: {lease.name}"
        for row, lease in enumerate(leases)
        if lease is not None and not self._users[lease.filling]
      ]
    if wrong:
      raise ValueError(
        f"{len(wrong)} rows have caches of adapters that were given back: "
        f"{name_some(wrong)}; compute their keys and values again."
      )
    return np.array([-1 if x is None else x.slot for x in leases], np.int32)

  def _idle(self) -> str | None:
    """Returns the least recently used adapter that nobody holds."""
    return next(
      (n for n, x in self._held.items() if not self._users[x.filling]), None
    )

  def _clear_out(self, lease: Lease) -> None:
    """Frees the slot of an adapter that is neither named nor in use."""
    is_gone = self._held.get(lease.name) != lease
    if is_gone and not self._users[lease.filling]:
      del self._users[lease.filling], self._live[lease.slot]
      self._free.append(lease.slot)

  def _misfit(self, path: str, lora: Lora) -> str | None:
    """Says why a Lora does not fit its module."""
    needed = self.shapes.get(path)
    if needed is None:
      return f"{path} is no module of it"
    given = (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    if given != needed:
      return f"{path} is for {given}, needed is {needed}"
    if lora.rank > self.rank:
      return f"{path} has rank {lora.rank}"
    with np.errstate(over="ignore"):
      factors = [np.asarray(x).astype(self.dtype) for x in (lora.a, lora.b)]
    if not all(np.isfinite(x).all() for x in (*factors, lora.scale)):
      return f"{path} is not finite in {self.dtype}"
    return None

  def _padded(self, path: str, lora: Lora | None) -> Lora:
    """Pads a Lora to the room's rank in host memory; zeros for none."""
    *lead, into, out = self.shapes[path]
    a = np.zeros((*lead, self.rank, into), self.dtype)
    b = np.zeros((*lead, self.rank, out), self.dtype)
    scale: Any = np.zeros(lead, np.float32)
    if lora is not None:
      a[..., : lora.rank, :], b[..., : lora.rank, :] = lora.a, lora.b
      scale = np.asarray(lora.scale, np.float32)
    return Lora(a, b, scale)  # pyright: ignore


def fetch_rows(bank: Mapping[str, Lora], ids: jax.Array) -> Loras:
  """Fetches the adapter of each row, for a vmap over rows.

      a (n, ..., r, in)  →  (B, ..., r, in)

  Made once for many tokens, it is cheaper than `adapt_rows`, which looks the
  ids up at every product; and what a row computes does not depend on the slot.

  Args:
    bank: of a `Room`, or from `make_bank`.
    ids: (B,) int32; -1 for none, which is a scale of zero.

  Returns:
    Loras with rows in place of adapters; copies B adapters. NaN as the scale of
    ids outside of the bank.

  Example:
    >>> bank = {"w": Lora(jnp.ones((2, 1, 3)), jnp.ones((2, 1, 2)),
    ...                   jnp.array([0.5, 2.0]))}
    >>> fetch_rows(bank, jnp.array([1, -1, 0]))["w"].scale
    Array([2. , 0. , 0.5], dtype=float32)
  """

  def fetched(lora: Lora) -> Lora:
    """Fetches the rows of one module."""
    at = jnp.clip(ids, 0, len(lora.a) - 1)
    scale = lora.scale[at]
    known = jnp.expand_dims(ids, tuple(range(1, scale.ndim)))
    scale = jnp.where(known == -1, jnp.zeros_like(scale), scale)
    is_out = (known < -1) | (known >= len(lora.a))
    scale = jnp.where(is_out, jnp.full_like(scale, jnp.nan), scale)
    return Lora(lora.a[at], lora.b[at], scale)

  return {path: fetched(lora) for path, lora in bank.items()}


class Shelf:
  """Adapters in host memory by name, read in the background.

  Keeps up to `nbytes` of them; the least recently asked for go first, and are
  read again when they are asked for.

  Args:
    read: name -> Loras, called in a thread of the shelf's own.
    nbytes: of all adapters that are kept.
    threads: adapters that are read at once.

  Example:
    >>> one = {"w": Lora(np.ones((1, 3)), np.ones((1, 2)), np.float32(1))}
    >>> with Shelf({"one": one}.__getitem__) as shelf:
    ...   shelf.ask("one").result()["w"].rank, shelf.names
    (1, ['one'])
  """

  def __init__(
    self,
    read: Callable[[str], Mapping[str, Lora]],
    *,
    nbytes: int = 2**30,
    threads: int = 1,
  ):
    self._read, self._most = read, nbytes
    self._lock = threading.Lock()
    self._kept: collections.OrderedDict[str, Loras] = collections.OrderedDict()
    self._reading: dict[str, concurrent.futures.Future] = {}
    self._pool = concurrent.futures.ThreadPoolExecutor(threads, "shelf")

  def __enter__(self) -> "Shelf":
    """Returns itself."""
    return self

  def __exit__(self, *_: Any) -> None:
    """Waits for what is being read."""
    self.close()

  @property
  def names(self) -> list[str]:
    """Lists the adapters in memory, the least recently asked for first."""
    with self._lock:
      return list(self._kept)

  def ask(self, name: str) -> "concurrent.futures.Future[Loras]":
    """Returns an adapter, or begins to read it.

    Args:
      name: of the adapter.

    Returns:
      A future of {path: Lora}, done if it is in memory. Its exception is what
      `read` raised; nothing of it is kept, so that it may be asked for again.
    """
    with self._lock:
      if name in self._kept:
        self._kept.move_to_end(name)
        found: concurrent.futures.Future = concurrent.futures.Future()
        found.set_result(self._kept[name])
        return found
      if name not in self._reading:
        self._reading[name] = self._pool.submit(self._fetch, name)
      return self._reading[name]

  def put(self, name: str, loras: Mapping[str, Lora]) -> None:
    """Keeps an adapter that was read elsewhere.

    Args:
      name: of the adapter; one of that name is replaced.
      loras: path -> Lora.
    """
    found = {path: jax.tree.map(np.asarray, x) for path, x in loras.items()}
    self.forget(name)
    with self._lock:
      self._keep(name, found)

  def forget(self, name: str) -> None:
    """Drops an adapter; what is being read of it is not kept.

    Args:
      name: of an adapter; nothing happens if there is none.
    """
    with self._lock:
      self._kept.pop(name, None)
      self._reading.pop(name, None)

  def close(self) -> None:
    """Stops reading; waits for what has begun."""
    self._pool.shutdown(cancel_futures=True)

  def _fetch(self, name: str) -> Loras:
    """Reads an adapter, and keeps it unless it was forgotten meanwhile."""
    with self._lock:
      mine = self._reading.get(name)
    found: Loras = {}
    try:
      read = self._read(name)
      found = {path: jax.tree.map(np.asarray, x) for path, x in read.items()}
      return found
    finally:
      with self._lock:
        if mine is not None and self._reading.get(name) is mine:
          del self._reading[name]
          if found:
            self._keep(name, found)

  def _keep(self, name: str, loras: Loras) -> None:
    """Keeps an adapter, and drops others until all of them fit."""
    self._kept[name] = loras
    while self._kept and sum(map(_nbytes, self._kept.values())) > self._most:
      self._kept.popitem(last=False)


def _nbytes(loras: Loras) -> int:
  """Counts the bytes of an adapter."""
  return sum(lora.nbytes for lora in loras.values())


def _empty_bank(shapes: Shapes, slots: int, rank: int, dtype: Any) -> Loras:
  """Makes a bank of zeros."""
  return {
    path: Lora(
      jnp.zeros((slots, *lead, rank, into), dtype),
      jnp.zeros((slots, *lead, rank, out), dtype),
      jnp.zeros((slots, *lead), jnp.float32),
    )
    for path, (*lead, into, out) in shapes.items()
  }


@functools.partial(jax.jit, donate_argnums=0)
def _put(bank: Loras, slot: Any, adapter: Loras) -> Loras:
  """Writes one adapter into a bank, in place."""
  return jax.tree.map(lambda all_, own: all_.at[slot].set(own), bank, adapter)
