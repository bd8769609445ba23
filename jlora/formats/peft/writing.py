# SPDX-License-Identifier: Apache-2.0
"""Writes PEFT adapter folders.

    Loras, biases, full         ─► save_peft   ─► adapter folder ─► load_peft
    base, Loras, biases, full   ─► save_merged ─► checkpoint folder

Scales are folded into the factors. `r` and `lora_alpha` are the largest rank,
and `rank_pattern` equals `alpha_pattern`, so the scale is 1 both for a reader
that knows the patterns and for one that only looks at the tensors.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from jlora.checkpoints.new_files import (
  move,
  name_temporary,
  replace_text,
  sync_folder,
)
from jlora.checkpoints.safetensors import stream_safetensors
from jlora.checkpoints.sources import check_apart
from jlora.formats.fingerprints import metadata_of
from jlora.formats.peft.config import shortest_targets
from jlora.formats.peft.conversions import (
  convert_base,
  convert_full,
  convert_loras,
  find_conversions,
  spread_reasons,
)
from jlora.formats.peft.experts import (
  complete_experts,
  nest_parameters,
  stack_experts,
)
from jlora.formats.peft.layouts import CONFIG, PEFT, PREFIX, TENSORS, Profile
from jlora.formats.peft.parts import (
  HEAD,
  Base,
  FilePart,
  Rename,
  describe_base,
  is_transposed,
  module_of,
)
from jlora.formats.peft.plans import (
  arrays_of,
  has_own_names,
  name_parts,
  plan_biases,
  plan_full,
  plan_loras,
  spec_of,
)
from jlora.formats.peft.tree_names import RENAMING, leaves_of
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.numerics.backends import library_of


def save_peft(
  folder: str | os.PathLike,
  loras: Mapping[str, Lora],
  *,
  like: Any,
  biases: Mapping[str, Any] | None = None,
  full: Mapping[str, Any] | None = None,
  profile: Profile = PEFT,
  dtype: Any = None,
  base_model: str | None = None,
  task_type: str | None = "CAUSAL_LM",
  model_type: str | None = None,
  config: Mapping[str, Any] | None = None,
  rename: Rename | Sequence[tuple[str, str]] | None = None,
  fingerprint: Mapping[str, Mapping[str, Any]] | None = None,
  overwrite: bool = False,
) -> dict[str, str]:
  """Writes a PEFT adapter folder; returns the changes that it cannot hold.

  Args:
    folder: created if needed. `adapter_model.safetensors`, and then
      `adapter_config.json`, are written whole or not at all. Equal arguments
      give equal bytes.
    loras: path -> Lora. May be lazy: one is held at a time, and each is read
      twice, the first time for its shape.
    like: every parameter of the base: path -> anything with `.shape`, an open
      checkpoint, or any pytree (nested dicts, linen's variables, an NNX State).
      It names the modules that must stay untouched and gives the axes' roles.
    biases: path of a bias -> its change (out,). PEFT has one switch for all
      modules, so every other module gets a zero bias. Where the base has no
      bias, PEFT can then apply the adapter but not merge it.
    full: path -> new value, for what is not low-rank (norms, new vocabulary).
      May be lazy. It needs all parameters of a module. Before PEFT loads a
      longer vocabulary, the base's has to be resized.
    profile: the consumer; `VLLM` accepts neither `biases` nor `full`, and with
      `config` only what its class of that name takes. Where separate experts
      are stacked on loading, every expert of a changed layer is written, padded
      with zeros to rank r.
    dtype: storage dtype of factors and biases; None keeps each factor's own.
    base_model: name or path of the base, for the configuration.
    task_type: PEFT's task name, or None, or "auto": what `config` says. With
      "CAUSAL_LM" and no `config` a base without `lm_head.weight` is assumed to
      have a tied head. Where tables are tied each of them gets the change: PEFT
      applies that correctly but merges a tied LoRA twice: use `save_merged` to
      merge it.
    model_type: `model_type` of the base's config.json.
    config: the contents of the base's config.json. With a `model_type` in it,
      names and classes of modules are looked up in a table of transformers'
      models; what PEFT cannot hold in that model is returned with the reason.
    rename: path -> name in the Hugging Face model, for every path of `like` and
      of the changes; or (regex, replacement) pairs for the names that `config`
      gives. Without either, paths of a tree are read as Flax names them:
      `l1/kernel` is `l1.weight`. For a parameter with leading axes (scanned
      layers) a sequence of names, one per index.
    fingerprint: what `jlora.formats.fingerprint` says of the base; kept in the
      header of the tensors' file, where PEFT and vLLM do not look, for those of
      `loras` that are written.
    overwrite: whether an adapter in the folder may be replaced.

  Returns:
    {path: reason} for each entry of `loras`, `biases` and `full` that the
    format or the profile cannot hold, and for modules of rank 0.

  Raises:
    ValueError: before anything is written, if the folder holds an adapter or
      a file that `like` was read from, a Lora is malformed or does not fit
      `like`, a rank exceeds the profile's, two parameters get one name, or no
      module is left to write.

  Example:
    >>> import tempfile
    >>> import jax
    >>> import jax.numpy as jnp
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(2))
    >>> like = {"h.0.q.weight": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   left = save_peft(folder, {"h.0.q.weight": lora}, like=like)
    ...   left, json.loads(Path(folder, CONFIG).read_text())["target_modules"]
    ({}, ['q'])

  References:
    huggingface/peft 0.21.2, docs/source/developer_guides/checkpoint.md.
  """
  folder, biases, full = Path(folder), biases or {}, full or {}
  present = [name for name in (CONFIG, TENSORS) if (folder / name).exists()]
  if present and not overwrite:
    raise ValueError(f"{folder} already holds an adapter; use overwrite=True.")
  like = leaves_of(like)
  files = {file for x in like.values() if (file := getattr(x, "file", None))}
  check_apart(folder, files)
  if profile.one_rank:
    loras = Padded(loras)
  base = describe_base(like, model_type, task_type, rename, config)
  check_consumer(base, profile)
  if task_type == "auto":
    task_type = base.family.task_type if base.family else "CAUSAL_LM"
  left: dict[str, str] = {}
  conversions = find_conversions(base) if profile.stacks_experts else []
  given = [*loras, *biases, *full]
  if not has_own_names(base, profile):
    full = convert_full(full, loras, conversions, base, left)
    loras = convert_loras(loras, conversions, base, left)
    base = convert_base(base, conversions)
  parts, base = _plan_named(loras, base, profile, dtype, left)
  parts, carried = plan_biases(biases, parts, base, profile, left)
  kept = plan_full(full, parts, base, profile, left)
  spread_reasons(left, conversions, given)
  if not parts:
    reasons = name_some(f"{path}: {reason}" for path, reason in left.items())
    hint = f" {RENAMING}" if rename is None and config is None else ""
    raise ValueError(f"No module is left to write. {reasons}.{hint}")
  entries = _configuration(parts, carried, kept, base)
  named = {"base_model_name_or_path": base_model, "task_type": task_type}
  spec = spec_of(parts, carried, full, kept)
  arrays = arrays_of(parts, loras, biases, carried, full, kept)
  said = {
    path: one
    for path, one in (fingerprint or {}).items()
    if path in given and path not in left
  }
  write_folder(
    folder,
    spec,
    arrays,
    entries | {key: value for key, value in named.items() if value is not None},
    metadata_of(said),
  )
  return left


class Padded(Mapping[str, Lora]):
  """Loras that all have the largest rank, by rows of zeros.

  Attributes:
    loras: path -> Lora; may be lazy.
    rank: the largest.
  """

  def __init__(self, loras: Mapping[str, Lora]):
    self.loras = loras
    self.rank = max((lora.rank for lora in loras.values()), default=0)

  def __getitem__(self, path: str) -> Lora:
    lora = self.loras[path]
    if lora.rank in (0, self.rank):
      return lora
    rest = [(0, 0)] * (lora.a.ndim - 2) + [(0, self.rank - lora.rank), (0, 0)]
    a, b = (library_of(x).pad(x, rest) for x in (lora.a, lora.b))
    return Lora(a, b, lora.scale)

  def __iter__(self) -> Iterator[str]:
    return iter(self.loras)

  def __len__(self) -> int:
    return len(self.loras)


def check_consumer(base: Base, profile: Profile) -> None:
  """Raises if a consumer puts no adapter on this class of model at all.

  Args:
    base: the base model.
    profile: the consumer.

  Raises:
    ValueError: with the consumer's own words.

  Example:
    >>> check_consumer(describe_base({}, None, None, None), PEFT)
  """
  family = base.family
  if family is not None and family.refusal and profile is PEFT:
    raise ValueError(
      f"PEFT puts no adapter on a {family.name} ({family.refusal}). Merge the"
      " change into a checkpoint instead: `save_merged`, `jlora merge`."
    )
  if family is None or profile.refuses_class is None:
    return
  reason = profile.refuses_class(family.architectures, family.is_found)
  if reason:
    raise ValueError(
      f"{reason}. Merge the change into a checkpoint instead: `save_merged`,"
      " `jlora merge`."
    )


def _plan_named(
  loras: Mapping[str, Lora],
  base: Base,
  profile: Profile,
  dtype: Any,
  left: dict[str, str],
) -> tuple[list[FilePart], Base]:
  """Plans the parts of all Loras, by the names that a consumer looks for."""
  parts = plan_loras(loras, base, profile, dtype, left)
  if profile.stacks_experts:
    parts = stack_experts(parts, base, left)
  if not has_own_names(base, profile):
    return nest_parameters(parts, left, base), base
  parts = nest_parameters(complete_experts(parts, base), left, base)
  return name_parts(parts, base, profile, left)


def _configuration(
  parts: Sequence[FilePart],
  carried: Mapping[str, str],
  kept: Mapping[str, str],
  base: Base,
) -> dict[str, Any]:
  """Returns the contents of `adapter_config.json`, without empty entries.

  PEFT refuses or warns of entries that its version does not know.
  """
  rank = max(part.rank for part in parts)
  patterns = {
    f"^{re.escape(part.target)}": part.rank
    for part in parts
    if part.rank != rank
  }
  modules = {part.module for part in parts if not part.layout.wraps_parameter}
  saved = {module_of(name) for name in kept}
  saved = {  # of a module and one inside it the outer one is replaced
    name for name in saved if not any(name.startswith(f"{s}.") for s in saved)
  }
  has_head = HEAD in kept and base.rename(kept[HEAD]) == HEAD
  ours = {part.name for part in parts} | kept.keys()
  optional = {
    "alpha_pattern": patterns,
    "ensure_weight_tying": base.tied_head and HEAD in ours and not has_head,
    "fan_in_fan_out": any(is_transposed(part, base) for part in parts),
    "lora_bias": bool(carried),
    "modules_to_save": sorted(_unlike_others(saved, base.modules)),
    "rank_pattern": patterns,
    "target_parameters": sorted(
      part.name for part in parts if part.layout.wraps_parameter
    ),
  }
  return {
    "lora_alpha": rank,
    "peft_type": "LORA",
    "r": rank,
    "target_modules": shortest_targets(
      modules,
      (base.modules | (base.family.bare_names if base.family else set()))
      - modules,
    ),
  } | {key: value for key, value in optional.items() if value}


def _unlike_others(saved: Set[str], modules: Set[str]) -> list[str]:
  """Names modules so that no other name ends like theirs, as PEFT compares."""
  others = modules - saved
  return [
    PREFIX + name if any(other.endswith(name) for other in others) else name
    for name in saved
  ]


def write_folder(
  folder: Path,
  spec,
  arrays,
  config: Mapping[str, Any],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes both files of an adapter folder, the configuration last.

  It replaces the adapter that was there; until it is whole there is none.

  Args:
    folder: created if needed.
    spec: key -> (shape, dtype), as for `stream_safetensors`.
    arrays: (key, array) pairs.
    config: the contents of `adapter_config.json`.
    metadata: for the header of the tensors' file, beside its format.
  """
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  tensors = name_temporary(folder / TENSORS)
  try:
    header = {"format": "pt"} | dict(metadata or {})
    stream_safetensors(tensors, spec, arrays, header)
    (folder / CONFIG).unlink(missing_ok=True)
    sync_folder(folder)
    move(tensors, folder / TENSORS)
    sync_folder(folder)
    replace_text(folder / CONFIG, text)
  except BaseException:
    tensors.unlink(missing_ok=True)
    raise
