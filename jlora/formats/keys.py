# SPDX-License-Identifier: Apache-2.0
"""Which tool wrote an adapter's file, told by its keys.

A key is a module's name and a suffix; the suffix says what the tensor is. One
table has every suffix of every tool, another the kinds that are refused.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jlora.formats.forms import LORA, MAGNITUDES, Form, form_of, missing_roles
from jlora.messages import name_some

#: Suffix -> (role, the tool that writes it). Of two that fit the longer counts.
SUFFIXES = {
  ".lora_down.weight": ("down", "kohya"),
  ".lora_up.weight": ("up", "kohya"),
  ".lora_mid.weight": ("mid", "kohya"),
  ".lora_A.weight": ("down", "diffusers"),
  ".lora_B.weight": ("up", "diffusers"),
  ".lora_B.bias": ("bias", "diffusers"),
  ".lora_A.default.weight": ("down", "diffusers"),
  ".lora_B.default.weight": ("up", "diffusers"),
  ".lora_B.default.bias": ("bias", "diffusers"),
  ".lora_A": ("down", "diffusers"),
  ".lora_B": ("up", "diffusers"),
  "_lora.down.weight": ("down", "old diffusers"),
  "_lora.up.weight": ("up", "old diffusers"),
  ".lora.down.weight": ("down", "old diffusers"),
  ".lora.up.weight": ("up", "old diffusers"),
  ".lora_linear_layer.down.weight": ("down", "old diffusers"),
  ".lora_linear_layer.up.weight": ("up", "old diffusers"),
  ".lora_magnitude_vector": ("magnitude", "diffusers"),
  ".lora_magnitude_vector.weight": ("magnitude", "diffusers"),
  ".lora_magnitude_vector.default.weight": ("magnitude", "diffusers"),
  ".dora_scale": ("dora_scale", "kohya"),
  ".alpha": ("alpha", ""),
  **{
    f".hada_{part}": (f"hada_{part}", "LoHa")
    for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
  },
  **{
    f".lokr_{part}": (f"lokr_{part}", "LoKr")
    for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
  },
  ".diff": ("diff", ""),
  ".diff_b": ("diff_b", ""),
  ".w_norm": ("diff", ""),
  ".b_norm": ("diff_b", ""),
}
#: Role of a whole change -> what it is added to.
WHOLE = {"diff": "weight", "diff_b": "bias"}

_LENGTHS = sorted({len(suffix) for suffix in SUFFIXES}, reverse=True)

# What is no sum of LoRA's kind, by the keys that tell. First match wins.
_REFUSED = (
  (r"(^|.*\.)(exp_avg|exp_avg_sq|momentum_buffer|optimizer)(\..*|$)|.*\.exp_avg"
   r"(_sq)?", "the state of an optimizer",
   "give the file of the adapter, not the one training goes on from"),
  (r".*\.boft_[\w.]*", "BOFT",
   "it turns the weight; merge it into a checkpoint and extract a LoRA"),
  (r".*\.oft_(blocks|diag|R)[\w.]*", "OFT",
   "it turns the weight; merge it into a checkpoint and extract a LoRA"),
  (r".*\.[ab][12](\.weight)?", "GLoRA",
   "it scales the weight; merge it into a checkpoint and extract a LoRA"),
  (r".*\.(ia3_l|on_input)[\w.]*", "IA3",
   "it scales the weight; merge it into a checkpoint and extract a LoRA"),
)  # fmt: skip


class StoredModule(NamedTuple):
  """The stored tensors of one module.

  Attributes:
    stem: the module's name as the file has it.
    keys: role -> key.
    form: how its change is kept.
  """

  stem: str
  keys: dict[str, str]
  form: Form


class Sorted(NamedTuple):
  """The keys of a file by what they are.

  Attributes:
    tool: the format's name.
    modules: stem -> its tensors, of those with a LoRA or its like.
    whole: (stem, "weight" or "bias") -> key of a change stored whole.
  """

  tool: str
  modules: dict[str, StoredModule]
  whole: dict[tuple[str, str], str]


def sort_keys(keys: Iterable[str], place: str) -> Sorted:
  """Sorts a file's keys into modules and roles.

  Args:
    keys: of the file.
    place: its name, for errors.

  Returns:
    Sorted.

  Raises:
    ValueError: a kind of adapter that is no sum, keys of no known tool, or a
      part of a module missing.
  """
  keys = list(keys)
  if not keys:
    raise ValueError(f"{place} holds no tensors, and so no adapter.")
  _check_kinds(keys, place)
  parts = {key: split_key(key) for key in keys}
  unknown = [key for key, found in parts.items() if found is None]
  if unknown:
    raise ValueError(
      f"{place}: {len(unknown)} keys are of no adapter format that is known: "
      f"{name_some(unknown)}."
    )
  tools: dict[str, int] = {}
  by_stem: dict[str, dict[str, str]] = {}
  for key, found in parts.items():
    stem, role, tool = found or ("", "", "")
    tools[tool] = tools.get(tool, 0) + bool(tool)
    roles = by_stem.setdefault(stem, {})
    if role in roles:
      raise ValueError(
        f"{place}: {stem} has the part {role} twice, {roles[role]} and {key}."
      )
    roles[role] = key
  whole = {
    (stem, WHOLE[role]): key
    for stem, roles in by_stem.items()
    for role, key in roles.items()
    if role in WHOLE
  }
  parts_of = {
    stem: kept
    for stem, roles in by_stem.items()
    if (kept := {r: key for r, key in roles.items() if r not in WHOLE})
  }
  modules = _whole_modules(parts_of, place)
  tool = max(tools, key=lambda name: tools[name]) or "whole changes"
  return Sorted(tool, modules, whole)


def split_key(key: str) -> tuple[str, str, str] | None:
  """Splits a key into the module's name, the role, and the tool; or None.

  Args:
    key: of a tensor.

  Returns:
    (stem, role, tool), the tool "" where several write that suffix.
  """
  for length in _LENGTHS:
    if found := SUFFIXES.get(key[-length:]):
      stem = key[:-length]
      return (_old_name(stem) if found[1] == "old diffusers" else stem), *found
  return None


def _old_name(stem: str) -> str:
  """Turns old diffusers' names of attention processors into modules' names."""
  stem = stem.replace(".processor.", ".")
  return stem + ".0" if stem.endswith(".to_out") else stem


def _check_kinds(keys: list[str], place: str) -> None:
  """Raises where keys tell of a kind that is refused."""
  for pattern, name, way in _REFUSED:
    if found := [key for key in keys if re.fullmatch(pattern, key)]:
      raise ValueError(
        f"{place} is {name} ({name_some(found)}), no LoRA: {way}."
      )


def _whole_modules(
  parts: Mapping[str, dict[str, str]], place: str
) -> dict[str, StoredModule]:
  """Returns the modules; raises unless all have every part and none else."""
  found, wrong = {}, []
  for stem, keys in parts.items():
    form = form_of(keys)
    if form is None:
      wrong.append(f"{stem} has {name_some(keys)} alone")
    elif lacking := missing_roles(form, keys):
      spelled = name_some(_spelled(keys, role) for role in lacking)
      wrong.append(f"{stem} lacks {spelled}")
    elif set(MAGNITUDES) <= set(keys):
      both = name_some(keys[role] for role in MAGNITUDES)
      wrong.append(f"{stem} has two magnitudes, {both}")
    elif odd := set(keys) - form.every:
      wrong.append(f"{stem}, {form.name}, has {name_some(sorted(odd))} too")
    else:
      found[stem] = StoredModule(stem, keys, form)
  if wrong:
    raise ValueError(
      f"{place}: {len(wrong)} modules are not whole, so that their change is "
      f"not known: {name_some(wrong)}."
    )
  return found


def _spelled(keys: Mapping[str, str], role: str) -> str:
  """Returns a role as the suffix of the file's tool, where it has one."""
  tool = {split[2] for key in keys.values() if (split := split_key(key))}
  for suffix, (name, writer) in SUFFIXES.items():
    if name == role and writer in tool and form_of([role]) is LORA:
      return suffix.lstrip(".")
  return role
