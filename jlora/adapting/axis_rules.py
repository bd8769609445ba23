# SPDX-License-Identifier: Apache-2.0
"""Rules for JAX operations that move, slice, scale or add Adapted parameters.

A rule takes a primitive's operands and parameters and returns the primitive's
result, or None where it does not apply; the caller then forms the dense sum.
Only the operations in `SEEN_THROUGH` are applied to an Adapted with branches.
Operations that change the axes drop further rows, as for a tied head.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.adapting.adapted import (
  Adapted,
  Change,
  axes_with,
  dense_sum,
  is_adapted,
  over_lead,
)

PrimitiveRule = Callable[[Sequence[Any], dict[str, Any]], Any]


def _axes(value: Adapted, function, factor_function=None) -> Adapted:
  """Applies a function to w, and to the factors, whose axes may be 1."""
  factor_function = factor_function or function
  return dataclasses.replace(
    value,
    w=function(value.w),
    changes=tuple(over_lead(c, factor_function) for c in value.changes),
    rows=None,
  )


def _transpose(operands, params):
  """Transposes an Adapted, but not the inputs that a router reads."""
  value, order = operands[0], params["permutation"]
  for change in value.changes:
    reads, writes = (axes_with(x, value.ndim) for x in (change.a, change.b))
    inputs = [i for i in order if i in reads and i not in writes]
    if change.router is not None and inputs != sorted(inputs):
      return None
  return _axes(value, lambda x: lax.transpose(x, order))


def _squeeze(operands, params):
  """Removes axes of length 1 from an Adapted."""
  axes = params["dimensions"]
  return _axes(operands[0], lambda x: lax.squeeze(x, axes))


def _broadcast_in_dim(operands, params):
  """Broadcasts w; the factors keep 1 on the new axes."""
  value, *sizes = operands
  if sizes:  # of a shape that is not static
    return None
  shape, axes = params["shape"], params["broadcast_dimensions"]

  def whole(x):
    """Broadcasts w."""
    return lax.broadcast_in_dim(x, shape, axes)

  def factor(x):
    """Reshapes a factor, with 1 on the new axes."""
    ones = [1] * len(shape)
    for size, axis in zip(x.shape, axes, strict=True):
      ones[axis] = size
    return lax.broadcast_in_dim(x, ones, axes)

  return _axes(value, whole, factor)


def _reshape(operands, params):
  """Reshapes an Adapted, unless two factors share part of a group of axes."""
  value, *sizes = operands
  if sizes or params["dimensions"] is not None:
    return None
  old, new = value.shape, tuple(params["new_sizes"])
  if 0 in old:
    return None
  groups = _groups(old, new)
  changes = tuple(_spread(c, old, groups) for c in value.changes)
  value = dataclasses.replace(value, changes=changes)

  def sizes_of(x):
    """Returns a factor's new sizes; None if it varies within a group."""
    sizes = []
    for before, after in groups:
      given = [x.shape[axis] for axis in before]
      if given == [old[axis] for axis in before]:
        sizes += [new[axis] for axis in after]
      elif all(size == 1 for size in given):
        sizes += [1] * len(after)
      else:
        return None
    return sizes

  factors = [
    jax.ShapeDtypeStruct(x.shape[x.ndim - value.ndim :], x.dtype)
    for c in value.changes
    for x in (c.a, c.b, c.gate, *jax.tree.leaves(c.router))
  ]
  if any(sizes_of(factor) is None for factor in factors):
    return None
  return _axes(
    value,
    lambda x: lax.reshape(x, new),
    lambda x: lax.reshape(x, tuple(sizes_of(x) or ())),
  )


def _spread(change: Change, shape, groups) -> Change:
  """Repeats a factor along the rest of a group of axes that it has alone.

  So heads that are repeated (8, 2, 4) -> (8, 2, 2, 4) -> (8, 4, 4) keep their
  factors; that of the outputs then has a column for each repeated one.
  """
  for group, _ in groups:
    long = {
      name: [
        i for i in group if getattr(change, name).shape[change.lead + i] > 1
      ]
      for name in ("a", "b", "gate")
    }
    sharing = [name for name, axes in long.items() if axes]
    if len(sharing) != 1:
      continue
    x = getattr(change, sharing[0])
    wide = [*x.shape]
    for i in group:
      wide[change.lead + i] = shape[i]
    spread = {sharing[0]: jnp.broadcast_to(x, wide)}
    change = dataclasses.replace(change, **spread)
  return change


def _groups(old, new):
  """Pairs runs of axes, (before, after), with equal numbers of entries."""
  found, i, j = [], 0, 0
  while i < len(old) or j < len(new):
    before, after, left, right = [], [], 1, 1
    if i < len(old):
      before, left, i = [i], old[i], i + 1
    if j < len(new) and (not before or left != 1 or new[j] == 1):
      after, right, j = [j], new[j], j + 1
    while left != right:
      if left < right:
        before, left, i = [*before, i], left * old[i], i + 1
      else:
        after, right, j = [*after, j], right * new[j], j + 1
    found.append((before, after))
  return found


def _slice(operands, params):
  """Slices an Adapted with static bounds."""
  value = operands[0]
  starts, limits = params["start_indices"], params["limit_indices"]
  strides = params["strides"] or (1,) * len(starts)
  return _axes(
    value,
    lambda x: lax.slice(x, starts, limits, strides),
    lambda x: _sliced(x, value.shape, starts, limits, strides),
  )


def _sliced(x, shape, starts, limits, strides):
  """Slices a factor along the axes on which it varies."""
  whole = [size != own for size, own in zip(x.shape, shape, strict=True)]
  kept = zip(whole, starts, limits, strides, strict=True)
  ranges = [(0, 1, 1) if w else (i, j, k) for w, i, j, k in kept]
  return lax.slice(x, *zip(*ranges, strict=True)) if ranges else x


def _dynamic_slice(operands, params):
  """Slices an Adapted with traced starts."""
  value, *starts = operands
  sizes, rows = params["slice_sizes"], value.rows
  if sizes[:1] == value.shape[:1]:
    rows = None  # none is chosen
  if any(map(is_adapted, starts)) or (
    rows is not None and (1, *rows.shape[1:]) != sizes
  ):
    return None

  def factor(x):
    """Slices a factor along the axes on which it varies."""
    own = [
      (start, size) if length == whole else (jnp.zeros_like(start), 1)
      for start, size, length, whole in zip(
        starts, sizes, x.shape, value.shape, strict=True
      )
    ]
    return lax.dynamic_slice(x, *zip(*own, strict=True))

  found = _axes(value, lambda x: lax.dynamic_slice(x, starts, sizes), factor)
  if rows is None:
    return found
  at = starts[0] - value.shape[0]
  row = lax.dynamic_slice_in_dim(rows, at, 1).astype(value.dtype)
  return jnp.where(at < 0, dense_sum(found), row)


def _split(operands, params):
  """Splits an Adapted along an axis."""
  value, axis, start, parts = operands[0], params["axis"], 0, []
  for size in params["sizes"]:
    limits = [*value.shape]
    starts = [0] * value.ndim
    starts[axis], limits[axis] = start, start + size
    given = {"start_indices": starts, "limit_indices": limits, "strides": None}
    parts.append(_slice([value], given))
    start += size
  return parts


def _concatenate(operands, params):
  """Concatenates; each change gets zeros outside of its own part."""
  axis = params["dimension"]
  arrays = [x.w if is_adapted(x) else x for x in operands]
  if any(is_adapted(x) and x.branches for x in operands):
    return None
  whole, start, changes = lax.concatenate(arrays, axis), 0, []
  for x in operands:
    size = x.shape[axis]
    before, after = start, whole.shape[axis] - start - size
    for change in x.changes if is_adapted(x) else ():
      place = _placed(change, axis, size, before, after)
      changes.append(place)
    start += size
  first = next(x for x in operands if is_adapted(x))
  return Adapted(whole, tuple(changes), path=first.path)


def _stack(operands, params):
  """Stacks arrays and Adapted values along a new axis."""
  axis = params["axis"]
  own = range(operands[0].ndim + 1)
  shape = [*operands[0].shape]
  shape.insert(axis, 1)
  given = {
    "shape": shape,
    "broadcast_dimensions": [i for i in own if i != axis],
  }
  parts = [
    _broadcast_in_dim([x], given) if is_adapted(x) else x.reshape(shape)
    for x in operands
  ]
  return _concatenate(parts, {"dimension": axis})


def _placed(change: Change, axis, size, before, after) -> Change:
  """Pads a change with zeros before and after its part of an axis."""
  widths = [(0, 0, 0)] * (change.b.ndim - change.lead)
  widths[axis] = (before, after, 0)
  sizes = {axis: size}
  return _padded(change, sizes, widths)


def _padded(change: Change, sizes, widths) -> Change:
  """Pads a change with zeros, its factors where they hang on an axis.

  Args:
    change: the change.
    sizes: of the parameter's axes that are padded.
    widths: (before, after, between) for each axis.
  """
  own = {name: getattr(change, name) for name in ("a", "b", "gate")}
  for axis, width in enumerate(widths):
    at = change.lead + axis
    if not any(width):
      continue
    hanging = [name for name, x in own.items() if x.shape[at] > 1]
    if not hanging:
      wide = [*own["b"].shape]
      wide[at] = sizes[axis]
      own["b"] = jnp.broadcast_to(own["b"], wide)
    for name in hanging or ["b"]:
      x = own[name]
      whole = [width if i == at else (0, 0, 0) for i in range(x.ndim)]
      own[name] = lax.pad(x, jnp.zeros((), x.dtype), whole)
  return dataclasses.replace(change, **own)


def _pad(operands, params):
  """Pads w; its changes are zero there."""
  value, fill = operands
  if is_adapted(fill) or not is_adapted(value):
    return None
  widths = params["padding_config"]
  return dataclasses.replace(
    value,
    w=lax.pad(value.w, fill, widths),
    changes=tuple(_padded(c, value.shape, widths) for c in value.changes),
    rows=None,
  )


def _reversed(operands, params):
  """Reverses axes; of a factor that has 1 there nothing changes."""
  axes = params["dimensions"]
  return _axes(operands[0], lambda x: lax.rev(x, axes))


def _tiled(operands, params):
  """Repeats w and the factors along the axes on which they hang."""
  value, reps = operands[0], params["reps"]

  def factor(x):
    """Repeats a factor."""
    sizes = zip(x.shape, reps, strict=True)
    return jnp.tile(x, [count if size > 1 else 1 for size, count in sizes])

  return _axes(value, lambda x: jnp.tile(x, reps), factor)


def _gathered(operands, params):
  """Gathers an Adapted's shards; factors that have 1 there are whole."""
  value, axis = operands[0], params["all_gather_dimension"]
  if not params["tiled"]:
    return None

  def gather(x):
    """Gathers the shards of w, or of a factor."""
    return lax.all_gather(
      x,
      params["axis_name"],
      axis_index_groups=params["axis_index_groups"],
      axis=axis,
      tiled=True,
    )

  return _axes(
    value,
    gather,
    lambda x: gather(x) if x.shape[axis] == value.shape[axis] else x,
  )


def _scaled(operands, params):
  """Multiplies an Adapted by a number, or by one for each row or column."""
  del params
  first, second = operands
  value, by = (first, second) if is_adapted(first) else (second, first)
  return _by(value, by, jnp.multiply)


def _divided(operands, params):
  """Divides an Adapted by a number, or by one for each row or column."""
  del params
  value, by = operands
  return _by(value, by, jnp.divide) if is_adapted(value) else None


def _by(value, by, function):
  """Multiplies or divides w, and of each change one factor."""
  if is_adapted(by) or value.branches:
    return None
  by = jnp.asarray(by)
  if by.ndim == 0:
    return _times(value, by if function is jnp.multiply else 1 / by)
  if by.ndim != value.ndim or value.rows is not None:
    return None
  on, changes = set(axes_with(by, by.ndim)), []
  for change in value.changes:
    name = _side_for(change, on, by.ndim)
    if name is None:
      return None
    x = getattr(change, name)
    each = by.astype(x.dtype).reshape(*[1] * change.lead, *by.shape)
    changes.append(dataclasses.replace(change, **{name: function(x, each)}))
  w = function(value.w, by)
  return dataclasses.replace(value, w=w, changes=tuple(changes))


def _side_for(change: Change, on: set[int], ndim: int) -> str | None:
  """Returns the factor that can take numbers for some axes; None if neither.

  Both stay thin if none takes an axis that the other has alone.
  """
  a, b = (set(axes_with(x, ndim)) for x in (change.a, change.b))
  fits = [
    name for name, own, other in (("a", a, b), ("b", b, a))
    if not on & (other - own)
  ]  # fmt: skip
  whole = [name for name in fits if on <= {"a": a, "b": b}[name]]
  return next(iter([*whole, *fits[::-1]]), None)


def _times(value, by):
  """Multiplies w, the gates of its changes and the rows by a scalar."""
  by = jnp.asarray(by)
  changes = tuple(
    dataclasses.replace(c, gate=c.gate * by.astype(c.gate.dtype))
    for c in value.changes
  )
  rows = None if value.rows is None else value.rows * by
  return dataclasses.replace(value, w=value.w * by, changes=changes, rows=rows)


def _negated(operands, params):
  """Negates an Adapted."""
  del params
  value = operands[0]
  return None if value.branches else _times(value, jnp.array(-1, value.dtype))


def _added(operands, params):
  """Adds two Adapted parameters, or one and a dense array."""
  del params
  first, second = operands
  if any(is_adapted(x) and x.shape == () for x in operands):
    return None
  if any(is_adapted(x) and x.branches for x in operands):
    return None
  arrays = [x.w if is_adapted(x) else x for x in operands]
  changes = [c for x in operands if is_adapted(x) for c in x.changes]
  named = first if is_adapted(first) else second
  return Adapted(arrays[0] + arrays[1], tuple(changes), path=named.path)


def _subtracted(operands, params):
  """Subtracts, where one or both operands are Adapted."""
  first, second = operands
  negative = _negated([second], params) if is_adapted(second) else -second
  return None if negative is None else _added([first, negative], params)


def _converted(operands, params):
  """Converts an Adapted to a floating dtype."""
  value = operands[0]
  dtype = params["new_dtype"]
  if not jnp.issubdtype(dtype, jnp.floating):
    return None
  return _cast(value, dtype)


def _cast(value: Adapted, dtype) -> Adapted:
  """Casts w and the further rows; factors keep their dtype."""
  rows = None if value.rows is None else value.rows.astype(dtype)
  return dataclasses.replace(value, w=value.w.astype(dtype), rows=rows)


def _stopped(operands, params):
  """Stops the gradients of all parts of an Adapted."""
  del params
  return jax.tree.map(lax.stop_gradient, operands[0])


def _barrier(operands, params):
  """Puts an optimization barrier around all parts of the operands."""
  del params
  return lax.optimization_barrier(list(operands))


# Primitive's name -> rule.
AXIS_RULES: dict[str, PrimitiveRule] = {
  "transpose": _transpose,
  "squeeze": _squeeze,
  "broadcast_in_dim": _broadcast_in_dim,
  "reshape": _reshape,
  "slice": _slice,
  "dynamic_slice": _dynamic_slice,
  "split": _split,
  "concatenate": _concatenate,
  "pad": _pad,
  "rev": _reversed,
  "tile": _tiled,
  "all_gather": _gathered,
  "stack": _stack,
  "convert_element_type": _converted,
  "mul": _scaled,
  "div": _divided,
  "neg": _negated,
  "add": _added,
  "add_any": _added,
  "sub": _subtracted,
  "stop_gradient": _stopped,
  "optimization_barrier": _barrier,
}

# Applied to w alone: the changes keep their own placement and precision.
OF_W_ALONE = (
  "copy",
  "copy_p",
  "pcast",
  "pvary",
  "reduce_precision",
  "reshard",
  "sharding_constraint",
)

# A branch acts on a matmul's input and output, so only operations that keep
# these as they are may come between the parameter and its matmul.
SEEN_THROUGH = (
  "transpose",
  "squeeze",
  "reshape",
  "broadcast_in_dim",
  "convert_element_type",
  "stop_gradient",
  "optimization_barrier",
  *OF_W_ALONE,
)

# A gate needs all inputs of its layer at once: what cuts a parameter along
# others leaves it as it is, and a product with a part of the inputs is refused.
SEEN_BY_GATES = (
  *SEEN_THROUGH,
  "all_gather",
  "dynamic_slice",
  "slice",
  "split",
)
