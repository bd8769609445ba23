# SPDX-License-Identifier: Apache-2.0
"""CRC-32 of whole files, also of files that were written in any order.

A checksum tells that a file is still what was written: against a damaged disk
or another file of that name, not against somebody who means harm.
"""

import functools
import zlib
from collections.abc import Iterable
from pathlib import Path

_READ = 2**22  # bytes read at a time

# CRC-32 is a remainder modulo a polynomial over {0, 1}; the highest bit of an
# integer here is the coefficient of x to the power of 0.
_MODULUS = 0xEDB88320
_ONE = 1 << 31


def checksum_of(path: Path) -> str:
  """Returns the CRC-32 of a file.

  Args:
    path: a regular file.

  Returns:
    8 hexadecimal digits.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   _ = Path(folder, "x").write_bytes(b"123456789")
    ...   checksum_of(Path(folder, "x"))
    'cbf43926'
  """
  found = 0
  with open(path, "rb") as file:
    while part := file.read(_READ):
      found = zlib.crc32(part, found)
  return as_text(found)


def join_checksums(parts: Iterable[tuple[int, int]]) -> int:
  """Returns the CRC-32 of parts put one after the other, from theirs.

      crc(a b) = crc(a) x^(8 |b|) + crc(b)        modulo CRC-32's polynomial

  Args:
    parts: (CRC-32, number of bytes), in order.

  Returns:
    The CRC-32. No byte is read; a part costs 0.2 ms.

  Example:
    >>> one, two = b"12345", b"6789"
    >>> as_text(join_checksums((zlib.crc32(x), len(x)) for x in (one, two)))
    'cbf43926'
  """
  whole = 0
  for found, nbytes in parts:
    whole = _times(_power(8 * nbytes), whole) ^ found
  return whole


def as_text(checksum: int) -> str:
  """Returns a CRC-32 as files hold it.

  Args:
    checksum: the number.

  Returns:
    8 hexadecimal digits.

  Example:
    >>> as_text(255)
    '000000ff'
  """
  return f"{checksum:08x}"


def _times(one: int, other: int) -> int:
  """Multiplies two polynomials, modulo CRC-32's."""
  product = 0
  while one:
    if one & _ONE:
      product ^= other
    one = one << 1 & 0xFFFFFFFF
    other = other >> 1 ^ (_MODULUS if other & 1 else 0)
  return product


def _power(exponent: int) -> int:
  """Returns x to a power, modulo CRC-32's polynomial."""
  power = _ONE
  for bit in range(exponent.bit_length()):
    if exponent >> bit & 1:
      power = _times(_square(bit), power)
  return power


@functools.cache
def _square(times: int) -> int:
  """Returns x squared so many times, modulo CRC-32's polynomial."""
  if not times:
    return _ONE >> 1
  below = _square(times - 1)
  return _times(below, below)
