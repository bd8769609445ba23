# SPDX-License-Identifier: Apache-2.0
"""What of an adapter goes where in a PEFT folder, decided before writing.

A plan is made from shapes alone. Whatever the format or the consumer cannot
carry ends in `left` with its reason, so that nothing is dropped silently.
"""

import collections
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.loras import Lora, check_loras, name_some
from jlora.peft_files import (
  CONVOLUTION,
  EMBEDDING,
  EXPERTS,
  LINEAR,
  PARAMETER_ORDER,
  ROUTER,
  Layout,
  Profile,
)
from jlora.views import (
  KERNEL,
  TORCH_VIEWS,
  MatrixView,
  Rule,
  table_for,
  view_of,
)

Rename = Callable[[str], str | Sequence[str]]

_EMBEDDINGS = TORCH_VIEWS[0][0]
_INPUT_EMBEDDINGS = r"(.*\.)?(embed_tokens|wte|word_embeddings)\.weight"
_HEAD = "lm_head.weight"
_SPLIT_EXPERTS = r".*\.experts\.\d+\..*"
# Where experts are fused, routers are modules of their own classes.
_ROUTERS = r".*\.(gate|router)\.weight"


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
  table: tuple[Rule, ...]
  model_type: str | None
  tied_head: bool
  splits_experts: bool
  rename: Rename


class Part(NamedTuple):
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
  layout: Layout
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
    task_type == "CAUSAL_LM" and _HEAD not in names,
    any(re.fullmatch(_SPLIT_EXPERTS, name) for name in names),
    rename,
  )


def plan_loras(
  loras: Mapping[str, Lora],
  base: Base,
  profile: Profile,
  dtype: Any,
  left: dict[str, str],
) -> list[Part]:
  """The parts that the Loras become, in the Loras' order; each is read once.

  Args:
    loras: path -> Lora, may be lazy.
    base: the base model.
    profile: the consumer.
    dtype: storage dtype, or None for each Lora's own.
    left: receives path -> reason.

  Returns:
    Parts; none of rank 0.

  Raises:
    ValueError: Loras that are malformed, not in the base, not of its shape, or
      of too high a rank; two parts of one name.

  Example:
    >>> import jax.numpy as jnp
    >>> from jlora.peft_files import PEFT
    >>> loras = {"q.weight": Lora(jnp.ones((1, 3)), jnp.ones((1, 2)),
    ...                           jnp.float32(1))}
    >>> base = describe_base({"q.weight": np.ones((2, 3))}, None, None, None)
    >>> plan_loras(loras, base, PEFT, None, {})[0].module
    'q'
  """
  unknown = [path for path in loras if path not in base.shapes]
  if unknown:
    raise ValueError(
      f"{len(unknown)} of {len(loras)} Loras are for parameters that `like`"
      f" does not have: {name_some(unknown)}."
    )
  parts: list[Part] = []
  wrong: list[str] = []
  for path, lora in loras.items():
    check_loras({path: lora})
    shape = (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    view = view_of(path, base.shapes[path], base.table)
    if view is None or view.shape(base.shapes[path]) != shape:
      wrong.append(f"{path}: Lora {shape}, parameter {base.shapes[path]}")
      continue
    new = _parts_of(path, lora, view, base, dtype)
    reason = _refusal(new[0], view, profile)
    if reason:
      left[path] = reason
    else:
      parts += new
  if wrong:
    raise ValueError(
      f"{len(wrong)} Loras do not fit their parameter: {name_some(wrong)}."
      " Needed: (..., in, out) of the parameter's view; is model_type right?"
    )
  _check_parts(parts, profile)
  return _nested(parts, left)


def plan_biases(
  biases: Mapping[str, Any],
  parts: Sequence[Part],
  base: Base,
  profile: Profile,
  left: dict[str, str],
) -> tuple[list[Part], dict[str, str]]:
  """Which module carries which bias, and zero Loras for those without one.

  Args:
    biases: path of a bias -> its change.
    parts: the Loras' parts.
    base: the base model.
    profile: the consumer.
    left: receives path -> reason.

  Returns:
    All parts, and {module: path of its bias}.

  Raises:
    ValueError: a bias of another length than its module's output.

  Example:
    >>> from jlora.peft_files import PEFT
    >>> base = describe_base({"q.weight": np.ones((2, 3))}, None, None, None)
    >>> parts, carried = plan_biases({"q.bias": np.ones(2)}, [], base, PEFT, {})
    >>> parts[0].module, parts[0].rank, carried
    ('q', 1, {'q': 'q.bias'})
  """
  modules = {part.module: part for part in parts}
  clash = {
    part.layout.kind
    for part in parts
    if part.layout.wraps_parameter or part.layout is EMBEDDING
  }
  carried: dict[str, str] = {}
  wrong: list[str] = []
  for path, bias in biases.items():
    name = str(base.rename(path))
    module = name.removesuffix(".bias")
    part = modules.get(module) or _zero_part(module, parts, base)
    if "bias" in profile.refused:
      left[path] = profile.refused["bias"]
    elif clash:
      left[path] = f"PEFT refuses lora_bias beside LoRA on {min(clash)}"
    elif module == name or part is None:
      left[path] = (
        "not the bias of a linear layer; give its new value in `full`"
      )
    elif bias.shape != part.b[-1:]:
      wrong.append(f"{path}: {bias.shape}, needed {part.b[-1:]}")
    else:
      modules[module] = part
      carried[module] = path
  if wrong:
    raise ValueError(f"{len(wrong)} biases do not fit: {name_some(wrong)}.")
  if not carried:
    return list(parts), carried
  return list(modules.values()), carried


def plan_full(
  full: Mapping[str, Any],
  parts: Sequence[Part],
  base: Base,
  profile: Profile,
  left: dict[str, str],
) -> dict[str, str]:
  """Which tensors are kept whole: {Hugging Face name: path}.

  PEFT replaces modules, not parameters, and finds them by the ends of names.

  Args:
    full: path -> new value.
    parts: the Loras' parts.
    base: the base model.
    profile: the consumer.
    left: receives path -> reason.

  Returns:
    Names; of a tied embedding also the head's.

  Raises:
    ValueError: a parameter that has a Lora as well.

  Example:
    >>> from jlora.peft_files import PEFT
    >>> base = describe_base({"norm.weight": np.ones(3)}, None, None, None)
    >>> plan_full({"norm.weight": np.ones(3)}, [], base, PEFT, {})
    {'norm.weight': 'norm.weight'}
  """
  both = sorted({part.path for part in parts if part.path in full})
  if both:
    raise ValueError(f"Given as a Lora and in full: {name_some(both)}.")
  names = {str(base.rename(path)): path for path in full}
  saved = {name.rpartition(".")[0] for name in names}
  wrapped = {part.module for part in parts}
  kept: dict[str, str] = {}
  for name, path in names.items():
    reason = profile.refused.get("full") or _obstacle(
      name, path, names, saved, wrapped, base
    )
    if reason:
      left[path] = reason
      continue
    kept[name] = path
    if base.tied_head and re.fullmatch(_INPUT_EMBEDDINGS, name):
      kept[_HEAD] = path
  return kept


def is_transposed(part: Part, base: Base) -> bool:
  """Whether the module is a `Conv1D`, which keeps its weight (in, out).

  Args:
    part: a part.
    base: the base model.

  Returns:
    The answer, by `model_type`.

  Example:
    >>> base = describe_base({}, "gpt2", None, None)
    >>> part = Part("x", None, "h.0.c_fc.weight", LINEAR, (1, 1), (1, 1), None)
    >>> is_transposed(part, base)
    True
  """
  table = table_for([part.name], base.model_type)
  return part.layout is LINEAR and view_of(part.name, (1, 1), table) == KERNEL


def _parts_of(path, lora, view, base, dtype) -> list[Part]:
  """One part, or one for each leading index, or one more for a tied head."""
  name = base.rename(path)
  layout, kernel = _layout(path, view, base)
  dtype = np.dtype(dtype or lora.a.dtype)
  if isinstance(name, str):
    part = Part(
      path, None, name, layout, lora.a.shape, lora.b.shape, dtype, kernel
    )
    if base.tied_head and re.fullmatch(_INPUT_EMBEDDINGS, name):
      head = part._replace(
        name=_HEAD, layout=LINEAR, a=part.b, b=part.a, swapped=True
      )
      return [part, head]
    return [part]
  count = math.prod(lora.a.shape[:-2])
  if len(name) != count:
    raise ValueError(f"{path}: {len(name)} names for {count} matrices.")
  a, b = lora.a.shape[-2:], lora.b.shape[-2:]
  return [
    Part(path, index, each, layout, a, b, dtype, kernel)
    for index, each in enumerate(name)
  ]


def _layout(
  path: str, view: MatrixView, base: Base
) -> tuple[Layout, tuple[int, ...]]:
  """How PEFT stores the Lora of a parameter, and a convolution's kernel."""
  name = base.rename(path)
  if not isinstance(name, str):
    return LINEAR, ()
  if view.batch:
    return EXPERTS, ()
  if re.fullmatch(_EMBEDDINGS, name):
    return EMBEDDING, ()
  if re.fullmatch(_ROUTERS, name) and not base.splits_experts:
    return ROUTER, ()
  if len(view.inputs) > 1 and ("/" not in path or "conv" in path):
    return CONVOLUTION, tuple(base.shapes[path][axis] for axis in view.inputs)
  return LINEAR, ()


def _refusal(part: Part, view: MatrixView, profile: Profile) -> str | None:
  """Why a part cannot be carried, or None."""
  if part.rank == 0:
    return "rank 0: nothing to write"
  if part.layout.kind in profile.refused:
    return profile.refused[part.layout.kind]
  if part.layout is CONVOLUTION and view.outputs != (0,):
    return "a kernel not in PyTorch's layout; transpose it first"
  if not part.layout.wraps_parameter and not part.name.endswith(".weight"):
    return f"PEFT wraps modules with a `weight`, not {part.name}"
  return None


def _check_parts(parts: Sequence[Part], profile: Profile) -> None:
  """Nothing, if ranks are allowed and names differ."""
  limit = math.inf if profile.max_rank is None else profile.max_rank
  high = [f"{part.name} ({part.rank})" for part in parts if part.rank > limit]
  if high:
    raise ValueError(
      f"{len(high)} modules have a rank over {limit}, the most that"
      f" {profile.name} takes: {name_some(high)}. Truncate them."
    )
  counts = collections.Counter(part.name for part in parts)
  twice = [name for name, count in counts.items() if count > 1]
  if twice:
    raise ValueError(f"Names given to several Loras: {name_some(twice)}.")


def _nested(parts: Sequence[Part], left: dict[str, str]) -> list[Part]:
  """Parts with the depth of their wrapper, where a module has several."""
  several: dict[str, list[str]] = {}
  for part in parts:
    if part.layout.wraps_parameter:
      several.setdefault(part.module, []).append(part.name.rpartition(".")[2])
  nested = []
  for part in parts:
    siblings = several.get(part.module, [])
    if len(siblings) < 2:
      nested.append(part)
    elif set(siblings) <= set(PARAMETER_ORDER):
      order = [name for name in PARAMETER_ORDER if name in siblings]
      depth = order[::-1].index(part.name.rpartition(".")[2])
      nested.append(part._replace(depth=depth))
    else:
      left[str(part.path)] = (
        f"PEFT nests several parameters of {part.module} in an order that is"
        f" known only for {', '.join(PARAMETER_ORDER)}"
      )
  return nested


def _zero_part(module: str, parts: Sequence[Part], base: Base) -> Part | None:
  """A zero Lora of rank 1 for a linear module, or None."""
  name = f"{module}.weight"
  path = base.paths.get(name)
  view = path and view_of(path, base.shapes[path], base.table)
  if not path or not view or view.batch:
    return None
  if _layout(path, view, base)[0] is not LINEAR:
    return None
  in_, out = view.shape(base.shapes[path])
  dtype = parts[0].dtype if parts else np.dtype(np.float32)
  return Part(None, None, name, LINEAR, (1, in_), (1, out), dtype)


def _obstacle(name, path, names, saved, wrapped, base: Base) -> str | None:
  """Why PEFT cannot replace the module of a tensor, or None."""
  module = name.rpartition(".")[0]
  missing = [
    other
    for other in sorted(base.names)
    if other.startswith(f"{module}.") and other not in names
  ]
  alike = [
    other for other in sorted(base.modules - saved) if other.endswith(module)
  ]
  if not module:
    return "a parameter of no module, which PEFT cannot replace"
  if module in wrapped:
    return "its module has a Lora; give its change in `biases`"
  if missing:
    return f"PEFT replaces whole modules; give also {name_some(missing)}"
  if alike:
    return f"PEFT compares ends of names and would replace {name_some(alike)}"
  if (
    "/" in path
    and len(base.shapes.get(path, ())) > 1
    and not re.fullmatch(_EMBEDDINGS, name)
  ):
    return "kept whole only in PyTorch's layout; transpose and rename it first"
  return None
