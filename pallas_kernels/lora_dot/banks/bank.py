# SPDX-License-Identifier: Apache-2.0
"""A bank of adapters, and which of them each row of a batch takes.

A bank is a (n, r, K) and b (n, r, N), one shape for as long as a program lives:
adapters come and go by `put_adapter`, rows choose by ids, and nothing compiles
again. A smaller rank is padded with zeros, which change no result.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.lora_dot.checks import check_shapes
from pallas_kernels.lora_dot.weights import Weight


class Bank(NamedTuple):
  """The adapters of one weight, stacked.

  a: (n, r, K), the rows with which each reads x.
  b: (n, r, N), the rows that each writes, its scale multiplied in.
  """

  a: jax.Array
  b: jax.Array


def empty_bank(adapters: int, r: int, k: int, n: int, dtype: Any) -> Bank:
  """Makes a bank of adapters that change nothing.

  Args:
    adapters: how many places it has.
    r: the largest rank.
    k: the size of the layer's input.
    n: the size of its output.
    dtype: of both factors.

  Returns:
    Bank of zeros, adapters r (k + n) numbers.

  Example:
    >>> empty_bank(3, 2, 8, 4, jnp.float32).b.shape
    (3, 2, 4)
  """
  return Bank(
    jnp.zeros((adapters, r, k), dtype), jnp.zeros((adapters, r, n), dtype)
  )


def put_adapter(
  bank: Bank, place: int, a: jax.Array, b: jax.Array, scale: float = 1.0
) -> Bank:
  """Returns the bank with one adapter in the place of another.

  Args:
    bank: of n adapters.
    place: 0 to n - 1.
    a: (r', K), r' at most the bank's r.
    b: (r', N).
    scale: multiplied into b, in float32.

  Returns:
    Bank of the same shapes and dtypes: what was compiled for one runs on the
    other. The old bank is as it was; both are in memory for a while.

  Raises:
    ValueError: for a place that is not there, or shapes that do not fit.

  Example:
    >>> bank = empty_bank(2, 2, 3, 1, jnp.float32)
    >>> put_adapter(bank, 1, jnp.ones((1, 3)), jnp.ones((1, 1)), 0.5).b[:, 0]
    Array([[0. ], [0.5]], dtype=float32)
  """
  n, r, k = bank.a.shape
  columns = bank.b.shape[2]
  if not 0 <= place < n:
    raise ValueError(f"place {place} is not in 0 to {n - 1}.")
  rank = a.shape[0]
  if a.shape != (rank, k) or b.shape != (rank, columns) or rank > r:
    raise ValueError(
      f"a {a.shape}, b {b.shape}: the bank takes a (r, {k}) and b "
      f"(r, {columns}) with r at most {r}."
    )
  padded = [(0, r - rank), (0, 0)]
  b = b.astype(jnp.float32) * jnp.float32(scale)
  return Bank(
    bank.a.at[place].set(jnp.pad(a, padded).astype(bank.a.dtype)),
    bank.b.at[place].set(jnp.pad(b, padded).astype(bank.b.dtype)),
  )


def check_ids(ids: Any, adapters: int) -> jax.Array:
  """Returns the ids as int32; raises unless each is -1 or an adapter's.

  Args:
    ids: integers of any shape, known here and now.
    adapters: how many the bank holds.

  Returns:
    int32 of the same shape.

  Raises:
    ValueError: for ids that are neither -1 nor 0 to adapters - 1, up to three
      by place and value; for other numbers than integers; inside jit, where
      ids have no values yet.

  Example:
    >>> check_ids([0, -1, 2], 3)
    Array([ 0, -1,  2], dtype=int32)
  """
  if isinstance(ids, Tracer):
    raise ValueError("ids have no values inside jit: check them before.")
  values = np.asarray(ids)
  if not np.issubdtype(values.dtype, np.integer):
    raise ValueError(f"ids are {values.dtype}, needed are integers.")
  wrong = np.argwhere((values < -1) | (values >= adapters))
  if len(wrong):
    named = ", ".join(
      f"ids[{', '.join(map(str, at))}] = {values[tuple(at)]}"
      for at in wrong[:3]
    )
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise ValueError(
      f"{named}{more}: needed are 0 to {adapters - 1}, or -1 for none."
    )
  return jnp.asarray(values.astype(np.int32))


def check_many(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  ids: jax.Array,
  gate: jax.Array | None,
  transpose_w: bool,
) -> None:
  """Raises ValueError unless the shapes make a product with a bank.

  Example:
    >>> one = jnp.ones
    >>> check_many(one((4, 2)), one((2, 3)), one((5, 1, 2)), one((5, 1, 3)),
    ...            jnp.zeros(4, int), None, False)
  """
  if a.ndim != 3 or b.ndim != 3 or a.shape[:2] != b.shape[:2]:
    raise ValueError(
      f"a {a.shape}, b {b.shape}: a bank is a (n, r, K) and b (n, r, N)."
    )
  if 0 in a.shape[:2]:
    raise ValueError(f"a {a.shape}: a bank has an adapter and a rank at least.")
  one: Any = jax.ShapeDtypeStruct
  first_a, first_b = (one(t.shape[1:], t.dtype) for t in (a, b))
  check_shapes(x, w, first_a, first_b, None, transpose_w)
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"ids are {ids.dtype}, needed are integers.")
  lead = x.shape[:-1]
  wanted = lead if ids.ndim == len(lead) else (*lead, *ids.shape[-1:])
  if not _fits(ids.shape, wanted) or ids.ndim != len(wanted):
    raise ValueError(
      f"ids {ids.shape} for x {x.shape}: needed is {lead}, or with an axis "
      "more for several adapters a row; sizes may be 1."
    )
  if gate is not None and not _fits(gate.shape, (*wanted, a.shape[1])):
    raise ValueError(
      f"gate {gate.shape} does not broadcast to {(*wanted, a.shape[1])}."
    )


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
  """Returns whether a shape broadcasts to another."""
  if len(shape) > len(wanted):
    return False
  tail = wanted[len(wanted) - len(shape) :]
  return all(s in (1, t) for s, t in zip(shape, tail, strict=True))


class Slots(NamedTuple):
  """The adapters that every row takes, and how much of each.

  ids: (..., s) int32, each an adapter's: those of no adapter are turned into
    some adapter's, and weigh nothing.
  weights: (..., s, r) or (..., s, 1) float32: the gate, exactly zero where the
    id was -1, NaN where it was out of range.
  """

  ids: jax.Array
  weights: jax.Array


def slots_of(
  ids: jax.Array, gate: jax.Array | None, lead: tuple[int, ...], adapters: int
) -> Slots:
  """Brings ids and gate, in whatever form given, to one shape.

  Args:
    ids: (...) or (..., s), -1 for none; sizes may be 1.
    gate: broadcastable to the shape of all ids and (r,), or None.
    lead: the shape of x without its last axis.
    adapters: how many the bank holds.

  Example:
    >>> slots_of(jnp.array([0, -1, 9]), None, (3,), 4).weights.ravel()
    Array([ 1.,  0., nan], dtype=float32)
  """
  several = ids.ndim > len(lead)
  shape = (*lead, ids.shape[-1]) if several else lead
  ids = jnp.broadcast_to(ids.astype(jnp.int32), shape)
  one = jnp.ones((), jnp.float32) if gate is None else gate.astype("float32")
  one = jnp.broadcast_to(one, (*shape, *(one.shape[-1:] or (1,))))
  if not several:
    ids, one = ids[..., None], one[..., None, :]
  there = ((ids >= 0) & (ids < adapters))[..., None]
  nothing = jnp.where(ids == -1, 0.0, jnp.nan)[..., None]
  return Slots(jnp.clip(ids, 0, adapters - 1), jnp.where(there, one, nothing))
