# SPDX-License-Identifier: Apache-2.0
"""Prepares the Loras of mixture-of-experts layers as PEFT expects them.

References:
  huggingface/peft 0.21.2, `utils/transformers_weight_conversion.py` (separate
  experts are stacked for transformers 5) and `_inject_parameters`.
"""

import re
from collections.abc import Sequence

from jlora.formats.peft.families import drops_experts, expert_names
from jlora.formats.peft.layouts import (
  EXPERTS,
  LINEAR_FILE,
  PARAMETER_ORDER,
  ROUTER,
)
from jlora.formats.peft.parts import (
  ROUTERS,
  SPLIT_EXPERTS,
  Base,
  FilePart,
  kind_of,
  zero_part,
)


def stack_experts(
  parts: Sequence[FilePart], base: Base, left: dict[str, str]
) -> list[FilePart]:
  """Adds and pads parts so that PEFT can stack separate experts.

  PEFT on transformers 5 stacks a layer's experts into one tensor, at the rank
  `r` of the configuration. So every expert has to be there, at that rank, and
  so does the router, if it has a Lora. Missing experts and units become zeros.

  Args:
    parts: all parts.
    base: the base model.
    left: receives path -> reason, where PEFT would drop the change.

  Returns:
    Parts, the added zeros last.

  Example:
    >>> from jlora.formats.peft.parts import describe_base, parts_of
    >>> from jlora.loras import Lora
    >>> import numpy as np
    >>> names = [f"mlp.experts.{i}.up_proj.weight" for i in range(2)]
    >>> base = describe_base(dict.fromkeys(names, np.ones((5, 4))), None, None,
    ...                      None)
    >>> part = zero_part("mlp.experts.0.up_proj", 3, np.float32, base)
    >>> [(part.module, part.rank) for part in stack_experts([part], base, {})]
    [('mlp.experts.0.up_proj', 3), ('mlp.experts.1.up_proj', 3)]
  """
  if drops_experts(base.model_type):
    parts = _without_experts(parts, base, left)
  taken = expert_names(base.model_type)
  return _padded([_untaken(part, taken) for part in parts], base)


def complete_experts(parts: Sequence[FilePart], base: Base) -> list[FilePart]:
  """Adds and pads parts so that vLLM can pack the experts of a layer.

  It needs either of each separate expert all matrices, of one rank, or of the
  stacked ones both. Missing ones become zeros.

  Args:
    parts: all parts.
    base: the base model.

  Returns:
    Parts, the added zeros last.

  Example:
    >>> complete_experts([], Base({}, {}, frozenset(), frozenset(), (), None,
    ...                           False, False, str))
    []
  """
  padded = _padded(parts, base)
  present = {part.name for part in parts}
  for part in parts:
    for leaf in PARAMETER_ORDER if part.layout is EXPERTS else ():
      name = f"{part.module}.{leaf}"
      zeros = _zero_experts(name, part, base)
      if name not in present and zeros:
        present.add(name)
        padded.append(zeros)
  return padded


def _zero_experts(name: str, like: FilePart, base: Base) -> FilePart | None:
  """Makes a part of zeros for stacked experts; None if there are none."""
  path = base.paths.get(name)
  if path is None:
    return None
  view, layout, *_ = kind_of(path, base.shapes[path], base)
  if view is None or layout is not EXPERTS:
    return None
  *batch, in_, out = view.shape(base.shapes[path])
  a, b = (*batch, like.rank, in_), (*batch, like.rank, out)
  return FilePart(None, None, name, EXPERTS, a, b, like.dtype)


def _padded(parts: Sequence[FilePart], base: Base) -> list[FilePart]:
  """Pads separate experts to one rank, and adds those that are missing."""
  rank = max((part.rank for part in parts), default=0)
  stacks = {}
  padded = []
  for part in parts:
    match = re.fullmatch(SPLIT_EXPERTS, part.name)
    if match:
      stacks[match[1]] = part.dtype
    is_router = base.splits_experts and re.fullmatch(ROUTERS, part.name)
    if match or (is_router and part.layout is not ROUTER):
      part = part._replace(a=(rank, part.a[-1]), b=(rank, part.b[-1]))
    padded.append(part)
  present = {part.name for part in parts}
  for name in sorted(base.names - present):
    match = re.fullmatch(SPLIT_EXPERTS, name)
    if match and match[1] in stacks:
      module = name.rpartition(".")[0]
      zeros = zero_part(module, rank, stacks[match[1]], base)
      padded += [zeros] if zeros else []
  return padded


def nest_parameters(
  parts: Sequence[FilePart], left: dict[str, str], base: Base | None = None
) -> list[FilePart]:
  """Sets the depths of parts where PEFT wraps several parameters of a module.

  PEFT nests these wrappers, each around the one before.

  Args:
    parts: all parts.
    left: receives path -> reason, where the order is not known.
    base: the base model; without one the order is `PARAMETER_ORDER`.

  Returns:
    Parts, in their order.

  Example:
    >>> from jlora.formats.peft.layouts import EXPERTS
    >>> up = FilePart("x", None, "e.gate_up_proj", EXPERTS, (), (), None)
    >>> down = up._replace(name="e.down_proj")
    >>> [part.stem for part in nest_parameters([up, down], {})]
    ['e.base_layer', 'e']
  """
  several: dict[str, list[str]] = {}
  for part in parts:
    if part.layout.wraps_parameter:
      several.setdefault(part.module, []).append(part.name.rpartition(".")[2])
  nested = []
  for part in parts:
    siblings = several.get(part.module, [])
    family = base and base.family
    known = family.order_of(part.module) if family else PARAMETER_ORDER
    if len(siblings) < 2:
      nested.append(part)
    elif set(siblings) <= set(known):
      order = [name for name in known if name in siblings]
      depth = order[::-1].index(part.name.rpartition(".")[2])
      nested.append(part._replace(depth=depth))
    else:
      left[str(part.path)] = (
        f"PEFT nests several parameters of {part.module} in an order that is"
        " not known"
      )
  return nested


def _without_experts(
  parts: Sequence[FilePart], base: Base, left: dict[str, str]
) -> list[FilePart]:
  """Drops separate experts, with the reason, and wraps their router."""
  kept = []
  for part in parts:
    if re.fullmatch(SPLIT_EXPERTS, part.name):
      left[str(part.path)] = (
        f"PEFT 0.21 does not convert separate experts of {base.model_type}"
      )
    elif base.splits_experts and re.fullmatch(ROUTERS, part.name):
      kept.append(part._replace(layout=ROUTER))
    else:
      kept.append(part)
  return kept


def _untaken(part: FilePart, taken: frozenset[str]) -> FilePart:
  """Names a parameter where PEFT would take its module for an expert.

  In models whose separate experts PEFT stacks, it takes every module with an
  expert's name for one, even shared experts and dense layers, and drops it.
  """
  leaf = part.module.rpartition(".")[2]
  is_taken = part.layout is LINEAR_FILE and leaf in taken
  if not is_taken or re.fullmatch(f"{SPLIT_EXPERTS}|{ROUTERS}", part.name):
    return part
  return part._replace(layout=ROUTER)
