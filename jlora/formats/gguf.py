# SPDX-License-Identifier: Apache-2.0
"""Adapters as llama.cpp loads them: GGUF files, written and read.

The package `gguf` (the extra of that name) has the format and the names of
tensors; it is imported when a file is written or read.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jlora.checkpoints.gguf import check_places, is_plain, raw_of
from jlora.checkpoints.gguf_header import read_header
from jlora.checkpoints.gguf_names import (
  KINDS,
  import_gguf,
  permuted,
  unpermuted,
)
from jlora.checkpoints.new_files import move, name_temporary, sync_folder
from jlora.checkpoints.sources import check_apart
from jlora.formats.adapters import Adapter
from jlora.formats.bases import Base, shape_of
from jlora.formats.storing import balanced
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.numerics.finite import rounded

#: Class of the model -> its name in llama.cpp, and whether the rows of queries
#: and keys are in another order there.
ARCHITECTURES = {
  kind.name: (name, kind.is_permuted) for name, kind in KINDS.items()
} | dict.fromkeys(("MistralForCausalLM", "MixtralForCausalLM"), ("llama", True))
_TABLE, _HEAD = "token_embd.weight", "output.weight"
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
_ALPHA = "adapter.lora.alpha"


class Model(NamedTuple):
  """What of a model a file of llama.cpp depends on.

  Attributes:
    architecture: llama.cpp's name.
    heads: pattern of a tensor's name -> heads by which its rows are permuted.
    name_of: parameter -> its tensor in llama.cpp, None if there is none.
    is_tied: whether the head is the table of tokens.
  """

  architecture: str
  heads: Mapping[str, int]
  name_of: Callable[[str], str | None]
  is_tied: bool


def save_gguf(
  path: str | os.PathLike,
  loras: Mapping[str, Lora],
  *,
  config: Mapping[str, Any],
  like: Mapping[str, Any] | None = None,
  shifts: Mapping[str, Any] | None = None,
  dtype: Any = np.float16,
  pad: bool = False,
  name: str = "adapter",
) -> dict[str, str]:
  """Writes an adapter of a language model for llama.cpp's `--lora`.

      T.lora_a (r, in),  T.lora_b (out, r),   change = alpha / r · lora_b lora_a

  Args:
    path: the file, written whole or not at all.
    loras: parameter or module -> Lora, by Hugging Face names.
    config: the base's config.json: class, heads and layers.
    like: parameter -> anything with `.shape`, of the base; tells kernels from
      matrices.
    shifts: parameter -> change, of what is no Lora; it is not carried.
    dtype: float32, float16 or bfloat16.
    pad: whether all ranks are made the largest, by zeros. Otherwise B of a
      smaller rank is multiplied by r / alpha, as the file has one alpha, the
      largest rank, which the loader divides by the rank of each pair.
    name: `general.name`.

  Returns:
    {name: why it is not in the file}. Rows of queries and keys of Llama's kin
    are in llama.cpp's order.

  Raises:
    ValueError: the package gguf is missing, a class that is not known here, no
      Lora left, or entries that the dtype cannot hold.

  Example:
    >>> import tempfile
    >>> config = {"architectures": ["Qwen2ForCausalLM"],
    ...           "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> lora = Lora(np.ones((1, 4)), np.ones((1, 4)), np.float32(1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_gguf(f"{folder}/x.gguf", config=config, loras={
    ...     "model.layers.0.mlp.up_proj.weight": lora, "odd.weight": lora})
    {'odd.weight': 'llama.cpp has no tensor of that name'}

  References:
    ggml-org/llama.cpp, `convert_lora_to_gguf.py`, `src/llama-adapter.cpp`.
  """
  kind = np.dtype(dtype).name
  if kind not in _FILE_TYPES:
    raise ValueError(f"dtype must be one of {', '.join(_FILE_TYPES)}; {kind}.")
  package, model = import_gguf(), model_of(config)
  if Path(path).is_dir():
    raise ValueError(f"{path} is a folder; give the name of a file.")
  check_apart(path, [loras])
  left = {
    name: "llama.cpp adds no biases; merge the change into a checkpoint"
    if name.endswith(".bias")
    else "llama.cpp reads whole tensors and does not apply them"
    for name in shifts or {}
  }
  shapes: dict[str, int] = {}
  for path_, lora in loras.items():
    if reason := _refusal(path_, lora, like, loras, model):
      left[path_] = reason
    elif lora.rank != lora.b.shape[-2]:
      raise ValueError(
        f"{path_}: a {lora.a.shape} and b {lora.b.shape} have different ranks."
      )
    else:
      shapes[path_] = lora.rank
  if not shapes:
    reasons = name_some(f"{p}: {reason}" for p, reason in left.items())
    raise ValueError(f"No module is left to write. {reasons}")
  most = max(shapes.values())
  ends = [model.name_of(name) for name in shapes]
  if twice := [n for n in shapes if ends.count(model.name_of(n)) > 1]:
    raise ValueError(f"{name_some(twice)} are of one tensor; give one.")

  def pairs() -> Iterator[tuple[str, np.ndarray]]:
    for path_ in shapes:
      target = str(model.name_of(path_))
      a, b = _stored(path_, loras[path_], target, model, most, pad, dtype)
      yield f"{target}.lora_a", a
      yield f"{target}.lora_b", b

  entries = (model.architecture, name, float(most), _FILE_TYPES[kind])
  _write(package, Path(path), entries, pairs)
  return left


def model_of(config: Mapping[str, Any]) -> Model:
  """Returns what llama.cpp makes of a model.

  Args:
    config: the contents of its config.json.

  Raises:
    ValueError: the package gguf is missing, or the class is not known.

  Example:
    >>> model = model_of({"architectures": ["LlamaForCausalLM"],
    ...                   "num_hidden_layers": 1, "num_attention_heads": 4})
    >>> model.name_of("model.layers.0.self_attn.q_proj.weight")
    'blk.0.attn_q.weight'
  """
  package = import_gguf()
  classes = config.get("architectures") or ["none"]
  known = next((c for c in classes if c in ARCHITECTURES), None)
  if known is None:
    raise ValueError(
      f"the class {name_some(classes)} has no row in the table of llama.cpp's "
      f"architectures; known are {', '.join(ARCHITECTURES)}."
    )
  architecture, is_permuted = ARCHITECTURES[known]
  kind = next(
    key
    for key, value in package.MODEL_ARCH_NAMES.items()
    if value == architecture
  )
  needed = ("num_hidden_layers", "num_attention_heads")
  if wrong := [
    name
    for name in needed
    if not isinstance(n := config.get(name), int) or n < 1
  ]:
    raise ValueError(
      f"the model's config.json has no number as {name_some(wrong)}; give that "
      "of the language model itself."
    )
  names = package.get_tensor_name_map(kind, config["num_hidden_layers"])
  queries = config["num_attention_heads"]
  keys = config.get("num_key_value_heads") or queries
  heads = {r"blk\.\d+\.attn_q\.weight": queries,
           r"blk\.\d+\.attn_k\.weight": keys}  # fmt: skip
  return Model(
    architecture,
    heads if is_permuted else {},
    lambda name: names.get_name(
      f"{name.removesuffix('.weight')}.weight", try_suffixes=(".weight",)
    ),
    bool(config.get("tie_word_embeddings", False)),
  )


def _refusal(
  path: str,
  lora: Lora,
  like: Mapping[str, Any] | None,
  loras: Mapping[str, Lora],
  model: Model,
) -> str:
  """Returns why llama.cpp cannot have a Lora, "" if it can."""
  target = model.name_of(path)
  if lora.a.ndim > 2:
    return "a stack of experts, which is not written to GGUF"
  stored = None if like is None else like.get(path, like.get(f"{path}.weight"))
  if stored is not None and len(shape_of(stored)) > 2:
    return "llama.cpp has no LoRA for convolutions"
  if target is None:
    return "llama.cpp has no tensor of that name"
  if target == _HEAD and model.is_tied:
    both = any(model.name_of(other) == _TABLE for other in loras)
    also = "the embedding's change serves both" if both else "merge it instead"
    return f"the head is the table of tokens (tied): {also}"
  return "" if lora.rank else "rank 0: no change"


def _stored(
  path: str, lora: Lora, target: str, model: Model, most: int, pad: bool, dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the two tensors of a module."""
  a, b = (np.asarray(x).astype(np.float32) for x in (lora.a, lora.b))
  if pad:
    rest = ((0, most - len(a)), (0, 0))
    a, b = np.pad(a, rest), np.pad(b, rest)
  a, b = balanced(a, np.float32(float(lora.scale) * len(a) / most) * b)
  up = b.T
  for pattern, heads in model.heads.items():
    if re.fullmatch(pattern, target):
      up = permuted(up, heads)
  down = a.T if target == _TABLE else a
  down, up = (np.ascontiguousarray(x) for x in (down, up))
  return rounded(f"{path}, A", down, dtype), rounded(f"{path}, B", up, dtype)


def _write(package, path: Path, entries, pairs) -> None:
  """Writes a file, whole or not at all, one tensor in memory at a time."""
  architecture, name, alpha, file_type = entries
  partial = name_temporary(path)
  writer = package.GGUFWriter(partial, architecture)
  try:
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(_ALPHA, alpha)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    for key, tensor in pairs():
      kind, stored = _raw(package, tensor)
      writer.add_tensor_info(
        key, stored.shape, stored.dtype, stored.nbytes, raw_dtype=kind
      )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in pairs():
      writer.write_tensor_data(_raw(package, tensor)[1])
    writer.close()
    move(partial, path)
    sync_folder(path.parent)
  except BaseException:
    writer.close()
    partial.unlink(missing_ok=True)
    raise


def _raw(package, tensor: np.ndarray) -> tuple[Any, np.ndarray]:
  """Returns a tensor's type if NumPy lacks it, and its bytes in that case."""
  if tensor.dtype != ml_dtypes.bfloat16:
    return None, tensor
  return package.GGMLQuantizationType.BF16, tensor.view(np.uint8)


def open_gguf(path: Path, base: Base | None) -> Adapter:
  """Opens an adapter of llama.cpp.

  Args:
    path: the file.
    base: the model, whose config.json has the heads and whose names are used;
      None: llama.cpp's names and its order of rows, which a note says.

  Returns:
    Adapter.

  Raises:
    ValueError: the package gguf is missing, the file is damaged or no adapter,
      a factor of a pair is missing, or the base lacks a tensor.
  """
  fields, tensors = _read(path)
  if fields.get("general.type") != "adapter":
    raise ValueError(
      f"{path} is a GGUF file, but no adapter: general.type is "
      f"{fields.get('general.type')!r}."
    )
  alpha = float(fields.get(_ALPHA, 0.0))
  if not math.isfinite(alpha):
    raise ValueError(f"{path}: {_ALPHA} is {alpha}; the file is damaged.")
  targets = _pairs_in(tensors, path)
  names, model = _names(targets, base, path)
  adapter = Adapter(path, "gguf", {})
  for target in targets:
    a, b = (tensors[f"{target}.lora_{side}"] for side in "ab")
    is_table = target == _TABLE
    down = a.shape[::-1] if is_table else a.shape
    if len(down) != 2 or len(b.shape) != 2 or down[0] != b.shape[1]:
      raise ValueError(
        f"{path}: the factors of {target} have different ranks: a {down}, b "
        f"{b.shape}; the file is damaged."
      )
    module = names[target]
    rank, width, height = *down, b.shape[0]
    scale = alpha / rank if alpha else 1.0
    heads = _heads(target, model)
    adapter.readers[module] = _ReadPair(a, b, is_table, scale, heads)
    outer = (width, height) if is_table else (height, width)
    known = next((base.shapes[at] for at, name in base.names.items()
                  if name == module), outer) if base else outer  # fmt: skip
    if outer != known:
      raise ValueError(
        f"{path}: {target} is for a weight {outer}, the base has {known}; it "
        "was made for another model."
      )
    adapter.shapes[module] = outer
    adapter.ranks[module] = rank
    adapter.alphas[module] = alpha or None
  adapter.metadata = {key: str(value) for key, value in fields.items()}
  if base is None:
    adapter.notes.append(
      "without a base: llama.cpp's names, and its order of rows"
    )
  return adapter


class _Stored(NamedTuple):
  """A tensor of a GGUF file that is read when it is asked for.

  It is not mapped: the pages of a mapped file count as the process's memory.

  Attributes:
    path: the file.
    start: its first byte.
    dtype: of what is stored.
    stored: shape of that.
    shape: of the tensor.
    dequantise: what makes its values of it; None: they are stored.
  """

  path: Path
  start: int
  dtype: np.dtype
  stored: tuple[int, ...]
  shape: tuple[int, ...]
  dequantise: Callable[[np.ndarray], np.ndarray] | None

  def read(self) -> np.ndarray:
    """Reads it."""
    count = math.prod(self.stored) * self.dtype.itemsize
    with open(self.path, "rb") as file:
      file.seek(self.start)
      data = np.frombuffer(file.read(count), self.dtype).reshape(self.stored)
    if self.dequantise is not None:
      data = self.dequantise(data)
    return data.reshape(self.shape)


class _ReadPair(NamedTuple):
  """Reads one pair of a GGUF file.

  Attributes:
    a: (r, in); of a table transposed.
    b: (out, r).
    is_table: whether it is one of tokens.
    scale: alpha / r.
    heads: by which the rows of b are permuted, 0 for none.
  """

  a: _Stored
  b: _Stored
  is_table: bool
  scale: float
  heads: int

  def __call__(self) -> Lora:
    """Reads it."""
    a, b = self.a.read(), self.b.read()
    b = unpermuted(b, self.heads) if self.heads else b
    down: Any = np.array(a.T if self.is_table else a)
    scale: Any = np.float32(self.scale)
    return Lora(down, np.ascontiguousarray(b.T), scale)  # type: ignore[arg-type]


def _heads(target: str, model: Model | None) -> int:
  """Returns the heads by which a tensor's rows are permuted, 0 for none."""
  heads = {} if model is None else model.heads
  return next((n for p, n in heads.items() if re.fullmatch(p, target)), 0)


def _names(
  targets: list[str], base: Base | None, path: Path
) -> tuple[dict[str, str], Model | None]:
  """Returns each tensor's module in the base, and the model."""
  if base is None:
    return {target: target.removesuffix(".weight") for target in targets}, None
  config = next(iter(base.configs.values()), {})
  if not config:
    raise ValueError(
      f"{path}: the base has no config.json, which tells the heads; give its "
      "folder."
    )
  model = model_of(config)
  found = {}
  for name in base.names.values():
    target = model.name_of(f"{name}.weight")
    if target is not None:
      found[target] = name
  if lost := [target for target in targets if target not in found]:
    raise ValueError(
      f"{path}: the base has no module for {len(lost)} names of the file: "
      f"{name_some(lost)}. Give its own base."
    )
  return found, model


def _pairs_in(tensors: Mapping[str, Any], path: Path) -> list[str]:
  """Lists the tensors that have both factors; raises unless all have."""
  stems = {name.rpartition(".lora_")[0] for name in tensors}
  lacking = [
    f"{stem} lacks lora_{side}"
    for stem in sorted(stems)
    for side in "ab"
    if f"{stem}.lora_{side}" not in tensors
  ]
  if lacking:
    raise ValueError(
      f"{path}: {len(lacking)} modules are not whole: {name_some(lacking)}."
    )
  return sorted(stems)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
  """Returns the entries of a file, and its tensors, which are not read."""
  package = import_gguf()
  entries, tensors, _ = read_header(path)
  raw = {
    name: raw_of(path, name, one, package) for name, one in tensors.items()
  }
  check_places(path, raw)
  found = {}
  for name, one in tensors.items():
    own = raw[name]
    dequantise = None
    if not is_plain(one):
      kind = package.GGMLQuantizationType(one.kind)
      dequantise = functools.partial(package.quants.dequantize, qtype=kind)
    place = path, own.start or 0, np.dtype(own.dtype), tuple(own.shape)
    found[name] = _Stored(*place, tuple(one.shape), dequantise)
  return entries, found
