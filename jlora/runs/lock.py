# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: a lock that dies with its process."""

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from jlora.messages import name_file

LOCK = ".jlora-lock"
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_TRIES = 100  # a lock is found removed by another run that has just ended


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
  """Makes a folder if it is not there, and keeps other runs out of it.

  A file in it is locked, which the system undoes when this process ends,
  however it ends. On a network file system it counts for all machines if the
  server knows locks; where none can be had there is a warning.

  Args:
    folder: of a run's results. It is removed again if it was made here and is
      empty at the end.

  Yields:
    Nothing.

  Raises:
    ValueError: the folder is a file, or another run is at work in it; names its
      process.

  Warns:
    UserWarning: the file system has no locks.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...   with hold_folder(Path(root, "out")), hold_folder(Path(root, "out")):
    ...     pass  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: ... is being written by another run (process ... on ...)...
  """
  if os.path.lexists(folder) and not folder.is_dir():
    raise ValueError(f"{folder} is a file; give a folder.")
  made = [each for each in (folder, *folder.parents) if not each.exists()]
  handle = _take(folder)
  try:
    yield
  finally:
    try:
      (folder / LOCK).unlink(missing_ok=True)
    finally:
      os.close(handle)
    for each in made:
      with contextlib.suppress(OSError):  # it is not empty
        each.rmdir()


def _take(folder: Path) -> int:
  """Makes a folder and returns its open, locked file, unless another has it."""
  path = folder / LOCK
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
  for _ in range(_TRIES):
    try:
      folder.mkdir(parents=True, exist_ok=True)
      handle = os.open(path, flags, 0o666)
    except (FileNotFoundError, FileExistsError):
      # Another run that made the folder removed it, in the second case between
      # two steps of mkdir.
      if os.path.lexists(folder) and not folder.is_dir():
        raise
      continue
    except OSError as error:
      if error.errno == errno.ELOOP:
        raise ValueError(f"{path} is a link; remove it.") from error
      raise
    try:
      _lock(handle, folder)
      if _is_there(handle, path):
        with name_file(path):
          os.ftruncate(handle, 0)
          text = f"process {os.getpid()} on {socket.gethostname()}"
          os.pwrite(handle, text.encode(), 0)
        return handle
    except BaseException:
      os.close(handle)
      raise
    os.close(handle)  # its name was given to a new file: that one counts
  raise ValueError(
    f"{folder} is being written by other runs, one after another."
  )


def _lock(handle: int, folder: Path) -> None:
  """Locks an open file; raises if another process has locked it."""
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno not in _HELD:
      warnings.warn(
        f"{folder} lies on a file system without locks ({error.strerror}): see "
        "to it that no other run writes there.",
        stacklevel=6,
      )
      return
    who = os.pread(handle, 200, 0).decode(errors="replace")
    raise ValueError(
      f"{folder} is being written by another run ({who or 'just begun'}). Wait "
      "until it has ended, or give another out."
    ) from error


def _is_there(handle: int, path: Path) -> bool:
  """Returns whether an open file still has its name."""
  try:
    return os.path.samestat(os.fstat(handle), os.lstat(path))
  except FileNotFoundError:
    return False
