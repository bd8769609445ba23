# SPDX-License-Identifier: Apache-2.0
"""Views of a tree of Flax-like names, by what the whole tree tells.

A kernel of three axes can be a stack of matrices or one layer that writes
heads. Before names decide, the tree does: vectors (biases, scales) that have an
axis more show that their block is scanned, and along which axis; a bias beside
a kernel shows which axes the layer writes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.declared_views import declared_views
from jlora.selection import EMBEDDINGS, is_floating
from jlora.views import (
  FLAX_NAMES,
  FLAX_VIEWS,
  FUSED_READERS,
  LINEAR,
  STACKED,
  TORCH_VIEWS,
  VECTORS,
  VIEWS_OF_MODEL,
  MatrixView,
  Readings,
  ViewRule,
  stack_view,
)

Shape = tuple[int, ...]
_WRITES_HEADS = MatrixView((), (0,), (1, 2))
_SUMS_HEADS = MatrixView((), (0, 1), (2,))


class _Stack(NamedTuple):
  """A block whose layers are stacked: its prefix and the axis."""

  prefix: str
  axis: int

  def has(self, path: str) -> bool:
    """Returns whether a parameter lies in the block."""
    return path.startswith(self.prefix)


def table_for(
  paths: Iterable[str], model_type: str | None = None, *, tree: Any = None
) -> tuple[ViewRule, ...] | dict[str, Readings]:
  """Chooses how a set of parameters is read as matrices.

  Args:
    paths: names, or a mapping from names to shapes or anything with `.shape`.
      Names with dots and no slashes are PyTorch's.
    model_type: `model_type` of the checkpoint's config.json, if there is one.
    tree: the pytree that the paths are of, for what it declares itself
      (`declared_views`).

  Returns:
    A table for `view_of`: of shapes under Flax-like names the readings of each
    parameter, else rules for names.

  Example:
    >>> table_for(["h.0.attn.weight"]) is TORCH_VIEWS
    True
    >>> table_for(["layers/0/kernel"]) is FLAX_VIEWS
    True
  """
  names = list(paths)
  dotted = sum("." in path and "/" not in path for path in names)
  if 2 * dotted > len(names):
    return VIEWS_OF_MODEL.get(model_type or "", TORCH_VIEWS)
  if not isinstance(paths, Mapping):
    return FLAX_VIEWS
  found = read_tree(paths)
  for path, declared in declared_views(tree, _alone).items():
    both = tuple(view for view in declared if view in found.get(path, ()))
    found[path] = both if len(both) == 1 else declared
  return found


def read_tree(leaves: Mapping[str, Any]) -> dict[str, Readings]:
  """Reads every parameter of a tree as a matrix, by the whole tree.

  Args:
    leaves: path -> a shape, or anything with `.shape`; paths have slashes.

  Returns:
    {path: readings} of parameters of two axes or more: several where neither
    the tree nor the name decides. One without inputs and outputs is no matrix.

  Example:
    >>> import numpy as np
    >>> tree = {"layers/q_proj/kernel": np.ones((6, 8, 8)),
    ...         "layers/norm/scale": np.ones((6, 8))}
    >>> for row in read_tree(tree).items(): print(*row)
    layers/q_proj/kernel (MatrixView(batch=(0,), inputs=(1,), outputs=(2,)),)
    layers/norm/scale (MatrixView(batch=(0, 1), inputs=(), outputs=()),)
  """
  shapes = {
    path: tuple(getattr(leaf, "shape", leaf))
    for path, leaf in leaves.items()
    if isinstance(leaf, tuple) or hasattr(leaf, "shape")
    if is_floating(getattr(leaf, "dtype", np.float32))  # no counters, no keys
  }
  stacks = find_stacks(shapes)
  wide = [path for path, shape in shapes.items() if len(shape) > 1]
  layers = {shapes[p][s.axis] for s in stacks for p in wide if s.has(p)}
  found = {}
  for path, shape in shapes.items():
    if len(shape) < 2:
      continue
    own = next((stack for stack in stacks if stack.has(path)), None)
    found[path] = (
      _in_stack(path, shape, own, shapes)
      if own
      else _readings(path, shape, shapes, layers)
    )
  return found


def find_stacks(shapes: Mapping[str, Shape]) -> list[_Stack]:
  """Finds the blocks of which each parameter holds several layers.

  All parameters of such a block have one axis of the same length in the same
  place, and either its vectors have two axes, or one of its kernels has three
  that is not an attention's or a convolution's, or its heads do not fit each
  other. The whole tree can be one, along its first axis, if it has vectors.

  Args:
    shapes: path -> shape.

  Returns:
    Blocks; none lies in another.

  Example:
    >>> find_stacks({"h/norm/scale": (8, 4), "h/mlp/kernel": (8, 4, 16),
    ...              "embedding": (32, 4)})
    [_Stack(prefix='h/', axis=0)]
  """
  found: list[_Stack] = []
  blocks = _blocks(shapes)
  for prefix in sorted(blocks, key=lambda name: name.count("/")):
    if any(prefix.startswith(stack.prefix) for stack in found):
      continue
    inside = {path: shapes[path] for path in blocks[prefix]}
    axes = _stacked_axes(inside)
    if not prefix:  # all of a tree may have one width along the second axis
      axes = [0] if 0 in axes and any(map(_is_vector, inside)) else []
    stacks = [_Stack(prefix, axis) for axis in axes]
    if len(stacks) > 1:
      stacks = _by_features(stacks, inside, shapes)
    found += stacks
  return found


def _blocks(paths: Iterable[str]) -> dict[str, list[str]]:
  """Returns {beginning that ends with a slash, or nothing: its paths}."""
  found: dict[str, list[str]] = {"": [*paths]}
  for path in found[""]:
    for at in re.finditer("/", path):
      found.setdefault(path[: at.end()], []).append(path)
  return found


def _stacked_axes(inside: Mapping[str, Shape]) -> list[int]:
  """Returns the axes along which a block's layers can be stacked.

  The bias of one layer's heads tells of no stack, and numbers that each layer
  has one of say nothing.
  """
  inside = {p: s for p, s in inside.items() if len(s) > 1 or _is_vector(p)}
  vectors = {p: s for p, s in inside.items() if _is_vector(p)}
  if len(inside) < 2 or any(len(shape) < 2 for shape in inside.values()):
    return []
  if any(_is_convolution(path, inside) for path in inside):
    return []
  if vectors:
    told = [
      path
      for path, shape in vectors.items()
      if len(shape) == 2 and not _is_of_heads(path, shape, inside)
    ]
    if not told or len(vectors) == len(inside):
      return []
  elif not _has_plain_kernel(inside) and not _have_no_heads(inside):
    return []
  places = (0, 1) if vectors else (0,)
  return [
    axis
    for axis in places
    if len({shape[axis] for shape in inside.values()}) == 1
  ]


def _is_of_heads(path: str, bias: Shape, inside: Mapping[str, Shape]) -> bool:
  """Returns whether a bias is that of a kernel (..., heads, size) beside it."""
  holder = path.rpartition("/")[0]
  names = (f"{holder}/{leaf}" if holder else leaf for leaf in ("kernel", "w"))
  return any(inside.get(name, ())[-2:] == bias for name in names)


def _is_convolution(path: str, inside: Mapping[str, Shape]) -> bool:
  """Returns whether a weight has a bias (out, 1, ...), as Equinox keeps it."""
  holder, _, leaf = path.rpartition("/")
  if leaf != "weight" or len(inside[path]) < 3:
    return False
  n_out, *_, window = inside[path]
  bias = inside.get(f"{holder}/bias" if holder else "bias")
  return window > 1 and bias == (n_out, *(1,) * (len(inside[path]) - 2))


def _has_plain_kernel(inside: Mapping[str, Shape]) -> bool:
  """Returns whether one of three axes is no attention's or convolution's."""
  return any(
    len(shape) == 3 and _by_name(path, shape) is None
    for path, shape in inside.items()
  )


def _have_no_heads(inside: Mapping[str, Shape]) -> bool:
  """Returns whether no kernel (d, heads, size) has its (heads, size, d)."""
  three = {path: shape for path, shape in inside.items() if len(shape) == 3}
  views = {path: _by_name(path, shape) for path, shape in three.items()}
  writes = {three[p] for p, view in views.items() if view == _WRITES_HEADS}
  sums = {three[p] for p, view in views.items() if view == _SUMS_HEADS}
  turned = {(heads, size, d) for d, heads, size in writes}
  return bool(writes and sums) and not turned & sums


def _by_features(
  stacks: list[_Stack], inside: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> list[_Stack]:
  """Returns the stack whose layers are as wide as what is around the block.

  Without such evidence the first axis: scans lay their layers along it.
  """
  around = {
    size
    for path, shape in shapes.items()
    if path not in inside
    for size in shape
  }
  vector = next(shape for path, shape in inside.items() if _is_vector(path))
  fitting = [stack for stack in stacks if vector[1 - stack.axis] in around]
  return fitting if len(fitting) == 1 else stacks[:1]


def _is_vector(path: str) -> bool:
  """Returns whether a name is that of a vector in each layer."""
  return re.fullmatch(VECTORS, path) is not None


def _in_stack(
  path: str, shape: Shape, stack: _Stack, shapes: Mapping[str, Shape]
) -> Readings:
  """Returns the readings of a parameter of stacked layers."""
  if len(shape) == 2 or _is_vector(path):
    return (MatrixView(tuple(range(len(shape))), (), ()),)
  prefix, axis = stack
  inner = {
    other: own[:axis] + own[axis + 1 :]
    for other, own in shapes.items()
    if other.startswith(prefix)
  }
  rest = _readings(path, inner[path], inner)
  return tuple(stack_view(view, axis) for view in rest)


def _alone(path: str, shape: Shape) -> Readings:
  """Returns the readings of a parameter of which only the name is known."""
  return _readings(path, shape, {path: shape})


def _readings(
  path: str,
  shape: Shape,
  shapes: Mapping[str, Shape],
  layers: Iterable[int] = (),
) -> Readings:
  """Returns the ways in which a parameter of one layer can be read."""
  if _is_vector(path):
    return (MatrixView(tuple(range(len(shape))), (), ()),)
  if len(shape) == 2:
    return (_of_two_axes(path, shape, shapes),)
  if told := _by_bias(path, shape, shapes):
    return (told,)
  if told := _by_name(path, shape):
    is_contradicted = told == _WRITES_HEADS and _is_stack(shape, shapes)
    return (STACKED, told) if is_contradicted else (told,)
  readings = _possible(path, shape)
  return (
    _by_sizes(readings, shape, shapes, layers)
    if len(readings) > 1
    else readings
  )


def _by_name(path: str, shape: Shape) -> MatrixView | None:
  """Returns what a name says, and the number of axes under it."""
  if (
    len(shape) == 4 and re.fullmatch(FUSED_READERS, path) and shape[1] in (2, 3)
  ):
    return MatrixView((), (0,), (1, 2, 3))  # (d, 3, heads, size)
  for pattern, axes, view in FLAX_NAMES:
    if axes == len(shape) and re.fullmatch(pattern, path):
      return view
  return None


def _widths(shapes: Mapping[str, Shape]) -> set[int]:
  """Returns the lengths of the norms and biases of a tree."""
  return {
    own[0] for p, own in shapes.items() if len(own) == 1 and _is_vector(p)
  }


def _is_stack(shape: Shape, shapes: Mapping[str, Shape]) -> bool:
  """Returns whether widths say that a kernel named q is one of many layers."""
  widths = _widths(shapes)
  return shape[0] not in widths and shape[1] in widths


def _of_two_axes(
  path: str, shape: Shape, shapes: Mapping[str, Shape]
) -> MatrixView:
  """Returns how a matrix is read: a weight is (out, in), as in PyTorch."""
  holder, _, leaf = path.rpartition("/")
  if leaf != "weight" or re.fullmatch(EMBEDDINGS, path):
    return MatrixView()
  bias = shapes.get(f"{holder}/bias" if holder else "bias")
  is_kernel = bias == shape[1:] and shape[0] != shape[1]
  return MatrixView() if is_kernel else LINEAR


def _by_bias(
  path: str, shape: Shape, shapes: Mapping[str, Shape]
) -> MatrixView | None:
  """Returns what the bias beside a kernel says of its outputs."""
  holder, _, leaf = path.rpartition("/")
  if leaf not in ("kernel", "w", "weight"):
    return None
  names = [f"{holder}/{name}" if holder else name for name in ("bias", "b")]
  bias: Any = next((shapes[name] for name in names if name in shapes), None)
  is_convolution = "conv" in holder.lower()
  if not bias or (is_convolution and len(bias) > 1):
    return None
  if leaf == "weight":
    return None if is_convolution else _by_bias_of_weight(shape, bias)
  if _writes_second_last(path, shape, bias):
    *window, n_out, n_in = range(len(shape))
    return MatrixView((), (*window, n_in), (n_out,))
  count = len(shape) - len(bias)
  if count > 0 and shape[count:] == bias:
    axes = tuple(range(len(shape)))
    if shape[0] == bias[0] and len(bias) == len(shape) - 1 > 1:
      return None  # (d, d, ...): either
    return MatrixView((), axes[:count], axes[count:])
  if bias[0] == shape[0] and bias[1:] == shape[-len(bias) + 1 :]:
    return MatrixView((0,), (1,), tuple(range(2, len(shape))))
  return None


def _writes_second_last(path: str, shape: Shape, bias: Shape) -> bool:
  """Returns whether a kernel is (window..., out, in): a transposed convolution.

  Haiku's always are; linen's only if asked for, which unequal sides show.
  """
  if len(shape) < 3 or bias != shape[-2:-1]:
    return False
  is_haikus = path.endswith("/w") and "transpose" in path.lower()
  return is_haikus or bias != shape[-1:]


def _by_bias_of_weight(shape: Shape, bias: Shape) -> MatrixView | None:
  """Returns what the bias beside a weight says: outputs come first there."""
  axes = tuple(range(len(shape)))
  is_plain = len(bias) == 1 and shape[0] != shape[-1]
  if bias[0] == shape[0] and (
    is_plain or bias[1:] == (1,) * (len(shape) - 2)  # Equinox's convolutions
  ):
    return MatrixView((), axes[1:], axes[:1])
  if len(shape) == 3 and bias == shape[:2]:
    return MatrixView((0,), (2,), (1,))
  return None


def _possible(path: str, shape: Shape) -> Readings:
  """Returns the readings of a layer of three axes or more."""
  axes = tuple(range(len(shape)))
  stack = MatrixView(axes[:-2], axes[-2:-1], axes[-1:])
  every = (
    stack,
    MatrixView((), axes[:1], axes[1:]),
    MatrixView((), axes[:-1], axes[-1:]),
  )
  is_weight = path.rpartition("/")[2] == "weight"  # (out, in), as in PyTorch
  if is_weight:
    every = tuple(view.exchanged for view in every)
  elif _is_window(shape):
    return every[2:]
  # Axes of length 1 make no difference.
  found = {}
  for view in every:
    sides = view.batch, view.inputs, view.outputs
    wide = tuple(tuple(a for a in own if shape[a] > 1) for own in sides)
    if wide[1] and wide[2]:
      found.setdefault(wide, view)
  return tuple(found.values()) or (stack,)


def _is_window(shape: Shape) -> bool:
  """Returns whether a kernel's first axes can only be a convolution's window.

  They are of one length, and that is odd or the input is an image.
  """
  *window, channels, _ = shape
  is_square = len(window) > 1 and len(set(window)) == 1
  return is_square and (window[0] % 2 == 1 or channels in (1, 3, 4))


def _by_sizes(
  readings: Readings,
  shape: Shape,
  shapes: Mapping[str, Shape],
  layers: Iterable[int],
) -> Readings:
  """Returns the reading whose sizes occur elsewhere in the tree, or all.

  A side of one axis that is as long as some vector is a layer's width; a first
  axis as long as a scanned block that is nobody's width counts layers.
  """
  widths = _widths(shapes)
  if shape[0] in set(layers) - widths:
    return tuple(view for view in readings if 0 in view.batch)[:1] or readings
  fitting = tuple(
    view
    for view in readings
    if any(
      len(side) == 1 and shape[side[0]] in widths
      for side in (view.inputs, view.outputs)
    )
  )
  return fitting if len(fitting) == 1 else readings
