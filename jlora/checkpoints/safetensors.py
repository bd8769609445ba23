# SPDX-License-Identifier: Apache-2.0
"""Reading headers of safetensors files, and writing whole files.

A file is eight bytes of little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}`, and the
arrays' bytes, one after another without holes.

The official package reads and checks the headers. It does not move the arrays,
for reasons measured with 0.8:

- float8 does not come as a NumPy array, and an empty axis cannot be sliced.
- Mapped, the peak of resident memory is the whole file, and a file that is cut
  short while open ends the process by SIGBUS. With `backend="pread"` each slice
  reads its whole tensor.
- Each file stays mapped, and one rewritten in place is not noticed.
- Its writer needs all arrays in memory, writes those of Fortran's order as if
  they were of C's, and puts metadata into a new order each time: the same
  tensors would not give the same bytes.

References:
  https://github.com/huggingface/safetensors, section "Format".
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jlora.checkpoints.byte_ranges import place_arrays
from jlora.checkpoints.new_files import sync_folder
from jlora.checkpoints.sources import check_apart

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
_MAX_AXES = 64  # NumPy's limit
_LONGEST, _DEEPEST = 2**12, 2**6  # letters and slashes of a name

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

  Args:
    path: the file; symbolic links are followed.

  Returns:
    Header: specs in the order of the bytes, metadata, bytes read.

  Raises:
    ValueError: if the file cannot be opened, its header is not valid or does
      not describe every byte of the file exactly once, or NumPy has no array
      of a dtype or shape in it.

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
    size = path.stat().st_size
    with safe_open(path, "np") as file:
      stored = {name: file.get_slice(name) for name in file.offset_keys()}
      metadata = (file.metadata() or {}).items()
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  except SafetensorError as error:
    raise ValueError(
      f"{path} is not a whole safetensors file: {error}; download or save it"
      " again"
    ) from error
  specs = {
    name: _stored(path, name, array.get_shape(), array.get_dtype())
    for name, array in stored.items()
  }
  # The arrays fill the file from the header on, so sizes give the places.
  end = head = size - sum(spec.nbytes for spec in specs.values())
  for name, spec in specs.items():
    start, end = end, end + spec.nbytes
    specs[name] = spec._replace(start=start, end=end)
  in_order = sorted(specs, key=lambda n: (specs[n].start, specs[n].end, n))
  return Header(
    {name: specs[name] for name in in_order}, dict(sorted(metadata)), head
  )


def write_safetensors(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file, whole or not at all.

  The same tensors always give the same bytes.

  Args:
    path: the file. An existing one is replaced once the new one is complete.
    tensors: arrays by name, of any dtype the format has; may be a Checkpoint.
    metadata: strings to strings, stored in the header.

  Raises:
    ValueError: for a dtype the format lacks, metadata that is not strings, or a
      file that is, or would be, a part of the Checkpoint that is written.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/a.safetensors", {"w": np.ones(2)})
    ...   open_checkpoint(f"{folder}/a.safetensors")["w"]
    array([1., 1.])
  """
  check_apart(path, [tensors])
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
  sync_folder(Path(path).parent)


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


def _stored(
  path: Path, name: str, shape: Sequence[int], code: str
) -> TensorSpec:
  """Returns the spec of a stored tensor; raises unless NumPy can hold it."""
  where = f"{path}: tensor {name!r}"
  if len(name) > _LONGEST or name.count("/") > _DEEPEST:
    raise ValueError(
      f"{path}: a tensor's name has {len(name)} letters and {name.count('/')} "
      f"slashes, {name[:60]!r}...; at most {_LONGEST} and {_DEEPEST} are read"
    )
  if code not in DTYPES:
    raise ValueError(
      f"{where} has the dtype {code!r}; known are {', '.join(DTYPES)}"
    )
  dtype = DTYPES[code]
  if (
    len(shape) > _MAX_AXES
    or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63
  ):
    raise ValueError(f"{where}: no array can have the shape {tuple(shape)}")
  return TensorSpec(
    tuple(shape), dtype, math.prod(shape) * dtype.itemsize, path
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
