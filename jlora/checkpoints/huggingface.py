# SPDX-License-Identifier: Apache-2.0
"""Finding and writing the files of a Hugging Face checkpoint folder.

A folder holds one safetensors file, or shards with an index
`{"metadata": {"total_size": n}, "weight_map": {tensor: file}}`.

A shard may be a symbolic link that leads out of the folder, because the
download cache stores every file that way. A name that leads out is refused.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jlora.checkpoints.byte_ranges import place_arrays
from jlora.checkpoints.documents import read_json, shortened
from jlora.checkpoints.new_files import replace_text, sync_folder
from jlora.checkpoints.safetensors import Shapes, lay_out_file
from jlora.messages import name_some

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_NUMBERED = r"-\d+-of-\d+$"
_LONGEST = 255  # letters of a file's name
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def find_shards(
  folder: Path, variant: str | None = None
) -> dict[Path, set[str] | None]:
  """Finds the safetensors files that make up the checkpoint in a folder.

  The index decides if there is one; else it is `model.safetensors`, or else the
  only file, or the one that all others are variants of (`name.fp16.safetensors`
  beside `name.safetensors`), with a warning.

  Args:
    folder: an existing folder.
    variant: take the files of that one: `name.VARIANT.safetensors`, or the
      index `name.safetensors.index.VARIANT.json`.

  Returns:
    {file: names of the tensors it must hold, or None without an index}. Empty
    if there is no safetensors file.

  Raises:
    ValueError: if the index is damaged, names missing files or files outside
      the folder, or if it is not clear which files are meant.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   _ = Path(folder, "adapter_model.safetensors").touch()
    ...   [path.name for path in find_shards(Path(folder))]
    ['adapter_model.safetensors']
  """
  if variant is not None:
    return _find_variant(folder, variant)
  files = sorted(folder.glob("*.safetensors"))
  indices = sorted(folder.glob("*.safetensors.index.json"))
  single, index = folder / _SINGLE, folder / _INDEX
  if len(indices) > 1 and index not in indices:
    raise ValueError(f"{folder} holds several indices: {_names(indices)}")
  if indices:
    index = index if index in indices else indices[0]
    shards = _read_index(index)
    if single in files and single not in shards:
      raise ValueError(
        f"{folder} holds {_SINGLE} and {index.name} without it: two"
        " checkpoints; open one file by its own path or delete the other"
      )
    return shards
  if single in files:
    return {single: None}
  if len(files) > 1 and (plain := _without_variant(files)):
    others = [file for file in files if file != plain]
    warnings.warn(
      f"{folder}: {plain.name} is read, and not {_names(others)}; say "
      "variant=... to open_checkpoint, or give the file, for another.",
      stacklevel=3,
    )
    return {plain: None}
  if len(files) > 1:
    raise ValueError(
      f"{folder} holds {len(files)} safetensors files and no {_INDEX}:"
      f" {_names(files)}; restore the index or open one file by its own path"
    )
  return dict.fromkeys(files)


def _without_variant(files: list[Path]) -> Path | None:
  """Returns the file that all others are variants of, None if there is none."""
  plain = [file for file in files if "." not in file.stem]
  if len(plain) != 1:
    return None
  stem = f"{plain[0].stem}."
  is_only = all(f == plain[0] or f.name.startswith(stem) for f in files)
  return plain[0] if is_only else None


def _find_variant(folder: Path, variant: str) -> dict[Path, set[str] | None]:
  """Finds the files of one variant; raises unless they are clear."""
  indices = [
    path
    for path in folder.iterdir()
    if path.name.endswith(f".safetensors.index.{variant}.json")
  ]
  files = [
    path
    for path in folder.iterdir()
    if path.name.endswith(f".{variant}.safetensors")
  ]
  found = sorted(indices or files)
  if len(found) != 1:
    held = sorted(folder.glob("*.safetensors*"))
    raise ValueError(
      f"{folder} holds {len(found)} checkpoints of the variant {variant!r}, "
      f"needed is one; there are {_names(held) or 'no safetensors files'}."
    )
  return _read_index(found[0]) if indices else {found[0]: None}


def check_not_pickled(path: Path) -> None:
  """Raises if a file, or all weights in a folder, are Python pickles.

  Args:
    path: a file or folder.

  Raises:
    ValueError: tells how to convert them. Pickles can run code when loaded.

  Example:
    >>> check_not_pickled(Path("model.safetensors"))
    >>> check_not_pickled(Path("w.bin"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: w.bin holds pickled weights. ...
  """
  files = path.iterdir() if path.is_dir() else [path]
  if found := sorted(file for file in files if file.suffix in _PICKLES):
    raise ValueError(
      f"{_names(found)} holds pickled weights. Convert first: load them with"
      " torch.load(file, weights_only=True) and save the tensors with"
      " safetensors.torch.save_file, or load and save_pretrained the model"
      " with transformers"
    )


def stream_checkpoint(
  folder: str | os.PathLike,
  spec: Shapes,
  arrays: Iterable[tuple[str, np.ndarray]],
  *,
  max_shard_bytes: int = 5 * 2**30,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a Hugging Face checkpoint from arrays that come in any order.

  Args:
    folder: is made if it does not exist; must not hold a checkpoint yet.
    spec: name -> (shape, dtype), or a TensorSpec, in the order of the shards.
    arrays: (name, array) pairs, each name of `spec` exactly once. One array is
      in memory at a time.
    max_shard_bytes: the most bytes of arrays in a file; a larger tensor gets a
      file of its own.
    metadata: stored in each file; None writes {"format": "pt"}, which
      transformers asks for.

  Raises:
    ValueError: the folder holds a checkpoint; or an array is missing, comes
      twice, is not in `spec`, or has another shape or dtype. No file is then
      written.

  Example:
    >>> import tempfile
    >>> spec = {"a": ((2,), np.float32), "b": ((3,), np.float32)}
    >>> arrays = [("b", np.ones(3, "f4")), ("a", np.zeros(2, "f4"))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   stream_checkpoint(folder, spec, arrays, max_shard_bytes=12)
    ...   sorted(path.name for path in Path(folder).iterdir())
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors',
     'model.safetensors.index.json']
  """
  folder = Path(folder)
  plan = plan_shards(folder, spec, max_shard_bytes)
  metadata = {"format": "pt"} if metadata is None else metadata
  files = {
    path: lay_out_file(path, shard, metadata) for path, shard in plan.items()
  }
  folder.mkdir(parents=True, exist_ok=True)
  if found := [p.name for p in sorted(folder.glob("*.safetensors*"))]:
    raise ValueError(
      f"{folder} holds a checkpoint, {name_some(found)}; choose an empty folder"
      " or delete it first"
    )
  place_arrays(files, arrays)
  sync_folder(folder)
  if len(plan) > 1:
    write_index(folder, plan)


def plan_shards(
  folder: Path, tensors: Shapes, max_bytes: int, stem: str = "model"
) -> dict[Path, dict[str, tuple]]:
  """Deals tensors out to files of at most `max_bytes`, in the order given.

  Args:
    folder: where the files will be.
    tensors: name -> (shape, dtype), or a TensorSpec.
    max_bytes: of arrays in a file; a larger tensor gets a file of its own.
    stem: what the files' names begin with.

  Returns:
    {file: {name: (shape, dtype)}}, named as transformers names them.

  Raises:
    ValueError: if `max_bytes` is not positive.

  Example:
    >>> tensors = {"a": ((4,), "u1"), "b": ((3,), "u1"), "c": ((1,), "u1")}
    >>> plan = plan_shards(Path("."), tensors, 4)
    >>> {path.name: list(shard) for path, shard in plan.items()}
    {'model-00001-of-00002.safetensors': ['a'],
     'model-00002-of-00002.safetensors': ['b', 'c']}
  """
  if max_bytes < 1:
    raise ValueError(f"max_shard_bytes must be positive, not {max_bytes}")
  shards: list[dict[str, tuple]] = [{}]
  room = max_bytes
  for name, (shape, dtype, *_) in tensors.items():
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes > room and shards[-1]:
      shards.append({})
      room = max_bytes
    shards[-1][name] = (shape, dtype)
    room -= nbytes
  if len(shards) == 1:
    return {folder / f"{stem}.safetensors": shards[0]}
  return {
    folder / f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard
    for i, shard in enumerate(shards, 1)
  }


def write_index(folder: Path, shards: Mapping[Path, Shapes]) -> None:
  """Writes the index of shards from `plan_shards`, whole or not at all."""
  weight_map = {
    name: path.name for path, tensors in shards.items() for name in tensors
  }
  total = sum(
    math.prod(shape) * np.dtype(dtype).itemsize
    for tensors in shards.values()
    for shape, dtype, *_ in tensors.values()
  )
  index = {
    "metadata": {"total_size": total},
    "weight_map": dict(sorted(weight_map.items())),
  }
  first = next(iter(shards)).stem
  name = f"{re.sub(_NUMBERED, '', first)}.safetensors.index.json"
  replace_text(folder / name, json.dumps(index, indent=2))


def _read_index(index: Path) -> dict[Path, set[str] | None]:
  """Reads an index: each shard, and the names of the tensors it must hold."""
  found = read_json(index, is_unique=True)
  weight_map = found.get("weight_map") if isinstance(found, dict) else None
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f"{index} has no weight_map from tensors to files")
  shards: dict[Path, set[str] | None] = {}
  names: dict[str, set[str]] = {}
  for tensor, name in weight_map.items():
    # A bare name cannot climb out, whichever separator the system uses.
    is_text = isinstance(name, str) and len(name) <= _LONGEST
    if not is_text or set("/\\:\0") & set(name):
      raise ValueError(
        f"{index}: tensor {tensor!r} lies in {shortened(name)}, which is not"
        " the name of a file beside the index"
      )
    names.setdefault(name, set()).add(tensor)
  for name, tensors in sorted(names.items()):
    if not name.endswith(".safetensors") or not (index.parent / name).is_file():
      raise ValueError(
        f"{index} needs the safetensors file {name!r}, for"
        f" {name_some(sorted(tensors))}; it is not there: download it again"
      )
    shards[index.parent / name] = tensors
  return shards


def _names(paths: list[Path]) -> str:
  """Lists file names for an error message."""
  return name_some([path.name for path in paths])
