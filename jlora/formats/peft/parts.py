# SPDX-License-Identifier: Apache-2.0
"""Describes the base model, and splits Loras into the parts of a PEFT file.

A part is one LoRA layer of the file. Most parameters have one part, a stack of
scanned layers has one for each layer, and an embedding that is also the output
head has two.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.formats.peft.families import Family, Kind, family_of
from jlora.formats.peft.layouts import (
  CONVOLUTION,
  EMBEDDING,
  EXPERTS,
  IN_OUT,
  LINEAR_FILE,
  PARAMETER,
  ROUTER,
  TRANSPOSED,
  FileLayout,
)
from jlora.formats.peft.tree_names import leaves_of, name_path
from jlora.loras import Lora
from jlora.tree_views import table_for
from jlora.views import (
  KERNEL,
  TORCH_VIEWS,
  MatrixView,
  Readings,
  ViewRule,
  view_of,
)

Rename = Callable[[str], str | Sequence[str]]

TABLES = TORCH_VIEWS[0][0]
INPUT_EMBEDDINGS = r"(.*\.)?(embed_tokens|wte|word_embeddings)\.weight"
HEAD = "lm_head.weight"
NO_VIEW = "no rule says which of its axes a layer sums over"
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
    family: the model's class; None if only the names are known.
  """

  shapes: dict[str, tuple[int, ...]]
  paths: dict[str, str]
  names: frozenset[str]
  modules: frozenset[str]
  table: tuple[ViewRule, ...] | dict[str, Readings]
  model_type: str | None
  tied_head: bool
  splits_experts: bool
  rename: Rename
  family: Family | None = None


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


def module_of(name: str) -> str:
  """Returns the module that a consumer replaces to replace a parameter.

  The parts of a parametrised weight lie in modules of their own inside it.

  Example:
    >>> module_of("h.conv.parametrizations.weight.original0")
    'h.conv'
  """
  return name.rpartition(".")[0].partition(".parametrizations.")[0]


def describe_base(
  like: Any,
  model_type: str | None,
  task_type: str | None,
  rename: Rename | Sequence[tuple[str, str]] | None,
  config: Mapping[str, Any] | None = None,
) -> Base:
  """Collects what is known of the base model from its parameters' shapes.

  Args:
    like: every parameter, as `leaves_of` takes them.
    model_type: from config.json, or None.
    task_type: PEFT's task name, or "auto". Without `config` these two can have
      a tied head: "CAUSAL_LM" and "auto".
    rename: path -> Hugging Face name, or a sequence of them; or (regex,
      replacement) pairs, applied to the names that `config` gives, or without
      it `name_path`; None keeps those.
    config: the base's config.json, by which names and classes are looked up.

  Example:
    >>> like = {"h.0.q.weight": np.ones((2, 3))}
    >>> sorted(describe_base(like, None, None, None).modules)
    ['h', 'h.0', 'h.0.q']
  """
  family = family_of(config)
  rename = _renaming(rename, family)
  shapes = {path: tuple(leaf.shape) for path, leaf in leaves_of(like).items()}
  base = Base(
    {}, {}, frozenset(), frozenset(), table_for(shapes, model_type), model_type,
    False, False, rename, family,
  )  # fmt: skip
  base = with_names(base, shapes, rename)
  ties_head = (
    family.ties_to(HEAD) if family else task_type in ("CAUSAL_LM", "auto")
  )
  return base._replace(tied_head=HEAD not in base.names and ties_head)


def with_names(
  base: Base, shapes: Mapping[str, tuple[int, ...]], rename: Rename
) -> Base:
  """Returns a base with other parameters; its class and table stay.

  Args:
    base: what else is known.
    shapes: path -> shape of every parameter.
    rename: path -> Hugging Face name or names.

  Example:
    >>> base = describe_base({"q": np.ones((2, 3))}, None, None, None)
    >>> with_names(base, {"h.k": (2, 3)}, str).modules
    frozenset({'h'})
  """
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
  return base._replace(
    shapes=dict(shapes),
    paths=paths,
    names=frozenset(names),
    modules=frozenset(modules),
    splits_experts=any(re.fullmatch(SPLIT_EXPERTS, name) for name in names),
    rename=rename,
  )


def _renaming(
  rename: Rename | Sequence[tuple[str, str]] | None, family: Family | None
) -> Rename:
  """Returns path -> name from what the caller gave and the model's class."""
  named = functools.cache(family.name_of) if family else name_path
  if callable(rename):
    return rename
  pairs = [(re.compile(regex), to) for regex, to in rename or ()]
  if not pairs:
    return named

  def apply(path: str) -> str:
    name = named(path)
    for regex, to in pairs:
      name = regex.sub(to, name)
    return name

  return apply


def kind_of(
  path: str,
  shape: tuple[int, ...],
  base: Base,
  matrix: tuple[int, ...] | None = None,
) -> Kind:
  """Returns how a parameter is read, and how PEFT's file stores its Lora.

  Args:
    path: the parameter's path.
    shape: its shape.
    base: the base model.
    matrix: the (..., in, out) of its Lora, which decides where several readings
      are possible.

  Returns:
    Kind. By the model's class where that is known, else by the parameter's name
    and number of axes. Where a tied parameter has no LoRA, this one has none.

  Example:
    >>> base = describe_base({"q.weight": np.ones((2, 3))}, None, None, None)
    >>> kind_of("q.weight", (2, 3), base).layout.kind
    'linear'
  """
  name = base.rename(path)
  if base.family is None or not isinstance(name, str):
    try:
      view = view_of(path, shape, base.table, matrix)
    except ValueError as unclear:
      return Kind(why=str(unclear))
    if view is None and len(shape) > 1 and "/" not in path:
      return Kind(why=NO_VIEW)
    return Kind(view, view and _guess_layout(path, view, base))
  if len(shape) < 2:
    return Kind(None)
  kind = base.family.kind_of(name, len(shape))
  if kind.layout is EMBEDDING and base.family.may_be_tied(base.names):
    why = "what else it is tied to in this model is not known"
    return Kind(why=why, in_model=False)
  for other in base.family.tied_to(name, base.names):
    tied = base.family.kind_of(other, len(shape))
    if kind.layout and not tied.layout:
      return Kind(why=f"{other}, which is tied to it: {tied.why}")
  return kind


def ties_of(name: str, base: Base) -> list[str]:
  """Lists the parameters that are not stored because they equal this one.

  Example:
    >>> base = describe_base({"wte.weight": np.ones((5, 4))}, None,
    ...                      "CAUSAL_LM", None)
    >>> ties_of("wte.weight", base)
    ['lm_head.weight']
  """
  if base.family is not None:
    return base.family.tied_to(name, base.names)
  is_tied = base.tied_head and re.fullmatch(INPUT_EMBEDDINGS, name)
  return [HEAD] if is_tied else []


def tied_beside(base: Base) -> dict[str, list[str]]:
  """Returns path -> paths of what is tied into the same modules with it.

  Example:
    >>> tied_beside(describe_base({}, None, None, None))
    {}
  """
  found: dict[str, list[str]] = {}
  for name, path in base.paths.items() if base.family else ():
    for other in ties_of(name, base):
      module = other.rpartition(".")[0]
      own = base.family.ties_in(module, base.names) if base.family else {}
      paths = [base.paths[of] for of in own.values() if of in base.paths]
      found.setdefault(path, []).extend(paths)
  return found


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
  if part.layout is not LINEAR_FILE:
    return False
  if base.family is not None:
    return base.family.kind_of(part.name, 2).view == KERNEL
  table = table_for([part.name], base.model_type)
  return view_of(part.name, (1, 1), table) == KERNEL


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
    return [part, *(_copy(part, other, base) for other in ties_of(name, base))]
  count = math.prod(lora.a.shape[:-2])
  if len(name) != count:
    raise ValueError(f"{path}: {len(name)} names for {count} matrices.")
  a, b = lora.a.shape[-2:], lora.b.shape[-2:]
  return [
    FilePart(path, index, each, layout, a, b, dtype, kernel)
    for index, each in enumerate(name)
  ]


def _copy(part: FilePart, name: str, base: Base) -> FilePart:
  """Returns the part of a parameter that is tied to a part's."""
  layout = LINEAR_FILE
  if base.family is not None:
    axes = len(base.shapes[part.path]) if part.path else 2
    layout = base.family.kind_of(name, axes).layout or LINEAR_FILE
  if (layout is EMBEDDING) == (part.layout is EMBEDDING):
    return part._replace(name=name, layout=layout)
  return part._replace(
    name=name, layout=layout, a=part.b, b=part.a, swapped=True
  )


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
  kind = kind_of(path, base.shapes[path], base)
  layout = kind.layout or _guess_layout(path, view, base)
  if layout is CONVOLUTION:
    return layout, tuple(base.shapes[path][axis] for axis in view.inputs)
  return layout, ()


def _guess_layout(path: str, view: MatrixView, base: Base) -> FileLayout:
  """Returns the layout that a parameter's name suggests."""
  name = base.rename(path)
  if not isinstance(name, str):
    return LINEAR_FILE
  if view.batch:
    return EXPERTS
  if re.fullmatch(TABLES, name):
    return EMBEDDING
  if re.fullmatch(ROUTERS, name) and not base.splits_experts:
    return ROUTER
  if name.rpartition(".")[2] in IN_OUT:
    return TRANSPOSED
  if name.endswith("_proj_weight"):
    return PARAMETER
  if len(view.inputs) > 1 and ("/" not in path or "conv" in path):
    return CONVOLUTION
  return LINEAR_FILE


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
  if not path:
    return None
  view, layout, *_ = kind_of(path, base.shapes[path], base)
  if view is None or layout is not LINEAR_FILE:
    return None
  in_, out = view.shape(base.shapes[path])
  dtype = np.dtype(dtype)
  return FilePart(
    None, None, name, LINEAR_FILE, (rank, in_), (rank, out), dtype
  )
