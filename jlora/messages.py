# SPDX-License-Identifier: Apache-2.0
"""What errors name: offenders, and the file that could not be written."""

import contextlib
import os
from collections.abc import Iterator


def name_some(offenders, most: int = 3) -> str:
  """Lists up to three items by name and counts the rest, for an error message.

  Args:
    offenders: the items, which are printed with `str`.
    most: how many are named.

  Returns:
    "x, y, z and 4 more".

  Example:
    >>> name_some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
  """
  offenders = list(offenders)
  rest = len(offenders) - most
  named = ", ".join(str(offender) for offender in offenders[:most])
  return f"{named} and {rest} more" if rest > 0 else named


@contextlib.contextmanager
def name_file(path: str | os.PathLike) -> Iterator[None]:
  """Gives an error of the system the name of the file it is about.

  A full disk is reported for an open file, of which only the number is known.

  Args:
    path: the file that is written.

  Yields:
    Nothing.

  Raises:
    OSError: what the block raised, with `filename`.

  Example:
    >>> with name_file("x"):
    ...   raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    ...
    OSError: [Errno 28] No space left on device: 'x'
  """
  try:
    yield
  except OSError as error:
    if error.filename is None and error.errno is not None:
      error.filename = os.fspath(path)
    raise
