# SPDX-License-Identifier: Apache-2.0
"""Reading, checking and writing safetensors files.

A file is eight bytes of little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}`, and the
arrays' bytes, one after another without holes.

`read_header` refuses whatever the official reader refuses, and besides: names
given twice, fields other than the three, dtypes outside the table, and shapes
that NumPy cannot hold. `write_safetensors` and `stream_safetensors` lay out the
header first, then write each array at its place.

References:
  https://github.com/huggingface/safetensors, section "Format".
"""

import collections
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jlora.checkpoints.byte_ranges import place_arrays

DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "U16": np.dtype("<u2"),
  "I16": np.dtype("<i2"),
  "F16": np.dtype("<f2"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "U32": np.dtype("<u4"),
  "I32": np.dtype("<i4"),
  "F32": np.dtype("<f4"),
  "U64": np.dtype("<u8"),
  "I64": np.dtype("<i8"),
  "F64": np.dtype("<f8"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_HEADER_BYTES = 100_000_000  # the official limit
_MAX_AXES = 64  # NumPy's limit

Shapes = Mapping[str, tuple]  # name -> (shape, dtype), or a TensorSpec


class TensorSpec(NamedTuple):
  """The shape, dtype and place of a stored tensor, known without reading it.

  Attributes:
    shape: lengths of the axes.
    dtype: as stored; ml_dtypes for bfloat16 and float8.
    nbytes: bytes as stored.
    file: the file that holds it; None in an orbax checkpoint.
    start: first byte, counted from the beginning of the file, or None.
    end: one past the last byte, or None.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  nbytes: int
  file: Path | None = None
  start: int | None = None
  end: int | None = None


class Header(NamedTuple):
  """The contents of a file's header.

  Attributes:
    spec: name -> TensorSpec, in the order of the bytes.
    metadata: the `__metadata__` entry, strings to strings.
    nbytes: bytes before the first array, all that was read.
  """

  spec: dict[str, TensorSpec]
  metadata: dict[str, str]
  nbytes: int


def read_header(path: str | os.PathLike) -> Header:
  """Reads and validates the header of a safetensors file; no array is read.

  The announced length is compared with the size of the file before memory is
  allocated for it.

  Args:
    path: the file; symbolic links are followed.

  Returns:
    Header: specs in the order of the bytes, metadata, bytes read.

  Raises:
    ValueError: if the file cannot be opened, or its header is not valid or
      does not describe every byte of the file exactly once.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = Path(folder, "a.safetensors")
    ...   head, _ = lay_out_file(path, {"w": ((2, 3), "float32")})
    ...   _ = path.write_bytes(head + bytes(24))
    ...   header = read_header(path)
    >>> header.spec["w"].shape, header.spec["w"].nbytes
    ((2, 3), 24)
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: no such file")
  try:
    with open(path, "rb", buffering=0) as stream:
      size = os.fstat(stream.fileno()).st_size
      length = _header_length(path, stream.read(8), size)
      text = stream.read(length)
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}") from error
  entries = parse_json(text, path)
  metadata = _checked_metadata(entries.pop("__metadata__", None), path)
  specs = {
    name: _parse_entry(path, name, entry, 8 + length)
    for name, entry in entries.items()
  }
  ordered = sorted(
    (spec.start or 0, spec.end or 0, name) for name, spec in specs.items()
  )
  _check_cover(path, ordered, 8 + length, size)
  in_order = {name: specs[name] for _, _, name in ordered}
  return Header(in_order, metadata, 8 + length)


def write_safetensors(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file, whole or not at all.

  The same tensors always give the same bytes.

  Args:
    path: the file. An existing one is replaced once the new one is complete.
    tensors: arrays by name, of any dtype the format has.
    metadata: strings to strings, stored in the header.

  Raises:
    ValueError: for a dtype the format lacks, or metadata that is not strings.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/a.safetensors", {"w": np.ones(2)})
    ...   open_checkpoint(f"{folder}/a.safetensors")["w"]
    array([1., 1.])
  """
  arrays = {name: np.asarray(array) for name, array in tensors.items()}
  spec = {name: (array.shape, array.dtype) for name, array in arrays.items()}
  stream_safetensors(path, spec, arrays.items(), metadata)


def stream_safetensors(
  path: str | os.PathLike,
  spec: Shapes,
  arrays: Iterable[tuple[str, np.ndarray | Iterator[np.ndarray]]],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file from arrays that come one by one, in any order.

  The header is laid out from `spec` first, so each array goes straight to its
  place: one, or part of one, is in memory at a time.

  Args:
    path: the file. An existing one is replaced once the new one is complete.
    spec: name -> (shape, dtype), or a TensorSpec: what the file will hold.
    arrays: (name, array) pairs, each name of `spec` exactly once. Instead of an
      array, an iterator of consecutive parts of its entries.
    metadata: strings to strings, stored in the header.

  Raises:
    ValueError: an array is missing, comes twice, is not in `spec`, or differs
      from its shape, dtype or (in parts) size there. The file is then not
      written.

  Example:
    >>> import tempfile
    >>> spec = {"a": ((2,), np.float32), "b": ((), np.int8)}
    >>> arrays = {"b": np.int8(1), "a": np.zeros(2, np.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   stream_safetensors(f"{folder}/x.safetensors", spec, arrays.items())
    ...   list(read_header(f"{folder}/x.safetensors").spec)
    ['a', 'b']
  """
  files = {Path(path): lay_out_file(path, spec, metadata)}
  place_arrays(files, arrays)


def lay_out_file(
  path: str | os.PathLike,
  tensors: Shapes,
  metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, TensorSpec]]:
  """Returns the header bytes of a new file, and every tensor's place in it.

  The widest dtype comes first, then names in order, so every array is aligned
  and the same tensors give the same bytes.

  Args:
    path: the file, for specs and error messages; it is not touched.
    tensors: name -> (shape, dtype), or a TensorSpec.
    metadata: strings to strings, stored as `__metadata__`.

  Returns:
    The header with its length in front, and name -> TensorSpec.

  Raises:
    ValueError: for a name or dtype the format lacks, or metadata that is not
      strings.

  Example:
    >>> head, spec = lay_out_file("x.safetensors", {"w": ((2, 3), "float32")})
    >>> len(head), spec["w"].start, spec["w"].end
    (72, 72, 96)
  """
  path, places, position = Path(path), {}, 0
  specs = {name: _announced(path, name, *tensors[name][:2]) for name in tensors}
  entries: dict[str, Any] = {}
  if metadata is not None:
    checked = _checked_metadata(metadata, path)
    entries["__metadata__"] = dict(sorted(checked.items()))
  for name in sorted(specs, key=lambda n: (-specs[n].dtype.itemsize, n)):
    spec = specs[name]
    start, position = position, position + spec.nbytes
    entries[name] = {
      "dtype": _CODES[spec.dtype],
      "shape": spec.shape,
      "data_offsets": (start, position),
    }
    places[name] = (start, position)
  text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # arrays begin aligned, as the official ones
  base = 8 + len(text)
  return len(text).to_bytes(8, "little") + text, {
    name: specs[name]._replace(start=base + start, end=base + end)
    for name, (start, end) in places.items()
  }


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
  """Parses a JSON object; refuses repeated names and negative numbers.

  Args:
    text: UTF-8.
    path: where it came from, for the error message.

  Raises:
    ValueError: if it is not UTF-8, not JSON, nested too deeply, not an object,
      or has a name twice or a negative integer.
  """
  try:
    found = json.loads(
      text.decode(), object_pairs_hook=_unique, parse_int=_natural
    )
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not a valid JSON header: {error}") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path}: a JSON object is needed, not {type(found)}")
  return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Makes a dict of a JSON object's pairs; raises if a name occurs twice."""
  found = dict(pairs)
  if len(found) != len(pairs):
    names = collections.Counter(name for name, _ in pairs)
    raise ValueError(f"{names.most_common(1)[0][0]!r} is given twice")
  return found


def _natural(digits: str) -> int:
  """Parses an integer; raises if it is negative."""
  if digits.startswith("-"):
    raise ValueError(f"negative number {digits[:20]}")
  return int(digits)


def _header_length(path: Path, head: bytes, size: int) -> int:
  """Returns the announced header length; raises if the file cannot hold it."""
  if len(head) < 8:
    raise ValueError(
      f"{path}: {size} bytes, too few for a safetensors file, which begins"
      " with an 8-byte header length; download or save it again"
    )
  length = int.from_bytes(head, "little")
  if length > min(size - 8, _MAX_HEADER_BYTES):
    raise ValueError(
      f"{path}: header of {length} bytes announced, but the file has {size}"
      f" and {_MAX_HEADER_BYTES} are allowed; not a safetensors file, or"
      " truncated"
    )
  return length


def _checked_metadata(metadata: Any, path: Path) -> dict[str, str]:
  """Returns metadata as a dict; raises unless it maps strings to strings."""
  metadata = {} if metadata is None else metadata
  if not isinstance(metadata, Mapping) or not all(
    isinstance(text, str) for pair in metadata.items() for text in pair
  ):
    raise ValueError(f"{path}: __metadata__ must map strings to strings")
  for text in (text for pair in metadata.items() for text in pair):
    _check_text(text, path)
  return dict(metadata)


def _check_text(text: str, path: Path) -> None:
  """Raises unless a text can be stored as UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"{path}: {text!r} is not valid Unicode") from error


def _parse_entry(path: Path, name: str, entry: Any, base: int) -> TensorSpec:
  """Parses a tensor's header entry; its offsets count from the byte `base`."""
  _check_text(name, path)
  where = f"{path}: tensor {name!r}"
  if not isinstance(entry, dict) or entry.keys() != _FIELDS:
    raise ValueError(f"{where} must have exactly dtype, shape, data_offsets")
  code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(code, str) or code not in DTYPES:
    raise ValueError(
      f"{where} has the unknown dtype {code!r}; known are {', '.join(DTYPES)}"
    )
  for field, numbers in (("shape", shape), ("data_offsets", offsets)):
    if not isinstance(numbers, list) or any(
      type(n) is not int for n in numbers
    ):
      raise ValueError(f"{where}: {field} must be a list of integers")
  if len(offsets) != 2:
    raise ValueError(f"{where}: data_offsets must be begin and end")
  dtype = DTYPES[code]
  if (
    len(shape) > _MAX_AXES
    or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63
  ):
    raise ValueError(f"{where}: no array can have the announced shape")
  nbytes = math.prod(shape) * dtype.itemsize
  if offsets[1] - offsets[0] != nbytes:
    raise ValueError(
      f"{where}: shape {tuple(shape)} of {code} takes {nbytes} bytes, but"
      f" data_offsets hold {offsets[1] - offsets[0]}"
    )
  start, end = (base + offset for offset in offsets)
  return TensorSpec(tuple(shape), dtype, nbytes, path, start, end)


def _check_cover(
  path: Path, ordered: list[tuple[int, int, str]], position: int, size: int
) -> None:
  """Raises unless every byte of the file belongs to exactly one tensor."""
  for start, end, name in ordered:
    if start != position:
      kind = "leaves a hole" if start > position else "overlaps another"
      raise ValueError(
        f"{path}: tensor {name!r} {kind}: begins at byte {start}, while the"
        f" ones before it end at {position}"
      )
    if end > size:
      raise ValueError(
        f"{path}: tensor {name!r} ends at byte {end}, but the file has {size}:"
        " truncated; download or save it again"
      )
    position = end
  if position != size:
    raise ValueError(
      f"{path}: {size - position} bytes after the last tensor belong to none"
    )


def _announced(
  path: Path, name: str, shape: Sequence[int], dtype: DTypeLike
) -> TensorSpec:
  """Returns the spec of a tensor to be written, its place still open."""
  dtype = np.dtype(dtype)
  if not isinstance(name, str) or name == "__metadata__":
    raise ValueError(f"{path}: {name!r} cannot name a tensor")
  _check_text(name, path)
  if dtype not in _CODES:
    raise ValueError(
      f"{path}: tensor {name!r} is {dtype}, which safetensors lacks; cast it"
      f" to one of {', '.join(map(str, _CODES))}"
    )
  shape = tuple(int(n) for n in shape)
  return TensorSpec(shape, dtype, math.prod(shape) * dtype.itemsize, path)
