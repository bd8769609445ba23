# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk as lazy mappings from names to NumPy arrays.

    safetensors or GGUF file | Hugging Face folder | orbax directory
      -> {name: array}

Opening reads only headers and metadata, and validates all of them. An array, or
a slice of one, is read when asked for. float8 weights come multiplied by their
scales, and weights of MXFP4 or bitsandbytes dequantised. Writers put a file in
its place only when it is complete.
"""

import math
import operator
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.checkpoints import byte_ranges, gguf, huggingface, orbax
from jlora.checkpoints.documents import read_config
from jlora.checkpoints.float8 import (
  FLOAT8,
  dequantise,
  find_casts,
  pair_other_scales,
  pair_scales,
)
from jlora.checkpoints.hub import locate
from jlora.checkpoints.quantised import find_packed
from jlora.checkpoints.safetensors import (
  TensorSpec,
  read_header,
)
from jlora.checkpoints.safetensors import (
  stream_safetensors as stream_safetensors,
)
from jlora.messages import name_some

# A stored tensor's name and region -> the array, and the bytes read for it.
_Read = Callable[[str, Sequence[range]], tuple[np.ndarray, int]]


class Checkpoint(Mapping[str, np.ndarray]):
  """A checkpoint on disk: a mapping from names to arrays, read on demand.

  `checkpoint[name]` is the whole array in its stored dtype, bfloat16 included.
  float8 weights come as float32, codes times scales, and weights of MXFP4 and
  bitsandbytes in the dtype they were made from; what lies beside a quantised
  weight is not among the names. Several threads may read at once. No file stays
  open.

  Attributes:
    path: what was opened.
    format: "safetensors", "gguf", "huggingface" or "orbax".
    places: the files, or the one folder of orbax, that hold its arrays.
    spec: name -> TensorSpec, with the stored dtype; known without reading. Of
      a weight of MXFP4 or bitsandbytes it has the dtype as read.
    companions: name of a scale, or of another tensor beside a quantised weight
      -> name of the weight it belongs to.
    casts: names of float8 weights without a scale, whose codes are the values.
    left_out: name of a tensor that is not among the names, and is no companion
      -> why; empty unless the checkpoint was opened by components.
    metadata: the `__metadata__` strings of all files together.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/x.safetensors", {"w": np.eye(3)})
    ...   checkpoint = open_checkpoint(folder)
    ...   checkpoint.read("w", (slice(1, 2),)), checkpoint.spec["w"].shape
    (array([[0., 1., 0.]]), (3, 3))
  """

  def __init__(
    self,
    path: Path,
    format: str,
    stored: Mapping[str, TensorSpec],
    read: _Read,
    *,
    places: Sequence[Path] = (),
    metadata: Mapping[str, str] | None = None,
    bytes_read: int = 0,
    config: Mapping[str, Any] | None = None,
    float8: str | None = None,
  ):
    self.path = path
    self.places = tuple(places)
    self.format = format
    self.metadata = dict(metadata or {})
    self._stored = stored
    self._read = read
    self._lock = threading.Lock()
    self._bytes_read = bytes_read
    self._config = config
    self.left_out: dict[str, str] = {}
    self.casts = find_casts(stored, self.metadata, float8 == "cast")
    try:
      scales = pair_scales(
        {name: own for name, own in stored.items() if name not in self.casts}
      )
      self._packed = find_packed(stored, self._read_counted)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
    self._scales = {weight: name for name, weight in scales.items()}
    self.companions = {**scales, **pair_other_scales(stored, scales)}
    for name, packed in self._packed.items():
      self.companions |= {part: name for part in packed.parts if part != name}
    made = {packed.parts[0]: name for name, packed in self._packed.items()}
    self.spec = {
      made.get(name, name): self._packed[made[name]].spec
      if name in made
      else spec
      for name, spec in stored.items()
      if name in made or name not in self.companions
    }

  def __getitem__(self, name: str) -> np.ndarray:
    return self.read(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self.spec)

  def __len__(self) -> int:
    return len(self.spec)

  def __contains__(self, name: object) -> bool:
    return name in self.spec

  def __repr__(self) -> str:
    return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"

  @property
  def model_type(self) -> str | None:
    """Returns `model_type` of the folder's config.json, None if it has none."""
    return self.config.get("model_type")

  @property
  def config(self) -> dict[str, Any]:
    """Returns what the folder's config.json says, {} if it has none.

    Of a GGUF file it is what its header tells. Raises a ValueError if it is no
    regular file or no such configuration.
    """
    if self._config is not None:
      return dict(self._config)
    file = self.path / "config.json"
    if not file.exists():
      return {}
    return read_config(file)

  @property
  def bytes_read(self) -> int:
    """Returns the bytes read so far, headers included.

    A region of an orbax leaf counts with its size in memory.
    """
    return self._bytes_read

  def read(self, name: str, index: Any = ()) -> np.ndarray:
    """Reads `self[name][index]`, and of the file only that leading-axis slice.

    Args:
      name: a key.
      index: integers, slices with positive step, and one `...`, as for NumPy.

    Returns:
      The array, in its stored dtype; float32 if that is float8. Slices of inner
      axes read whole rows, through a buffer of at most 4 MiB.

    Raises:
      KeyError: if there is no such tensor.
      ValueError: if the index does not fit, or the file changed or is damaged.

    Example:
      >>> import tempfile
      >>> from jlora.checkpoints import write_safetensors
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   write_safetensors(f"{folder}/x.safetensors", {"w": np.eye(3)})
      ...   open_checkpoint(folder).read("w", (slice(1, 3), 1))
      array([1., 0.])
    """
    spec = self.spec[name]
    region, shape = region_of(name, spec.shape, index)
    if name in self._packed:
      array = self._packed[name].read(self._read_counted, region)
      return array.reshape(shape)
    array = self._read_counted(name, region)
    if name in self.casts:
      array = array.astype(np.float32)
    elif spec.dtype in FLOAT8 and name in self._scales:
      scale = self._scales[name]
      whole = [range(n) for n in self._stored[scale].shape]
      scales = self._read_counted(scale, whole)
      array = dequantise(array, scales, spec.shape, region)
    return array.reshape(shape)

  def read_float32(self, name: str, index: Any = ()) -> np.ndarray:
    """Reads as `read` does, and converts any floating dtype to float32.

    Args:
      name: a key.
      index: as in `read`.

    Returns:
      float32. Every stored value up to 32 bits is represented exactly.

    Raises:
      KeyError: if there is no such tensor.
      ValueError: if the tensor is not floating; otherwise as `read`.

    Example:
      >>> import tempfile
      >>> from jlora.checkpoints import write_safetensors
      >>> half = np.ones(2, np.float16)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   write_safetensors(f"{folder}/x.safetensors", {"w": half})
      ...   open_checkpoint(folder).read_float32("w")
      array([1., 1.], dtype=float32)
    """
    dtype = self.spec[name].dtype
    if dtype.kind in "biuc":
      raise ValueError(f"{self.path}: tensor {name!r} is {dtype}, not floating")
    return self.read(name, index).astype(np.float32, copy=False)

  def _read_counted(self, name: str, region: Sequence[range]) -> np.ndarray:
    """Reads a region and counts its bytes."""
    array, count = self._read(name, region)
    with self._lock:
      self._bytes_read += count
    return array


def open_checkpoint(
  path: str | os.PathLike,
  *,
  variant: str | None = None,
  float8: str | None = None,
) -> Checkpoint:
  """Opens the checkpoint at a path; its arrays are not read yet.

  Args:
    path: a `.safetensors` file; a `.gguf` file of a language model (extra
      `gguf`), whose tensors come under Hugging Face's names, quantised ones as
      float32 with a warning; a Hugging Face folder with one such file or
      shards and their index, or the Hub id of one that was downloaded into the
      Hugging Face cache; or an orbax directory, from the root of its steps
      (the newest finished one is taken) down to the item with the arrays.
    variant: of a Hugging Face folder, as in `name.fp16.safetensors`; None takes
      the files without one, with a warning where others are beside them and
      neither an index nor `model.safetensors` says which are meant.
    float8: "cast" reads float8 weights without a scale as what they are in
      files that were cast: each code is the value. None does so, with a
      warning, where no float8 weight has a scale, and else refuses them.

  Returns:
    Checkpoint, a lazy mapping. Orbax leaves are named by their tree paths
    joined with "/".

  Raises:
    ValueError: if there is nothing to open, a file is damaged, the index and
      the shards disagree, it is not clear which arrays are meant, the weights
      are pickled, a float8 weight has no scale that fits, or what describes a
      weight of bitsandbytes is damaged.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/model.safetensors", {"w": np.ones(2)})
    ...   dict(open_checkpoint(folder))
    {'w': array([1., 1.])}
  """
  if float8 not in (None, "cast"):
    raise ValueError(f"float8 must be 'cast' or None, got {float8!r}.")
  path = locate(path)
  if variant is not None and not path.is_dir():
    raise ValueError(
      f"{path} is a file, which has no variant {variant!r}; give its folder."
    )
  if not path.is_dir() and path.suffix == ".gguf":
    return _open_gguf(path)
  if not path.is_dir():
    huggingface.check_not_pickled(path)
    return _open_files(path, "safetensors", {path: None}, float8)
  if shards := huggingface.find_shards(path, variant):
    return _open_files(path, "huggingface", shards, float8)
  if folder := orbax.find_item(path):
    return _open_orbax(path, folder)
  huggingface.check_not_pickled(path)
  if (path / "model_index.json").is_file():
    raise ValueError(
      f"{path} is a pipeline's folder; give that of one of its components, "
      "such as its unet or transformer."
    )
  raise ValueError(
    f"{path} holds neither safetensors files nor a finished orbax checkpoint"
  )


def _open_files(
  path: Path,
  format: str,
  shards: Mapping[Path, set[str] | None],
  float8: str | None,
) -> Checkpoint:
  """Opens safetensors files as one checkpoint."""
  stored: dict[str, TensorSpec] = {}
  stamps, metadata, count = {}, {}, 0
  for file, expected in shards.items():
    stamps[file] = byte_ranges.stamp_of(file)
    header = read_header(file)
    if expected is not None:
      _check_shard(file, header.spec.keys(), expected)
    stored |= header.spec
    metadata |= header.metadata
    count += header.nbytes

  def read(name: str, region: Sequence[range]) -> tuple[np.ndarray, int]:
    spec = stored[name]
    file = spec.file or path
    try:
      return byte_ranges.read_region(file, spec, region, stamps[file])
    except ValueError as error:
      raise ValueError(f"tensor {name!r}: {error}") from error

  found = Checkpoint(
    path,
    format,
    stored,
    read,
    places=list(shards),
    metadata=metadata,
    bytes_read=count,
    float8=float8,
  )
  if found.casts and float8 is None:
    _tell_casts(found)
  return found


def _tell_casts(found: Checkpoint) -> None:
  """Warns that codes are read as values; raises if config.json differs."""
  names = name_some(sorted(found.casts))
  if "quantization_config" in found.config:
    raise ValueError(
      f"{found.path}: config.json says that weights are quantised, but no "
      f"float8 tensor has a scale: {names}. Download the files again, or say "
      "--float8=cast (float8='cast') if each code is the value."
    )
  warnings.warn(
    f"{found.path}: no float8 tensor has a scale, so the codes of "
    f"{len(found.casts)} are read as the values: {names}; say float8='cast' if "
    "that is known.",
    stacklevel=4,
  )


def _open_gguf(path: Path) -> Checkpoint:
  """Opens a GGUF file as a checkpoint."""
  found = gguf.open_model(path)
  return Checkpoint(
    path,
    "gguf",
    found.stored,
    found.read,
    places=[path],
    metadata=found.metadata,
    bytes_read=found.nbytes,
    config=found.config,
  )


def _open_orbax(path: Path, folder: Path) -> Checkpoint:
  """Opens the arrays in an orbax item as a checkpoint."""
  leaves = orbax.list_leaves(folder)
  stored = {
    name: TensorSpec(
      leaf.shape, leaf.dtype, math.prod(leaf.shape) * leaf.dtype.itemsize
    )
    for name, leaf in leaves.items()
  }

  def read(name: str, region: Sequence[range]) -> tuple[np.ndarray, int]:
    try:
      array = orbax.read_leaf(leaves[name], region)
    except ValueError as error:
      raise ValueError(f"{folder}: tensor {name!r}: {error}") from error
    return array, array.nbytes

  return Checkpoint(path, "orbax", stored, read, places=[folder])


def _check_shard(file: Path, found: Iterable[str], expected: set[str]) -> None:
  """Raises unless a shard holds exactly the tensors that the index says."""
  found = set(found)
  for names, problem in (
    (expected - found, "which the index places there"),
    (found - expected, "which the index does not place there"),
  ):
    if names:
      verb = "lacks" if names <= expected else "holds"
      raise ValueError(
        f"{file} {verb} {len(names)} tensors {problem}:"
        f" {name_some(sorted(names))}; download the folder again"
      )


def region_of(
  name: str, shape: tuple[int, ...], index: Any
) -> tuple[tuple[range, ...], tuple[int, ...]]:
  """Turns NumPy's basic index into a range per axis, and the result's shape.

  Args:
    name: of the tensor, for errors.
    shape: its shape.
    index: integers, slices with positive step, and one `...`.

  Returns:
    Which indices of each axis are meant, and the shape of what NumPy returns.

  Raises:
    ValueError: the index does not fit.

  Example:
    >>> region_of("w", (4, 5), (1, slice(2, None)))
    ((range(1, 2), range(2, 5)), (3,))
  """
  index = index if isinstance(index, tuple) else (index,)
  dots = [at for at, part in enumerate(index) if part is Ellipsis]
  if dots:
    at = dots[0]
    fill = (slice(None),) * (len(shape) - len(index) + 1)
    index = index[:at] + fill + index[at + 1 :]
  index += (slice(None),) * (len(shape) - len(index))
  region, left = [], []
  try:
    for n, part in zip(shape, index, strict=True):
      if isinstance(part, slice):
        region.append(range(n)[part])
        left.append(len(region[-1]))
      else:
        at = range(n)[operator.index(part)]
        region.append(range(at, at + 1))
  except (TypeError, IndexError, ValueError) as error:
    raise ValueError(
      f"index {index} does not fit tensor {name!r} of shape {shape}"
    ) from error
  if any(indices.step < 1 for indices in region):
    raise ValueError(f"index {index} of tensor {name!r} has a negative step")
  return tuple(region), tuple(left)
