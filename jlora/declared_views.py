# SPDX-License-Identifier: Apache-2.0
"""Views of parameters as modules of NNX and boxes of linen declare them."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jlora.views import MatrixView, Readings, stack_view

Shape = tuple[int, ...]


def declared_views(
  tree: Any, read_alone: Callable[[str, Shape], Readings]
) -> dict[str, Readings]:
  """Reads what modules of NNX and boxes of linen say of their parameters.

  An NNX layer knows its sizes, so that an axis more is a stack of layers.
  Linen's `Partitioned` and `LogicallyPartitioned` name the axes: "layers" and
  "experts" repeat a layer, "heads" and what lies beside them go together.

  Args:
    tree: any pytree.
    read_alone: `(path, shape) -> readings` by the name, for what is stacked and
      of whose other axes the metadata say nothing.

  Returns:
    {path: readings}, of those parameters that something is said of; several
    where a stack's axis could be either of two.

  Example:
    >>> from flax import nnx
    >>> layer = nnx.LinearGeneral(6, (2, 4), rngs=nnx.Rngs(0))
    >>> declared_views({"x": layer}, lambda path, shape: ())
    {'x/kernel': (MatrixView(batch=(), inputs=(0,), outputs=(1, 2)),)}
  """
  nnx, meta = sys.modules.get("flax.nnx"), sys.modules.get("flax.core.meta")
  kinds = [nnx.Module] if nnx else []
  kinds += [meta.Partitioned] if meta else []
  is_known = lambda node: isinstance(node, tuple(kinds))  # noqa: E731
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_known)[0]
  found = {}
  for at, node in leaves if kinds else []:
    path = jax.tree_util.keystr(at, simple=True, separator="/")
    if nnx and isinstance(node, nnx.Module):
      found.update(_of_modules(path, nnx.iter_modules(node)))
    elif is_known(node):
      found.update(_of_box(path, node.value, node.names, read_alone))
  return found


def _of_modules(
  prefix: str, modules: Iterable[tuple[tuple[Any, ...], Any]]
) -> Iterator[tuple[str, Readings]]:
  """Yields what the layers of an NNX module say."""
  for at, module in modules:
    kinds = [cls.__name__ for cls in type(module).__mro__]
    say = next((_LAYERS[kind] for kind in kinds if kind in _LAYERS), None)
    if say is None:
      continue
    name, view, shape = say(module)
    leaf = getattr(module, name, None)
    places = _places(tuple(getattr(leaf, "shape", ())), shape)
    bias = getattr(getattr(module, "bias", None), "shape", None)
    if bias and len(places) > 1:
      one = tuple(shape[axis] for axis in view.outputs)
      places = [a for a in places if bias[:a] + bias[a + 1 :] == one] or places
    readings = (stack_view(view, axis) for axis in places)
    if places:
      path = "/".join(str(part) for part in (prefix, *at, name) if part != "")
      yield path, tuple(readings)


def _places(shape: Shape, one: Shape) -> list[int | None]:
  """Returns the axes that a parameter may have beyond one layer's; or None."""
  if shape == one:
    return [None]
  return [
    axis
    for axis in range(len(shape))
    if shape[:axis] + shape[axis + 1 :] == one
  ]


def _as_tuple(sizes: Any) -> Shape:
  """Returns one size or several as a tuple."""
  return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def _linear(layer: Any) -> tuple[str, MatrixView, Shape]:
  """Reads nnx.Linear."""
  return "kernel", MatrixView(), (layer.in_features, layer.out_features)


def _linear_general(layer: Any) -> tuple[str, MatrixView, Shape]:
  """Reads nnx.LinearGeneral: (batch..., in..., out...)."""
  sides = (
    tuple(layer.batch_axis.values()),
    _as_tuple(layer.in_features),
    _as_tuple(layer.out_features),
  )
  axes = iter(range(sum(map(len, sides))))
  view = MatrixView(*(tuple(next(axes) for _ in side) for side in sides))
  return "kernel", view, sum(sides, ())


def _convolution(layer: Any) -> tuple[str, MatrixView, Shape]:
  """Reads nnx.Conv and nnx.ConvTranspose: (window..., in, out)."""
  *window, n_in, n_out = range(len(layer.kernel_shape))
  if getattr(layer, "transpose_kernel", False):
    n_in, n_out = n_out, n_in
  view = MatrixView((), (*window, n_in), (n_out,))
  return "kernel", view, tuple(layer.kernel_shape)


def _embedding(layer: Any) -> tuple[str, MatrixView, Shape]:
  """Reads nnx.Embed."""
  return "embedding", MatrixView(), (layer.num_embeddings, layer.features)


def _einsum(layer: Any) -> tuple[str, MatrixView, Shape]:
  """Reads nnx.Einsum, from its equation."""
  operands, _, result = layer.einsum_str.replace(" ", "").partition("->")
  given, _, kernel = operands.partition(",")
  roles = [(axis in given, axis in result) for axis in kernel]
  places = lambda role: tuple(  # noqa: E731
    at for at, found in enumerate(roles) if found == role
  )
  view = MatrixView(
    places((True, True)), places((True, False)), places((False, True))
  )
  return "kernel", view, tuple(layer.kernel_shape)


# A class of NNX -> the parameter's name, its view and shape in one layer.
_LAYERS: dict[str, Callable[[Any], tuple[str, MatrixView, Shape]]] = {
  "Linear": _linear,
  "LinearGeneral": _linear_general,
  "Conv": _convolution,
  "ConvTranspose": _convolution,
  "Embed": _embedding,
  "Einsum": _einsum,
}
# What linen's metadata call the axes that repeat a layer, and those of heads.
_REPEATS = r"(?i)layers?|blocks?|stages?|repeats?|scan\w*|\w*experts?|exp"
_HEADS = r"(?i)\w*heads?|q?kv|\w*head_(dim|size)|kv_(dim|size)"


def _of_box(
  path: str,
  value: Any,
  names: tuple[Any, ...],
  read_alone: Callable[[str, Shape], Readings],
) -> Iterator[tuple[str, Readings]]:
  """Yields what the names of a boxed parameter's axes say."""
  shape = tuple(getattr(value, "shape", ()))
  if len(names) != len(shape) or len(shape) < 2:
    return
  is_of = lambda rule, at: re.fullmatch(rule, str(names[at])) is not None  # noqa: E731
  batch = tuple(at for at in range(len(shape)) if is_of(_REPEATS, at))
  rest = tuple(at for at in range(len(shape)) if at not in batch)
  heads = tuple(at for at in rest if is_of(_HEADS, at))
  others = tuple(at for at in rest if at not in heads)
  if len(rest) < 2:
    yield path, (MatrixView(tuple(range(len(shape))), (), ()),)
  elif len(rest) == 2:
    yield path, (MatrixView(batch, rest[:1], rest[1:]),)
  elif heads and others and heads in (rest[: len(heads)], rest[-len(heads) :]):
    first, last = sorted((heads, others))
    yield path, (MatrixView(batch, first, last),)
  elif batch:
    inner = tuple(shape[at] for at in rest)
    on = lambda axes: tuple(rest[axis] for axis in axes)  # noqa: E731
    yield (
      path,
      tuple(
        MatrixView(batch + on(view.batch), on(view.inputs), on(view.outputs))
        for view in read_alone(path, inner)
      ),
    )
