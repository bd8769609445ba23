# SPDX-License-Identifier: Apache-2.0
"""Packed Loras on disk: one safetensors file, its bits checked when read."""

import json
import os
from collections.abc import Mapping

import numpy as np

from jlora.checkpoints import open_checkpoint
from jlora.messages import name_some
from jlora.packing import MAX_BITS, Packed
from jlora.safetensors_files import read_header, write_safetensors

_PARTS = ("bits", "steps", "codes")
_SHAPES = "jlora_packed_shapes"


def save_packed(path: str | os.PathLike, packed: Mapping[str, Packed]) -> None:
  """A safetensors file of packed Loras, written whole or not at all.

  Args:
    path: the file.
    packed: path -> Packed, in storage `<path>.bits`, `.steps` and `.codes`;
      the shapes are in the file's metadata.

  Raises:
    ValueError: nothing is to be written.

  Example:
    >>> import tempfile
    >>> from jlora.loras import Lora
    >>> from jlora.packing import pack
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   lora = Lora(np.ones((1, 3)), np.ones((1, 2)), np.float32(1))
    ...   save_packed(f"{folder}/x.safetensors", {"w": pack(lora, 2)})
    ...   load_packed(f"{folder}/x.safetensors")["w"].shape
    (3, 2)
  """
  if not packed:
    raise ValueError("There is no packed Lora to save.")
  tensors = {
    f"{name}.{part}": getattr(module, part)
    for name, module in packed.items()
    for part in _PARTS
  }
  shapes = {name: module.shape for name, module in packed.items()}
  write_safetensors(path, tensors, {_SHAPES: json.dumps(shapes)})


def load_packed(path: str | os.PathLike) -> dict[str, Packed]:
  """The packed Loras of a file.

  `unpack` makes Loras of them, which `save_peft` exports as any others.

  Args:
    path: a file that `save_packed` wrote.

  Returns:
    path -> Packed.

  Raises:
    ValueError: another file, a tensor missing or left over, or codes that do
      not fit their bits and shape; up to three named.

  Example:
    >>> load_packed("/nowhere.safetensors")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere.safetensors does not exist
  """
  checkpoint = open_checkpoint(path)
  text = read_header(path).metadata.get(_SHAPES)
  if text is None:
    raise ValueError(f"{path} holds no packed Loras: {_SHAPES} is missing.")
  shapes = {name: tuple(shape) for name, shape in json.loads(text).items()}
  expected = {f"{name}.{part}" for name in shapes for part in _PARTS}
  if odd := sorted(expected ^ set(checkpoint)):
    raise ValueError(f"{path}: missing or left over: {name_some(odd)}.")
  found = {
    name: Packed(shape, *(checkpoint[f"{name}.{part}"] for part in _PARTS))
    for name, shape in shapes.items()
  }
  if wrong := [name for name, one in found.items() if not _is_whole(one)]:
    raise ValueError(
      f"{path}: the codes of {name_some(wrong)} do not fit their bits and "
      "shape; the file is damaged."
    )
  return found


def _is_whole(packed: Packed) -> bool:
  """Whether the parts belong together."""
  bits, sides = packed.bits, sum(packed.shape)
  counts = [np.sum(bits == width) * width for width in range(1, MAX_BITS + 1)]
  return (
    bits.ndim == 1
    and bits.dtype == packed.codes.dtype == np.uint8
    and bool(np.all((bits >= 1) & (bits <= MAX_BITS)))
    and packed.steps.shape == (2, len(bits))
    and packed.codes.shape == (sum(-(-int(n) * sides // 8) for n in counts),)
  )
