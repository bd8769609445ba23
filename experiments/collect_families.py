# SPDX-License-Identifier: Apache-2.0
"""Which modules has every model class of transformers, and what are they?

  python -m experiments.collect_families [MODEL_TYPE ...] --out=FILE

Builds every class in the automatic tables of the transformers that is installed
on torch's meta device, small, and writes what `jlora.formats.peft.families`
needs to know of it: `jlora/formats/peft/families.json`, if no model type is
given. Takes two minutes; run it after a new release of transformers or PEFT.
"""

import ast
import functools
import importlib.metadata
import inspect
import itertools
import json
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.lib.sources.forward_code import find_opened, find_reached

FILE = Path(__file__).parents[1] / "jlora/formats/peft/families.json"

_LAYERS = (
  "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers",
  "decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth",
)  # fmt: skip
_DENSE_LAYERS = (
  "first_k_dense_replace", "moe_layer_start_index", "n_dense_first_layers",
  "moe_num_dense_layers", "num_dense_layers",
)  # fmt: skip
_LAYER_TYPES = (
  "full_attention", "sliding_attention", "linear_attention", "conv", "mamba",
  "attention", "recurrent", "moe", "mlp", "hybrid",
)  # fmt: skip
# Settings that say which layers are of which kind.
_PERIODS = re.compile(r"_(period|offset|interval|freq|step|pattern|indices)\b")
# Settings on which it depends which modules a model has.
_VARIANTS = [
  *({"layer_types": kind} for kind in _LAYER_TYPES),
  {"mlp_layer_types": "sparse"},
  {"mlp_layer_types": "dense"},
  {"num_experts": 4},
  {"num_local_experts": 4},
  {"n_routed_experts": 4},
  {"use_qk_norm": True},
  {"feed_forward_proj": "gated-gelu"},
  {"use_mamba": True},
  {"attn_layer_period": 2},
]
# What a class needs that its configuration leaves open.
_OPEN = {
  "head_dim": 64,
  "context_length": 4,
  "is_decoder": True,
  "layer_types": ["conv", "full_attention"],
  "mask_token_id": 4,
  "n_routed_experts": 4,
  "n_shared_experts": 1,
  "num_attention_heads": 4,
  "num_key_value_heads": 1,
  "pad_token_id": 1,
  "prediction_length": 4,
  "rope_theta": 1e4,
  "shared_expert_intermediate_size": 64,
  "vocab_size": 128,
  "vocabulary_map": {"<image>": 120, "<|extra_200|>": 121, "IMGIMGA": 7},
}
# What PEFT's layers around convolutions and embeddings do not have.
_NOT_OF_LORA = (
  "stride", "kernel_size", "padding", "dilation", "groups", "in_channels",
  "out_channels", "num_embeddings", "embedding_dim", "padding_idx",
)  # fmt: skip
_TASKS = {
  "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "CAUSAL_LM",
  "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "SEQ_2_SEQ_LM",
}


def collect(model_types: Iterable[str] = ()) -> dict[str, Any]:
  """Returns the contents of families.json.

  Args:
    model_types: only these; all if empty.
  """
  os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
  warnings.simplefilter("ignore")
  import transformers
  from peft.tuners import tuners_utils
  from peft.utils import transformers_weight_conversion as conversion
  from transformers import conversion_mapping

  transformers.logging.set_verbosity_error()
  wanted = set(model_types)
  tables = _tables()
  classes: dict[str, dict[str, Any]] = {}
  for name, types in _listed(tables).items():
    if not wanted or wanted & types:
      _build(name, min(types), classes)
  for table, task in _TASKS.items():
    for name in tables[table].values():
      row = classes.get(name)
      if row and row.pop("generates", False):
        row["task"] = task
  for row in classes.values():
    row.pop("generates", None)
    row["bare"] = [
      name for name in row.get("bare", ()) if name in _names(row["modules"])
    ]
    for key in ("ties", "parts", "modules", "bare"):
      if not row.get(key):
        row.pop(key, None)
  rules: Any = conversion  # its tables have no public names
  patterns = rules._MODEL_TO_CONVERSION_PATTERN
  experts = rules._MOE_TARGET_MODULE_MAPPING
  conversions = conversion_mapping._build_checkpoint_conversion_mapping()
  used = {*classes, "legacy", *(row["type"] for row in classes.values())}
  return {
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("peft", "transformers")
    },
    "auto": {
      kind: dict(sorted(_one_each(tables[table])))
      for kind, table in (
        ("base", "MODEL_MAPPING_NAMES"),
        ("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
      )
    },
    "peft_experts": {
      name: sorted(experts[pattern])
      for name, pattern in sorted(patterns.items())
      if pattern in experts
    },
    "peft_refuses": _refused(tuners_utils._check_lora_target_modules_mamba),
    "conversions": {
      name: [_transform(each) for each in conversions[name]]
      for name in sorted(conversions)
      if not wanted or name in used
    },
    "classes": dict(sorted(classes.items())),
  }


def _names(tree: dict[str, Any]) -> set[str]:
  """Returns all names in a tree of modules."""
  inner = [_names(value) for value in tree.values() if isinstance(value, dict)]
  return set(tree).union(*inner)


def write(facts: dict[str, Any], file: Path) -> None:
  """Writes the facts, one class or conversion a line."""
  dump = functools.partial(json.dumps, separators=(",", ":"))
  lines = []
  for key, value in facts.items():
    if key in ("classes", "conversions"):
      rows = ",\n".join(f" {dump(k)}:{dump(v)}" for k, v in value.items())
      lines.append(f"{dump(key)}:{{\n{rows}\n}}")
    else:
      lines.append(f"{dump(key)}:{dump(value)}")
  file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _tables() -> dict[str, dict[str, Any]]:
  """Returns transformers' tables of model type -> class names."""
  from transformers.models.auto import modeling_auto

  return {
    name: getattr(modeling_auto, name)
    for name in dir(modeling_auto)
    if name.startswith("MODEL") and name.endswith("_MAPPING_NAMES")
  }


def _one_each(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields (model type, the first class of it)."""
  for model_type, names in table.items():
    yield model_type, names if isinstance(names, str) else names[0]


def _listed(tables: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
  """Returns {class: its model types}."""
  found: dict[str, set[str]] = {}
  for table in tables.values():
    for model_type, names in table.items():
      for name in [names] if isinstance(names, str) else names:
        found.setdefault(name, set()).add(model_type)
  return dict(sorted(found.items()))


def _build(name: str, model_type: str, classes: dict[str, Any]) -> None:
  """Builds a class and its variants, and adds rows of it and its parts."""
  import transformers

  cls: Any = getattr(transformers, name, None)
  configs = transformers.models.auto.configuration_auto.CONFIG_MAPPING
  own = _attempt(lambda: cls.config_class)
  model_type = getattr(own, "model_type", None) or model_type
  if cls is None or model_type not in configs:
    return

  def make(is_open=False, **changes):
    config = configs[model_type]()
    if own is not None and not isinstance(config, own):
      config = own()
    _shrink(config, set())
    if is_open:
      _fill(config, set())
    for key, value in changes.items():
      if not hasattr(config, key):
        return None
      if key.endswith("layer_types"):
        if not isinstance(getattr(config, key), list):
          return None
        value = [value] * config.num_hidden_layers
      setattr(config, key, value)
    return _on_meta(cls, config)

  model = _attempt(make)
  if model is None:
    make = functools.partial(make, is_open=True)
    model = _attempt(make)
  if model is None:
    return
  _record(model, classes)
  row = classes[name]
  if refusal := _refusal(model):
    row["peft"] = refusal
  row["generates"] = bool(_attempt(model.can_generate))
  tied = _attempt(lambda: make(tie_word_embeddings=True)) or model
  ties = _attempt(lambda: tied.get_expanded_tied_weights_keys(True)) or {}
  row["ties"] = dict(sorted(ties.items()))
  for variant in _VARIANTS:
    other = _attempt(functools.partial(make, **variant))
    if other is not None:
      _record(other, classes)


def _refusal(model: Any) -> str:
  """Returns why PEFT puts no adapter at all on a model; "" if it does."""
  from peft.utils import other

  try:
    other._get_module_names_tied_with_embedding(model)
  except Exception as error:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
  return ""


def _attempt(make: Any) -> Any:
  """Calls; None where a library is missing or a setting does not go."""
  try:
    return make()
  except Exception:
    return None


def _on_meta(cls: Any, config: Any) -> Any:
  """Builds a model without memory."""
  import torch

  with torch.device("meta"):
    return cls(config)


def _shrink(config: Any, seen: set[int]) -> None:
  """Leaves one layer of each kind in a configuration and those inside it."""
  from transformers import PretrainedConfig

  if id(config) in seen:
    return
  seen.add(id(config))
  kinds = getattr(config, "layer_types", None)
  kinds = list(dict.fromkeys(kinds)) if isinstance(kinds, list) else []
  is_periodic = any(_PERIODS.search(key) for key in vars(config))
  count = max(8 if is_periodic else 2, len(kinds))

  def change(name, value):
    _attempt(lambda: setattr(config, name, value))

  for name in ("layer_types", "mlp_layer_types"):
    if isinstance(getattr(config, name, None), list):
      own = list(dict.fromkeys(getattr(config, name)))
      change(name, (own * count)[:count])
  for names, most in ((_LAYERS, count), (_DENSE_LAYERS, 1)):
    for name in names:
      if isinstance(getattr(config, name, None), int):
        change(name, min(most, getattr(config, name)))
  for inner in list(vars(config).values()):
    if isinstance(inner, PretrainedConfig):
      _shrink(inner, seen)


def _fill(config: Any, seen: set[int]) -> None:
  """Sets what a configuration and those inside it leave open."""
  from transformers import PretrainedConfig

  if id(config) in seen:
    return
  seen.add(id(config))
  for name, value in _OPEN.items():
    if not getattr(config, name, None):
      _attempt(functools.partial(setattr, config, name, value))
  if getattr(config, "num_kv_shared_layers", None):
    config.num_kv_shared_layers = 0
  width, heads = (
    getattr(config, name, None)
    for name in ("hidden_size", "num_attention_heads")
  )
  if isinstance(width, int) and isinstance(heads, int) and width % heads:
    config.num_attention_heads = 1
  for inner in list(vars(config).values()):
    if isinstance(inner, PretrainedConfig):
      _fill(inner, seen)


def _record(model: Any, classes: dict[str, Any]) -> None:
  """Adds what a model has to the rows of its class and of its parts."""
  from transformers import PreTrainedModel

  models = {
    path: module
    for path, module in model.named_modules()
    if isinstance(module, PreTrainedModel)
  }
  passed = _passed_by(model)
  places = {id(model.config): []}
  _place(model.config, [], places)
  for path, each in models.items():
    start = f"{path}." if path else ""
    inner = [p for p in models if p.startswith(start) and p != path]
    inner = [p for p in inner if not any(p.startswith(f"{q}.") for q in inner)]
    row = classes.setdefault(
      type(each).__name__,
      {
        "type": each.config.model_type,
        "prefix": each.base_model_prefix,
        "parts": {},
        "top": [],
        "modules": {},
      },
    )
    if "ties" not in row:
      keys = _attempt(
        functools.partial(each.get_expanded_tied_weights_keys, True)
      )
      row["ties"] = dict(sorted((keys or {}).items()))
    own = places.get(id(each.config))
    for p in inner:
      part = models[p]
      place = places.get(id(part.config))
      if place is not None and own is not None and place[: len(own)] == own:
        place = place[len(own) :]
      else:
        place = None
      row["parts"][_normal(p[len(start) :])] = [type(part).__name__, place]
    children = [name for name, _ in each.named_children()]
    children += [name for name, _ in each.named_parameters(recurse=False)]
    row["top"] = sorted({*row["top"], *children})
    bare: set[str] = set(row.get("bare", ()))
    for name, module in each.named_modules(remove_duplicate=False):
      if any(f"{start}{name}.".startswith(f"{p}.") for p in inner):
        continue
      if not any(True for _ in module.parameters()):
        bare.add(name.rpartition(".")[2])
      is_passed = id(module) in passed
      _record_module(name, module, row["modules"], type(each), is_passed)
    row["bare"] = sorted(name for name in bare if not name.isdigit())


def _place(config: Any, path: list[str], places: dict[int, list[str]]) -> None:
  """Notes at which key of config.json each configuration lies."""
  from transformers import PretrainedConfig

  for key, value in vars(config).items():
    if isinstance(value, PretrainedConfig) and not key.startswith("_"):
      places.setdefault(id(value), [*path, key])
      _place(value, [*path, key], places)


def _passed_by(model: Any) -> set[int]:
  """Returns modules that a model also holds, and calls, in its own lists."""
  import torch

  return {
    id(inside)
    for each in model.modules()
    for value in vars(each).values()
    if isinstance(value, list | tuple)
    for module in value
    if isinstance(module, torch.nn.Module)
    for inside in module.modules()
  }


def _record_module(
  name: str, module: Any, tree: dict, holder: type, is_passed: bool
) -> None:
  """Adds the codes of a module's parameters of two axes or more."""
  for leaf, parameter in module.named_parameters(recurse=False):
    if parameter.dim() < 2:
      continue
    code = _code(name, leaf, module, parameter, holder)
    code = "b" if is_passed else code
    branch: Any = tree
    last: Any = leaf
    parts = _normal(name).split(".") if name else []
    parts = parts if leaf == "weight" and parts else [*parts, leaf]
    for part, following in itertools.pairwise([*parts, None]):
      if following is None:
        last = part
        break
      below = branch.setdefault(part, {})
      if isinstance(below, str):  # a weight and something else
        below = branch[part] = {"weight": below}
      branch = below
    if isinstance(branch.get(last), dict):
      branch, last = branch[last], "weight"
    before = branch.get(last, code)
    branch[last] = code if before == code else "m"


def _code(name: str, leaf: str, module: Any, parameter: Any, holder: type):
  """Returns the code of a parameter; `families.KINDS` says what they mean."""
  import torch
  from torch.nn.modules import conv
  from transformers.pytorch_utils import Conv1D

  axes = parameter.dim()
  has_children = any(True for c in module.children() for _ in c.parameters())
  if leaf == "weight" and not has_children:
    place = name.rpartition(".")[2]
    reached = place in find_reached(holder.__module__, ("weight",))
    is_read = place in find_reached(holder.__module__, _NOT_OF_LORA)
    if isinstance(module, conv._ConvTransposeNd):
      return "t"
    if isinstance(module, conv._ConvNd):
      if module.groups != 1:
        return "g"
      if {*module.dilation} != {1} or module.padding_mode != "zeros":
        return "v"
      if not type(module).__module__.startswith("torch."):
        return "s"
      return "d" if reached or is_read else str(axes - 2)
    if isinstance(
      module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear
    ):
      return "d"  # torch's own attention reads its weight
    if reached:
      return "d"
    if (
      type(module) is torch.nn.Linear or type(module).__name__ == "FalconLinear"
    ):
      return "l"
    if isinstance(module, Conv1D):
      return "f"
    if is_read and isinstance(module, torch.nn.Embedding):
      return "d"
    if type(module) is torch.nn.Embedding:
      return "e"
    scaled = hasattr(module, "embed_scale")
    if (
      isinstance(module, torch.nn.Embedding)
      and scaled
      and "Scaled" in str(type(module))
    ):
      return "e"
  if ".parametrizations." in f"{name}.":
    return "z"
  if isinstance(module, torch.nn.RNNBase):
    return "d"
  if axes > 3:
    return "x"
  place = name.rpartition(".")[2]
  opened, named = find_opened(holder.__module__)
  has_matrices = any(
    p.dim() > 1 for child in module.children() for p in child.parameters()
  )
  is_in_layers = bool(re.search(r"(^|\.)\d+\.", name))
  is_closed = is_in_layers and not place.isdigit() and place not in opened
  is_list = isinstance(module, torch.nn.ParameterList | torch.nn.ParameterDict)
  if not name or has_matrices or is_list or (has_children and not is_closed):
    return "n"
  if place in named or place in opened:
    return "k"
  is_transposed = axes == 3 and getattr(module, "is_transposed", False)
  return f"p{axes}" + ("t" if is_transposed else "")


def _refused(check: Any) -> dict[str, list[str]]:
  """Reads from PEFT's source which modules of which models it refuses."""
  tree = ast.parse(textwrap.dedent(inspect.getsource(check)))
  values = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in ast.walk(tree)
    if isinstance(node, ast.Assign)
    and isinstance(node.targets[0], ast.Name)
    and isinstance(node.value, ast.Set)
  }
  return {
    "types": sorted(values["mamba_model_types"]),
    "modules": sorted(values["incompatible_modules"]),
  }


def _transform(transform: Any) -> list[Any]:
  """Returns [class, regexes, replacements, operations] of a conversion.

  An operation is its name and the axes it works on.
  """
  sources = [
    re.sub(r"\*\.", r".*\\.", pattern) for pattern in transform.source_patterns
  ]
  sources = [
    f"{pattern}(?!\\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else pattern
    for pattern in sources
  ]
  operations = [
    [type(o).__name__, *(value for key, value in sorted(vars(o).items())
                         if key.startswith("dim") and value is not None)]
    for o in getattr(transform, "operations", [])
  ]  # fmt: skip
  return [
    type(transform).__name__, sources, list(transform.target_patterns),
    operations,
  ]  # fmt: skip


def _normal(name: str) -> str:
  """Replaces numbers of layers by N."""
  return re.sub(r"(?<![^.])\d+(?![^.])", "N", name)


def main(words: list[str]) -> None:
  """Collects and writes."""
  out = [word.removeprefix("--out=") for word in words if "--out=" in word]
  types = [word for word in words if "--out=" not in word]
  if types and not out:
    raise SystemExit("give --out for a part of the table")
  facts = collect(types)
  write(facts, Path(out[0]) if out else FILE)
  print(
    f"{len(facts['classes'])} classes, {len(facts['conversions'])} mappings"
  )


if __name__ == "__main__":
  main(sys.argv[1:])
