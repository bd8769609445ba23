# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: entries, and where its tensors lie.

    magic, version, counts | entries | tensors' names and places | data

Lists are passed over: of the vocabulary only the length is kept.

References:
  ggml-org/ggml, `docs/gguf.md`.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Codes of an entry's type -> how struct reads it.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
            10: "Q", 11: "q", 12: "d"}  # fmt: skip
_STRING, _LIST = 8, 9
_LONGEST_NAME, _MOST_AXES = 2**16, 4


class Stored(NamedTuple):
  """A tensor of the file.

  Attributes:
    shape: as NumPy has it, the axis that lies together last.
    kind: code of its type.
    start: its first byte in the file.
  """

  shape: tuple[int, ...]
  kind: int
  start: int


class ListOf(NamedTuple):
  """A list among the entries, of which the length alone is read.

  Attributes:
    count: its length.
  """

  count: int


class _Reader:
  """Reads values one after the other; past the end is an error."""

  def __init__(self, data: mmap.mmap):
    self.data, self.at = data, 0

  def skip(self, count: int) -> int:
    """Moves on; returns where it was."""
    start = self.at
    if count > len(self.data) - start:
      raise ValueError("it ends within its header")
    self.at += count
    return start

  def number(self, form: str) -> Any:
    """Reads one number."""
    start = self.skip(struct.calcsize(f"<{form}"))
    return struct.unpack_from(f"<{form}", self.data, start)[0]

  def text(self) -> str:
    """Reads a string."""
    count = self.number("Q")
    start = self.skip(count)
    return bytes(self.data[start : start + count]).decode("utf-8", "replace")

  def value(self, kind: int) -> Any:
    """Reads an entry's value."""
    if kind in _NUMBERS:
      return self.number(_NUMBERS[kind])
    if kind == _STRING:
      return self.text()
    if kind != _LIST:
      raise ValueError(f"an entry has the unknown type {kind}")
    inner, count = self.number("I"), self.number("Q")
    if inner == _STRING:
      for _ in range(count):
        self.skip(self.number("Q"))
    elif inner in _NUMBERS:
      self.skip(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
    else:
      raise ValueError(f"a list has entries of the unknown type {inner}")
    return ListOf(count)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Stored], int]:
  """Reads the header of a GGUF file.

  Args:
    path: a regular file.

  Returns:
    {entry: number, string or ListOf}, {tensor: Stored}, and the header's bytes.

  Raises:
    ValueError: another format or version, the bytes of the other endianness, or
      a damaged header.

  Example:
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...   read_header(Path(file.name))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: /... is no GGUF file: it is too short.
  """
  with path.open("rb") as file:
    if len(file.read(24)) < 24:
      raise ValueError(f"{path} is no GGUF file: it is too short.")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      try:
        return _parse(_Reader(data))
      except (ValueError, struct.error) as error:
        raise ValueError(f"{path} is no whole GGUF file: {error}.") from None


def _parse(reader: _Reader) -> tuple[dict[str, Any], dict[str, Stored], int]:
  """Reads all of a header."""
  start = reader.skip(4)
  if reader.data[start : start + 4] != MAGIC:
    raise ValueError("it does not begin with GGUF")
  version = reader.number("I")
  if version not in _VERSIONS:
    raise ValueError(f"version {version} is not one of {_VERSIONS}")
  n_tensors, n_entries = reader.number("Q"), reader.number("Q")
  entries: dict[str, Any] = {}
  for _ in range(n_entries):
    name = reader.text()
    entries[name] = reader.value(reader.number("I"))
  found: dict[str, Stored] = {}
  for _ in range(n_tensors):
    name, axes = reader.text(), reader.number("I")
    if name in found or len(name) > _LONGEST_NAME or axes > _MOST_AXES:
      raise ValueError(f"tensor {name[:99]!r} is there twice, or is damaged")
    shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
    found[name] = Stored(shape, reader.number("I"), reader.number("Q"))
  alignment = entries.get("general.alignment", 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise ValueError(f"general.alignment is {alignment!r}")
  begin = -(-reader.at // alignment) * alignment
  return (
    entries,
    {
      name: one._replace(start=begin + one.start) for name, one in found.items()
    },
    reader.at,
  )
