# SPDX-License-Identifier: Apache-2.0
"""New files and folders: whole, on the disk, and through no link.

    temporary beside ─► written ─► synced ─► given its name ─► folder synced

A temporary's name cannot be foreseen, and it is made or refused, never opened:
what lies under that name, a link for example, is not written through. A link
under the final name is replaced, and what it leads to stays as it is.
"""

import contextlib
import contextvars
import errno
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from jlora.checkpoints.checksums import as_text
from jlora.messages import name_file

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.tmp", re.DOTALL)
# The most bytes of a final name that a temporary's repeats, since a system has
# a limit for the whole; of a longer one so many letters.
_BYTES, _LETTERS = 200, 40
# Systems of files that cannot sync a folder say one of these.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)

_NOTED: contextvars.ContextVar[dict[Path, str] | None] = contextvars.ContextVar(
  "files put in place", default=None
)


def name_temporary(path: Path) -> Path:
  """Returns a name beside a path that nobody can foresee; nothing is made.

  Args:
    path: the final one.

  Returns:
    A hidden name in the same folder.

  Example:
    >>> len(name_temporary(Path("out/x")).name)
    19
  """
  name, drawn = path.name, secrets.token_hex(6)
  name = name if len(os.fsencode(name)) <= _BYTES else name[:_LETTERS]
  return path.with_name(f".{name}.{drawn}.tmp")


def open_new(path: Path) -> BinaryIO:
  """Makes a file and opens it for writing.

  Args:
    path: a name that nothing has, not even a link.

  Returns:
    The open file.

  Raises:
    FileExistsError: something has the name.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   os.symlink("/elsewhere", f"{folder}/x")
    ...   open_new(Path(folder, "x"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    FileExistsError: [Errno 17] File exists: '...'
  """
  flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
  return os.fdopen(os.open(path, flags, 0o666), "wb")


def move(source: Path, target: Path, checksum: int | None = None) -> None:
  """Gives a file or folder its final name; what had that name is replaced.

  Args:
    source: synced, on the same file system.
    target: the name.
    checksum: of a file, for `noted`; None: what was noted under its old name.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   _ = Path(folder, "x").write_text("y")
    ...   move(Path(folder, "x"), Path(folder, "z"))
    ...   os.listdir(folder)
    ['z']
  """
  os.replace(source, target)
  noted = _NOTED.get()
  if noted is not None:
    known = noted.pop(source, None)
    if checksum is not None:
      known = as_text(checksum)
    if known is not None:
      noted[target] = known


@contextlib.contextmanager
def noted() -> Iterator[dict[Path, str]]:
  """Notes each file that the block puts in place, with its checksum.

  Checksums are those of what was written, not read again. Other threads' files
  are not noted.

  Yields:
    {file: CRC-32 as `checksum_of` returns it}, which fills up.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, noted() as files:
    ...   replace_text(Path(folder, "x"), "123456789")
    >>> list(files.values())
    ['cbf43926']
  """
  files: dict[Path, str] = {}
  token = _NOTED.set(files)
  try:
    yield files
  finally:
    _NOTED.reset(token)


def is_noted() -> bool:
  """Returns whether somebody wants the checksums of what is written.

  Example:
    >>> is_noted()
    False
  """
  return _NOTED.get() is not None


def sync_folder(folder: Path) -> None:
  """Brings the names in a folder onto the disk, where the system can.

  Args:
    folder: an existing one.

  Example:
    >>> sync_folder(Path("."))
  """
  handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
  try:
    with name_file(folder):
      os.fsync(handle)
  except OSError as error:
    if error.errno not in _NO_SYNC:
      raise
  finally:
    os.close(handle)


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
  """Writes a file: readers see the old or the new one, whole.

  Args:
    path: the file.
    parts: its bytes, one part in memory at a time.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   replace_file(Path(folder, "x"), [b"a", b"b"])
    ...   Path(folder, "x").read_bytes()
    b'ab'
  """
  temporary, checksum = name_temporary(path), 0
  opened = open_new(temporary)  # what has this name already is not ours
  try:
    with opened as file, name_file(temporary):
      for part in parts:
        file.write(part)
        checksum = zlib.crc32(part, checksum)
      file.flush()
      os.fsync(file.fileno())
    move(temporary, path, checksum)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def replace_text(path: Path, text: str) -> None:
  """Writes a text file: readers see the old or the new one, whole.

  When it returns the file is on the disk under its name.

  Args:
    path: the file.
    text: its contents.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   replace_text(Path(folder, "x"), "y")
    ...   Path(folder, "x").read_text()
    'y'
  """
  replace_file(path, [text.encode()])
  sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """Makes a folder that gets its name when the block has filled it.

  Args:
    path: must not exist; its parents are made.

  Yields:
    A folder beside it to fill, with files that are synced. If the block raises,
    it is removed.

  Raises:
    ValueError: something has the name; or has it once the folder is filled,
      which then stays where it is.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...   with new_folder(Path(root, "a", "new")) as folder:
    ...     replace_text(folder / "x", "y")
    ...   Path(root, "a", "new", "x").read_text()
    'y'
  """
  check_new(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = name_temporary(path)
  partial.mkdir()
  try:
    yield partial
    sync_folder(partial)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  try:
    move(partial, path)
  except OSError as error:
    raise ValueError(
      f"{path} was made by somebody else meanwhile ({error.strerror}). What "
      f"was to be there is complete and lies in {partial}: move it where it is "
      "wanted."
    ) from error
  sync_folder(path.parent)


def check_new(path: Path) -> None:
  """Raises if something has a name: a file, a folder, or a link to nowhere.

  Args:
    path: of what is to be made.

  Raises:
    ValueError: there is something.

  Example:
    >>> check_new(Path("/nowhere"))
  """
  if os.path.lexists(path):
    raise ValueError(f"{path} exists; remove it or give a new name.")


def is_temporary(path: Path) -> bool:
  """Returns whether a name is one that `name_temporary` gives.

  Args:
    path: of anything; only its name is looked at.

  Example:
    >>> is_temporary(name_temporary(Path("x"))), is_temporary(Path("x.tmp"))
    (True, False)
  """
  return bool(_TEMPORARY.fullmatch(path.name))


def remove_temporaries(folder: Path) -> None:
  """Removes the temporaries that killed runs have left in a folder.

  Args:
    folder: to which nobody writes now.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   name_temporary(Path(folder, "x")).touch()
    ...   remove_temporaries(Path(folder))
    ...   os.listdir(folder)
    []
  """
  for found in list(folder.iterdir()):
    if not is_temporary(found):
      continue
    if found.is_dir() and not found.is_symlink():
      shutil.rmtree(found, ignore_errors=True)
    else:
      found.unlink(missing_ok=True)
