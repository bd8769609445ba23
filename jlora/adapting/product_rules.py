# SPDX-License-Identifier: Apache-2.0
"""Rules for matrix products and convolutions with Adapted parameters.

y = x w + Σ ((x aᵀ) g) b + Σ branch(x), without the dense sum of w and changes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jax import lax

from jlora.adapting.adapted import (
  Adapted,
  Change,
  axes_with,
  dropped,
  is_adapted,
  plus,
  without_bank,
)
from jlora.adapting.banks import chosen
from jlora.adapting.labels import Labels, label

with epy.lazy_imports():  # the kernels cost a quarter of a second to import
  from pallas_kernels import lora_dot as kernels


def _dot_general(operands, params):
  """Multiplies two operands of which one is Adapted."""
  first, second = operands
  if is_adapted(first) and is_adapted(second):
    return None
  value = first if is_adapted(first) else second
  x = second if is_adapted(first) else first
  contracted, _ = params["dimension_numbers"]
  if value.rows is not None and 0 in contracted[0 if value is first else 1]:
    return None  # a look-up by a product knows how many rows there are
  given = tuple(params.items()), is_adapted(first)
  if value.branches:  # their functions may hold arrays that are traced
    return _product(value, x, *given)
  return _product_once(dataclasses.replace(value, path=""), x, *given)


def _product(value: Adapted, x: Any, items: Any, is_left: bool):
  """Computes the product of value and x, in either order."""
  params = dict(items)
  numbers = params["dimension_numbers"]
  names = label(value.ndim, x.ndim, numbers, is_left=is_left)
  y = None
  if _is_plain(value, x, params, names):
    y = _fused(value, x, names)
  if y is None:
    pair = (value.w, x) if is_left else (x, value.w)
    y = lax.dot_general(*pair, **params)
    for change in value.changes:
      y = plus(y, _through(change, x, value.shape, names, params))
  for branch in value.branches:
    y = plus(y, _branched(branch, value, x, y.shape, names))
  return y


# A model's products of one shape are traced and differentiated once; XLA puts
# them in place again.
_product_once = jax.jit(_product, static_argnums=(2, 3))


def _is_plain(value, x, params, names: Labels) -> bool:
  """Returns whether `lora_dot` can compute this product with its change."""
  precision = params.get("precision")
  default = precision is None or all(
    p in (None, lax.Precision.DEFAULT) for p in np.atleast_1d(precision)
  )
  wanted = params.get("preferred_element_type")
  return (
    value.ndim == 2
    and len(names.contracted) == 1
    and len(names.out) == x.ndim
    and len(value.changes) == 1
    and value.changes[0].key is None
    and value.changes[0].ids is None
    and default
    and params.get("out_sharding") is None
    and x.dtype == value.dtype
    and wanted in (None, x.dtype)
    and jnp.issubdtype(x.dtype, jnp.floating)
  )


def _fused(value: Adapted, x, names):
  """Computes the product by `lora_dot`; None if the factors do not fit it."""
  change, axis = value.changes[0], names.contracted[0]
  sides = _sides(change, axis)
  if sides is None:
    return None
  a, b = sides
  k, n = value.shape[axis], value.shape[1 - axis]
  rank = len(change.a)
  if a.size != rank * k or b.size != rank * n:
    return None
  a, b = lax.reshape(a, (rank, k)), lax.reshape(b, (rank, n))
  gate = lax.reshape(change.gate, (rank,))
  if change.rows is not None:
    gate = change.rows * gate.reshape((1,) * len(names.rows) + (rank,))
  x = _moved(x, names.x.index(axis), -1)
  y = kernels.lora_dot(x, value.w, a, b, gate, transpose_w=axis == 1)
  return y if names.out[-1] < 2 else jnp.moveaxis(y, -1, 0)


def _moved(x, source, target):
  """Moves an axis, and does nothing where it lies there."""
  is_there = source % x.ndim == target % x.ndim
  return x if is_there else jnp.moveaxis(x, source, target)


def _sides(change: Change, axis: int):
  """Returns the factors that vary along the contracted and the other axis."""
  on_a, on_b = axes_with(change.a, 2), axes_with(change.b, 2)
  if axis not in on_b and 1 - axis not in on_a:
    return change.a, change.b
  if axis not in on_a and 1 - axis not in on_b:
    return change.b, change.a
  return None


def _through(change: Change, x, shape, names, params):
  """Computes what a change adds to a product, by two thin products."""
  if change.ids is not None:
    tokens = math.prod(x.shape) // math.prod(shape[i] for i in names.contracted)
    more = _through(chosen(change, tokens), x, shape, names, params)
    # Adding -0 keeps rows without an adapter exact, even the sign of a zero.
    return jnp.where(jnp.any(change.ids >= 0), more, -jnp.zeros_like(more))
  x = dropped(x, change)
  dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
  rank = max([*names.x, *names.out]) + 1
  ndim = len(shape)
  on = {name: set(axes_with(getattr(change, name), ndim)) for name in "ab"}
  meets = {
    name: math.prod(shape[i] for i in names.contracted if i in axes)
    for name, axes in on.items()
  }
  first, second = ("a", "b") if meets["a"] >= meets["b"] else ("b", "a")
  steps = []
  for name in (first, "gate", second):
    factor = getattr(change, name)
    axes = axes_with(factor, ndim)
    sizes = (factor.shape[0], *(shape[axis] for axis in axes))
    own = _of_gates(dtype) if name == "gate" else dtype
    steps.append((factor.reshape(sizes), [rank, *axes], own))
  if change.rows is not None:
    steps.insert(1, (change.rows, [*names.rows, rank], _of_gates(dtype)))
  found, labels = x.astype(dtype), [*names.x]
  for i, (factor, own_labels, own) in enumerate(steps):
    later = {*names.out, *(n for _, each, _ in steps[i + 1 :] for n in each)}
    kept = [n for n in dict.fromkeys([*labels, *own_labels]) if n in later]
    found = jnp.einsum(
      found.astype(own),
      labels,
      factor.astype(own),
      own_labels,
      kept,
      precision=params.get("precision"),
      preferred_element_type=jnp.float32,
    )
    labels = kept
  return _laid_out(found, labels, names.out)


def _of_gates(dtype):
  """Returns what gates are multiplied in: scales may be over float16's."""
  return jnp.float32 if dtype == jnp.float16 else dtype


def _laid_out(found, labels, out):
  """Transposes to the result's axes, with 1 where labels are missing."""
  order = [name for name in out if name in labels]
  found = found.transpose([labels.index(name) for name in order])
  sizes = dict(zip(order, found.shape, strict=True))
  return found.reshape([sizes.get(name, 1) for name in out])


def _branched(branch, value, x, out_shape, names):
  """Computes what a branch (..., in) -> (..., out) adds to a product."""
  own = range(value.ndim)
  free = [name for name in names.out if name not in own]
  writes = [name for name in own if name not in names.contracted]
  order = [names.x.index(name) for name in (*free, *names.contracted)]
  rows = [x.shape[names.x.index(name)] for name in free]
  found = branch(x.transpose(order).reshape(*rows, -1))
  sizes = [value.shape[name] for name in writes]
  if math.prod(found.shape) != math.prod(out_shape):
    raise ValueError(
      f"A branch of {value.path} wrote {found.shape} for rows {tuple(rows)}; "
      f"needed is (..., {math.prod(sizes)})."
    )
  found = found.reshape(*rows, *sizes)
  return _laid_out(found, [*free, *writes], names.out)


def _conv(operands, params):
  """Convolves with an Adapted kernel, in groups if it is of groups.

  Within a group y_o = x * w_o + Σ_r (x * a_r) g_r b_ro. All groups read with
  the same a, so that the thin kernel has r outputs for each.
  """
  x, value = operands
  numbers, groups = params["dimension_numbers"], params["feature_group_count"]
  out_axis = numbers.rhs_spec[0]
  if is_adapted(x) or value.branches or params["batch_group_count"] != 1:
    return None
  changes = [without_bank(change) for change in value.changes]
  sides = [_writes_alone(c, out_axis, value.ndim) for c in changes]
  if None in sides:
    return None
  sides = filter(None, sides)
  y = lax.conv_general_dilated_p.bind(x, value.w, **params)
  feature = numbers.out_spec[1]
  for change, (reads, writes) in zip(changes, sides, strict=True):
    rank = len(reads)
    # The rank axis takes the place of the kernel's output features.
    kernel = jnp.moveaxis(
      jnp.squeeze(jnp.moveaxis(reads, 0, -1), out_axis), -1, out_axis
    )
    sizes = [*value.shape]
    sizes[out_axis] = rank
    kernel = jnp.broadcast_to(kernel, sizes).astype(x.dtype)
    reps = [groups if i == out_axis else 1 for i in range(kernel.ndim)]
    inner = lax.conv_general_dilated_p.bind(
      dropped(x, change), jnp.tile(kernel, reps), **params
    )
    inner = jnp.moveaxis(inner, feature, -1)
    inner = inner.reshape(*inner.shape[:-1], groups, rank)
    gate = change.gate.reshape(*(1,) * (inner.ndim - 1), -1)
    own = _of_gates(inner.dtype)
    gated = inner.astype(own) * gate.astype(own)
    inner = gated.astype(inner.dtype)
    wide = jnp.broadcast_to(
      writes.reshape(rank, -1), (rank, value.shape[out_axis])
    )
    wide = wide.reshape(rank, groups, -1).astype(inner.dtype)
    more = jnp.einsum("...gr,rgo->...go", inner, wide)
    more = more.reshape(*more.shape[:-2], -1)
    y = plus(y, jnp.moveaxis(more, -1, feature))
  return y


def _writes_alone(change: Change, axis: int, ndim: int):
  """Returns (reads, writes) if one factor varies only along the axis."""
  for reads, writes in ((change.a, change.b), (change.b, change.a)):
    if axis not in axes_with(reads, ndim) and set(axes_with(writes, ndim)) <= {
      axis
    }:
      return reads, writes
  return None


def _ragged_dot(operands, params):
  """Multiplies rows by the Adapted matrix of their group, as MoE layers do.

  y_t = x_t w_g + ((x_t a_gᵀ) gate_g) b_g,   g the group of row t
  """
  x, value, sizes = operands
  numbers = params["ragged_dot_dimension_numbers"]
  (of_x, of_w), (batch, w_batch) = numbers.dot_dimension_numbers
  groups = numbers.rhs_group_dimensions
  free = [i for i in range(value.ndim) if i not in {*of_w, *w_batch, *groups}]
  if (
    not is_adapted(value) or is_adapted(x) or is_adapted(sizes)
    or value.branches or len(free) != 1 or len(of_x) != 1 or len(groups) != 1
    or tuple(batch) != tuple(range(len(batch)))
    or params.get("out_sharding") is not None
  ):  # fmt: skip
    return None
  axis, column, shape = of_w[0], free[0], value.shape
  changes = [without_bank(change) for change in value.changes]
  sides = [_reads_and_writes(c, axis, column, value.ndim) for c in changes]
  if None in sides:
    return None
  sides = filter(None, sides)

  def product(x, w):
    """Multiplies rows by the matrix of their group."""
    given = {k: v for k, v in params.items() if k != "out_sharding"}
    return lax.ragged_dot_general(x, w, sizes, **given)

  def filled(factor, at):
    """Puts a factor's rank in the place of an axis on which it has 1."""
    factor = jnp.moveaxis(jnp.squeeze(factor, 1 + at), 0, at)
    wide = [s if i != at else factor.shape[at] for i, s in enumerate(shape)]
    return jnp.broadcast_to(factor, wide).astype(x.dtype)

  y = product(x, value.w)
  for change, (reads, writes) in zip(changes, sides, strict=True):
    inner = product(dropped(x, change), filled(reads, column))
    inner = jnp.moveaxis(inner.astype(x.dtype), -1, of_x[0])
    y = plus(y, product(inner, filled(writes * change.gate, axis)))
  return y


def _reads_and_writes(change: Change, axis: int, column: int, ndim: int):
  """Returns (reads, writes) if each factor hangs on one side's axis alone."""
  for reads, writes in ((change.a, change.b), (change.b, change.a)):
    if column not in axes_with(reads, ndim) and axis not in axes_with(
      writes, ndim
    ):
      return reads, writes
  return None


PRODUCT_RULES = {
  "dot_general": _dot_general,
  "conv_general_dilated": _conv,
  "ragged_dot_general": _ragged_dot,
}
