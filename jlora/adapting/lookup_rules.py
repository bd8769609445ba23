# SPDX-License-Identifier: Apache-2.0
"""Rules for look-ups in an Adapted table or stack, without the dense sum."""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax

from jlora.adapting.adapted import (
  Change,
  axes_with,
  dense_sum,
  is_adapted,
  over_lead,
)


def _gather(operands, params):
  """Looks up rows of an Adapted table, or parts along one axis of a stack."""
  value, indices = operands
  if is_adapted(indices):
    return None
  numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
  axes = numbers.start_index_map
  if (
    len(axes) != 1
    or numbers.collapsed_slice_dims != tuple(axes)
    or numbers.operand_batching_dims
    or value.branches
    or any(
      size != whole
      for i, (size, whole) in enumerate(zip(sizes, value.shape, strict=True))
      if i != axes[0]
    )
  ):
    return None
  axis = axes[0]
  y = lax.gather_p.bind(value.w, indices, **params)
  taken = tuple(
    over_lead(c, functools.partial(_take, indices, axis, params))
    for c in value.changes
  )
  if value.rows is not None and axis == 0:
    y = _with_rows(y, value, indices, numbers)
    known = _where_known(indices, value.shape[0], y, numbers)
    taken = tuple(_gated(c, known) for c in taken)
  found = dataclasses.replace(value, w=y, changes=taken, rows=None)
  is_batch = all(
    axis in axes_with(c.a, value.ndim) and axis in axes_with(c.b, value.ndim)
    for c in value.changes
  )
  # A matrix taken from a stack is still a parameter; rows of a table are not.
  return found if value.changes and is_batch else dense_sum(found)


def _take(indices, axis, params, factor):
  """Looks up in a factor; drops the axis where the factor does not vary."""
  numbers = params["dimension_numbers"]
  if factor.shape[axis] == 1:
    kept = [s for i, s in enumerate(factor.shape) if i != axis]
    ndim = len(kept) + indices.ndim - 1
    shape = [1] * ndim
    for at, size in zip(numbers.offset_dims, kept, strict=True):
      shape[at] = size
    return factor.reshape(shape)
  sizes = tuple(1 if i == axis else s for i, s in enumerate(factor.shape))
  # Out-of-range ids are clipped here: w's own look-up fills them with NaN or
  # with further rows.
  clip = {"mode": lax.GatherScatterMode.CLIP, "fill_value": None}
  given = {**params, **clip, "slice_sizes": sizes}
  return lax.gather_p.bind(factor, indices, **given)


def _gated(change: Change, known) -> Change:
  """Returns a change that is zero where `known` is 0."""
  ones = (1,) * change.lead
  known = known.reshape(*ones, *known.shape).astype(change.gate.dtype)
  return dataclasses.replace(change, gate=change.gate * known)


def _where_known(indices, count, y, numbers):
  """Returns 1 where an index lies in the table, shaped to multiply y."""
  known = indices[..., 0] < count
  batch = [i for i in range(y.ndim) if i not in numbers.offset_dims]
  shape = [1] * y.ndim
  for at, size in zip(batch, known.shape, strict=True):
    shape[at] = size
  return known.reshape(shape)


def _with_rows(y, value, indices, numbers):
  """Replaces look-ups past the table's end by its further rows."""
  rows, count = value.rows, value.shape[0]
  at = jnp.clip(indices[..., 0] - count, 0, rows.shape[0] - 1)
  found = rows.astype(y.dtype)[at]  # (batch..., offsets...)
  batch = [i for i in range(y.ndim) if i not in numbers.offset_dims]
  found = jnp.moveaxis(
    found,
    range(found.ndim),
    [*batch, *numbers.offset_dims],
  )
  known = _where_known(indices, count, y, numbers)
  inside = _where_known(indices, count + rows.shape[0], y, numbers)
  return jnp.where(known, y, jnp.where(inside, found, y))


LOOKUP_RULES = {"gather": _gather}
