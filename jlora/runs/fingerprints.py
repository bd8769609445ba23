# SPDX-License-Identifier: Apache-2.0
"""What makes two runs the same: inputs, functions and versions, as short texts.

Small files are told by their contents, large ones by headers, sizes, times and
paths: to read them whole would take as long as the run.
"""

import dataclasses
import functools
import hashlib
import os
import re
import types
from collections.abc import (
  Callable,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
  Set,
)
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.sources import SMALL_FILES
from jlora.messages import name_some

# What a result depends on besides jlora itself.
_PACKAGES = ("jax", "jaxlib", "jlora", "numpy")


def describe_input(name: str, checkpoint: Checkpoint) -> dict[str, str]:
  """Tells an open checkpoint from others, without reading its arrays.

  Args:
    name: what the run calls it.
    checkpoint: an open checkpoint.

  Returns:
    {name: of its headers, the sizes of its files and the contents of small
    ones, "name times": when its files were written, "name paths": where they
    lie}, each 16 characters.

  Raises:
    ValueError: a file is gone.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint, write_safetensors
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   write_safetensors(f"{tmp}/m.safetensors", {"w": np.ones(2)})
    ...   list(describe_input("base", open_checkpoint(tmp)))
    ['base', 'base times', 'base paths']
  """
  try:
    files = _files_of(checkpoint)
    stats = [file.stat() for file in files]
    small = [
      f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}"
      for file in _small_files(checkpoint.path)
    ]
  except OSError as error:
    raise ValueError(
      f"{error.filename} cannot be read: {error.strerror}"
    ) from error
  entries = [
    repr((tensor, spec.shape, spec.dtype.name, spec.start, spec.end))
    for tensor, spec in checkpoint.spec.items()
  ]
  sizes = [repr([stat.st_size for stat in stats])]
  paths = [checkpoint.path, *files]
  return {
    name: hash_lines([*entries, *sizes, *small]),
    f"{name} times": hash_lines(str(stat.st_mtime_ns) for stat in stats),
    f"{name} paths": hash_lines(os.path.realpath(path) for path in paths),
  }


def stamp_inputs(inputs: Mapping[str, Checkpoint]) -> dict[str, list[Any]]:
  """Returns what changes when a file of an input is written anew.

  Args:
    inputs: open checkpoints by name.

  Returns:
    For each input what `check_unchanged` compares.

  Example:
    >>> stamp_inputs({})
    {}
  """
  return {name: _stamp(checkpoint) for name, checkpoint in inputs.items()}


def check_unchanged(
  inputs: Mapping[str, Checkpoint], stamps: Mapping[str, list[Any]]
) -> None:
  """Raises if an input is not what it was: a result must not mix two of them.

  Args:
    inputs: open checkpoints by name.
    stamps: theirs, from before they were read.

  Raises:
    ValueError: names up to three.

  Example:
    >>> check_unchanged({}, {})
  """
  changed = [
    str(checkpoint.path)
    for name, checkpoint in inputs.items()
    if _stamp(checkpoint) != stamps[name]
  ]
  if changed:
    raise ValueError(
      f"{name_some(changed)} changed while it was read. Begin again with "
      "overwrite=True, when nobody writes there."
    )


def describe_versions() -> dict[str, str]:
  """Returns versions of what computes a result.

  Returns:
    By package, and a hash of jlora's own files: checkouts have one version for
    a long time.

  Example:
    >>> sorted(describe_versions())
    ['jax', 'jaxlib', 'jlora', 'jlora files', 'numpy']
  """
  return dict(_versions(Path(__file__).parents[1]))


@functools.cache
def _versions(root: Path) -> dict[str, str]:
  """Returns versions and a hash of the sources below a folder, read once."""
  whole = hashlib.sha256()
  for file in sorted(root.rglob("*.py")):
    whole.update(file.relative_to(root).as_posix().encode() + b"\0")
    whole.update(file.read_bytes())
  packages = {name: metadata.version(name) for name in _PACKAGES}
  return {**packages, "jlora files": whole.hexdigest()[:16]}


def hash_lines(lines: Iterable[str]) -> str:
  r"""Hashes lines of text.

  Args:
    lines: in an order that matters.

  Returns:
    16 characters.
  """
  text = "\n".join(lines)
  return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


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
    return f"{name_of(function.func)}({_without_addresses(options)})"
  return getattr(function, "__name__", type(function).__name__)


def identify(value: Any) -> str:
  """Hashes a function by its code, defaults and options, as far as they go.

  Two functions of one name and another body are told apart, and two objects of
  one class by their attributes, unless the class says how they are written.
  What a function finds in globals is not looked at.

  Args:
    value: a callable, or a value that one is called with.

  Returns:
    16 characters, the same in every process.

  Example:
    >>> identify(lambda x: x + 1) == identify(lambda x: x + 2)
    False
    >>> power = functools.partial(pow, 2)
    >>> identify(power) == identify(functools.partial(pow, 2))
    True
  """
  return hash_lines(_parts_of(value, ()))


def _parts_of(value: Any, outer: tuple[int, ...]) -> Iterator[str]:
  """Yields texts that tell a value from others.

  Args:
    value: any.
    outer: `id` of those that it was found in; a function can hold itself.
  """
  if id(value) in outer:
    yield f"{len(outer) - outer.index(id(value))} levels up"
    return
  parts, outer = _inside(value), (*outer, id(value))
  if parts is None:
    yield _without_addresses(repr(value))
    return
  for part in parts:
    if isinstance(part, _Said):
      yield part.text
    else:
      yield from _parts_of(part, outer)


class _Said(NamedTuple):
  """A text that tells a value from others."""

  text: str


def _inside(value: Any) -> list[Any] | None:
  """Lists what a value is made of, texts as `_Said`; None of plain values."""
  if isinstance(value, functools.partial):
    return [_Said("partial"), value.func, value.args, value.keywords]
  if isinstance(value, types.MethodType):
    return [_Said("method"), value.__func__, value.__self__]
  if isinstance(value, types.FunctionType):
    held = [_content(cell) for cell in value.__closure__ or ()]
    own = [value.__code__, value.__defaults__, value.__kwdefaults__, held]
    return [_Said(f"{value.__module__}.{value.__qualname__}"), *own]
  if isinstance(value, types.CodeType):
    said = f"{value.co_code.hex()} {value.co_names} {value.co_varnames}"
    return [_Said(said), value.co_consts]
  if isinstance(value, Set):  # its order differs between processes
    return [_Said(f"{sorted(_without_addresses(repr(x)) for x in value)}")]
  if hasattr(value, "__wrapped__"):  # a function under jax.jit
    return [value.__wrapped__]
  if hasattr(value, "dtype") and hasattr(value, "shape"):
    array = np.asarray(value)
    said = f"{array.dtype} {array.shape} {array.tobytes().hex()}"
    return [_Said(said)]
  if isinstance(value, Mapping):
    pairs = [x for k, v in value.items() for x in (_Said(repr(k)), v)]
    return [_Said(f"{len(value)} pairs"), *pairs]
  if isinstance(value, Sequence) and not isinstance(value, str | bytes):
    return [_Said(f"{len(value)} values"), *value]
  kind = type(value)
  is_bare = kind.__repr__ is object.__repr__ or dataclasses.is_dataclass(kind)
  if is_bare and hasattr(value, "__dict__"):
    call = vars(kind).get("__call__")
    return [_Said(f"{kind.__module__}.{kind.__qualname__}"), call, vars(value)]
  return None


def _content(cell: types.CellType) -> Any:
  """Returns what a closure holds; a text where it holds nothing yet."""
  try:
    return cell.cell_contents
  except ValueError:
    return "nothing yet"


def _without_addresses(text: str) -> str:
  """Removes addresses in memory, which differ between processes."""
  return re.sub(r" at 0x[0-9a-f]+", "", text)


def _stamp(checkpoint: Checkpoint) -> list[Any]:
  """Returns names, sizes, times and inodes of all files of a checkpoint."""
  files = [*_files_of(checkpoint), *_small_files(checkpoint.path)]
  stats = [(file, os.stat(file)) for file in files if file.exists()]
  return [
    (str(file), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    for file, stat in stats
  ]


def _files_of(checkpoint: Checkpoint) -> list[Path]:
  """Lists the files that hold a checkpoint's arrays, of orbax all files."""
  files = []
  for place in checkpoint.places:
    inside = sorted(place.rglob("*")) if place.is_dir() else [place]
    files += [file for file in inside if file.is_file()]
  return files


def _small_files(folder: Path) -> list[Path]:
  """Lists configuration, tokenizer and the like of a checkpoint folder."""
  found = sorted(folder.iterdir()) if folder.is_dir() else []
  return [
    file for file in found if file.suffix in SMALL_FILES and file.is_file()
  ]
