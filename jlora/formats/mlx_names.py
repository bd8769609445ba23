# SPDX-License-Identifier: Apache-2.0
"""Names of a language model's modules in mlx-lm, as data."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jlora.messages import name_some

_MIXTRAL = ((r"\.mlp\.(gate$|experts\b)", r".block_sparse_moe.\1"),)


class Kind(NamedTuple):
  """How mlx-lm builds the models of a `model_type`.

  Attributes:
    is_tied: whether the head is the table of tokens where config.json does not
      say so.
    renamed: (regex, replacement) for what has another name there.
  """

  is_tied: bool
  renamed: tuple[tuple[str, str], ...] = ()


#: model_type of config.json -> what differs. The others' modules are named as
#: those of transformers.
KINDS = {
  "llama": Kind(True),
  "mistral": Kind(True),  # mlx-lm's Llama
  "qwen2": Kind(True),
  "qwen3": Kind(False),
  "gemma": Kind(True),
  "gemma2": Kind(True),
  "gemma3_text": Kind(True),
  "phi3": Kind(False),
  "granite": Kind(True),
  "olmo2": Kind(True),
  "cohere": Kind(True),
  "starcoder2": Kind(True),
  "mixtral": Kind(False, _MIXTRAL),
  "qwen2_moe": Kind(False),
  "qwen3_moe": Kind(False),
  "olmoe": Kind(True),
}
_FUSED = re.compile(r"(.+)\.experts\.gate_up_proj")
_STACK = re.compile(r"(.+)\.experts\.(gate_proj|up_proj|down_proj)")
_EXPERT = re.compile(
  r"(.+)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)"
)
_OLD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LAYER = re.compile(r"((?:.+\.)?layers)\.(\d+)\.(.+)")


class Place(NamedTuple):
  """What of a module in mlx-lm a module is.

  Attributes:
    module: mlx-lm's name.
    expert: which of its experts; None for all, or for a layer without.
    half: which half of the outputs of the given module it is; None for all.
  """

  module: str
  expert: int | None = None
  half: int | None = None


def kind_of(config: Mapping[str, Any]) -> Kind:
  """Returns the row of a model.

  Args:
    config: the contents of its config.json.

  Raises:
    ValueError: there is none.

  Example:
    >>> kind_of({"model_type": "qwen3"}).is_tied
    False
  """
  name = config.get("model_type", "none")
  if name not in KINDS:
    raise ValueError(
      f"the model_type {name!r} has no row in the table of mlx-lm's names; "
      f"known are {name_some(KINDS, len(KINDS))}."
    )
  return KINDS[name]


def places_of(module: str, kind: Kind) -> tuple[Place, ...]:
  """Returns what a module of transformers is in mlx-lm.

  Args:
    module: its name, without `.weight`.
    kind: of the model.

  Returns:
    One place; two where experts keep the gate and the other input in one.

  Example:
    >>> kind = KINDS["mixtral"]
    >>> places_of("model.layers.0.mlp.experts.3.w2", kind)[0][:2]
    ('model.layers.0.block_sparse_moe.switch_mlp.down_proj', 3)
    >>> [place.module for place in places_of("mlp.experts.gate_up_proj", kind)]
    ['mlp.switch_mlp.gate_proj', 'mlp.switch_mlp.up_proj']
  """
  for pattern, new in kind.renamed:
    module = re.sub(pattern, new, module)
  if found := _FUSED.fullmatch(module):
    return tuple(
      Place(f"{found[1]}.switch_mlp.{side}", half=half)
      for half, side in enumerate(("gate_proj", "up_proj"))
    )
  if found := _STACK.fullmatch(module):
    return (Place(f"{found[1]}.switch_mlp.{found[2]}"),)
  if found := _EXPERT.fullmatch(module):
    side = _OLD.get(found[3], found[3])
    return (Place(f"{found[1]}.switch_mlp.{side}", int(found[2])),)
  return (Place(module),)


def keys_of(
  modules: Mapping[str, Any], depth: int | None
) -> tuple[list[str], int]:
  """Returns the two entries by which mlx-lm finds the modules to change.

  Args:
    modules: by its names.
    depth: layers of the model, by its config.json.

  Returns:
    Names, of what is in a layer relative to it; and how many layers, counted
    from the last, have such modules. At least 1, as 0 means all.

  Raises:
    ValueError: the depth is not known, or a module is in a layer beyond it.

  Example:
    >>> keys_of({"model.layers.2.mlp.up_proj": 0, "lm_head": 0}, 4)
    (['lm_head', 'mlp.up_proj'], 2)
  """
  found = {module: _LAYER.fullmatch(module) for module in modules}
  keys = {module if m is None else m[3] for module, m in found.items()}
  layers = [int(m[2]) for m in found.values() if m]
  if depth is None or max(layers, default=0) >= depth:
    raise ValueError(
      f"the adapter changes layers up to {max(layers, default=0)}, counted "
      f"from 0, config.json has num_hidden_layers {depth}; give the base's own."
    )
  return sorted(keys), max(1, depth - min(layers, default=depth))
