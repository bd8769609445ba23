# SPDX-License-Identifier: Apache-2.0
"""Adapted: a parameter with programs on it, never summed.

Factors are kept in the parameter's own layout, with 1 for the axes that they
do not hang on, so whatever is done to an axis of the parameter is done to the
same axis of both factors, and neither a view nor an orientation is needed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.loras import Lora
from jlora.views import MatrixView

LayerFunction = Callable[[jax.Array], jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("a", "b", "gate", "ids", "weights", "key"),
  meta_fields=("rate", "batch"),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Change:
  """A low-rank change of a parameter w, in w's own layout.

      change = Σ_r gate_r a_r b_r,   broadcast against each other

  Attributes:
    a: (r, *w.shape), with 1 for axes it does not hang on; of a bank of
      adapters (n, r, *w.shape).
    b: likewise.
    gate: likewise, constant where nothing batches w: scales and weights.
    ids: None, or (s,) adapters of the bank that are added; -1 is none.
    weights: None, or (s,) what those adapters are multiplied by.
    key: None, or the PRNG key of the dropout of what the change reads.
    rate: share that is dropped; static.
    batch: how many rows choose from the bank at a time, under vmap; static.
  """

  a: jax.Array
  b: jax.Array
  gate: jax.Array
  ids: jax.Array | None = None
  weights: jax.Array | None = None
  key: jax.Array | None = None
  rate: float = 0.0
  batch: int = 1

  @property
  def lead(self) -> int:
    """Axes before those of the parameter: 1, or 2 for a bank."""
    return 1 if self.ids is None else 2


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("w", "changes", "branches", "rows"),
  meta_fields=("path",),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Adapted:
  """A parameter and what is added to it, or to what its matmul writes.

  A leaf of the parameters that `bind` gives; a function that was not wrapped by
  `adapt` cannot compute with it.

  Attributes:
    w: the base's parameter.
    changes: low-rank changes; their sum is added.
    branches: functions of what a matmul with w reads, (..., in) -> (..., out),
      each a pytree; their values are added to what it writes.
    rows: None, or (p, ...) more rows of a table, found behind its last.
    path: the parameter's name, for messages; static.
  """

  w: jax.Array
  changes: tuple[Change, ...] = ()
  branches: tuple[LayerFunction, ...] = ()
  rows: jax.Array | None = None
  path: str = ""

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the parameter."""
    return self.w.shape

  @property
  def dtype(self) -> Any:
    """Dtype of the parameter."""
    return self.w.dtype

  @property
  def ndim(self) -> int:
    """Axes of the parameter."""
    return self.w.ndim


def is_adapted(x: Any) -> bool:
  """Whether a leaf is an Adapted.

  Args:
    x: anything.

  Returns:
    bool; for `is_leaf` of `jax.tree`.

  Example:
    >>> is_adapted(Adapted(jnp.ones(2))), is_adapted(jnp.ones(2))
    (True, False)
  """
  return isinstance(x, Adapted)


def change_of(
  lora: Lora, view: MatrixView, shape: tuple[int, ...], weight: Any = 1.0
) -> Change:
  """The Change of a Lora, its factors in the layout of a parameter.

  Args:
    lora: a (..., r, in), b (..., r, out), scale (...).
    view: how the parameter is read as (..., in, out).
    shape: the parameter's.
    weight: multiplies the scale.

  Returns:
    Change; reshapes and transposes of a and b.

  Example:
    >>> lora = Lora(jnp.ones((2, 3)), jnp.ones((2, 5)), jnp.float32(1))
    >>> change = change_of(lora, MatrixView(inputs=(1,), outputs=(0,)), (5, 3))
    >>> change.a.shape, change.b.shape, change.gate.shape
    ((2, 1, 3), (2, 5, 1), (2, 1, 1))
  """
  count = len(view.batch)

  def lay(factor, own):
    """(*batch, r, columns) as (r, *shape), with 1 where it does not hang."""
    kept = (*view.batch, *own)
    sizes = tuple(shape[axis] for axis in kept)
    factor = jnp.moveaxis(factor, count, 0)
    factor = factor.reshape(factor.shape[0], *sizes)
    order = sorted(range(len(kept)), key=kept.__getitem__)
    factor = factor.transpose(0, *(1 + i for i in order))
    ones = tuple(size if i in kept else 1 for i, size in enumerate(shape))
    return factor.reshape(factor.shape[0], *ones)

  scale = lora.scale.astype(jnp.float32) * jnp.asarray(weight, jnp.float32)
  gate = jnp.broadcast_to(scale[..., None], (*scale.shape, lora.rank))
  return Change(
    lay(lora.a, view.inputs), lay(lora.b, view.outputs), lay(gate, ())
  )


def over_lead(change: Change, function: Callable[[jax.Array], Any]) -> Change:
  """A Change of another layout: the same done to a, b and gate.

  Args:
    change: of a parameter.
    function: (*w.shape) -> (*new shape), for arrays with 1 for some axes.

  Returns:
    Change.

  Example:
    >>> one = jnp.ones
    >>> change = Change(one((2, 3, 1)), one((2, 1, 5)), one((2, 1, 1)))
    >>> over_lead(change, jnp.transpose).a.shape
    (2, 1, 3)
  """
  for _ in range(change.lead):
    function = jax.vmap(function)
  return dataclasses.replace(
    change,
    a=function(change.a),
    b=function(change.b),
    gate=function(change.gate),
  )


def without_bank(change: Change) -> Change:
  """The change that the ids of a bank select, on one rank axis.

  Args:
    change: with or without ids.

  Returns:
    Change without ids, of rank s r; exactly zero for an id of -1, NaN for one
    that the bank lacks, as `lora_dot_many` has it.

  Example:
    >>> bank = Change(jnp.ones((4, 2, 3, 1)), jnp.ones((4, 2, 1, 5)),
    ...               jnp.ones((4, 2, 1, 1)), jnp.array([1, -1]))
    >>> without_bank(bank).gate[:, 0, 0]
    Array([1., 1., 0., 0.], dtype=float32)
  """
  if change.ids is None:
    return change
  ids, count = change.ids, change.a.shape[0]
  safe = jnp.clip(ids, 0, count - 1)

  def take(x, fill, factor=None):
    x = x[safe]
    if factor is not None:
      x = x * factor.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    on = (ids >= 0).reshape(-1, *(1,) * (x.ndim - 1))
    known = (ids < count).reshape(on.shape)
    x = jnp.where(on, x, jnp.zeros((), x.dtype))
    x = jnp.where(known & (ids >= -1).reshape(on.shape), x, fill)
    return x.reshape(-1, *x.shape[2:])

  return dataclasses.replace(
    change,
    a=take(change.a, jnp.zeros((), change.a.dtype)),
    b=take(change.b, jnp.zeros((), change.b.dtype)),
    gate=take(
      change.gate, jnp.array(jnp.nan, change.gate.dtype), change.weights
    ),
    ids=None,
    weights=None,
  )


def axes_with(factor: jax.Array, ndim: int) -> tuple[int, ...]:
  """The axes of the parameter that a factor hangs on.

  Args:
    factor: (lead..., *w.shape).
    ndim: axes of the parameter.

  Returns:
    Axes of w where the factor is longer than 1.

  Example:
    >>> axes_with(jnp.ones((2, 1, 5)), 2)
    (1,)
  """
  sizes = factor.shape[factor.ndim - ndim :]
  return tuple(axis for axis, size in enumerate(sizes) if size > 1)


def dropped(x: jax.Array, change: Change) -> jax.Array:
  """What a change reads: x / (1 - rate) or 0 where there is dropout.

  Args:
    x: what the layer reads.
    change: with a key, or none.

  Returns:
    An array like x.

  Example:
    >>> one = jnp.ones
    >>> change = Change(one((1, 2)), one((1, 1)), one((1, 1)))
    >>> dropped(one(2), change)
    Array([1., 1.], dtype=float32)
  """
  if change.key is None:
    return x
  kept = jax.random.bernoulli(change.key, 1 - change.rate, x.shape)
  return jnp.where(kept, x / jnp.array(1 - change.rate, x.dtype), 0)


def plus(y: jax.Array, more: jax.Array) -> jax.Array:
  """The sum in y's dtype.

  Args:
    y: any shape, floating.
    more: broadcastable to it.

  Returns:
    An array like y.

  Example:
    >>> plus(jnp.bfloat16(1), jnp.float32(0.5)).dtype.name
    'bfloat16'
  """
  return y + more.astype(y.dtype)


def dense_change(change: Change, shape: tuple[int, ...]) -> jax.Array:
  """The change as an array of the parameter's shape, float32.

  Args:
    change: of a parameter of that shape.
    shape: the parameter's.

  Returns:
    float32 of that shape; costs `2 r` operations an entry and its memory.

  Example:
    >>> one = jnp.ones
    >>> dense_change(Change(one((2, 3, 1)), one((2, 1, 5)), one((2, 1, 1))),
    ...              (3, 5)).shape
    (3, 5)
  """
  change, ndim = without_bank(change), len(shape)
  operands, kept = [], set()
  for factor in (change.a, change.gate, change.b):
    axes = axes_with(factor, ndim)
    kept.update(axes)
    sizes = (factor.shape[0], *(shape[axis] for axis in axes))
    operands += [factor.reshape(sizes).astype(jnp.float32), [ndim, *axes]]
  found = jnp.einsum(
    *operands, sorted(kept), precision=jax.lax.Precision.HIGHEST
  )
  ones = tuple(size if i in kept else 1 for i, size in enumerate(shape))
  return jnp.broadcast_to(found.reshape(ones), shape)


def dense_sum(value: Adapted) -> jax.Array:
  """The parameter with its changes in it, one rounding to its dtype.

  Args:
    value: without branches, which have no dense form. Its further rows are no
      part of the table.

  Returns:
    An array like `value.w`.

  Raises:
    ValueError: it has branches.

  Example:
    >>> dense_sum(Adapted(jnp.ones(2)))
    Array([1., 1.], dtype=float32)
  """
  if value.branches:
    raise ValueError(
      f"{value.path} has a branch, which can be added only to what a matmul "
      "with it writes; give the branch to a parameter that is used in one."
    )
  total = value.w
  if value.changes:
    parts = (dense_change(change, value.shape) for change in value.changes)
    total = sum(parts, start=value.w.astype(jnp.float32))
  return total.astype(value.dtype)
