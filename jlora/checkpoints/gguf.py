# SPDX-License-Identifier: Apache-2.0
"""GGUF files of language models, opened under Hugging Face's names.

    blk.N.attn_q.weight  ─►  model.layers.N.self_attn.q_proj.weight

Rows of queries and keys come in transformers' order, and weights of Gemma's
norms without the 1 that llama.cpp's converter adds. The package `gguf` (the
extra of that name) has the names and dequantises.
"""

import collections
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jlora.checkpoints.byte_ranges import read_region, stamp_of
from jlora.checkpoints.gguf_header import Stored, read_header
from jlora.checkpoints.gguf_names import (
  BUFFERS,
  KINDS,
  config_of,
  heads_of,
  import_gguf,
  names_in,
  unpermuted,
)
from jlora.checkpoints.safetensors import TensorSpec
from jlora.messages import name_some

# Codes of types that NumPy has too.
_PLAIN = {
  0: np.float32, 1: np.float16, 24: np.int8, 25: np.int16, 26: np.int32,
  27: np.int64, 28: np.float64, 30: ml_dtypes.bfloat16,
}  # fmt: skip
_TABLE, _HEAD = "token_embd.weight", "output.weight"
Read = Callable[[str, Sequence[range]], tuple[np.ndarray, int]]


class Opened(NamedTuple):
  """What a GGUF file holds.

  Attributes:
    stored: parameter -> its shape, its dtype as read, and its bytes as stored.
    read: reads a region of one, and counts the bytes.
    config: as much of config.json as the file tells.
    metadata: what else it says, as strings.
    nbytes: of the header.
  """

  stored: dict[str, TensorSpec]
  read: Read
  config: dict[str, Any]
  metadata: dict[str, str]
  nbytes: int


class _Tensor(NamedTuple):
  """A tensor of the file under a parameter's name.

  Attributes:
    shape: its axes.
    kind: code of its type.
    raw: where its bytes are: of a plain type its own axes, else (rows, bytes).
    heads: by which its rows are permuted, 0 for none.
    shift: what was added to it.
  """

  shape: tuple[int, ...]
  kind: int
  raw: TensorSpec
  heads: int
  shift: float


def open_model(path: Path) -> Opened:
  """Opens a GGUF file of a language model; its tensors are not read yet.

  Args:
    path: the file.

  Returns:
    Opened. float32, float16 and bfloat16 stay what they are; quantised tensors
    are float32, as the package gguf dequantises them.

  Raises:
    ValueError: the package gguf is missing; no GGUF file, a damaged one, an
      adapter, or one part of several; an architecture, a tensor or a type that
      is not known.

  Warns:
    UserWarning: tensors are quantised: their values are not those that the
      model was made with.
  """
  package = import_gguf()
  stamp = stamp_of(path)
  entries, tensors, nbytes = read_header(path)
  _check_model(path, entries)
  try:
    rows = tensors[_TABLE].shape[0] if _TABLE in tensors else 0
    config = config_of(entries, _HEAD not in tensors, rows)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  left = [name for name in tensors if re.fullmatch(BUFFERS, name)]
  rest = {name: one for name, one in tensors.items() if name not in left}
  found = _named(path, rest, entries["general.architecture"], config)
  check_places(path, {name: one.raw for name, one in found.items()})
  metadata = _said(entries, found, left, package, path)

  def read(name: str, region: Sequence[range]) -> tuple[np.ndarray, int]:
    try:
      return _read(found[name], region, path, stamp, package)
    except ValueError as error:
      raise ValueError(f"tensor {name!r}: {error}") from error

  stored = {
    name: TensorSpec(
      one.shape,
      np.dtype(_PLAIN.get(one.kind, np.float32)),
      one.raw.nbytes,
      path,
    )
    for name, one in found.items()
  }
  return Opened(stored, read, config, metadata, nbytes)


def _named(
  path: Path,
  tensors: Mapping[str, Stored],
  architecture: str,
  config: Mapping[str, Any],
) -> dict[str, _Tensor]:
  """Returns the tensors by their names in transformers."""
  package, kind = import_gguf(), KINDS[architecture]
  layers = config["num_hidden_layers"]
  if layers > len(tensors):
    raise ValueError(
      f"{path} has {len(tensors)} tensors for {layers} layers; it is damaged."
    )
  names = names_in(architecture, layers)
  found: dict[str, _Tensor] = {}
  lost = []
  for name, one in tensors.items():
    stem, _, leaf = name.rpartition(".")
    if stem not in names or leaf not in ("weight", "bias"):
      lost.append(name)
      continue
    own = f"{names[stem]}.{leaf}"
    raw = raw_of(path, name, one, package)
    heads = heads_of(own, kind, config)
    shift = kind.shift if own.endswith("norm.weight") else 0.0
    found[own] = _Tensor(one.shape, one.kind, raw, heads, shift)
  if lost:
    raise ValueError(
      f"{path}: {len(lost)} tensors have no name in {kind.name}: "
      f"{name_some(lost)}. Give the model that it was made from."
    )
  return found


def _check_model(path: Path, entries: Mapping[str, Any]) -> None:
  """Raises unless a file is a whole model."""
  what = entries.get("general.type", "model")
  if what != "model":
    raise ValueError(
      f"{path} is a GGUF file, but no model: general.type is {what!r}"
      + ("; adapters are read by `open_adapter`." if what == "adapter" else ".")
    )
  parts = entries.get("split.count", 0)
  if parts not in (0, 1):
    raise ValueError(
      f"{path} is one of {parts} parts of a model; join them first: "
      "llama-gguf-split --merge."
    )


def is_plain(one: Stored) -> bool:
  """Returns whether NumPy has a tensor's type.

  Args:
    one: the tensor.
  """
  return one.kind in _PLAIN


def raw_of(path: Path, name: str, one: Stored, package: Any) -> TensorSpec:
  """Returns where a tensor's bytes are.

  Args:
    path: the file.
    name: of the tensor.
    one: what the header says of it.
    package: gguf.

  Returns:
    Its own axes, or of a quantised one (rows, bytes of a row).

  Raises:
    ValueError: the type is not known, or rows do not consist of blocks.
  """
  if one.kind in _PLAIN:
    dtype = np.dtype(_PLAIN[one.kind])
    shape, nbytes = one.shape, math.prod(one.shape) * dtype.itemsize
    return TensorSpec(shape, dtype, nbytes, path, one.start, one.start + nbytes)
  try:
    kind = package.GGMLQuantizationType(one.kind)
    block, size = package.GGML_QUANT_SIZES[kind]
    package.quants.dequantize(np.zeros((1, size), np.uint8), kind)
  except (ValueError, KeyError, NotImplementedError):
    raise ValueError(
      f"{path}: {name} has the type {one.kind}, which the package gguf does "
      "not dequantise; install a newer one, or give the model that it was made "
      "from."
    ) from None
  width = one.shape[-1] if one.shape else 1
  if width % block:
    raise ValueError(
      f"{path}: rows of {name} have {width} values, blocks of {kind.name} "
      f"{block}; the file is damaged."
    )
  rows, row = math.prod(one.shape[:-1]), width // block * size
  end = one.start + rows * row
  return TensorSpec(
    (rows, row), np.dtype(np.uint8), rows * row, path, one.start, end
  )


def check_places(path: Path, places: Mapping[str, TensorSpec]) -> None:
  """Raises unless all tensors lie within the file.

  Args:
    path: the file.
    places: tensor -> where its bytes are.

  Raises:
    ValueError: names up to three that do not.
  """
  size = path.stat().st_size
  if wrong := [name for name, one in places.items() if (one.end or 0) > size]:
    raise ValueError(
      f"{path} ends before {len(wrong)} of its tensors, {name_some(wrong)}; "
      "download it again."
    )


def _said(
  entries: Mapping[str, Any],
  found: Mapping[str, _Tensor],
  left: Sequence[str],
  package: Any,
  path: Path,
) -> dict[str, str]:
  """Returns what the file says of itself; warns of quantised tensors."""
  said = {
    name: str(value)
    for name, value in entries.items()
    if name.startswith("general.") and isinstance(value, str | int | float)
  }
  if left:
    said["gguf.left_out"] = f"{', '.join(left)}: of positions, no parameters"
  counts = collections.Counter(
    package.GGMLQuantizationType(one.kind).name
    for one in found.values()
    if one.kind not in _PLAIN
  )
  if counts:
    told = ", ".join(f"{kind} ({count})" for kind, count in counts.items())
    said["gguf.quantised"] = f"{told}: read as float32"
    warnings.warn(
      f"{path}: {sum(counts.values())} of {len(found)} tensors are quantised, "
      f"{told}; they come as float32, with the error of their type.",
      stacklevel=4,
    )
  return said


def _read(
  one: _Tensor,
  region: Sequence[range],
  path: Path,
  stamp: tuple[int, ...],
  package: Any,
) -> tuple[np.ndarray, int]:
  """Reads a region of a tensor: of those in llama.cpp's order all rows."""
  whole = [range(n) for n in one.shape]
  wanted = whole if one.heads else list(region)
  if one.kind in _PLAIN:
    array, count = read_region(path, one.raw, wanted, stamp)
  else:
    array, count = _dequantised(one, wanted, path, stamp, package)
  if one.heads:
    array = unpermuted(array, one.heads)
    array = array[np.ix_(*region)] if region else array
  if one.shift:
    array = (array - np.float32(one.shift)).astype(array.dtype)
  return np.ascontiguousarray(array), count


def _dequantised(
  one: _Tensor,
  region: Sequence[range],
  path: Path,
  stamp: tuple[int, ...],
  package: Any,
) -> tuple[np.ndarray, int]:
  """Reads the rows that a region touches, and dequantises them."""
  if not all(len(indices) for indices in region):
    return np.empty([len(indices) for indices in region], np.float32), 0
  rows, row = one.raw.shape
  if len(one.shape) > 1:
    first = region[0]
    each = rows // one.shape[0]
    span = range(first[0] * each, (first[-1] + 1) * each)
    inside = (range(0, len(first) * first.step, first.step), *region[1:])
    shape = (first[-1] + 1 - first[0], *one.shape[1:])
  else:
    span, inside, shape = range(rows), tuple(region), one.shape
  raw, count = read_region(path, one.raw, (span, range(row)), stamp)
  kind = package.GGMLQuantizationType(one.kind)
  array = package.quants.dequantize(raw, kind).reshape(shape)
  return np.asarray(array[np.ix_(*inside)], np.float32), count
