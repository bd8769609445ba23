# SPDX-License-Identifier: Apache-2.0
"""Writes adapters as ComfyUI reads them: the original's names, with dots."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.formats.kohya import (
  Spelling,
  family_of,
  place_modules,
  targets_of,
  whole_tensors,
)
from jlora.formats.names import Family
from jlora.formats.storing import (
  Select,
  Suffixes,
  everything,
  given_by,
  write_file,
)
from jlora.loras import Lora

_SUFFIXES = Suffixes(".lora_A.weight", ".lora_B.weight")


def _comfy_text(component: str, module: str, family: Family) -> str | None:
  """Returns a text encoder's name in ComfyUI."""
  prefix = family.comfy_text.get(component)
  return None if prefix is None else f"{prefix}.{module}"


COMFY = Spelling(
  lambda family: not family.comfy_ours,
  lambda name: f"diffusion_model.{name}",
  _comfy_text,
  (".diff", ".diff_b"),
)


def save_comfy(
  path: str | os.PathLike,
  loras: Mapping[str, Lora],
  *,
  like: Any = None,
  family: str | None = None,
  shifts: Mapping[str, Any] | None = None,
  dtype: Any = np.float16,
  select: Select = everything,
  metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
  """Writes a file for ComfyUI: original names with dots, and no alpha.

      diffusion_model.M.lora_A.weight (r, in, *k),  .lora_B.weight (out, r, *1)

  Args:
    path: the file, written whole or not at all.
    loras: module or parameter of diffusers -> Lora; as for `save_diffusers`.
    like: as for `save_kohya`.
    family: as for `save_kohya`.
    shifts: parameter -> change, of what is no Lora: `diff` and `diff_b`.
    dtype: storage dtype.
    select: which modules, by name and shape.
    metadata: strings to strings, for the header.

  Returns:
    {name: why it is not in the file}. The scale is in B.

  Raises:
    ValueError: as `save_kohya`.

  Example:
    >>> import tempfile
    >>> from jlora.formats import open_adapter
    >>> lora = Lora(np.ones((1, 8)), np.ones((1, 8)), np.float32(1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_comfy(f"{folder}/x.safetensors", {"blocks.0.attn1.to_q": lora})
    ...   adapter = open_adapter(f"{folder}/x.safetensors")
    ...   adapter.format, list(adapter)
    {}
    ('comfy', ['transformer.blocks.0.attn1.to_q'])

  References:
    comfyanonymous/ComfyUI, `comfy/lora.py`.
  """
  given = given_by(loras, like, shifts, select)
  own = family_of(given, family, metadata)
  targets = targets_of(given, place_modules(given, own, COMFY))
  extra = whole_tensors(given, own, COMFY, shifts or {}, dtype)
  left = dict(given.left)

  def describe(ranks: Mapping[str, int]) -> dict[str, str]:
    del ranks
    model = {"modelspec.architecture": f"{own.architecture}/lora"}
    known = model if own.architecture else {}
    return {"format": "pt", **known, **(metadata or {})}

  write_file(path, targets, loras, _SUFFIXES, dtype, extra, describe, left)
  return left
