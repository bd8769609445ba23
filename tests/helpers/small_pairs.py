# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints in pairs, and adapters read back as NumPy sees them."""

import functools
import json
import pathlib

import numpy as np

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.extraction.module import Extractor

# One Extractor for runs with the same options: each shape is compiled once for
# a whole test file.
shared_extractor = functools.cache(Extractor)


def draw(*shape, seed=0, dtype=np.float32):
  """Normal entries, the same for the same seed."""
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def write_pair(folder, base, finetuned, config=None):
  """Paths of two checkpoint folders, written from {name: array}."""
  folders = pathlib.Path(folder) / "base", pathlib.Path(folder) / "finetuned"
  for path, tensors in zip(folders, (base, finetuned), strict=True):
    path.mkdir(parents=True)
    write_safetensors(path / "model.safetensors", tensors)
    if config is not None:
      (path / "config.json").write_text(json.dumps(config))
  return folders


def files_of(folder):
  """{relative path: bytes} of every file of a folder, hidden ones too."""
  folder = pathlib.Path(folder)
  return {
    str(file.relative_to(folder)): file.read_bytes()
    for file in folder.rglob("*")
    if file.is_file()
  }


def adapter_tensors(folder):
  """{name without PEFT's prefix: array} of an adapter folder."""
  tensors = open_checkpoint(pathlib.Path(folder) / "adapter_model.safetensors")
  return {
    name.removeprefix("base_model.model."): tensors[name] for name in tensors
  }


def change_of(folder, module):
  """The change that an adapter makes to a linear layer, (out, in) float64.

  Scale 1: our configurations have lora_alpha == r in every module.
  """
  tensors = adapter_tensors(folder)
  a, b = (tensors[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
  return b @ a
