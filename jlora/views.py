# SPDX-License-Identifier: Apache-2.0
"""MatrixView: which axes of a parameter a layer sums over, and which it writes.

A view sorts the axes of a parameter into those that the layer sums over
(inputs), those that it writes (outputs), and those that merely repeat the layer
(batch: scanned layers, experts), so that the parameter reads as matrices
(in, out). Model families differ by rows of a table, never by branches.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jlora.messages import name_some


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixView:
  """The role of each axis of a parameter: batch, input or output.

  Attributes:
    batch: axes that repeat the layer, in order.
    inputs: axes that the layer sums over, in order.
    outputs: axes that the layer writes, in order.

  Example:
    >>> MatrixView(inputs=(1,), outputs=(0,)).shape((7, 3))   # torch (out, in)
    (3, 7)
  """

  batch: tuple[int, ...] = ()
  inputs: tuple[int, ...] = (0,)
  outputs: tuple[int, ...] = (1,)

  def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the matrix shape (..., in, out) of a parameter's shape."""
    take = lambda axes: tuple(parameter[axis] for axis in axes)  # noqa: E731
    return (
      *take(self.batch),
      math.prod(take(self.inputs)),
      math.prod(take(self.outputs)),
    )

  @property
  def axes(self) -> int:
    """Returns the number of axes of the parameter."""
    return len(self.batch) + len(self.inputs) + len(self.outputs)

  @property
  def exchanged(self) -> "MatrixView":
    """Returns the view that reads the transposed matrix, (out, in)."""
    return MatrixView(self.batch, self.outputs, self.inputs)

  @property
  def is_transposed(self) -> bool:
    """Returns whether the parameter keeps its outputs before its inputs."""
    return self.outputs < self.inputs


ViewRule = tuple[str, int, MatrixView]
#: The ways in which a parameter can be read; one where the tree decides.
Readings = tuple[MatrixView, ...]

KERNEL = MatrixView()
LINEAR = MatrixView(inputs=(1,), outputs=(0,))
CONV1D = MatrixView(inputs=(1, 2), outputs=(0,))
CONV2D = MatrixView(inputs=(1, 2, 3), outputs=(0,))
CONV3D = MatrixView(inputs=(1, 2, 3, 4), outputs=(0,))
EXPERTS_OUT_IN = MatrixView(batch=(0,), inputs=(2,), outputs=(1,))
STACKED = MatrixView(batch=(0,), inputs=(1,), outputs=(2,))

# Names of vectors, which a scanned block or heads give an axis more.
VECTORS = (
  r"(?i)(.*/)?(bias|scale|b|g|offset|mean|var|gamma|beta|[^/]*norm[^/]*"
  r"|[^/]*norm[^/]*/(w|weight))"
)
_CONVOLUTION = r"(?i)(.*/)?[^/]*conv[^/]*"
_READERS = r"(?i)(.*/)?(\w*_)?(q|k|v|qkv|kv|query|key|value)(_\w*|\d+)?"
_WRITERS = r"(?i)(.*/)?(o|out|output|attn_out|attn_vec_einsum)(_\w*|\d+)?"
_EXPERTS = (
  r"(?i)(.*/)?[^/]*(experts?|moe|mixture)[^/]*(/.*)?|(.*/)?(wi|wo|w1|w2|w3)"
  r"|(.*/)?(wi|wo)_\d"
)
_ENDS = r"/(kernel|w|weight)"
# Layers that write queries, keys and values at once.
FUSED_READERS = r"(?i)(.*/)?(\w*_)?(qkv|kv)(_\w*|\d+)?" + _ENDS

# What the name of a layer of three axes or more says. First match wins.
FLAX_NAMES: tuple[ViewRule, ...] = (
  (r"(.*/)?q_einsum/w", 3, MatrixView(inputs=(1,), outputs=(0, 2))),
  (r"(.*/)?(qkv|kv)_einsum/w", 4, MatrixView((0,), (2,), (1, 3))),
  (r"(.*/)?gating_einsum(/w)?", 3, MatrixView((0,), (2,), (1,))),
  (_CONVOLUTION + "/weight", 3, CONV1D),
  (_CONVOLUTION + "/weight", 4, CONV2D),
  (_CONVOLUTION + "/weight", 5, CONV3D),
  (_CONVOLUTION + "/(kernel|w)", 3, MatrixView((), (0, 1), (2,))),
  (_CONVOLUTION + "/(kernel|w)", 4, MatrixView((), (0, 1, 2), (3,))),
  (_CONVOLUTION + "/(kernel|w)", 5, MatrixView((), (0, 1, 2, 3), (4,))),
  (_READERS + _ENDS, 3, MatrixView((), (0,), (1, 2))),
  (_READERS + _ENDS, 4, MatrixView((0,), (1,), (2, 3))),
  (_WRITERS + _ENDS, 3, MatrixView((), (0, 1), (2,))),
  (_WRITERS + _ENDS, 4, MatrixView((0,), (1, 2), (3,))),
  (r"(.*/)?DenseGeneral_\d+/kernel", 3, MatrixView((), (0,), (1, 2))),
  (_EXPERTS, 3, STACKED),
  (_EXPERTS, 4, MatrixView((0, 1), (2,), (3,))),
)

# Flax, Haiku, NNX and plain JAX, by names alone: kernels are (in, out).
FLAX_VIEWS: tuple[ViewRule, ...] = (
  (VECTORS, 2, MatrixView((0, 1), (), ())),
  (VECTORS, 3, MatrixView((0, 1, 2), (), ())),
  *FLAX_NAMES,
  (r".*/kernel", 4, MatrixView((0, 1), (2,), (3,))),
  (r".*", 2, KERNEL),
  (r".*", 3, STACKED),
)

# PyTorch checkpoints: weights are (out, in). Embeddings, with a row for each
# token, are read as (token, feature), as PEFT does.
TORCH_VIEWS: tuple[ViewRule, ...] = (
  (r".*(embed_tokens|wte|wpe|word_embeddings|position_embeddings"
   r"|token_type_embeddings|embeddings|embedding|tok_embeddings|embed"
   r"|embed_positions|shared)\.weight", 2, KERNEL),
  (r".*experts\.(gate_up_proj|down_proj|gate_proj|up_proj|w1|w2|w3)(\.weight)?",
   3, EXPERTS_OUT_IN),
  (r".*\.weight", 2, LINEAR),
  (r".*\.weight", 3, CONV1D),
  (r".*\.weight", 4, CONV2D),
  (r".*\.weight", 5, CONV3D),
  (r".*\.(in|[qkv])_proj_weight", 2, LINEAR),  # of nn.MultiheadAttention
  (r".*\.text_projection", 2, KERNEL),  # OpenCLIP's, x @ text_projection
  (r"[^.]*weight", 2, LINEAR),
)  # fmt: skip

# GPT-2's Conv1D keeps (in, out).
GPT2_VIEWS: tuple[ViewRule, ...] = (
  (r".*\.(c_attn|c_proj|c_fc|q_attn)\.weight", 2, KERNEL),
  *TORCH_VIEWS,
)

# Fused experts that keep (expert, in, out).
EXPERTS_IN_OUT_VIEWS: tuple[ViewRule, ...] = (
  (r".*experts\.(gate_up_proj|down_proj)", 3, STACKED),
  *TORCH_VIEWS,
)

# The table for each `model_type` of a checkpoint's config.json.
VIEWS_OF_MODEL: dict[str, tuple[ViewRule, ...]] = {
  "gpt2": GPT2_VIEWS,
  "openai-gpt": GPT2_VIEWS,
  "gpt_oss": EXPERTS_IN_OUT_VIEWS,
  "llama4": EXPERTS_IN_OUT_VIEWS,
  "llama4_text": EXPERTS_IN_OUT_VIEWS,
}


def views_of(
  shapes: Mapping[str, tuple[int, ...]],
  table: Iterable[ViewRule] | Mapping[str, Readings],
  matrices: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, MatrixView]:
  """Chooses how each parameter is read as a matrix; refuses to guess.

  Args:
    shapes: path -> shape, of the parameters that are wanted.
    table: rules (regex for the whole path, number of axes, view), of which the
      first that fits counts; or the readings of each parameter of a tree, from
      `table_for`.
    matrices: path -> the (..., in, out) that is known of it, from the factors
      of a Lora: it decides where exactly one reading gives it. Where none does,
      the first is returned, for the caller to refuse with both shapes.

  Returns:
    {path: view}, without those that no rule fits, and without those that are no
    matrix (a bias stacked over scanned layers).

  Raises:
    ValueError: parameters that can be read in several ways; names up to three
      with the matrices that each reading gives.

  Example:
    >>> shapes = {"mlp/kernel": (3, 7), "layers/bias": (30, 7)}
    >>> {p: v.shape(shapes[p]) for p, v in views_of(shapes, FLAX_VIEWS).items()}
    {'mlp/kernel': (3, 7)}
    >>> readings = {"w": (KERNEL, LINEAR)}
    >>> views_of({"w": (3, 7)}, readings, {"w": (7, 3)})
    {'w': MatrixView(batch=(), inputs=(1,), outputs=(0,))}
  """
  known = matrices or {}
  rows: Any = table if isinstance(table, Mapping) else tuple(table)
  found = {
    path: _readings_of(path, shape, rows, known.get(path))
    for path, shape in shapes.items()
  }
  unclear = {path: own for path, own in found.items() if len(own) > 1}
  if unclear:
    told = [_told(path, shapes[path], own) for path, own in unclear.items()]
    raise ValueError(
      f"{len(unclear)} parameters can be read as different matrices, and "
      f"neither names nor the tree say how: {name_some(told)}. Say it by "
      "`views=[(regex, axes, MatrixView(batch, inputs, outputs)), ...]`, or "
      "read it from the program: views=jlora.adapting.views_from(fn, params, "
      "*inputs)."
    )
  return {
    path: own[0]
    for path, own in found.items()
    if own and own[0].inputs and own[0].outputs
  }


def view_of(
  path: str,
  shape: tuple[int, ...],
  table: Iterable[ViewRule] | Mapping[str, Readings],
  matrix: tuple[int, ...] | None = None,
) -> MatrixView | None:
  """Returns how one parameter is read as a matrix, or None.

  Args:
    path: the parameter's own name.
    shape: its shape.
    table: as for `views_of`.
    matrix: the (..., in, out) that is known of it.

  Returns:
    A view. None if no rule fits, or if the rule that fits sees no matrix (a
    bias stacked over scanned layers).

  Raises:
    ValueError: it can be read in several ways.

  Example:
    >>> view_of("mlp/kernel", (3, 7), FLAX_VIEWS).shape((3, 7))
    (3, 7)
    >>> view_of("layers/bias", (30, 7), FLAX_VIEWS) is None
    True
  """
  known = None if matrix is None else {path: matrix}
  return views_of({path: shape}, table, known).get(path)


def stack_view(view: MatrixView, axis: int | None) -> MatrixView:
  """Returns the view of a stack of layers along an axis.

  Args:
    view: of one layer.
    axis: where the stack's axis is; None: it is no stack.

  Returns:
    MatrixView, of one axis more.

  Example:
    >>> stack_view(LINEAR, 1)
    MatrixView(batch=(1,), inputs=(2,), outputs=(0,))
  """
  if axis is None:
    return view
  up = lambda axes: tuple(a + (a >= axis) for a in axes)  # noqa: E731
  batch = (axis, *up(view.batch))
  return MatrixView(batch, up(view.inputs), up(view.outputs))


def _readings_of(
  path: str,
  shape: tuple[int, ...],
  table: tuple[ViewRule, ...] | Mapping[str, Readings],
  matrix: tuple[int, ...] | None,
) -> Readings:
  """Returns the ways to read a parameter; by its matrix one, if one fits."""
  if isinstance(table, Mapping):
    own = tuple(v for v in table.get(path, ()) if v.axes == len(shape))
    if matrix is None:
      return own
    fitting = tuple(view for view in own if view.shape(shape) == matrix)
    return fitting or own[:1]  # none fits: to be refused with its shapes
  for pattern, axes, view in table:
    if axes == len(shape) and re.fullmatch(pattern, path):
      return (view,)
  return ()


def _told(path: str, shape: tuple[int, ...], readings: Readings) -> str:
  """Formats the readings of a parameter, for an error."""
  told = []
  for view in readings:
    *lead, n_in, n_out = view.shape(shape)
    count = f" {math.prod(lead)} times" if lead else ""
    told.append(
      f"({view.batch}, {view.inputs}, {view.outputs}) is {n_in} x {n_out}"
      + count
    )
  return f"{path} {shape}: {' or '.join(told)}"


def as_matrix(parameter: Any, view: MatrixView) -> Any:
  """Returns a parameter as a matrix, (..., in, out).

  Args:
    parameter: an array in the module's own layout; NumPy stays NumPy.
    view: the roles of its axes.

  Returns:
    (*batch, in, out), the same dtype. Shares the memory where the axes are
    already in order. Under sharding the spec is transposed and reshaped alike.

  Example:
    >>> import numpy as np
    >>> as_matrix(np.zeros((7, 3, 2, 2)), CONV2D).shape
    (12, 7)
  """
  axes = (*view.batch, *view.inputs, *view.outputs)
  shape = view.shape(parameter.shape)
  return parameter.transpose(axes).reshape(shape)


def as_parameter(matrix: Any, view: MatrixView, shape: tuple[int, ...]) -> Any:
  """Returns a matrix (..., in, out) in the parameter's own layout.

  The inverse of `as_matrix`.

  Args:
    matrix: (*batch, in, out).
    view: the roles of the parameter's axes.
    shape: the parameter's shape.

  Returns:
    An array of `shape`.

  Example:
    >>> import numpy as np
    >>> as_parameter(np.zeros((12, 7)), CONV2D, (7, 3, 2, 2)).shape
    (7, 3, 2, 2)
  """
  axes = (*view.batch, *view.inputs, *view.outputs)
  inverse = tuple(axes.index(axis) for axis in range(len(axes)))
  split = tuple(shape[axis] for axis in axes)
  return matrix.reshape(split).transpose(inverse)


def in_stored_order(delta: Any, view: MatrixView) -> tuple[Any, bool]:
  """Returns a change as a matrix in the order of its memory, not transposed.

  Args:
    delta: in the parameter's own layout.
    view: how the layout is read as a matrix.

  Returns:
    (..., in, out) and False, or (..., out, in) and True if the memory lies that
    way: swapping a Lora's factors costs less than transposing a delta.

  Example:
    >>> import numpy as np
    >>> delta, is_exchanged = in_stored_order(np.zeros((5, 3)), LINEAR)
    >>> delta.shape, is_exchanged
    ((5, 3), True)
  """
  flip = view.is_transposed
  return as_matrix(delta, view.exchanged if flip else view), flip
