# SPDX-License-Identifier: Apache-2.0
"""Hashes what makes two runs the same, and writes files atomically."""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.messages import name_file


def digest(checkpoint: Checkpoint) -> str:
  """Hashes a checkpoint's headers and its files' sizes and times.

  Args:
    checkpoint: an open checkpoint.

  Returns:
    16 characters.
  """
  files = {spec.file for spec in checkpoint.spec.values() if spec.file}
  # The specs of an orbax directory name no files: take all that it holds.
  files = files or {f for f in checkpoint.path.rglob("*") if f.is_file()}
  stats = [(f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
  entries = [
    (name, spec.shape, spec.dtype.name, spec.start, spec.end)
    for name, spec in checkpoint.spec.items()
  ]
  return hash_lines([repr(stats), *map(repr, entries)])


def hash_lines(lines: Iterable[str]) -> str:
  r"""Hashes lines of text.

  Args:
    lines: in an order that matters.

  Returns:
    16 characters.
  """
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def name_of(function: Callable[..., Any]) -> str:
  """Returns a function's name, with options set by `functools.partial`.

  Args:
    function: any callable.

  Returns:
    Its name, options in brackets.

  Example:
    >>> name_of(functools.partial(sorted, reverse=True))
    'sorted(reverse=True)'
  """
  if isinstance(function, functools.partial):
    options = ", ".join(
      f"{k}={v}" for k, v in sorted(function.keywords.items())
    )
    # Addresses in memory differ between processes.
    options = re.sub(r" at 0x[0-9a-f]+", "", options)
    return f"{name_of(function.func)}({options})"
  return getattr(function, "__name__", type(function).__name__)


def replace_text(path: Path, text: str) -> None:
  """Writes a text file atomically: readers see the old or the new one whole.

  Args:
    path: the file.
    text: its contents.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   replace_text(Path(folder) / "x", "y")
    ...   (Path(folder) / "x").read_text()
    'y'
  """
  partial = path.with_name(f".{path.name}.partial")
  with name_file(partial), open(partial, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
