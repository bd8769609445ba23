# SPDX-License-Identifier: Apache-2.0
"""Adapted: a parameter kept together with its programs, never summed.

Factors are stored in the parameter's own layout, with length 1 for the axes
along which they do not vary. So whatever happens to an axis of the parameter
happens to the same axis of both factors, without any view or orientation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.loras import Lora
from jlora.views import MatrixView

LayerFunction = Callable[[jax.Array], jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("a", "b", "gate", "ids", "weights", "key", "router", "rows"),
  meta_fields=("rate", "batch"),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Change:
  """A low-rank change of a parameter w, in w's own layout.

      change = Σ_r gate_r a_r b_r,   broadcast against each other

  Attributes:
    a: (r, *w.shape), with 1 for axes along which it does not vary; for a bank
      of n adapters (n, r, *w.shape).
    b: likewise.
    gate: likewise, the product of scales and weights; varies only along w's
      batch axes.
    ids: None, or (s,) the bank's adapters that are added; -1 adds none.
    weights: None, or (s,) factors of those adapters.
    key: None, or the PRNG key of the dropout of the change's input.
    router: None, or the `Router` that gates the units by what a layer reads;
      its leaves are (..., *w.shape).
    rows: None, or what the router said of one product's rows: gates (..., r),
      the rows' axes in x's order.
    rate: share of the input that is dropped; static.
    batch: number of rows that choose from the bank at once, under vmap; static.
  """

  a: jax.Array
  b: jax.Array
  gate: jax.Array
  ids: jax.Array | None = None
  weights: jax.Array | None = None
  key: jax.Array | None = None
  router: Any = None
  rows: jax.Array | None = None
  rate: float = 0.0
  batch: int = 1

  @property
  def lead(self) -> int:
    """Number of axes before those of the parameter: 1, or 2 for a bank."""
    return 1 if self.ids is None else 2


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("w", "changes", "branches", "rows"),
  meta_fields=("path",),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Adapted:
  """A parameter with the programs that change it.

  `bind` puts these in place of parameters. Only functions wrapped by `adapt`
  can compute with them.

  Attributes:
    w: the base's parameter.
    changes: low-rank changes, to be added to w.
    branches: functions of a matmul's input, (..., in) -> (..., out), each a
      pytree; their values are added to the output of the matmul with w.
    rows: None, or (p, ...) further rows of a table, after its last.
    path: the parameter's name, for messages; static.
  """

  w: jax.Array
  changes: tuple[Change, ...] = ()
  branches: tuple[LayerFunction, ...] = ()
  rows: jax.Array | None = None
  path: str = ""

  @property
  def shape(self) -> tuple[int, ...]:
    """The parameter's shape."""
    return self.w.shape

  @property
  def dtype(self) -> Any:
    """The parameter's dtype."""
    return self.w.dtype

  @property
  def ndim(self) -> int:
    """The parameter's number of axes."""
    return self.w.ndim


def is_adapted(x: Any) -> bool:
  """Returns whether a leaf is an Adapted."""
  return isinstance(x, Adapted)


def change_of(
  lora: Lora, view: MatrixView, shape: tuple[int, ...], weight: Any = 1.0
) -> Change:
  """Returns a Lora as a Change, its factors in the layout of the parameter.

  Args:
    lora: a (..., r, in), b (..., r, out), scale (...).
    view: how the parameter is read as (..., in, out).
    shape: of the parameter.
    weight: multiplies the scale.

  Example:
    >>> lora = Lora(jnp.ones((2, 3)), jnp.ones((2, 5)), jnp.float32(1))
    >>> change = change_of(lora, MatrixView(inputs=(1,), outputs=(0,)), (5, 3))
    >>> change.a.shape, change.b.shape, change.gate.shape
    ((2, 1, 3), (2, 5, 1), (2, 1, 1))
  """
  count, rank = len(view.batch), lora.rank

  def lay(factor, own):
    """Reshapes (*batch, r, columns) to (r, *shape), with 1 on other axes."""
    kept = (*view.batch, *own)
    if count:
      factor = jnp.moveaxis(factor, count, 0)
    order = sorted(range(len(kept)), key=kept.__getitem__)
    if order != [*range(len(kept))]:
      factor = factor.reshape(rank, *(shape[axis] for axis in kept))
      factor = factor.transpose(0, *(1 + i for i in order))
    ones = tuple(size if i in kept else 1 for i, size in enumerate(shape))
    return lax.reshape(factor, (rank, *ones))

  scale = lora.scale.astype(jnp.float32)
  if not (isinstance(weight, float) and weight == 1):
    scale = scale * jnp.asarray(weight, jnp.float32)
  gate = lax.broadcast_in_dim(scale, (*scale.shape, rank), range(count))
  return Change(
    lay(lora.a, view.inputs), lay(lora.b, view.outputs), lay(gate, ())
  )


def over_lead(change: Change, function: Callable[[jax.Array], Any]) -> Change:
  """Applies a function of a parameter's axes to the factors of its Change.

  Args:
    change: of the parameter.
    function: (*w.shape) -> (*new shape); must accept 1 for some of the sizes.

  Example:
    >>> one = jnp.ones
    >>> change = Change(one((2, 3, 1)), one((2, 1, 5)), one((2, 1, 1)))
    >>> over_lead(change, jnp.transpose).a.shape
    (2, 1, 3)
  """
  ndim = change.a.ndim - change.lead

  def mapped(x):
    """Applies the function to the last axes, those of the parameter."""
    own = function
    for _ in range(x.ndim - ndim):
      own = jax.vmap(own)
    return own(x)

  return dataclasses.replace(
    change,
    a=mapped(change.a),
    b=mapped(change.b),
    gate=mapped(change.gate),
    router=jax.tree.map(mapped, change.router),
  )


def without_bank(change: Change) -> Change:
  """Fetches the adapters that a change's ids select, along one rank axis.

  Returns:
    Change without ids, of rank s r: exactly zero for an id of -1, NaN for an id
    outside of the bank, as in `lora_dot_many`.

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
    """Selects by ids, 0 for an id of -1 and `fill` for an unknown one."""
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
  """Returns the axes of the parameter along which a factor is not broadcast.

  Args:
    factor: (lead..., *w.shape).
    ndim: number of axes of the parameter.

  Returns:
    Axes of w where the factor's length is not 1; 0 is that of an empty slice.

  Example:
    >>> axes_with(jnp.ones((2, 1, 5)), 2)
    (1,)
  """
  sizes = factor.shape[factor.ndim - ndim :]
  return tuple(axis for axis, size in enumerate(sizes) if size != 1)


def is_gated(value: Any) -> bool:
  """Returns whether a value is an Adapted with a router.

  Example:
    >>> is_gated(Adapted(jnp.ones(2)))
    False
  """
  return is_adapted(value) and any(c.router is not None for c in value.changes)


def is_matrix(value: Adapted) -> bool:
  """Returns whether a change has an axis for each of its factors alone.

  Example:
    >>> one = jnp.ones
    >>> change = Change(one((2, 3, 1)), one((2, 1, 5)), one((2, 1, 1)))
    >>> is_matrix(Adapted(one((3, 5)), (change,)))
    True
    >>> row = Change(one((2, 1)), one((2, 5)), one((2, 1)))
    >>> is_matrix(Adapted(one(5), (row,)))
    False
  """
  sides = [
    [set(axes_with(x, value.ndim)) for x in (c.a, c.b)] for c in value.changes
  ]
  return any(a - b and b - a for a, b in sides)


def dropped(x: jax.Array, change: Change) -> jax.Array:
  """Applies a change's dropout, if it has a key, to the layer's input x.

      x / (1 - rate) with probability 1 - rate, else 0

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
  """Adds an array to y, in y's dtype.

  Example:
    >>> plus(jnp.bfloat16(1), jnp.float32(0.5)).dtype.name
    'bfloat16'
  """
  return y + more.astype(y.dtype)


def dense_change(change: Change, shape: tuple[int, ...]) -> jax.Array:
  """Forms a change as a dense float32 array of the parameter's shape.

  Costs `2 r` operations per entry and the array's memory.

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
  """Adds an Adapted's changes to its parameter; rounds once to its dtype.

  The further rows of a table are left out.

  Raises:
    ValueError: it has branches or routers, which have no dense form.

  Example:
    >>> dense_sum(Adapted(jnp.ones(2)))
    Array([1., 1.], dtype=float32)
  """
  if value.branches:
    raise ValueError(
      f"{value.path} has a branch, which can be added only to what a matmul "
      "with it writes; give the branch to a parameter that is used in one."
    )
  if is_gated(value):
    raise ValueError(
      f"{value.path} has a Gated, whose gate reads the input of a matmul; give "
      "it to a parameter that is used in one, or a plain Lora to this one."
    )
  total = value.w
  if value.changes:
    parts = (dense_change(change, value.shape) for change in value.changes)
    total = sum(parts, start=value.w.astype(jnp.float32))
  return total.astype(value.dtype)
