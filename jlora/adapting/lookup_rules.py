# SPDX-License-Identifier: Apache-2.0
"""Rules for look-ups in an Adapted table or stack, without the dense sum."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora.adapting.adapted import (
  Adapted,
  Change,
  axes_with,
  is_adapted,
  over_lead,
)


def _gather(operands, params):
  """Looks up rows of an Adapted table, or matrices of a stack."""
  value, indices = operands
  if is_adapted(indices) or value.branches:
    return None
  numbers = params["dimension_numbers"]
  looked = _looked_up(value.shape, params)
  if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP and any(
    looked - _varying(c, value.ndim) for c in value.changes
  ):
    return None  # nothing says where the change is to be left out
  y = lax.gather_p.bind(value.w, indices, **params)
  taken = tuple(
    over_lead(c, functools.partial(_take, indices, value.shape, params))
    for c in value.changes
  )
  if value.rows is not None and 0 in numbers.start_index_map:
    if params["slice_sizes"] != (1, value.shape[1]):
      return None
    column = indices[..., numbers.start_index_map.index(0)]
    y = _with_rows(y, value, column, numbers)
    known = _where(column < value.shape[0], y, numbers)
    taken = tuple(_gated(c, known) for c in taken)
  found = dataclasses.replace(value, w=y, changes=taken, rows=None)
  return found if value.changes else found.w


def _looked_up(shape, params) -> set[int]:
  """Returns the axes of which indices choose some entries."""
  axes, sizes = (
    params["dimension_numbers"].start_index_map,
    params["slice_sizes"],
  )
  return {int(i) for i in axes if sizes[i] < shape[i]}


def _varying(change: Change, ndim: int) -> set[int]:
  """Returns the axes on which one of the factors hangs."""
  return {*axes_with(change.a, ndim), *axes_with(change.b, ndim)}


def takes_rows(value: Adapted, params: dict) -> bool:
  """Returns whether a look-up takes single rows of matrices, not matrices.

  Example:
    >>> import jax
    >>> one = jnp.ones
    >>> change = Change(one((2, 9, 1)), one((2, 1, 5)), one((2, 1, 1)))
    >>> table = Adapted(one((9, 5)), (change,))
    >>> look = jax.make_jaxpr(lambda t, i: t[i])(table.w, jnp.arange(3))
    >>> takes_rows(table, look.eqns[-1].params)
    True
  """
  looked = _looked_up(value.shape, params)
  sides = [
    [set(axes_with(x, value.ndim)) for x in (c.a, c.b)] for c in value.changes
  ]
  return value.rows is not None or any(looked & (a ^ b) for a, b in sides)


def _take(indices, shape, params, factor):
  """Looks up in a factor, on the axes on which it hangs."""
  numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
  long = {i for i, size in enumerate(factor.shape) if size == shape[i]}
  axes = numbers.start_index_map
  kept = [k for k, i in enumerate(axes) if i in long]
  own: dict[str, Any] = {
    "slice_sizes": tuple(
      size if i in long else 1 for i, size in enumerate(sizes)
    )
  }
  if not any(sizes[i] < shape[i] for i in axes if i in long):
    return _moved(factor, indices.ndim, params)
  pairs = [
    (i, j)
    for i, j in zip(
      numbers.operand_batching_dims,
      numbers.start_indices_batching_dims,
      strict=True,
    )
  ]
  shared = [i for i, _ in pairs if i not in long]
  own["dimension_numbers"] = lax.GatherDimensionNumbers(
    offset_dims=numbers.offset_dims,
    collapsed_slice_dims=tuple(
      sorted([*numbers.collapsed_slice_dims, *shared])
    ),
    start_index_map=tuple(axes[k] for k in kept),
    operand_batching_dims=tuple(i for i, _ in pairs if i in long),
    start_indices_batching_dims=tuple(j for i, j in pairs if i in long),
  )
  # What lies outside of the table is left out: w's own look-up says what it is.
  if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
    own["fill_value"] = 0
  given = {**params, **own}
  return lax.gather_p.bind(factor, indices[..., jnp.array(kept)], **given)


def _moved(factor, index_ndim, params):
  """Lays out a factor that no index chooses from as the result is."""
  numbers = params["dimension_numbers"]
  batching = numbers.operand_batching_dims
  gone = {*numbers.collapsed_slice_dims, *batching}
  offsets = [i for i in range(factor.ndim) if i not in gone]
  ndim = len(offsets) + index_ndim - 1
  place = dict(zip(offsets, numbers.offset_dims, strict=True))
  batch = [i for i in range(ndim) if i not in numbers.offset_dims]
  for i, j in zip(batching, numbers.start_indices_batching_dims, strict=True):
    place[i] = batch[j]
  kept = [i for i in range(factor.ndim) if i in place]
  found = lax.squeeze(factor, [i for i in range(factor.ndim) if i not in place])
  order = sorted(range(len(kept)), key=lambda k: place[kept[k]])
  shape = [1] * ndim
  for i in kept:
    shape[place[i]] = factor.shape[i]
  return lax.reshape(lax.transpose(found, order), shape)


def _gated(change: Change, known) -> Change:
  """Returns a change that is zero where `known` is 0."""
  ones = (1,) * change.lead
  known = known.reshape(*ones, *known.shape).astype(change.gate.dtype)
  return dataclasses.replace(change, gate=change.gate * known)


def _where(known, y, numbers):
  """Lays out what is known of each index so that it multiplies y."""
  batch = [i for i in range(y.ndim) if i not in numbers.offset_dims]
  shape = [1] * y.ndim
  for at, size in zip(batch, known.shape, strict=True):
    shape[at] = size
  return known.reshape(shape)


def _with_rows(y, value, column, numbers):
  """Replaces look-ups past the table's end by its further rows."""
  rows, count = value.rows, value.shape[0]
  at = jnp.clip(column - count, 0, rows.shape[0] - 1)
  found = rows.astype(y.dtype)[at]  # (batch..., columns)
  if len(numbers.offset_dims) > 1:  # the row's own axis is kept, of length 1
    found = found[..., None, :]
  batch = [i for i in range(y.ndim) if i not in numbers.offset_dims]
  found = jnp.moveaxis(
    found,
    range(found.ndim),
    [*batch, *numbers.offset_dims],
  )
  known = _where(column < count, y, numbers)
  inside = _where(column < count + rows.shape[0], y, numbers)
  return jnp.where(known, y, jnp.where(inside, found, y))


LOOKUP_RULES = {"gather": _gather}
