# SPDX-License-Identifier: Apache-2.0
"""What the modules of a Hugging Face model are called, and of which class.

A checkpoint's keys are not the names of its model's modules, and a name does
not say what a module is. Both are read from a table here: `families.json`, made
from transformers' own modules and conversions by
`experiments.collect_families`.

References:
  huggingface/transformers 5, `conversion_mapping.py`, `core_model_loading.py`.
  huggingface/peft 0.21.2, `utils/transformers_weight_conversion.py`.
"""

import collections
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jlora.formats.peft.layouts import (
  CONVOLUTION,
  EMBEDDING,
  EXPERTS,
  LINEAR_FILE,
  ROUTER,
  FileLayout,
)
from jlora.formats.peft.loading_rules import (
  CONVERTER,
  RENAMINGS,
  Rule,
  parts_of,
  read_families,
  rules_of,
)
from jlora.views import (
  CONV1D,
  CONV2D,
  CONV3D,
  EXPERTS_OUT_IN,
  KERNEL,
  LINEAR,
  STACKED,
  MatrixView,
)


class Kind(NamedTuple):
  """What a parameter is to PEFT.

  Attributes:
    view: how it is read as a matrix; None if PEFT has no LoRA for it.
    layout: how the file stores its Lora; None if there is none.
    why: the reason, where PEFT has no LoRA for it.
    in_model: whether the model has the parameter, so that it can go whole.
  """

  view: MatrixView | None = None
  layout: FileLayout | None = None
  why: str = ""
  in_model: bool = True


# The codes of families.json.
KINDS: dict[str, Kind] = {
  "l": Kind(LINEAR, LINEAR_FILE),
  "f": Kind(KERNEL, LINEAR_FILE),
  "e": Kind(KERNEL, EMBEDDING),
  "1": Kind(CONV1D, CONVOLUTION),
  "2": Kind(CONV2D, CONVOLUTION),
  "3": Kind(CONV3D, CONVOLUTION),
  "p2": Kind(LINEAR, ROUTER),
  "p3": Kind(EXPERTS_OUT_IN, EXPERTS),
  "p3t": Kind(STACKED, EXPERTS),
  "g": Kind(why="a convolution in groups, which PEFT adapts at few ranks"),
  "v": Kind(why="a convolution whose dilation or padding PEFT leaves out"),
  "z": Kind(why="a weight that is computed from others (weight norm)"),
  "s": Kind(why="a convolution of a class of the model's own"),
  "b": Kind(why="the model calls this module past its name", in_model=False),
  "t": Kind(why="a transposed convolution, for which PEFT has no LoRA"),
  "d": Kind(why="the model reads this weight past its module"),
  "m": Kind(why="modules of several classes have this name"),
  "n": Kind(why="a parameter of a module that holds others"),
  "k": Kind(why="a parameter of a module that cannot be put into a wrapper"),
  "x": Kind(why="a parameter of more than three axes"),
}
_AXES = {
  **{"l": 2, "f": 2, "e": 2, "1": 3, "2": 4, "3": 5},
  **{"p2": 2, "p3": 3, "p3t": 3},
}
_MODULES = frozenset("lfe123gtvs")  # of whole modules
# The conversions of separate experts that PEFT does with their Loras too.
_STACKED = {"MergeModulelist", "Concatenate"}
_STACK = ("MergeModulelist", 0)
# The conversions that are known here: the operations, the codes that their
# parameters can have, and how each of their tensors is read.
KNOWN_CONVERSIONS: dict[tuple[tuple[Any, ...], ...], dict[str, Kind]] = {
  (_STACK,): {"p3": KINDS["l"]},
  (_STACK, ("Concatenate", 1)): {"p3": KINDS["l"]},
  (("Chunk", 0),): {"l": KINDS["l"], "p2": KINDS["l"]},
  (("Split", 0),): {"l": KINDS["l"]},
  (("Concatenate", 0),): {
    "l": KINDS["l"],
    "p2": KINDS["l"],
    "e": KINDS["e"],
    "g": KINDS["g"],
  },
}


class Origin(NamedTuple):
  """What transformers makes of a tensor that is no parameter of the model.

  Attributes:
    parameters: names of the parameters that it becomes, or becomes a part of.
    operations: (name, axes ...) of transformers' operations, in their order.
    place: which of the converter's sources it is.
  """

  parameters: tuple[str, ...]
  operations: tuple[tuple[Any, ...], ...]
  place: int


class Family:
  """A model class: the names, classes and ties of its modules.

  Args:
    name: the class in transformers.
    config: the contents of config.json, which says what its parts are.

  Attributes:
    name: the class in transformers.
    model_type: what config.json says.
    task_type: PEFT's task name, or None.
    refusal: why PEFT puts no adapter on this class; "" if it does.
    architectures: the classes that config.json names.
    is_found: whether transformers, or the checkpoint itself, has the class.
    bare_names: last names of modules that such without parameters have, too.
  """

  is_found = True

  def __init__(self, name: str, config: Mapping[str, Any]):
    row = read_families()["classes"][name]
    self.name = name
    self.model_type: str = config.get("model_type") or row["type"]
    self.task_type: str | None = row.get("task")
    self.refusal: str = row.get("peft", "")
    self.architectures = tuple(config.get("architectures") or ())
    self._origins: dict[str, Origin | None] = {}
    self._ruled: set[str] = set()
    self._ties: dict[str, str] = row.get("ties", {})
    self._prefix: str = row["prefix"]
    parts = [*parts_of(name, config)]
    self.bare_names = frozenset(
      bare
      for each in parts
      for bare in read_families()["classes"][each.name].get("bare", ())
    )
    # Innermost first: that is the one a name belongs to.
    self._parts = [
      (re.compile(re.sub(r"(?<![^.])N(?![^.])", r"\\d+", place) + r"\."), part)
      for place, part, _ in sorted(parts[1:], key=lambda each: -len(each.place))
    ]
    self._rules = [*rules_of(parts, self._prefix)]
    self._is_converted = self.model_type in read_families()["conversions"]

  def name_of(self, key: str) -> str:
    """Returns a parameter's name in the model, from its key on disk.

    Example:
      >>> family = family_of({"model_type": "gpt2",
      ...                     "architectures": ["GPT2LMHeadModel"]})
      >>> family.name_of("h.0.ln_1.weight")
      'transformer.h.0.ln_1.weight'
    """
    name, is_ruled = key, False
    for rule in self._rules:
      if rule.kind in RENAMINGS:
        name = rule.apply(name)
      elif rule.kind != CONVERTER:
        is_ruled |= rule.match(name) is not None
    name = self._with_prefix(name)
    self._ruled |= {name} if is_ruled else set()
    return name

  def _with_prefix(self, name: str) -> str:
    """Returns a name with or without the base model's, as the model has it."""
    prefix = f"{self._prefix}." if self._prefix else ""
    bare = name.removeprefix(prefix)
    if prefix and bare != name and self._has(bare):
      return bare
    if prefix and self._has(prefix + name):
      return prefix + name
    return name

  def kind_of(self, name: str, axes: int) -> Kind:
    """Returns what a parameter is.

    Args:
      name: its name in the model.
      axes: how many axes it has.

    Example:
      >>> family = family_of({"model_type": "gpt2",
      ...                     "architectures": ["GPT2LMHeadModel"]})
      >>> family.kind_of("transformer.h.0.attn.c_attn.weight", 2).view
      MatrixView(batch=(), inputs=(0,), outputs=(1,))
    """
    if name in self._ruled:
      return Kind(why="transformers renames it by a rule", in_model=False)
    code = self._code(name)
    if code is None:
      return self._unknown(name, axes)
    refuses = read_families()["peft_refuses"]
    module = name.rpartition(".")[0]
    if (
      self.model_type in refuses["types"]
      and module.rpartition(".")[2] in refuses["modules"]
    ):
      return Kind(why=f"PEFT refuses this module in {self.model_type}")
    if _AXES.get(code, axes) != axes:
      return Kind(
        why=f"it has {axes} axes here and {_AXES[code]} in {self.name}",
        in_model=False,
      )
    if KINDS[code].layout and not self._is_stable(f"{module}.lora_A.weight"):
      return Kind(why="PEFT would rename the keys of its LoRA")
    return KINDS[code]

  def origin_of(self, name: str) -> Origin | None:
    """Returns what a tensor is made into, if that is not itself a parameter.

    Args:
      name: as `name_of` returns it.

    Returns:
      Origin; None for a parameter and for experts that PEFT converts itself.

    Example:
      >>> family = family_of({"model_type": "phimoe",
      ...                     "architectures": ["PhimoeForCausalLM"]})
      >>> family.origin_of("model.layers.0.mlp.experts.3.w2.weight").parameters
      ('model.layers.0.mlp.experts.down_proj',)
    """
    if name not in self._origins:
      self._origins[name] = self._origin(name)
    return self._origins[name]

  def tied_to(self, name: str, names: frozenset[str]) -> list[str]:
    """Lists parameters that are not stored because they are this one.

    Args:
      name: a parameter's name in the model.
      names: those of all parameters that are stored.
    """
    return [
      to for to, of in self._ties.items() if of == name and to not in names
    ]

  def ties_in(self, module: str, names: frozenset[str]) -> dict[str, str]:
    """Returns {parameter: the one it is} of a module, for those not stored.

    Args:
      module: a module's name.
      names: those of all parameters that are stored.
    """
    return {
      to: of
      for to, of in self._ties.items()
      if to.rpartition(".")[0] == module and to not in names
    }

  def may_be_tied(self, names: frozenset[str]) -> bool:
    """Returns whether a table may be tied in a way that is not known.

    Args:
      names: those of all parameters that are stored.
    """
    del names
    return False

  def ties_to(self, name: str) -> bool:
    """Returns whether a parameter can be another one."""
    return name in self._ties

  def order_of(self, module: str) -> list[str]:
    """Lists a module's parameters in the order in which it defines them."""
    branch = self._branch(f"{module}.")
    return list(branch) if isinstance(branch, dict) else []

  def _is_stable(self, key: str) -> bool:
    """Returns whether PEFT, which renames keys as if from disk, keeps a key."""
    if not self._is_converted:
      return True
    name = key
    for rule in self._rules:
      if rule.kind in RENAMINGS:
        name = rule.apply(name)
    return name == key

  def _part(self, name: str) -> tuple[str, str]:
    """Returns the class of the innermost part of a name, and the rest."""
    for path, part in self._parts:
      match = path.match(name)
      if match:
        return part, name[match.end() :]
    return self.name, name

  def _branch(self, name: str) -> Any:
    """Follows the dots of a name, but for the last part, into the table."""
    part, rest = self._part(name)
    branch = read_families()["classes"][part].get("modules", {})
    for each in rest.split(".")[:-1]:
      if not isinstance(branch, dict):
        return None
      branch = branch.get("N" if each.isdigit() else each)
    return branch

  def _code(self, name: str) -> str | None:
    """Returns the code of a parameter's kind, None for an unknown name."""
    branch, leaf = self._branch(name), name.rpartition(".")[2]
    if isinstance(branch, str):
      return branch if leaf == "weight" else None
    code = (branch or {}).get("N" if leaf.isdigit() else leaf)
    if not isinstance(code, str) or (leaf != "weight" and code in _MODULES):
      return None
    return code

  def _has(self, name: str) -> bool:
    """Returns whether the model has modules that a name can be in."""
    part, rest = self._part(name)
    return rest.partition(".")[0] in read_families()["classes"][part]["top"]

  def _origin(self, name: str) -> Origin | None:
    """Looks up what a tensor is made into."""
    row = None if self._code(name) is not None else self._converter(name)
    if row is None or row.kind != CONVERTER or self._converts_experts(row):
      return None
    parameters = tuple(map(self._with_prefix, row.apply_all(name)))
    return Origin(parameters, row.operations, row.place_of(name))

  def _converter(self, name: str) -> Rule | None:
    """Returns the conversion of a tensor's values, or rule, that applies."""
    for row in self._rules:
      if row.kind not in RENAMINGS and row.match(name):
        return row
    return None

  def _converts_experts(self, row: Rule) -> bool:
    """Returns whether PEFT does a conversion with Loras, too."""
    return (
      row.kind == CONVERTER
      and {operation for operation, *_ in row.operations} <= _STACKED
      and self.model_type in read_families()["peft_experts"]
      and row.targets[0].endswith(("gate_up_proj", "down_proj"))
    )

  def _unknown(self, name: str, axes: int) -> Kind:
    """Returns the kind of a parameter that the table does not have."""
    row = self._converter(name)
    if row is not None:
      if axes == 2 and self._converts_experts(row):
        return KINDS["l"]
      origin = self.origin_of(name)
      known = KNOWN_CONVERSIONS.get(row.operations, {})
      made = origin.parameters if origin else ()
      kinds = {known.get(self._code(each) or "") for each in made}
      kind = kinds.pop() if len(kinds) == 1 else None
      if kind is not None and (kind.view is None or axes == 2):
        return kind
      to = ", ".join(target.strip(".") for target in row.targets)
      return Kind(
        why=f"transformers turns it into {to}, and PEFT not its LoRA",
        in_model=False,
      )
    holder = self._branch(name.rpartition(".")[0])
    agreed = _agreed().get(_leaf(name))
    if isinstance(holder, dict) and agreed and _AXES[agreed] == axes:
      return KINDS[agreed]
    return Kind(why=f"{self.name} is not known to have it", in_model=False)


class UnknownFamily(Family):
  """A model that is not in transformers: what its names say everywhere else."""

  def __init__(self, config: Mapping[str, Any]):
    self.model_type = config["model_type"]
    self.name = (config.get("architectures") or [self.model_type])[0]
    self.task_type = "CAUSAL_LM" if "CausalLM" in self.name else None
    self.refusal = ""
    self.architectures = tuple(config.get("architectures") or ())
    self.is_found = bool(config.get("auto_map"))
    self._ties = {}
    self.bare_names = frozenset()
    told = [*_values(config, "tie_word_embeddings")]
    self._says_untied = bool(told) and not any(told)

  def name_of(self, key: str) -> str:
    """Returns the key: nothing is known."""
    return key

  def kind_of(self, name: str, axes: int) -> Kind:
    """Returns what all known families agree on."""
    agreed = _agreed().get(_leaf(name))
    if agreed and _AXES[agreed] == axes:
      return KINDS[agreed]
    return Kind(
      why=f"the class of this module of {self.model_type} is not known"
    )

  def order_of(self, module: str) -> list[str]:
    """Returns nothing: the order is not known."""
    return []

  def origin_of(self, name: str) -> None:
    """Returns None: no conversion is known."""

  def may_be_tied(self, names: frozenset[str]) -> bool:
    """Returns whether config.json leaves it open, and no head is stored."""
    return not self._says_untied and not any("head." in name for name in names)


def family_of(config: Mapping[str, Any] | None) -> Family | None:
  """Returns what is known of the model of a config.json.

  Args:
    config: its contents.

  Returns:
    A Family. None without a `model_type`: then the names are the modules', and
    what they are is told by the tables of `jlora.views`.

  Example:
    >>> family_of({"model_type": "bert", "architectures": ["BertModel"]}).name
    'BertModel'
  """
  model_type = (config or {}).get("model_type")
  if config is None or not model_type:
    return None
  table = read_families()
  names = config.get("architectures") or []
  names = [name for name in names if name in table["classes"]]
  if not names and not config.get("auto_map"):
    names = [
      table["auto"][kind][model_type]
      for kind in ("causal", "base")
      if model_type in table["auto"][kind]
    ]
    names = [name for name in names if name in table["classes"]]
  return Family(names[0], config) if names else UnknownFamily(config)


def expert_names(model_type: str | None) -> frozenset[str]:
  """Names that PEFT takes for experts, whatever module has them.

  Example:
    >>> sorted(expert_names("mixtral"))
    ['gate', 'w1', 'w2', 'w3']
  """
  return frozenset(read_families()["peft_experts"].get(model_type, ()))


def drops_experts(model_type: str | None) -> bool:
  """Returns whether transformers stacks separate experts, and PEFT does not.

  Example:
    >>> drops_experts("qwen2_moe"), drops_experts("qwen3_moe")
    (True, False)
  """
  rows = read_families()["conversions"].get(model_type, ())
  return model_type not in read_families()["peft_experts"] and any(
    [*_STACK] in operations for *_, operations in rows
  )


@functools.cache
def _agreed() -> dict[str, str]:
  """Returns {last part of a name: code} where all families agree.

  Up to one class in twenty may differ: q_proj is a linear layer, of which a few
  models read the weight themselves.
  """
  found: dict[str, collections.Counter[str]] = {}
  for row in read_families()["classes"].values():
    for leaf, code in _leaves(row.get("modules", {})):
      found.setdefault(leaf, collections.Counter())[code] += 1
  agreed = {}
  for leaf, codes in found.items():
    code, count = codes.most_common(1)[0]
    # Stacked experts have the same names, but no `.weight` and three axes.
    rest = codes.total() - sum(codes[other] for other in ("p3", "p3t"))
    if leaf != "N" and code in _AXES and 20 * count >= 19 * rest:
      agreed[leaf] = code
  return agreed


def _values(config: Any, key: str) -> Iterator[Any]:
  """Yields the values of a key in a configuration and those inside it."""
  if isinstance(config, Mapping):
    if key in config:
      yield config[key]
    for inner in config.values():
      yield from _values(inner, key)


def _leaves(branch: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields the last parts of all names in a tree, with their codes."""
  for key, value in branch.items():
    if isinstance(value, str):
      yield key, value
    else:
      yield from _leaves(value)


def _leaf(name: str) -> str:
  """Returns the last part of a module's or a bare parameter's name."""
  parts = name.split(".")
  return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
