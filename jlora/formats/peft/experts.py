# SPDX-License-Identifier: Apache-2.0
"""Prepares the Loras of mixture-of-experts layers as PEFT expects them.

References:
  huggingface/peft 0.21.2, `utils/transformers_weight_conversion.py` (separate
  experts are stacked for transformers 5) and `_inject_parameters`.
"""

import re
from collections.abc import Sequence

from jlora.formats.peft.layouts import PARAMETER_ORDER, ROUTER
from jlora.formats.peft.parts import (
  ROUTERS,
  SPLIT_EXPERTS,
  Base,
  FilePart,
  zero_part,
)

# Model types for which PEFT 0.21 takes every module of these names for an
# expert, even shared experts and dense layers, whose LoRAs it then drops.
_EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj"}
_TAKEN_FOR_EXPERTS = {
  "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32",
  "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
  "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
  "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next",
  "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker",
  "solar_open",
}  # fmt: skip
# Model types whose separate experts transformers 5 fuses, but whose LoRAs PEFT
# 0.21 does not convert.
_NOT_CONVERTED = {"qwen2_moe"}


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
  parts = [part for part in parts if not _dropped(part, base, left)]
  rank = max((part.rank for part in parts), default=0)
  stacks = {}
  padded = []
  for part in parts:
    match = re.fullmatch(SPLIT_EXPERTS, part.name)
    if match:
      stacks[match[1]] = part.dtype
    is_router = base.splits_experts and re.fullmatch(ROUTERS, part.name)
    if is_router and base.model_type in _NOT_CONVERTED:
      part = part._replace(layout=ROUTER)
    elif match or is_router:
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
  parts: Sequence[FilePart], left: dict[str, str]
) -> list[FilePart]:
  """Sets the depths of parts where PEFT wraps several parameters of a module.

  PEFT nests these wrappers, each around the one before.

  Args:
    parts: all parts.
    left: receives path -> reason, where the order is not known.

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


def _dropped(part: FilePart, base: Base, left: dict[str, str]) -> bool:
  """Returns whether PEFT would drop a part; adds the reason to `left`."""
  is_expert = re.fullmatch(SPLIT_EXPERTS, part.name)
  leaf = part.module.rpartition(".")[2]
  if is_expert and base.model_type in _NOT_CONVERTED:
    reason = f"PEFT 0.21 does not convert separate experts of {base.model_type}"
  elif (
    not is_expert
    and leaf in _EXPERT_NAMES
    and base.model_type in _TAKEN_FOR_EXPERTS
  ):
    reason = f"PEFT 0.21 takes every {leaf} of {base.model_type} for an expert"
  else:
    return False
  left[str(part.path)] = reason
  return True
