# SPDX-License-Identifier: Apache-2.0
"""Convolutions with an Adapted kernel, never summed."""

import jax.numpy as jnp
from jax import lax

from jlora.adapted import (
  Change,
  axes_with,
  dropped,
  is_adapted,
  plus,
  without_bank,
)


def _conv(operands, params):
  """A convolution whose kernel is adapted, one group."""
  x, value = operands
  numbers = params["dimension_numbers"]
  out_axis = numbers.rhs_spec[0]
  if is_adapted(x) or value.branches or (
    params["feature_group_count"] != 1 or params["batch_group_count"] != 1
  ):  # fmt: skip
    return None
  changes = [without_bank(change) for change in value.changes]
  sides = [_writes_alone(c, out_axis, value.ndim) for c in changes]
  y = lax.conv_general_dilated_p.bind(x, value.w, **params)
  feature = numbers.out_spec[1]
  for change, side in zip(changes, sides, strict=True):
    if side is None:
      return None
    reads, writes = side
    # The rank axis stands where the kernel has its output features.
    kernel = jnp.moveaxis(
      jnp.squeeze(jnp.moveaxis(reads, 0, -1), out_axis), -1, out_axis
    )
    sizes = [*value.shape]
    sizes[out_axis] = kernel.shape[out_axis]
    kernel = jnp.broadcast_to(kernel, sizes).astype(x.dtype)
    inner = lax.conv_general_dilated_p.bind(
      dropped(x, change), kernel, **params
    )
    inner = jnp.moveaxis(inner, feature, -1)
    gate = change.gate.reshape(*(1,) * (inner.ndim - 1), -1)
    inner = inner * gate.astype(inner.dtype)
    wide = jnp.broadcast_to(
      writes.reshape(writes.shape[0], -1),
      (writes.shape[0], value.shape[out_axis]),
    )
    more = inner @ wide.astype(inner.dtype)
    y = plus(y, jnp.moveaxis(more, -1, feature))
  return y


def _writes_alone(change: Change, axis: int, ndim: int):
  """(reads, writes), if one factor hangs on an axis alone; else None."""
  for reads, writes in ((change.a, change.b), (change.b, change.a)):
    if axis not in axes_with(reads, ndim) and set(axes_with(writes, ndim)) <= {
      axis
    }:
      return reads, writes
  return None


CONVOLUTION_RULES = {"conv_general_dilated": _conv}
