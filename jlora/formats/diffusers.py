# SPDX-License-Identifier: Apache-2.0
"""Writes adapters as diffusers' pipelines load them."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.bases import CLIP, Split
from jlora.formats.diffusers_metadata import ADAPTER_METADATA
from jlora.formats.storing import (
  Given,
  Select,
  Suffixes,
  Target,
  everything,
  given_by,
  rounded_change,
  write_file,
)
from jlora.loras import Lora

#: The file's name in a folder.
WEIGHTS = "pytorch_lora_weights.safetensors"
_SUFFIXES = Suffixes(".lora_A.weight", ".lora_B.weight")
_NO_WHOLE = "diffusers adds LoRAs alone; merge whole changes into a checkpoint"
_NOT_ALL = (
  "diffusers adds biases to all modules with a LoRA or to none, and not all "
  "have one"
)


def save_diffusers(
  path: str | os.PathLike,
  loras: Mapping[str, Lora],
  *,
  like: Any = None,
  shifts: Mapping[str, Any] | None = None,
  component: str | None = None,
  dtype: Any = np.float16,
  select: Select = everything,
  metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
  """Writes a file that `load_lora_weights` of diffusers' pipelines reads.

      C.M.lora_A.weight (r, in, *k),   C.M.lora_B.weight (out, r, *1)

  Args:
    path: the file, or a folder for `pytorch_lora_weights.safetensors`; written
      whole or not at all.
    loras: module or parameter -> Lora, with the component in front or of one
      component; an adapter of `open_adapter` is read one module at a time.
    like: the base: a path, a checkpoint, or parameter -> anything with
      `.shape`. None: the shapes of the adapter, or linear layers alone.
    shifts: parameter -> change, of what is no Lora. Biases are written if every
      module with a Lora has one.
    component: C, where names do not tell.
    dtype: storage dtype of the factors.
    select: which modules, by name and shape: `everything`, `linear_layers`,
      `attention_layers`, or any function.
    metadata: strings to strings, for the header.

  Returns:
    {name: why it is not in the file}. The scale is in B, so that alpha is the
    rank of each module; factors already of that dtype and of scale 1 keep their
    bytes.

  Raises:
    ValueError: no Lora, names that `like` lacks, shapes that differ, a stack, a
      component that is not known, or entries that the dtype cannot hold.

  Example:
    >>> import tempfile
    >>> from jlora.formats import open_adapter
    >>> lora = Lora(np.ones((1, 36)), np.ones((1, 8)), np.float32(2))
    >>> like = {"conv_in.weight": np.empty((8, 4, 3, 3))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   left = save_diffusers(
    ...     folder, {"conv_in": lora}, like=like, component="unet")
    ...   adapter = open_adapter(folder)
    ...   left, adapter.shapes, float(adapter["unet.conv_in"].scale)
    ({}, {'unet.conv_in': (8, 4, 3, 3)}, 1.0)

  References:
    huggingface/diffusers 0.42.1, `loaders/peft.py`, `utils/peft_utils.py`.
  """
  path = Path(path)
  if path.suffix != ".safetensors":
    path.mkdir(parents=True, exist_ok=True)
    path = path / WEIGHTS
  given = given_by(loras, like, shifts, select)
  several = sorted({own for own, _ in given.names})
  if component and len(several) > 1:
    raise ValueError(
      f"the Loras are of {', '.join(several)}, component={component!r} names "
      "one; leave it out, or write one component at a time."
    )
  stems = {split: _stem(split, component) for split in given.names}
  targets = [
    Target(stems[at], (name,), given.shapes[at][:1], given.shapes[at])
    for at, name in given.names.items()
  ]
  extra, has_biases = _biases(given, stems, loras, shifts or {}, dtype)
  left = dict(given.left)

  def describe(ranks: Mapping[str, int]) -> dict[str, str]:
    return {
      "format": "pt",
      **(metadata or {}),
      ADAPTER_METADATA: json.dumps(_configuration(ranks, has_biases)),
    }

  write_file(path, targets, loras, _SUFFIXES, dtype, extra, describe, left)
  return left


def _stem(split: Split, component: str | None) -> str:
  """Returns what a module's keys begin with."""
  own = split[0] or component
  if not own:
    raise ValueError(
      f"which component of a pipeline {split[1]} is of is not known; say it: "
      "component='unet', 'transformer' or 'text_encoder'."
    )
  return f"{component or own}.{split[1]}"


def _biases(
  given: Given,
  stems: Mapping[Split, str],
  loras: Mapping[str, Lora],
  shifts: Mapping[str, Any],
  dtype: Any,
) -> tuple[dict[str, np.ndarray], bool]:
  """Returns the tensors of biases, and whether there are any."""
  found: dict[str, np.ndarray] = {}
  wanted = {at for at, own in given.shifts.items() if "bias" in own}
  has_loras = {at for at, name in given.names.items() if not wanted or
               loras[name].rank}  # fmt: skip
  complete = bool(wanted) and has_loras <= given.biased
  for at, own in given.shifts.items():
    for leaf, name in own.items():
      if leaf == "bias" and at in has_loras:
        if not complete:
          given.left[name] = _NOT_ALL
      else:
        given.left[name] = _NO_WHOLE
  if not complete:
    return {}, False
  for at, stem in stems.items():
    if at not in has_loras:
      continue
    name = given.shifts.get(at, {}).get("bias")
    shape = given.shapes[at]
    found[f"{stem}.lora_B.bias"] = (
      np.zeros(shape[:1], dtype)
      if name is None
      else rounded_change(name, shifts[name], shape, dtype)
    )
  return found, True


def _configuration(
  ranks: Mapping[str, int], has_biases: bool
) -> dict[str, Any]:
  """Returns PEFT's configuration of each component, its name in front."""
  found: dict[str, Any] = {}
  components: dict[str, dict[str, int]] = {}
  for stem, rank in ranks.items():
    component, _, module = stem.partition(".")
    components.setdefault(component, {})[module] = rank
  for component, own in components.items():
    most = max(own.values())
    is_text = component.startswith("text_encoder")
    bare = {m: m.removeprefix(CLIP) if is_text else m for m in own}
    # CLIP has `text_model.` in transformers 4 and not in 5; diffusers takes it
    # off tensors' names alone. PEFT finds a target by the end of a name.
    optional = {m: r"(text_model\.)?" if bare[m] != m else "" for m in own}
    pattern = {
      f"^{optional[module]}{re.escape(bare[module])}": rank
      for module, rank in own.items()
      if rank != most
    }
    config = {
      "peft_type": "LORA",
      "r": most,
      "lora_alpha": most,
      "target_modules": sorted(bare.values()),
      "rank_pattern": pattern,
      "alpha_pattern": pattern,
      "lora_bias": has_biases,
    }
    found |= {f"{component}.{key}": value for key, value in config.items()}
  return found
