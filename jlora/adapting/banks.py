# SPDX-License-Identifier: Apache-2.0
"""Banks: many adapters in one set of Loras, from which a batch's rows choose.

`make_bank` stacks adapters. `laned` computes with all of them and masks,
`without_bank` fetches the chosen ones, and `chosen` picks the cheaper way.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapting.adapted import Change, without_bank
from jlora.loras import Lora, Loras, check_loras
from jlora.messages import name_some


def make_bank(
  adapters: Sequence[Mapping[str, Lora]], *, rank: int | None = None
) -> Loras:
  """Stacks adapters into one bank, along a new leading axis of its Loras.

      a (n, ..., r, in), b (n, ..., r, out), scale (n, ...)

  Args:
    adapters: path -> Lora each. Ranks and modules may differ: zeros fill up
      what an adapter lacks.
    rank: of the bank, at least the adapters' largest; None is the largest. A
      larger one lets later adapters fit without a change of shapes.

  Returns:
    Loras for `adapt_rows` and `bind(..., ids=...)`, in the dtype that holds all
    factors of a path.

  Raises:
    ValueError: no adapters, a rank below the largest, or Loras of one path that
      differ in more than their rank.

  Example:
    >>> one = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(1))
    >>> two = Lora(jnp.ones((2, 3)), jnp.ones((2, 2)), jnp.float32(1))
    >>> bank = make_bank([{"q": one}, {"q": two, "k": one}])
    >>> bank["q"].a.shape, bank["k"].scale.tolist()
    ((2, 2, 3), [0.0, 1.0])
  """
  if not adapters:
    raise ValueError("There are no adapters to stack; give at least one.")
  for adapter in adapters:
    check_loras(adapter)
  paths = list(dict.fromkeys(path for own in adapters for path in own))
  largest = max((x.rank for own in adapters for x in own.values()), default=1)
  rank = largest if rank is None else rank
  if rank < largest:
    raise ValueError(f"A bank of rank {rank} does not hold rank {largest}.")
  return {
    path: _stacked(path, [own.get(path) for own in adapters], rank)
    for path in paths
  }


def as_ids(ids: Any, count: int) -> jax.Array:
  """Returns ids as int32; those outside of a bank stay outside of it.

  Args:
    ids: integers of any dtype and shape; may be traced.
    count: how many adapters the bank holds.

  Raises:
    ValueError: for numbers that are no integers, and for truth values.

  Example:
    >>> as_ids(np.array([0, 4294967295], np.uint32), 3)
    Array([0, 3], dtype=int32)
  """
  ids = ids if hasattr(ids, "dtype") else np.asarray(ids)
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"ids are {ids.dtype}, needed are integers.")
  if jnp.iinfo(ids.dtype).bits >= 32:  # what int32 has no number for
    least = 0 if jnp.issubdtype(ids.dtype, jnp.unsignedinteger) else -2
    ids = ids.clip(least, count)
  return jnp.asarray(ids, jnp.int32)


def laned(change: Change) -> Change:
  """Puts all adapters of a bank on one rank axis; gates the unchosen to zero.

      g_(i, r) = gate_(i, r) Σ_s weight_s [ids_s = i]

  Returns:
    Change without ids, of rank n r. a and b are the bank's own, so that there
    is one copy of them under vmap over ids.

  Example:
    >>> bank = Change(jnp.ones((3, 2, 3, 1)), jnp.ones((3, 2, 1, 5)),
    ...               jnp.ones((3, 2, 1, 1)), jnp.array([1, -1]))
    >>> laned(bank).gate[:, 0, 0]
    Array([0., 0., 1., 1., 0., 0.], dtype=float32)
  """
  ids, count = change.ids, change.a.shape[0]
  if ids is None:
    return change
  on = (ids[:, None] == jnp.arange(count)[None]).astype(jnp.float32)
  if change.weights is not None:
    on = on * change.weights[:, None]
  unknown = jnp.any((ids < -1) | (ids >= count))
  on = jnp.where(unknown, jnp.nan, on.sum(axis=0))
  gate = change.gate * on.reshape(-1, *(1,) * (change.gate.ndim - 1))
  flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
  return dataclasses.replace(
    change,
    a=flat(change.a),
    b=flat(change.b),
    gate=flat(gate),
    ids=None,
    weights=None,
  )


class Machine(NamedTuple):
  """What work costs on a machine, in bytes moved to and from memory.

  Attributes:
    ridge: operations of a large product that take as long as moving a byte.
    cache: bytes of copies that are read again before they leave it.
    cached: what a byte costs there, in bytes of memory.
    thin: how much longer an operation takes in products of one row's adapter.
    overlaps: whether bytes move while products run.
  """

  ridge: float
  cache: int
  cached: float
  thin: float
  overlaps: bool


# TPU: v5e by its data sheet. CPU: fitted to times of both ways on one of two
# x86 cores of 512 KiB of L2 each: 2, 8 and 32 rows, 1 and 16 tokens, float32.
MACHINES = {
  "tpu": Machine(ridge=240, cache=0, cached=1.0, thin=1, overlaps=True),
  "cpu": Machine(ridge=10, cache=2**20, cached=0.3, thin=4, overlaps=False),
}


def costs(change: Change, tokens: int, machine: Machine) -> tuple[float, float]:
  """Counts what `laned` and `without_bank` cost, for each number of an adapter.

      laned: n (size + 2 batch tokens / ridge),
      fetched: s batch (3 size price + 2 thin tokens / ridge)

  A fetched number is read, written and read again: at the price of the cache
  where the copies of all rows fit there. The larger of bytes and operations
  counts, not the sum, on a machine that does both at once.

  Args:
    change: of a bank, with ids.
    tokens: number of vectors that each row multiplies with its adapters.
    machine: of MACHINES, or another.

  Returns:
    Bytes of memory in whose time each is done, over numbers of an adapter.

  Example:
    >>> bank = Change(jnp.ones((3, 2, 3, 1)), jnp.ones((3, 2, 1, 5)),
    ...               jnp.ones((3, 2, 1, 1)), jnp.array([1]), batch=64)
    >>> costs(bank, 1, Machine(128, 0, 1.0, 1, overlaps=False))
    (15.0, 769.0)
  """
  several = 0 if change.ids is None else len(change.ids)
  count, rows = len(change.a), several * change.batch
  size = change.a.dtype.itemsize
  largest = max(change.a.size, change.b.size) // max(count, 1)
  fits = rows * largest * size <= machine.cache
  price = machine.cached if fits else 1.0
  both = max if machine.overlaps else lambda *x: sum(x)
  work = 2 * tokens / machine.ridge
  laned = count * both(size, change.batch * work)
  return laned, rows * both(3 * size * price, machine.thin * work)


def chosen(change: Change, tokens: int) -> Change:
  """Resolves a bank's ids by `laned` or `without_bank`, whichever costs less.

  Args:
    change: with or without ids.
    tokens: number of vectors that each row multiplies with its adapters.

  Returns:
    Change without ids.

  Approximation: costs are counted by `costs`, not measured.

  Example:
    >>> bank = Change(jnp.ones((8, 2, 3, 1)), jnp.ones((8, 2, 1, 5)),
    ...               jnp.ones((8, 2, 1, 1)), jnp.array([1]), batch=64)
    >>> chosen(bank, 1).a.shape[0], chosen(bank, 4096).a.shape[0]
    (16, 2)
  """
  if change.ids is None:
    return change
  machine = MACHINES.get(jax.default_backend(), MACHINES["tpu"])
  in_lanes, fetched = costs(change, tokens, machine)
  return laned(change) if in_lanes < fetched else without_bank(change)


def _stacked(path: str, loras: Sequence[Lora | None], rank: int) -> Lora:
  """Stacks one path's Loras, with zeros for those that are missing."""
  there = [lora for lora in loras if lora is not None]
  shapes = {_shape(lora) for lora in there}
  if len(shapes) > 1:
    raise ValueError(
      f"{path}: Loras of {name_some(sorted(shapes))} (..., in, out) do not "
      "belong to one parameter."
    )
  dtype = jnp.result_type(*(x for lora in there for x in (lora.a, lora.b)))
  fill = _zeros(there[0])
  padded = [_padded(lora or fill, rank, dtype) for lora in loras]
  return Lora(
    jnp.stack([lora.a for lora in padded]),
    jnp.stack([lora.b for lora in padded]),
    jnp.stack([lora.scale for lora in padded]),
  )


def _shape(lora: Lora) -> tuple[int, ...]:
  """Returns the shape of a Lora's change, (..., in, out)."""
  return (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])


def _zeros(like: Lora) -> Lora:
  """Returns a Lora of zeros of the same shapes."""
  return Lora(
    jnp.zeros_like(like.a), jnp.zeros_like(like.b), jnp.zeros_like(like.scale)
  )


def _padded(lora: Lora, rank: int, dtype: Any) -> Lora:
  """Pads a Lora with zeros up to a rank."""

  def pad(factor):
    """Pads one factor."""
    widths = [(0, 0)] * factor.ndim
    widths[-2] = (0, rank - lora.rank)
    return jnp.pad(factor.astype(dtype), widths)

  return Lora(pad(lora.a), pad(lora.b), lora.scale.astype(jnp.float32))
