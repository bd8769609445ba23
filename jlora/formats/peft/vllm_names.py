# SPDX-License-Identifier: Apache-2.0
"""Which modules of which classes vLLM puts LoRA on, and by which names.

vLLM maps the names in an adapter to those of its own classes. It refuses an
adapter as a whole if the last part of a name is not among those that it
expects, and silently ignores a module whose name as a whole it does not have.
What it expects is read from a table here: `vllm.json`, made from the source of
one version by `experiments.collect_vllm`. Names that the source decides only at
run time are not checked, nor are classes that run on transformers' own modules.

References:
  vllm 0.33.0, `lora/lora_model.py`, `lora/utils.py`, `lora/worker_manager.py`,
  `model_executor/models/registry.py`.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("vllm.json")

# What follows a module's name in a key, which vLLM's renames see too.
_ENDS = {"embedding": ".lora_embedding_A"}
_END = ".lora_A.weight"
# Heads of classes that vLLM makes of generating ones.
_HEADS = ("score", "classifier")
# Where names of a text model begin that is a part of another one in vLLM.
_OF_TEXT = ("model", "lm_head", "layers")


def class_refusal(architectures: Sequence[str], is_known: bool = True) -> str:
  """Returns why vLLM takes no adapter at all for a model; "" if it does.

  Args:
    architectures: of config.json; empty if it names none.
    is_known: whether one of them is a class of transformers, or comes with the
      checkpoint. vLLM runs such a class even if it has none of its own.

  Example:
    >>> class_refusal(["LlamaForCausalLM"])
    ''
    >>> class_refusal(["GPT2LMHeadModel"])
    'vLLM 0.33.0 takes no LoRA for a GPT2LMHeadModel'
  """
  name = _class_of(tuple(architectures))
  if name is None:
    if is_known or not architectures:
      return ""
    return f"vLLM {_table()['version']} has no class {architectures[0]}"
  if _table()["classes"][name]["lora"]:
    return ""
  return f"vLLM {_table()['version']} takes no LoRA for a {name}"


def refusal_of(name: str, kind: str, architectures: Sequence[str]) -> str:
  """Returns why vLLM refuses or ignores a module's LoRA; "" if it takes it.

  Args:
    name: the module's name, as it is to be in the adapter.
    kind: of `LAYOUTS`.
    architectures: of config.json.

  Returns:
    The reason. "" as well where the table does not say.

  Example:
    >>> name = "model.layers.0.self_attn.q_proj"
    >>> refusal_of(name, "linear", ["LlamaForCausalLM"])
    ''
    >>> refusal_of("model.embed_tokens", "embedding", ["Qwen2ForCausalLM"])
    'vLLM 0.33.0 puts no LoRA on embed_tokens of Qwen2ForCausalLM'
    >>> refusal_of("encoder.layers.0.q_proj", "linear", ["LlamaForCausalLM"])
    'vLLM 0.33.0 ignores it: LlamaForCausalLM has no encoder.layers.0.q_proj'
  """
  cls = _class_of(tuple(architectures))
  row = _table()["classes"][cls] if cls else {}
  if cls is None or row.get("renames") is None:
    return class_refusal(architectures)
  who = f"vLLM {_table()['version']}"
  mapped = _mapped(name, _ENDS.get(kind, _END), row["renames"])
  last = mapped.rpartition(".")[2]
  if any(f".{each}" in f".{mapped}" for each in row.get("skips", ())):
    return f"{who} skips these modules of {cls}"
  if ".experts" in mapped or kind == "experts":
    reason = _refusal_of_experts(mapped, kind, row)
    if reason:
      return f"{who} {reason} of {cls}"
  elif not _is_expected(last, kind, row, cls in architectures):
    return f"{who} puts no LoRA on {last} of {cls}"
  if not _is_there(mapped, row, cls in architectures):
    return f"{who} ignores it: {cls} has no {mapped}"
  return ""


def _refusal_of_experts(mapped: str, kind: str, row: Mapping) -> str:
  """Returns why experts are not taken as they are, as a verb and its object."""
  experts = row.get("experts")
  found = mapped.find(".experts")
  rest = mapped[found + 1 :] if found >= 0 else mapped
  if experts == "stacked":
    is_right = kind == "experts" and rest == "experts"
    return "" if is_right else "takes only stacked gate_up_proj and down_proj"
  if not experts:
    return "" if row["expected"] is None else "puts no LoRA on experts"
  if kind == "experts":
    return "takes no stacked experts, only each expert's own matrices,"
  matched = re.fullmatch(r"experts\.\d+\.(\w+)", rest)
  if matched and matched[1] in experts:
    return ""
  return f"takes of experts only {', '.join(experts)}, not this module"


def _is_expected(last: str, kind: str, row: Mapping, is_own: bool) -> bool:
  """Returns whether the last part of a module's name is one of those taken."""
  tables = row.get("embeddings", ())
  if last in _HEADS and (row.get("pools") or not is_own):
    return True
  if row["expected"] is None:
    return True
  if kind == "embedding":
    return last in tables
  last = "N" if last.isdigit() else last
  return last in row["expected"] or last in tables


def _is_there(mapped: str, row: Mapping, is_own: bool) -> bool:
  """Returns whether a class has modules that a name can be in."""
  first, *rest = [part for part in mapped.split(".") if not part.isdigit()]
  modules = row["parts"]
  if modules is not None and not {*rest[:-1]} <= {*modules}:
    return False
  if first in row["top"] or (first in _HEADS and not rest):
    return True
  if row.get("text") and first in _OF_TEXT:
    return not (rest and rest[0] in row["top"])
  # vLLM finds these with or without `model.`.
  is_pooling = row.get("pools") or not is_own
  return is_pooling and (modules is None or first in modules)


def _mapped(name: str, end: str, renames: Mapping[str, Sequence]) -> str:
  """Returns a module's name in vLLM, by the renames of its class."""
  key = name + end
  for pattern, new in renames.get("regex", ()):
    key = re.sub(pattern, new, key)
  for old, new in renames.get("substr", ()):
    key = key.replace(old, new, 1)
  for old, new in renames.get("prefix", ()):
    key = new + key.removeprefix(old) if key.startswith(old) else key
  for old, new in renames.get("suffix", ()):
    key = key.removesuffix(old) + new if key.endswith(old) else key
  return key.removesuffix(end)


@functools.cache
def _class_of(architectures: tuple[str, ...]) -> str | None:
  """Returns the row of the table that vLLM would take, None if there is none.

  For pooling it makes a class of another one that differs in the suffix.
  """
  table = _table()
  for name in architectures:
    if name in table["classes"]:
      return name
    suffix = next((s for s in table["suffixes"] if name.endswith(s)), "")
    if table["suffixes"].get(suffix, "none") == "none":
      continue
    for other in table["suffixes"]:
      if name.removesuffix(suffix) + other in table["classes"]:
        return name.removesuffix(suffix) + other
  return None


@functools.cache
def _table() -> dict[str, Any]:
  """Reads vllm.json, once."""
  return json.loads(FILE.read_text())
