# SPDX-License-Identifier: Apache-2.0
"""The base model by names and shapes, and the parts an adapter file is made of.

A part is one Lora of the file: one for most parameters, several for a stack of
scanned layers, two for an embedding whose table is the output head as well.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.formats.peft.layouts import (
  CONVOLUTION,
  EMBEDDING,
  EXPERTS,
  LINEAR_FILE,
  ROUTER,
  FileLayout,
)
from jlora.loras import Lora
from jlora.views import (
  KERNEL,
  TORCH_VIEWS,
  MatrixView,
  ViewRule,
  table_for,
  view_of,
)

Rename = Callable[[str], str | Sequence[str]]

TABLES = TORCH_VIEWS[0][0]
INPUT_EMBEDDINGS = r"(.*\.)?(embed_tokens|wte|word_embeddings)\.weight"
HEAD = "lm_head.weight"
SPLIT_EXPERTS = r"(.*\.experts)\.\d+\..*"
# Where experts are fused, routers are modules of their own classes.
ROUTERS = r".*\.(gate|router)\.weight"


class Base(NamedTuple):
  """The base model, as far as names and shapes of its parameters tell.

  Attributes:
    shapes: shape of every parameter, by its path.
    paths: path of every parameter that has a Hugging Face name of its own.
    names: all Hugging Face names.
    modules: every module, from the names.
    table: how its parameters are read as matrices.
    model_type: from config.json, or None.
    tied_head: whether the output head is the input embedding.
    splits_experts: whether each expert's matrices are parameters of their own.
    rename: path -> Hugging Face name or names.
  """

  shapes: dict[str, tuple[int, ...]]
  paths: dict[str, str]
  names: frozenset[str]
  modules: frozenset[str]
  table: tuple[ViewRule, ...]
  model_type: str | None
  tied_head: bool
  splits_experts: bool
  rename: Rename


class FilePart(NamedTuple):
  """One Lora of the file: where it is read and how it is stored.

  Attributes:
    path: its path; None for a zero Lora that only carries a bias.
    index: which of the flattened leading axes; None for all of them.
    name: the parameter's Hugging Face name.
    layout: a row of `LAYOUTS`.
    a: shape of the first factor, (..., r, in).
    b: shape of the second, (..., r, out).
    dtype: storage dtype.
    kernel: (in channels, height, width) of a convolution.
    swapped: whether a and b change places, for a head tied to an embedding.
    depth: how many other wrappers PEFT puts around this one.
  """

  path: str | None
  index: int | None
  name: str
  layout: FileLayout
  a: tuple[int, ...]
  b: tuple[int, ...]
  dtype: np.dtype
  kernel: tuple[int, ...] = ()
  swapped: bool = False
  depth: int = 0

  @property
  def rank(self) -> int:
    """Units of each matrix."""
    return self.a[-2]

  @property
  def module(self) -> str:
    """The module that PEFT wraps."""
    return self.name.rpartition(".")[0]

  @property
  def target(self) -> str:
    """What PEFT compares with a pattern."""
    return self.name if self.layout.wraps_parameter else self.module

  @property
  def stem(self) -> str:
    """The keys of its tensors, up to the layout's ending."""
    return self.module + ".base_layer" * self.depth


def describe_base(
  like: Mapping[str, Any],
  model_type: str | None,
  task_type: str | None,
  rename: Rename | None,
) -> Base:
  """The base model's names, modules and views.

  Args:
    like: path -> anything with `.shape`, every parameter; of an open
      checkpoint only the `.spec` is looked at.
    model_type: from config.json, or None.
    task_type: PEFT's task name; only "CAUSAL_LM" can have a tied head.
    rename: path -> Hugging Face name, or a sequence of them; None keeps paths.

  Returns:
    Base.

  Example:
    >>> like = {"h.0.q.weight": np.ones((2, 3))}
    >>> sorted(describe_base(like, None, None, None).modules)
    ['h', 'h.0', 'h.0.q']
  """
  rename = rename or str
  shapes = {
    path: tuple(leaf.shape)
    for path, leaf in getattr(like, "spec", like).items()
  }
  given = {path: rename(path) for path in shapes}
  paths = {name: path for path, name in given.items() if isinstance(name, str)}
  names = {
    name
    for found in given.values()
    for name in ([found] if isinstance(found, str) else found)
  }
  modules = {
    name[: dot.start()] for name in names for dot in re.finditer(r"\.", name)
  }
  return Base(
    shapes,
    paths,
    frozenset(names),
    frozenset(modules),
    table_for(shapes, model_type),
    model_type,
    task_type == "CAUSAL_LM" and HEAD not in names,
    any(re.fullmatch(SPLIT_EXPERTS, name) for name in names),
    rename,
  )


def is_transposed(part: FilePart, base: Base) -> bool:
  """Whether the module is a `Conv1D`, which keeps its weight (in, out).

  Args:
    part: a part.
    base: the base model.

  Returns:
    The answer, by `model_type`.

  Example:
    >>> base = describe_base({}, "gpt2", None, None)
    >>> part = FilePart("x", None, "h.0.c_fc.weight", LINEAR, (1, 1), (1, 1),
    ...                 None)
    >>> is_transposed(part, base)
    True
  """
  table = table_for([part.name], base.model_type)
  return (
    part.layout is LINEAR_FILE and view_of(part.name, (1, 1), table) == KERNEL
  )


def parts_of(
  path: str, lora: Lora, view: MatrixView, base: Base, dtype: Any
) -> list[FilePart]:
  """The parts of one Lora: one, or one a layer, or one more for a tied head.

  Args:
    path: the parameter's path.
    lora: a (..., r, in), b (..., r, out); only shapes and dtype are used.
    view: the parameter's view.
    base: the base model.
    dtype: storage dtype, or None for that of a.

  Returns:
    Parts, in the order of the Hugging Face names.

  Raises:
    ValueError: `rename` gives another number of names than there are matrices.

  Example:
    >>> lora = Lora(np.ones((1, 5)), np.ones((1, 4)), np.float32(1))
    >>> base = describe_base({"wte.weight": np.ones((5, 4))}, None,
    ...                      "CAUSAL_LM", None)
    >>> [part.name for part in parts_of("wte.weight", lora, KERNEL, base, None)]
    ['wte.weight', 'lm_head.weight']
  """
  name = base.rename(path)
  layout, kernel = layout_of(path, view, base)
  dtype = np.dtype(dtype or lora.a.dtype)
  if isinstance(name, str):
    part = FilePart(
      path, None, name, layout, lora.a.shape, lora.b.shape, dtype, kernel
    )
    if base.tied_head and re.fullmatch(INPUT_EMBEDDINGS, name):
      head = part._replace(
        name=HEAD, layout=LINEAR_FILE, a=part.b, b=part.a, swapped=True
      )
      return [part, head]
    return [part]
  count = math.prod(lora.a.shape[:-2])
  if len(name) != count:
    raise ValueError(f"{path}: {len(name)} names for {count} matrices.")
  a, b = lora.a.shape[-2:], lora.b.shape[-2:]
  return [
    FilePart(path, index, each, layout, a, b, dtype, kernel)
    for index, each in enumerate(name)
  ]


def layout_of(
  path: str, view: MatrixView, base: Base
) -> tuple[FileLayout, tuple[int, ...]]:
  """How PEFT stores the Lora of a parameter, and a convolution's kernel.

  Args:
    path: the parameter's path.
    view: its view.
    base: the base model.

  Returns:
    A row of `LAYOUTS`, and (in channels, height, width) or ().

  Example:
    >>> base = describe_base({"q.weight": np.ones((2, 3))}, None, None, None)
    >>> layout_of("q.weight", MatrixView(), base)[0].kind
    'linear'
  """
  name = base.rename(path)
  if not isinstance(name, str):
    return LINEAR_FILE, ()
  if view.batch:
    return EXPERTS, ()
  if re.fullmatch(TABLES, name):
    return EMBEDDING, ()
  if re.fullmatch(ROUTERS, name) and not base.splits_experts:
    return ROUTER, ()
  if len(view.inputs) > 1 and ("/" not in path or "conv" in path):
    return CONVOLUTION, tuple(base.shapes[path][axis] for axis in view.inputs)
  return LINEAR_FILE, ()


def zero_part(
  module: str, rank: int, dtype: Any, base: Base
) -> FilePart | None:
  """A part that changes nothing, for a module that must be in the file.

  Args:
    module: a module's Hugging Face name.
    rank: its rank.
    dtype: storage dtype.
    base: the base model.

  Returns:
    A part without a path; None if the base has no such linear module.

  Example:
    >>> base = describe_base({"q.weight": np.ones((2, 3))}, None, None, None)
    >>> zero_part("q", 4, np.float32, base).a
    (4, 3)
  """
  name = f"{module}.weight"
  path = base.paths.get(name)
  view = path and view_of(path, base.shapes[path], base.table)
  if not path or not view or layout_of(path, view, base)[0] is not LINEAR_FILE:
    return None
  in_, out = view.shape(base.shapes[path])
  dtype = np.dtype(dtype)
  return FilePart(
    None, None, name, LINEAR_FILE, (rank, in_), (rank, out), dtype
  )
