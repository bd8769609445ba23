# SPDX-License-Identifier: Apache-2.0
"""Describes the base model, and splits Loras into the parts of a PEFT file.

A part is one LoRA layer of the file. Most parameters have one part, a stack of
scanned layers has one for each layer, and an embedding that is also the output
head has two.
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
# In models with fused experts, routers have module classes unknown to PEFT.
ROUTERS = r".*\.(gate|router)\.weight"


class Base(NamedTuple):
  """The base model's names, modules, shapes and views.

  Attributes:
    shapes: shape of every parameter, by its path.
    paths: path of every parameter that has a Hugging Face name of its own.
    names: all Hugging Face names.
    modules: every module, from the names.
    table: how its parameters are read as matrices.
    model_type: from config.json, or None.
    tied_head: whether the output head shares the input embedding's table.
    splits_experts: whether each expert's matrices are separate parameters.
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
  """One LoRA layer of the file: which Lora it holds and how it is stored.

  Attributes:
    path: the Lora's path; None for a zero Lora, as for a bias without a Lora.
    index: the matrix's index in a stacked Lora; None for the whole Lora.
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
    """The rank of each matrix's Lora."""
    return self.a[-2]

  @property
  def module(self) -> str:
    """The name of the module that holds the parameter."""
    return self.name.rpartition(".")[0]

  @property
  def target(self) -> str:
    """The name that PEFT compares with its patterns."""
    return self.name if self.layout.wraps_parameter else self.module

  @property
  def stem(self) -> str:
    """The common beginning of its tensors' keys."""
    return self.module + ".base_layer" * self.depth


def describe_base(
  like: Mapping[str, Any],
  model_type: str | None,
  task_type: str | None,
  rename: Rename | None,
) -> Base:
  """Collects what is known of the base model from its parameters' shapes.

  Args:
    like: path -> anything with `.shape`, every parameter; of an open checkpoint
      only the `.spec` is read.
    model_type: from config.json, or None.
    task_type: PEFT's task name; only "CAUSAL_LM" can have a tied head.
    rename: path -> Hugging Face name, or a sequence of them; None keeps paths.

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
  """Returns whether a part's module is a `Conv1D`, whose weight is (in, out).

  Depends on the base's `model_type`.

  Example:
    >>> base = describe_base({}, "gpt2", None, None)
    >>> part = FilePart("x", None, "h.0.c_fc.weight", LINEAR_FILE, (1, 1),
    ...                 (1, 1), None)
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
  """Splits a Lora into its parts: one, one per layer, or a second for the head.

  Args:
    path: the parameter's path.
    lora: a (..., r, in), b (..., r, out); only shapes and dtype are used.
    view: the parameter's view.
    base: the base model.
    dtype: storage dtype, or None for that of a.

  Returns:
    Parts, in the order of the Hugging Face names.

  Raises:
    ValueError: `rename` does not return one name per matrix.

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
  """Returns the file layout of a parameter's Lora, and a convolution's kernel.

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
  """Makes a part of zeros, for a linear module that must be in the file.

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
