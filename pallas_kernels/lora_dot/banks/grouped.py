# SPDX-License-Identifier: Apache-2.0
"""Many adapters, rows sorted by adapter: for many rows and many adapters.

    y_i = x_i w + ((x_i a_cᵀ) g_i) b_c,    c = ids_i

The ragged products touch the rank-r side only; x w stays one dense product.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from pallas_kernels.lora_dot.banks.bank import check_many, slots_of
from pallas_kernels.lora_dot.partitioning import vary_alike
from pallas_kernels.lora_dot.weights import Weight, times_base


def _ragged(left, right, grouped):
  """Says along which axes sorted rows meet their group's matrix."""
  return lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((left,), (right,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0] if grouped else [],
  )


_TIMES_T = _ragged(1, 2, True)  # (m, k), (n, r, k) -> (m, r)
_TIMES = _ragged(1, 1, True)  # (m, r), (n, r, k) -> (m, k)
_OUTER = _ragged(0, 0, False)  # (m, r), (m, k) -> (n, r, k)


def grouped_dot(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  ids: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
  ascending: bool = False,
) -> jax.Array:
  """Computes `lora_dot_many` by sorting the rows by adapter.

      y_i = x_i w + ((x_i a_cᵀ) g_i) b_c,    c = ids_i

  For many rows and many adapters: 2 M s r (K + N) operations for s adapters a
  row, whatever n. TPUs have a ragged product; elsewhere XLA masks the rows once
  for each adapter, which takes n times the memory. The rows of one device are
  sorted: on a mesh call it inside shard_map.

  Args:
    x: as `lora_dot_many` takes it.
    w: likewise.
    a: likewise.
    b: likewise.
    ids: likewise.
    gate: likewise.
    transpose_w: likewise.
    ascending: the rows are sorted by id already, -1 first; x is then not copied
      in another order. Where they are not, all of y is NaN.

  Returns:
    (..., N) in x's dtype, reverse-mode differentiable once in x, w, a, b, gate.
    Under jax.vmap a batch becomes rows; its gradients go one by one.

  Example:
    >>> one = jnp.ones
    >>> grouped_dot(one((2, 2)), one((2, 1)), one((3, 1, 2)), one((3, 1, 1)),
    ...             jnp.array([2, -1]))
    Array([[4.], [2.]], dtype=float32)
  """
  check_many(x, w, a, b, ids, gate, transpose_w)
  lead, k = x.shape[:-1], x.shape[-1]
  slots = slots_of(ids, gate, lead, a.shape[0])
  several = slots.ids.shape[-1]
  if ascending and several > 1:
    raise ValueError(
      f"ascending rows take one adapter each, not {several}: sort them here."
    )
  operands = (
    x.reshape(-1, k),
    a,
    b,
    slots.ids.reshape(-1, several),
    slots.weights.reshape(-1, several, slots.weights.shape[-1]),
  )
  change: Any = _change(ascending, *vary_alike(operands))
  base = times_base(x, w, transpose_w)
  return base + change.reshape(*lead, change.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _change(ascending, x, a, b, ids, weights):
  """Sums ((x aᵀ) g) b over the s adapters of each row, (m, N).

  The ids are (m, s), the weights (m, s, r).
  """
  return _batched(_forward, ascending)(x, a, b, ids, weights)[0]


class _Order(NamedTuple):
  """The order of rows by adapter, the way back, and rows of each adapter."""

  places: jax.Array | None
  back: jax.Array | None
  sizes: jax.Array


def _sort(ids, adapters, ascending):
  """Sorts the rows by adapter, unless they are, and counts those of each."""
  ids = ids.reshape(-1)
  sizes = jnp.bincount(ids, length=adapters).astype(jnp.int32)
  if ascending:
    return _Order(None, None, sizes)
  places = jnp.argsort(ids, stable=True)
  return _Order(places, jnp.argsort(places), sizes)


def _spread(rows, order, several):
  """Repeats each row as often as it has adapters, in order of adapters."""
  return rows if order.places is None else rows[order.places // several]


def _collect(rows, order, several):
  """Sums over the adapters of each row, back in the first order."""
  if order.back is None:
    return rows
  rows = rows[order.back]
  return rows.reshape(-1, several, rows.shape[-1]).sum(1)


def _product(left, right, order, dimensions):
  """Multiplies sorted rows by their group's matrix, summed in float32."""
  return lax.ragged_dot_general(
    left, right, order.sizes, dimensions, preferred_element_type=jnp.float32
  )


def _flat(weights):
  """Joins all axes but the last."""
  return weights.reshape(-1, weights.shape[-1])


def _weighed(u, g, dtype):
  """Multiplies u by g, exactly zero where g is, whatever u."""
  return jnp.where(g == 0, 0.0, u * g).astype(dtype)


def _forward(ascending, x, a, b, ids, weights):
  """Computes (change, u) in the rows' first order.

  u has a row for each adapter of a row.
  """
  several = ids.shape[1]
  order = _sort(ids, a.shape[0], ascending)
  rows = _spread(x, order, several)
  u = _product(rows, a.astype(x.dtype), order, _TIMES_T)
  gated = _weighed(u, _spread(_flat(weights), order, 1), x.dtype)
  change = _product(gated, b.astype(x.dtype), order, _TIMES).astype(x.dtype)
  if ascending:
    broken = jnp.any(ids[1:] < ids[:-1])
    change = jnp.where(broken, jnp.nan, change)
  return [_collect(change, order, several), _collect(u, order, 1)]


def _backward(ascending, x, a, b, ids, weights, u, dy):
  """Computes (dx, da, db, dweights) as gradients.py does, by adapter."""
  several = ids.shape[1]
  order = _sort(ids, a.shape[0], ascending)
  rows, dy = _spread(x, order, several), _spread(dy, order, several)
  g, u = _spread(_flat(weights), order, 1), _spread(u, order, 1)
  v = _product(dy, b.astype(x.dtype), order, _TIMES_T)
  vg, ug = (_weighed(t, g, x.dtype) for t in (v, u))
  dx = _product(vg, a.astype(x.dtype), order, _TIMES).astype(x.dtype)
  dg = u * v
  if g.shape[-1] == 1:
    dg = dg.sum(-1, keepdims=True)
  return [
    _collect(dx, order, several),
    _product(vg, rows, order, _OUTER).astype(a.dtype),
    _product(ug, dy, order, _OUTER).astype(b.dtype),
    _collect(dg, order, 1).reshape(weights.shape),
  ]


@functools.cache
def _batched(run: Callable, ascending: bool) -> Callable:
  """Returns `run` with a rule for vmap, which the ragged product lacks."""
  alone = functools.partial(run, ascending)
  call = custom_vmap(alone)

  @call.def_vmap
  def rule(axis_size, batched, *operands):
    if run is _forward and not (batched[1] or batched[2] or ascending):
      out = _as_rows(call, axis_size, batched, operands)
    else:
      out = lax.map(
        lambda i: call(*_one_of(i, batched, operands)), jnp.arange(axis_size)
      )
    return out, jax.tree.map(lambda _: True, out)

  return call


def _one_of(i, batched, operands):
  """Takes element i of the operands that have a batch."""
  pairs = zip(batched, operands, strict=True)
  return [t[i] if many else t for many, t in pairs]


def _as_rows(call, size, batched, operands):
  """Runs forward with the batch as rows, so each adapter is read once."""
  x, a, b, ids, weights = (
    t if many or i in (1, 2) else jnp.broadcast_to(t, (size, *t.shape))
    for i, (many, t) in enumerate(zip(batched, operands, strict=True))
  )
  rows = [t.reshape(-1, *t.shape[2:]) for t in (x, ids, weights)]
  out = call(rows[0], a, b, *rows[1:])
  return [t.reshape(size, -1, t.shape[-1]) for t in out]


def _keep(ascending, x, a, b, ids, weights):
  """Runs forward and keeps what the gradients need."""
  change, u = _batched(_forward, ascending)(x, a, b, ids, weights)
  return change, (x, a, b, ids, weights, u)


def _pull(ascending, kept, dy):
  """Computes the gradients from what was kept; ids have none."""
  dx, da, db, dweights = _batched(_backward, ascending)(*kept, dy)
  return dx, da, db, None, dweights


_change.defvjp(_keep, _pull)
