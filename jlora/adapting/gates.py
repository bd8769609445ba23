# SPDX-License-Identifier: Apache-2.0
"""Gates that read a layer's input: from a `Gated` to numbers for every row.

y = x w + ((x aᵀ) * repeat(scale * gate(params, x), r)) b
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapting.adapted import (
  Adapted,
  Change,
  axes_with,
  change_of,
  is_adapted,
  is_gated,
)
from jlora.adapting.labels import Labels, label
from jlora.adapting.programs import Gated
from jlora.messages import name_some
from jlora.views import MatrixView


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("params",),
  meta_fields=("function", "count", "width"),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Router:
  """What gates the units of a change: a `Gated`'s function and parameters.

  Attributes:
    params: of the function; each leaf (own axes..., *w.shape), with 1 for axes
      of w along which it does not vary, so that what happens to an axis of w
      happens to them too.
    function: (params, x (..., in)) -> (..., n), or that and a note; static.
    count: n, the number of adapters; static.
    width: in, the number of inputs of the layer; static.
  """

  params: Any
  function: Callable[[Any, jax.Array], Any]
  count: int
  width: int


def check_leads(
  programs: Mapping[str, tuple[Gated, tuple[int, ...]]],
) -> None:
  """Raises unless each gate's parameters begin with the layers of its matrix.

  Args:
    programs: path -> (program, sizes of the matrix's leading axes).

  Raises:
    ValueError: names up to three leaves.

  Example:
    >>> check_leads({})
  """
  wrong = [
    f"{path}{jax.tree_util.keystr(keys)} {jnp.shape(leaf)} for {lead}"
    for path, (program, lead) in programs.items()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(program.params)
    if jnp.shape(leaf)[: len(lead)] != lead
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} parameters of gates do not begin with the axes of the "
      f"layers that they are for: {name_some(wrong)}; stack them along these."
    )


def gated_change(
  program: Gated, view: MatrixView, shape: tuple[int, ...], weight: Any = 1.0
) -> Change:
  """Lays a `Gated` out as one change of rank n r with a `Router`.

  Args:
    program: fits the parameter.
    view: how the parameter is read as (..., in, out).
    shape: of the parameter.
    weight: multiplies the scales.

  Raises:
    ValueError: a view that reads the inputs in another order.

  Example:
    >>> from jlora.loras import Lora
    >>> one = jnp.ones
    >>> program = Gated(Lora(one((3, 2, 4)), one((3, 2, 5)), one(3)), ())
    >>> gated_change(program, MatrixView(), (4, 5)).a.shape
    (6, 4, 1)
  """
  if [*view.inputs] != sorted(view.inputs):
    raise ValueError(
      f"{view} reads its inputs in another order than the parameter keeps "
      "them; a Gated needs a view with its inputs in order."
    )
  each = jax.vmap(lambda lora: change_of(lora, view, shape, weight))
  change = each(program.bank)
  flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
  count = len(view.batch)
  order = sorted(range(count), key=view.batch.__getitem__)
  ones = [size if i in view.batch else 1 for i, size in enumerate(shape)]

  def lay(leaf):
    """Moves the axes of layers last, where w has them."""
    leaf = jnp.asarray(leaf)
    own = range(count, leaf.ndim)
    return leaf.transpose(*own, *order).reshape(*leaf.shape[count:], *ones)

  params = jax.tree.map(lay, program.params)
  width = program.bank.a.shape[-1]
  router = Router(params, program.gate, len(program.bank.a), width)
  return dataclasses.replace(
    change,
    a=flat(change.a),
    b=flat(change.b),
    gate=flat(change.gate),
    router=router,
  )


def read_gates(
  operands: Sequence[Any], params: Mapping[str, Any]
) -> tuple[list[Any], list[Any]]:
  """Computes the gates of a product's Adapted operand from its other one.

  Args:
    operands: of a `dot_general`.
    params: its parameters.

  Returns:
    The operands, with `rows` in place of routers, and the notes of the gates.

  Raises:
    ValueError: the product is not one with all inputs of the layer, or a gate
      gives another shape.

  Example:
    >>> read_gates([jnp.ones(2), jnp.ones(2)], {})[1]
    []
  """
  first, second = operands
  if not (is_gated(first) or is_gated(second)):
    return [first, second], []
  is_left = is_gated(first)
  value, x = (first, second) if is_left else (second, first)
  if is_adapted(x):
    raise ValueError(
      f"{value.path} has a Gated and is multiplied by {x.path}, which has "
      "programs too: there is no input for the gate to read."
    )
  numbers = params["dimension_numbers"]
  labels = label(value.ndim, x.ndim, numbers, is_left=is_left)
  notes, changes = [], []
  for change in value.changes:
    if change.router is not None:
      rows, note = _rows_of(change, value, x, labels)
      change = dataclasses.replace(change, router=None, rows=rows)
      notes += [] if note is None else [note]
    changes.append(change)
  value = dataclasses.replace(value, changes=tuple(changes))
  return [value, x] if is_left else [x, value], notes


def _rows_of(change: Change, value: Adapted, x, labels: Labels):
  """Returns gates (rows of x..., r) of one change, and the gate's note."""
  router, ndim = change.router, value.ndim
  leaves = jax.tree.leaves(router.params)
  on = {axis for leaf in (change.a, *leaves) for axis in axes_with(leaf, ndim)}
  inputs = sorted(labels.contracted)
  # Layers or experts that are multiplied at once, each with a gate of its own.
  layers = sorted(on & set(labels.rows))
  _check_reads(change, value, on - {*inputs, *layers}, inputs)
  others = [name for name in labels.rows if name not in layers]
  order = [labels.x.index(name) for name in (*layers, *others, *inputs)]
  x = x.transpose(order)
  x = x.reshape(*x.shape[: len(layers) + len(others)], router.width)
  sizes = [value.shape[axis] for axis in layers]
  params = jax.tree.map(
    lambda leaf: _by_layer(leaf, ndim, layers, sizes), router.params
  )
  run = functools.partial(_called, router, value.path)
  for _ in layers:
    run = jax.vmap(run)
  gates, note = run(params, x)
  gates = jnp.repeat(gates, len(change.a) // router.count, axis=-1)
  places = [[*layers, *others].index(name) for name in labels.rows]
  return gates.transpose(*places, gates.ndim - 1), note


def _check_reads(change: Change, value: Adapted, others, inputs) -> None:
  """Raises ValueError unless a product sums over all inputs of the layer."""
  width = math.prod(change.a.shape[1 + axis] for axis in inputs)
  if width == change.router.width and not others:
    return
  raise ValueError(
    f"{value.path} has a Gated for a layer of {change.router.width} inputs, of "
    f"which a product with {value.shape} that sums over axes {tuple(inputs)} "
    f"reads {width}: its gate needs all of them at once. Give a plain Lora to "
    "a parameter that is cut along its inputs, or multiplied from both sides."
  )


def _by_layer(leaf, ndim: int, layers, sizes):
  """Takes a parameter of a gate out of w's layout, its layers' axes first."""
  own = leaf.ndim - ndim
  ones = [own + i for i in range(ndim) if i not in layers]
  leaf = jnp.squeeze(leaf, tuple(ones))
  leaf = jnp.moveaxis(leaf, range(own, leaf.ndim), range(leaf.ndim - own))
  return jnp.broadcast_to(leaf, (*sizes, *leaf.shape[len(sizes) :]))


def _called(router: Router, path: str, params, x):
  """Calls a gate; returns (..., n) float32 for all rows of x, and its note."""
  found = router.function(params, x)
  gates, note = found if isinstance(found, tuple) else (found, None)
  wanted = (*x.shape[:-1], router.count)
  shape = jnp.shape(gates)
  padded = (1,) * (len(wanted) - len(shape)) + shape
  if len(padded) != len(wanted) or any(
    size not in (1, own) for size, own in zip(padded, wanted, strict=True)
  ):
    raise ValueError(
      f"The gate of {path} gave {shape} for x {x.shape}; needed is what "
      f"broadcasts to {wanted}, a number for each of {router.count} adapters."
    )
  gates = jnp.asarray(gates).astype(jnp.float32).reshape(padded)
  return jnp.broadcast_to(gates, wanted), note
