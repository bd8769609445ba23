# SPDX-License-Identifier: Apache-2.0
"""Reading regions of arrays inside files, and writing whole arrays into them.

Nothing here knows a file format: an array is a file, a shape, a dtype and the
byte where it starts. Arrays are row-major. Every call opens the file anew and
reads at an offset, so threads share no position, no descriptor stays open, and
no file is mapped into memory.
"""

import contextlib
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jlora.checkpoints.checksums import join_checksums
from jlora.checkpoints.new_files import (
  is_noted,
  move,
  name_temporary,
  open_new,
)
from jlora.messages import name_file, name_some

_CHUNK_BYTES = 2**22  # the buffer behind a slice of inner axes

Region = Sequence[range]  # one range of indices per axis


class StoredArray(Protocol):
  """An array's shape and dtype, and the byte of its file where it starts."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the lengths of the axes."""
    ...

  @property
  def dtype(self) -> np.dtype:
    """Returns the stored dtype."""
    ...

  @property
  def start(self) -> int | None:
    """Returns the first byte; None where it is not in one file."""
    ...


def stamp_of(path: Path) -> tuple[int, ...]:
  """Returns what changes when a file is rewritten: device, inode, size, time.

  Follows symbolic links. Raises a ValueError if the file cannot be opened.
  """
  with _opened(path) as file:
    return _stamp(file)


def read_region(
  path: Path,
  array: StoredArray,
  region: Region,
  stamp: tuple[int, ...] | None = None,
) -> tuple[np.ndarray, int]:
  """Reads one rectangular region of an array; returns it and the bytes read.

  A range of the leading axis is one read of exactly its bytes, straight into
  the result. Strided leading or partial inner axes are read through a buffer
  of at most 4 MiB, whole rows at a time.

  Args:
    path: the file.
    array: shape, dtype and first byte of the array.
    region: for each axis a `range` within it, with a positive step.
    stamp: from `stamp_of`; raises if the file changed since then.

  Returns:
    The array, of the ranges' lengths and the stored dtype, and the bytes read.

  Raises:
    ValueError: if the file is gone, changed, or ends within the array.

  Example:
    >>> import collections, tempfile
    >>> placed = collections.namedtuple("placed", "shape dtype start")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = Path(folder, "a")
    ...   np.arange(6.0).tofile(path)
    ...   whole = placed((3, 2), np.dtype(float), 0)
    ...   read_region(path, whole, (range(1, 2), range(2)))
    (array([[2., 3.]]), 16)
  """
  out = np.empty([len(indices) for indices in region], array.dtype)
  if out.size == 0:
    return out, 0
  with _opened(path) as file:
    if stamp is not None and _stamp(file) != stamp:
      raise ValueError(f"{path} changed since it was opened; open it anew")
    try:
      count = _fill(file, out, array.shape, tuple(region), array.start or 0)
    except EOFError as error:
      raise ValueError(f"{path}: {error}") from error
  return out, count


def place_arrays(
  files: Mapping[Path, tuple[bytes, Mapping[str, StoredArray]]],
  arrays: Iterable[tuple[str, np.ndarray | Iterator[np.ndarray]]],
) -> None:
  """Writes files from one stream of arrays, each array at its announced place.

  Temporary files beside the final ones take the arrays. After the last array
  they are synced and renamed, in the order given. One array, or part of one, is
  in memory at a time.

  Args:
    files: file -> its first bytes, and the announced arrays by name, which
      follow without holes.
    arrays: (name, array) pairs in any order, each announced name once. Instead
      of an array, an iterator of consecutive parts of its entries.

  Raises:
    ValueError: an array is missing, comes twice, was not announced, or differs
      from its announced shape, dtype or (in parts) size. No file is then
      written.

  Example:
    >>> import collections, tempfile
    >>> placed = collections.namedtuple("placed", "shape dtype start")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = Path(folder, "a")
    ...   slot = placed((2,), np.dtype("u1"), 1)
    ...   place_arrays({path: (b"x", {"w": slot})}, [("w", np.uint8([65, 66]))])
    ...   path.read_bytes()
    b'xAB'
  """
  temporaries: dict[Path, Path] = {}
  places: dict[str, tuple[Path, StoredArray]] = {}
  try:
    for path, (head, announced) in files.items():
      temporaries[path] = temporary = _reserve(path, head, announced)
      if shared := announced.keys() & places.keys():
        raise ValueError(
          f"{name_some(sorted(shared))}: announced for two files"
        )
      places |= {name: (temporary, slot) for name, slot in announced.items()}
    checksums = _place(places, arrays)
    for temporary in temporaries.values():
      with (
        _opened(temporary, os.O_RDWR | os.O_NOFOLLOW) as file,
        name_file(temporary),
      ):
        os.fsync(file)
    for path, temporary in temporaries.items():
      move(temporary, path, _checksum(*files[path], checksums))
  except BaseException:
    for temporary in temporaries.values():
      temporary.unlink(missing_ok=True)
    raise


def _reserve(
  path: Path, head: bytes, announced: Mapping[str, StoredArray]
) -> Path:
  """Makes a temporary file beside `path`: `head`, and room for the arrays."""
  if not path.parent.is_dir():
    raise ValueError(f"{path.parent} is not a folder; create it first")
  temporary = name_temporary(path)
  size = len(head) + sum(
    math.prod(slot.shape) * slot.dtype.itemsize for slot in announced.values()
  )
  opened = open_new(temporary)  # what has this name already is not ours
  try:
    with opened as stream, name_file(temporary):
      stream.write(head)
      stream.truncate(size)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  return temporary


def _place(
  places: Mapping[str, tuple[Path, StoredArray]],
  arrays: Iterable[tuple[str, np.ndarray | Iterator[np.ndarray]]],
) -> dict[str, int]:
  """Writes arrays to their places; raises unless each comes exactly once.

  Returns checksums by name, of nothing where nobody wants them.
  """
  missing, checksums, is_summed = dict(places), {}, is_noted()
  for name, given in arrays:
    if name not in missing:
      problem = "given twice" if name in places else "was not announced"
      raise ValueError(f"array {name!r} {problem}")
    path, slot = missing.pop(name)
    is_whole = not isinstance(given, Iterator)
    done, size, checksum = 0, math.prod(slot.shape), 0
    with _opened(path, os.O_WRONLY | os.O_NOFOLLOW) as file:
      for part in [given] if is_whole else given:
        part = np.asarray(part)
        fits = (
          part.shape == slot.shape if is_whole else part.size + done <= size
        )
        if part.dtype != slot.dtype or not fits:
          raise ValueError(
            f"array {name!r} was announced as {slot.dtype} {slot.shape}, but"
            f" {part.dtype} {part.shape} came after {done} entries of it"
          )
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        with name_file(path):
          _write(file, data, (slot.start or 0) + done * slot.dtype.itemsize)
        if is_summed:
          checksum = zlib.crc32(data, checksum)
        done += part.size
    if done < size:
      raise ValueError(f"array {name!r} ended after {done} of {size} entries")
    checksums[name] = checksum
  if missing:
    raise ValueError(
      f"{len(missing)} of {len(places)} announced arrays never came:"
      f" {name_some(sorted(missing))}"
    )
  return checksums


def _checksum(
  head: bytes,
  announced: Mapping[str, StoredArray],
  checksums: Mapping[str, int],
) -> int | None:
  """Returns the CRC-32 of a file from those of its arrays, if it is wanted."""
  if not is_noted():
    return None
  order = sorted(announced, key=lambda name: announced[name].start or 0)
  sizes = (
    math.prod(announced[name].shape) * announced[name].dtype.itemsize
    for name in order
  )
  arrays = zip((checksums[name] for name in order), sizes, strict=True)
  return join_checksums([(zlib.crc32(head), len(head)), *arrays])


def _write(file: int, view: memoryview, start: int) -> None:
  """Writes bytes at an offset."""
  done = 0
  while done < len(view):
    done += os.pwrite(file, view[done:], start + done)
  _begin_writing(file, start, len(view))


def _begin_writing(file: int, start: int, nbytes: int) -> None:
  """Asks the system to write at once, so that the final sync waits less."""
  if hasattr(os, "posix_fadvise"):
    os.posix_fadvise(file, start, nbytes, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
  """Opens a regular file and yields its descriptor; closes it on leaving."""
  if not path.is_file():
    raise ValueError(f"{path}: no such file")
  try:
    file = os.open(path, flags)
  except OSError as error:
    raise ValueError(f"{path} cannot be opened: {error.strerror}") from error
  try:
    yield file
  finally:
    os.close(file)


def _stamp(file: int) -> tuple[int, ...]:
  """Returns device, inode, size and time of change of an open file."""
  stat = os.fstat(file)
  return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read_into(file: int, out: np.ndarray, offset: int) -> int:
  """Fills a contiguous array, in several reads: one moves at most 2 GiB."""
  view = out.reshape(-1).view(np.uint8).data
  done = 0
  while done < len(view):
    count = os.preadv(file, [view[done:]], offset + done)
    if count == 0:
      raise EOFError(f"ends at byte {offset + done}, in the middle of a tensor")
    done += count
  return done


def _fill(
  file: int,
  out: np.ndarray,
  shape: tuple[int, ...],
  region: tuple[range, ...],
  offset: int,
) -> int:
  """Reads a region into `out`; returns the bytes read."""
  rest = region[1:]
  inner_is_whole = all(
    r == range(n) for r, n in zip(rest, shape[1:], strict=True)
  )
  if not region:
    return _read_into(file, out, offset)
  indices = region[0]
  row = math.prod(shape[1:]) * out.dtype.itemsize
  if inner_is_whole and (indices.step == 1 or len(indices) == 1):
    return _read_into(file, out, offset + indices.start * row)
  if len(indices) == 1 or row * indices.step > _CHUNK_BYTES:
    return sum(
      _fill(file, out[i : i + 1].reshape(out.shape[1:]), shape[1:], rest, at)
      for i, at in enumerate(offset + index * row for index in indices)
    )
  count = 0
  step = _CHUNK_BYTES // (row * indices.step)
  inner = tuple(slice(r.start, r.stop, r.step) for r in rest)
  for begin in range(0, len(indices), step):
    part = indices[begin : begin + step]
    rows = np.empty((part[-1] + 1 - part[0], *shape[1:]), out.dtype)
    count += _read_into(file, rows, offset + part[0] * row)
    out[begin : begin + step] = rows[(slice(None, None, part.step), *inner)]
  return count
