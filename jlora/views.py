# SPDX-License-Identifier: Apache-2.0
"""MatrixView: how a parameter is read as a matrix (in, out), as data.

A view names which axes of a parameter the layer sums over (inputs), which it
writes (outputs) and which merely repeat the layer (batch: scanned layers,
experts). Model families differ by rows of a table, never by branches.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixView:
  """Axes of a parameter, each in exactly one of three roles.

  Attributes:
    batch: axes that repeat the layer, in order.
    inputs: axes that are contracted with the layer's input, in order.
    outputs: axes that the layer writes, in order.

  Example:
    >>> MatrixView(inputs=(1,), outputs=(0,)).shape((7, 3))   # torch (out, in)
    (3, 7)
  """

  batch: tuple[int, ...] = ()
  inputs: tuple[int, ...] = (0,)
  outputs: tuple[int, ...] = (1,)

  def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
    """(..., in, out) of a parameter of the given shape."""
    take = lambda axes: tuple(parameter[axis] for axis in axes)  # noqa: E731
    return (
      *take(self.batch),
      math.prod(take(self.inputs)),
      math.prod(take(self.outputs)),
    )

  @property
  def exchanged(self) -> "MatrixView":
    """The view that reads the transposed matrix, (out, in)."""
    return MatrixView(self.batch, self.outputs, self.inputs)

  @property
  def is_transposed(self) -> bool:
    """Whether the layout keeps its outputs before its inputs."""
    return self.outputs < self.inputs


ViewRule = tuple[str, int, MatrixView]

KERNEL = MatrixView()
LINEAR = MatrixView(inputs=(1,), outputs=(0,))
CONV1D = MatrixView(inputs=(1, 2), outputs=(0,))
CONV2D = MatrixView(inputs=(1, 2, 3), outputs=(0,))
EXPERTS_OUT_IN = MatrixView(batch=(0,), inputs=(2,), outputs=(1,))
STACKED = MatrixView(batch=(0,), inputs=(1,), outputs=(2,))

# Flax, Haiku, NNX and plain JAX: kernels are (in, out). First match wins.
FLAX_VIEWS: tuple[ViewRule, ...] = (
  (r"(.*/)?(bias|scale|b|g|mean|var|gamma|beta)", 2,
   MatrixView((0, 1), (), ())),
  (r".*conv[^/]*/kernel", 3, MatrixView(inputs=(0, 1), outputs=(2,))),
  (r".*/(q|k|v|query|key|value)[^/]*/kernel", 3,
   MatrixView(inputs=(0,), outputs=(1, 2))),
  (r".*/(o|out|attn_out|attn_vec_einsum)[^/]*/kernel", 3,
   MatrixView(inputs=(0, 1), outputs=(2,))),
  (r".*/q_einsum/w", 3, MatrixView(inputs=(1,), outputs=(0, 2))),
  (r".*/attn_vec_einsum/w", 3, MatrixView(inputs=(0, 1), outputs=(2,))),
  (r".*/(qkv|kv)_einsum/w", 4, MatrixView((0,), (2,), (1, 3))),
  (r".*/gating_einsum(/w)?", 3, MatrixView((0,), (2,), (1,))),
  (r".*conv[^/]*/kernel", 4, MatrixView(inputs=(0, 1, 2), outputs=(3,))),
  (r".*/(q|k|v|query|key|value)[^/]*/kernel", 4,
   MatrixView((0,), (1,), (2, 3))),
  (r".*/(o|out|attn_out)[^/]*/kernel", 4, MatrixView((0,), (1, 2), (3,))),
  (r".*/kernel", 4, MatrixView((0, 1), (2,), (3,))),
  (r"(.*/)?(bias|scale)", 3, MatrixView((0, 1, 2), (), ())),
  (r".*", 2, KERNEL),
  (r".*", 3, STACKED),
)  # fmt: skip

# PyTorch checkpoints: weights are (out, in). Tables of rows by token are read
# as (token, feature), PEFT's own convention for embeddings.
TORCH_VIEWS: tuple[ViewRule, ...] = (
  (r".*(embed_tokens|wte|wpe|word_embeddings|position_embeddings"
   r"|token_type_embeddings|embeddings|embedding|tok_embeddings|embed"
   r"|embed_positions|shared)\.weight", 2, KERNEL),
  (r".*experts\.(gate_up_proj|down_proj|gate_proj|up_proj|w1|w2|w3)(\.weight)?",
   3, EXPERTS_OUT_IN),
  (r".*\.weight", 2, LINEAR),
  (r".*\.weight", 3, CONV1D),
  (r".*\.weight", 4, CONV2D),
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

# Which table a checkpoint's config.json asks for, by `model_type`.
VIEWS_OF_MODEL: dict[str, tuple[ViewRule, ...]] = {
  "gpt2": GPT2_VIEWS,
  "openai-gpt": GPT2_VIEWS,
  "gpt_oss": EXPERTS_IN_OUT_VIEWS,
  "llama4": EXPERTS_IN_OUT_VIEWS,
  "llama4_text": EXPERTS_IN_OUT_VIEWS,
}


def view_of(
  path: str, shape: tuple[int, ...], table: Iterable[ViewRule]
) -> MatrixView | None:
  """The view of a parameter by the first rule that fits, or None.

  Args:
    path: the parameter's own name.
    shape: its shape.
    table: rules (regex for the whole path, number of axes, view).

  Returns:
    A view, or None when no rule fits or the fitting one has no matrix (a bias
    stacked over scanned layers).

  Example:
    >>> view_of("mlp/kernel", (3, 7), FLAX_VIEWS).shape((3, 7))
    (3, 7)
    >>> view_of("layers/bias", (30, 7), FLAX_VIEWS) is None
    True
  """
  for pattern, axes, view in table:
    if axes == len(shape) and re.fullmatch(pattern, path):
      return view if view.inputs and view.outputs else None
  return None


def table_for(paths: Iterable[str], model_type: str | None = None):
  """The rules that a set of parameter names calls for.

  Args:
    paths: the parameter names. Names with dots and no slashes are PyTorch's.
    model_type: `model_type` of the checkpoint's config.json, if there is one.

  Returns:
    A tuple of rules for `view_of`.

  Example:
    >>> table_for(["h.0.attn.c_attn.weight"], "gpt2") is GPT2_VIEWS
    True
    >>> table_for(["layers/0/kernel"]) is FLAX_VIEWS
    True
  """
  paths = list(paths)
  dotted = sum("." in path and "/" not in path for path in paths)
  if 2 * dotted <= len(paths):
    return FLAX_VIEWS
  return VIEWS_OF_MODEL.get(model_type or "", TORCH_VIEWS)


def as_matrix(parameter: Any, view: MatrixView) -> Any:
  """A parameter read as (..., in, out).

  Args:
    parameter: an array of the module's own layout; numpy stays numpy.
    view: its axes.

  Returns:
    (*batch, in, out), the same dtype; a view of the memory where axes are
    already in order. Under sharding a transpose and a reshape of the spec.

  Example:
    >>> import numpy as np
    >>> as_matrix(np.zeros((7, 3, 2, 2)), CONV2D).shape
    (12, 7)
  """
  axes = (*view.batch, *view.inputs, *view.outputs)
  shape = view.shape(parameter.shape)
  return parameter.transpose(axes).reshape(shape)


def as_parameter(matrix: Any, view: MatrixView, shape: tuple[int, ...]) -> Any:
  """A matrix (..., in, out) back in the module's own layout.

  The inverse of `as_matrix`.

  Args:
    matrix: (*batch, in, out).
    view: the axes.
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
  """The change of a parameter as a matrix, in the order it is stored in.

  Args:
    delta: in the parameter's own layout.
    view: how the layout is read as a matrix.

  Returns:
    (..., in, out) and False, or (..., out, in) and True where that is how the
    memory lies: factors are exchanged for less than a delta is transposed.

  Example:
    >>> from jlora.views import LINEAR
    >>> delta, is_exchanged = in_stored_order(jnp.zeros((5, 3)), LINEAR)
    >>> delta.shape, is_exchanged
    ((5, 3), True)
  """
  flip = view.is_transposed
  return as_matrix(delta, view.exchanged if flip else view), flip
