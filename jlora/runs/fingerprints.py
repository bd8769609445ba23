# SPDX-License-Identifier: Apache-2.0
"""What makes two runs the same, and files that appear whole."""

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
  """A checkpoint's headers and its files' sizes and times, in one hash.

  Args:
    checkpoint: open.

  Returns:
    16 characters.

  Example:
    >>> import tempfile
    >>> import numpy as np
    >>> from jlora.checkpoints import open_checkpoint, write_safetensors
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   write_safetensors(f"{tmp}/m.safetensors", {"w": np.ones(2)})
    ...   len(digest(open_checkpoint(tmp)))
    16
  """
  files = {spec.file for spec in checkpoint.spec.values() if spec.file}
  # The specs of an orbax directory name none: take all that it holds.
  files = files or {f for f in checkpoint.path.rglob("*") if f.is_file()}
  stats = [(f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
  entries = [
    (name, spec.shape, spec.dtype.name, spec.start, spec.end)
    for name, spec in checkpoint.spec.items()
  ]
  return hash_lines([repr(stats), *map(repr, entries)])


def hash_lines(lines: Iterable[str]) -> str:
  r"""Returns a short hash of lines of text.

  Args:
    lines: in an order that means something.

  Returns:
    16 characters.

  Example:
    >>> hash_lines(["a", "b"]) == hash_lines(["a\nb"])
    True
  """
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def name_of(function: Callable[..., Any]) -> str:
  """A function with the options that `functools.partial` set, as text.

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
    # An address in memory is another one in the next process.
    options = re.sub(r" at 0x[0-9a-f]+", "", options)
    return f"{name_of(function.func)}({options})"
  return getattr(function, "__name__", type(function).__name__)


def replace_text(path: Path, text: str) -> None:
  """Puts a text file in its place, whole or not at all.

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
