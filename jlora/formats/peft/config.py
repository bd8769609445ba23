# SPDX-License-Identifier: Apache-2.0
"""Interprets `adapter_config.json`: ranks, scales, targets, refused entries.

A configuration says by patterns which modules of a base are wrapped, at which
rank and scale. The rules here are PEFT's own, so that a folder is read as PEFT
reads it, and refused if PEFT would do more than plain LoRA.

References:
  huggingface/peft 0.21.2, `utils/other.py` (patterns),
  `tuners/tuners_utils.py` (targets), `tuners/lora/config.py` (entries).
"""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jlora.checkpoints.documents import (
  COUNT,
  FLAG,
  NULL,
  NUMBER,
  OBJECT,
  TEXT,
  Kind,
  check_fields,
  either,
  list_of,
  read_object,
  table_of,
)
from jlora.formats.peft.layouts import PARAMETER_ORDER, PREFIX
from jlora.formats.peft.patterns import is_end, is_inside, is_whole

# Configuration entries with which a module is not base + scale * B @ A, or only
# for another base. Any value but None, False and empty is refused.
REFUSED = {
  "alora_invocation_tokens": "the change depends on the position (aLoRA)",
  "arrow_config": "the change depends on a router",
  "corda_config": "the adapter is relative to another base (CorDA)",
  "kasa_config": "the adapter is relative to another base (KaSA)",
  "layer_replication": "layers are replicated",
  "megatron_config": "the tensors are split by Megatron",
  "monteclora_config": "the change is random (MonteCLoRA)",
  "trainable_token_indices": "rows of the embedding are replaced",
  "use_bdlora": "the factors are block-diagonal (BD-LoRA)",
  "use_dora": "columns are normalised (DoRA); merge it with PEFT first",
  "use_qalora": "inputs are pooled (QALoRA)",
  "velora_config": "activations are compressed (VeLoRA)",
}
# Initialisations that move part of the base's weight into the adapter.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq")
# Entries that are read, and what they hold. All but the last may be null.
_NAMES = list_of(TEXT)
_OR_NULL = {
  "alpha_pattern": table_of(NUMBER),
  "bias": TEXT,
  "ensure_weight_tying": FLAG,
  "exclude_modules": either(TEXT, _NAMES),
  "fan_in_fan_out": FLAG,
  "init_lora_weights": either(FLAG, TEXT, OBJECT),
  "lora_bias": FLAG,
  "modules_to_save": _NAMES,
  "rank_pattern": table_of(COUNT),
  "target_modules": either(TEXT, _NAMES),
  "target_parameters": _NAMES,
  "use_rslora": FLAG,
}
_READ: dict[str, Kind] = {
  **{name: either(kind, NULL) for name, kind in _OR_NULL.items()},
  "lora_alpha": NUMBER,
  "peft_type": either(TEXT, NULL),
  "r": COUNT,
}
# Entries whose strings, or the names of whose values, are regexes.
_REGEXES = ("alpha_pattern", "modules_to_save", "rank_pattern")
_MAYBE_REGEXES = ("exclude_modules", "target_modules")
# Entries about how the adapter was trained or made, which change nothing here.
_HARMLESS = {
  "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode",
  "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
  "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
  "revision", "runtime_config", "task_type",
}  # fmt: skip


def read_adapter_config(path: str | os.PathLike) -> dict[str, Any]:
  """Reads an `adapter_config.json`, whatever its method.

  Args:
    path: the file.

  Returns:
    Its contents; what LoRAs have is of its kind.

  Raises:
    ValueError: no regular file or no JSON, an entry of another kind than PEFT
      writes, or a pattern that is no regex.

  Example:
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = pathlib.Path(folder, "adapter_config.json")
    ...   _ = file.write_text('{"r": 4, "target_modules": ["q"]}')
    ...   read_adapter_config(file)["r"]
    4
  """
  named = {"base_model_name_or_path": either(TEXT, NULL)}
  config = read_object(path, {**_READ, **named})
  regexes = [x for key in _REGEXES for x in config.get(key) or ()]
  for key in _MAYBE_REGEXES:
    if isinstance(config.get(key), str):
      regexes.append(config[key])
  for regex in dict.fromkeys(regexes):
    try:
      is_whole(regex, "")
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
  return config


def check_config(config: Mapping[str, Any], place: str) -> None:
  """Raises unless a configuration describes plain LoRA that can be read.

  Args:
    config: the contents of `adapter_config.json`.
    place: the file's name, for the message.

  Raises:
    ValueError: a method other than LoRA, an entry that changes what the tensors
      mean, an unknown entry that is set, or r missing or below 1.

  Example:
    >>> check_config({"peft_type": "LORA", "r": 2, "use_dora": True}, "x")
    Traceback (most recent call last):
    ...
    ValueError: x: use_dora: columns are normalised (DoRA); merge it with PEFT
    first.
  """
  if config.get("peft_type") != "LORA":
    raise ValueError(
      f"{place}: peft_type is {config.get('peft_type')!r}; only 'LORA' is read."
    )
  for key, reason in REFUSED.items():
    if config.get(key):
      raise ValueError(f"{place}: {key}: {reason}.")
  start = config.get("init_lora_weights")
  if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
    raise ValueError(
      f"{place}: init_lora_weights is {start!r}, which changes the base;"
      " save it with PEFT's path_initial_model_for_weight_conversion."
    )
  if config.get("bias", "none") != "none":
    raise ValueError(
      f"{place}: bias is {config['bias']!r}; only 'none' and lora_bias are"
      " read."
    )
  known = _READ.keys() | _HARMLESS | REFUSED.keys()
  unknown = sorted(key for key in config if config[key] and key not in known)
  if unknown:
    raise ValueError(
      f"{place}: unknown entries {', '.join(unknown[:3])} ({len(unknown)} in"
      " all); they may change what the tensors mean."
    )
  check_fields(config, _READ, place, required=("r",))


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any):
  r"""Returns the value of the first pattern that matches a name, as PEFT does.

  A pattern is a regex for the end of the name, from a dot or from the start:
  `(.*\.)?(pattern)$`.

  Args:
    patterns: `rank_pattern` or `alpha_pattern`.
    name: a module's name, or a parameter's for `target_parameters`.
    default: returned when nothing matches.

  Example:
    >>> by_pattern({"q_proj": 4, r"^h\.1\.k$": 2}, "h.1.q_proj", 8)
    4
  """
  for pattern, value in (patterns or {}).items():
    if is_end(pattern, name):
      return value
  return default


def rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
  """Returns the rank and effective scale that a configuration gives a module.

      scale = lora_alpha / r,  or  lora_alpha / sqrt(r)  with use_rslora

  Args:
    config: the contents of `adapter_config.json`.
    name: the module's name, or the parameter's for `target_parameters`.

  Returns:
    (rank, scale), with the patterns applied.

  Example:
    >>> rank_and_scale({"r": 4, "lora_alpha": 6, "use_rslora": True}, "q")
    (4, 3.0)
  """
  rank = by_pattern(config.get("rank_pattern"), name, config["r"])
  alpha = by_pattern(
    config.get("alpha_pattern"), name, config.get("lora_alpha", 8)
  )
  root = math.sqrt(rank) if config.get("use_rslora") else rank
  return rank, alpha / root


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
  """Returns whether PEFT puts a LoRA on a module of this name.

  Modules in `exclude_modules` or `modules_to_save` get none. With
  `target_modules` "all-linear" all others count, because a name does not tell
  whether a module is linear.

  Args:
    config: the contents of `adapter_config.json`.
    module: a full module name.

  Example:
    >>> is_targeted({"target_modules": ["q_proj"]}, "h.0.q_proj")
    True
  """
  saved = config.get("modules_to_save") or ()
  if any(is_inside(name, module) for name in saved):
    return False
  if _matches(config.get("exclude_modules") or (), module):
    return False
  targets = config.get("target_modules") or ()
  return targets == "all-linear" or _matches(targets, module)


def wrapped_parameters(
  config: Mapping[str, Any],
  module: str,
  order: Sequence[str] = PARAMETER_ORDER,
) -> list[str]:
  """Returns the parameters of a module that PEFT wraps, the innermost first.

  Args:
    config: the contents of `adapter_config.json`.
    module: a full module name.
    order: in which the module defines its parameters.

  Returns:
    Last parts of names from `target_parameters`; empty if there are none.

  Raises:
    ValueError: PEFT wraps several, in an order that is not known.

  Example:
    >>> entries = {"target_parameters": ["experts.down_proj",
    ...                                  "experts.gate_up_proj"]}
    >>> wrapped_parameters(entries, "h.0.experts")
    ['gate_up_proj', 'down_proj']
  """
  names = {
    target.rpartition(".")[2]
    for target in config.get("target_parameters") or ()
    if f".{module}".endswith(f".{target}".rpartition(".")[0])
  }
  if len(names) < 2:
    return list(names)
  if names <= set(order):
    return [name for name in order if name in names]
  raise ValueError(
    f"{module}: PEFT nests {', '.join(sorted(names)[:3])} in an order that is"
    f" known only for {', '.join(order)}."
  )


def is_saved(config: Mapping[str, Any], module: str) -> bool:
  """Returns whether `modules_to_save` names a module or one that contains it.

  Example:
    >>> is_saved({"modules_to_save": ["norm"]}, "model.norm")
    True
  """
  parts = module.split(".")
  holders = [
    PREFIX + ".".join(parts[: count + 1]) for count in range(len(parts))
  ]
  saved = tuple(config.get("modules_to_save") or ())
  return any(holder.endswith(saved) for holder in holders) if saved else False


def shortest_targets(
  modules: Iterable[str], others: Collection[str]
) -> list[str] | str:
  """Makes a `target_modules` entry that wraps exactly the given modules.

  Uses last names (`q_proj`) where every module of that last name is wrapped, as
  people write them, and full names elsewhere. vLLM compares the last names of
  the tensors, so it accepts both.

  Args:
    modules: full names of the modules to wrap.
    others: full names of all other modules of the base.

  Returns:
    A sorted list. One regex instead, if a full name is also the end of another
    module's name, since a list would match both.

  Example:
    >>> shortest_targets(["h.0.q", "h.1.q", "h.0.k"], ["h.1.k"])
    ['h.0.k', 'q']
  """
  modules = sorted(modules)
  taken = {other.rpartition(".")[2] for other in others}
  leaves = {module: module.rpartition(".")[2] for module in modules}
  targets = {
    module if leaf in taken else leaf for module, leaf in leaves.items()
  }
  if any(_matches(targets, other) for other in others):
    return "|".join(re.escape(module) for module in modules)
  return sorted(targets)


def _matches(targets: Collection[str] | str, name: str) -> bool:
  """Matches as PEFT does: a regex for the name, or a list of name endings."""
  if isinstance(targets, str):
    return is_whole(targets, name)
  parts = name.split(".")
  return any(".".join(parts[i:]) in targets for i in range(len(parts)))
