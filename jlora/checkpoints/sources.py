# SPDX-License-Identifier: Apache-2.0
"""What a result is made from: kept apart from it, and the files that go along.

Links are followed, and two paths are the same where the system says that they
are: a folder that is mounted twice is one folder.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from jlora.checkpoints.hub import repository_of
from jlora.checkpoints.new_files import replace_file
from jlora.messages import name_some

# Files that a folder needs besides its weights: configuration, tokenizer, code.
SMALL_FILES = {".jinja", ".json", ".model", ".py", ".tiktoken", ".txt"}
_READ = 2**22  # bytes of a file that are copied at a time


class Source(Protocol):
  """An open checkpoint, as far as its files go.

  Attributes:
    path: what was opened.
    places: the files, or the one folder, that hold its arrays.
  """

  path: Path
  places: tuple[Path, ...]


def check_apart(out: str | os.PathLike, sources: Iterable[Any]) -> None:
  """Raises if writing to a path would change what is read.

  It would if the path is one of the files or folders that are read, or a folder
  that holds one of them. A new folder inside a Hugging Face folder is no part
  of that checkpoint; one inside an orbax directory is, and so is a safetensors
  file beside others.

  Args:
    out: a file or folder to write, which need not exist.
    sources: open checkpoints, or files and folders; what is neither, a mapping
      of arrays in memory for example, is passed over.

  Raises:
    ValueError: names up to three of what is read.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...   os.makedirs(f"{root}/base")
    ...   check_apart(f"{root}/out", [Path(root, "base")])
    ...   check_apart(root, [Path(root, "base")])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: ... is or holds what is read: .../base. Give another out.
  """
  out = Path(out)
  own = _identity(out)
  held, parts = [], []
  for path, folders in filter(None, map(_places_of, sources)):
    places = [path, *folders]
    held += [p for p in places if own and own in _lineage(p)][:1]
    if _is_part(out, path, folders):
      parts.append(path)
  if held:
    raise ValueError(
      f"{out} is or holds what is read: {name_some(dict.fromkeys(held))}. Give "
      "another out."
    )
  if parts:
    raise ValueError(
      f"{out} would be a part of what is read: {name_some(parts)}. Give "
      "another out."
    )


def list_companions(source: Source) -> list[Path]:
  """Lists the small files of a checkpoint folder, without its indices.

  A link may lead to a file of the folder, to one beside the checkpoint's own
  weights, where these are links too, or within the Hub's cache of the model.

  Args:
    source: an open checkpoint.

  Returns:
    Files, by name; none if the checkpoint is a file.

  Raises:
    ValueError: links that lead elsewhere, or nowhere; names up to three.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint, write_safetensors
    >>> with tempfile.TemporaryDirectory() as root:
    ...   write_safetensors(f"{root}/model.safetensors", {})
    ...   _ = Path(root, "config.json").write_text("{}")
    ...   [file.name for file in list_companions(open_checkpoint(root))]
    ['config.json']
  """
  if not source.path.is_dir():
    return []
  found = [
    file
    for file in sorted(source.path.iterdir())
    if file.suffix in SMALL_FILES and not file.name.endswith(".index.json")
    if file.is_symlink() or file.is_file()
  ]
  real = [Path(os.path.realpath(file)).parent for file in source.places]
  cached = repository_of(os.path.realpath(source.path)) or source.path
  allowed = {_identity(folder) for folder in (source.path, cached, *real)}
  strays = [
    f"{file.name} leads to {os.path.realpath(file)}"
    for file in found
    if file.is_symlink()
    if not file.is_file() or not allowed & set(_lineage(file, real_only=True))
  ]
  if strays:
    raise ValueError(
      f"{source.path}: files that go along with the weights are links to "
      f"elsewhere: {name_some(strays)}. Put copies in their place (cp -L), or "
      "remove them."
    )
  return found


def copy_files(files: Iterable[Path], folder: Path) -> None:
  """Copies files into a folder, each whole or not at all.

  Args:
    files: links among them are followed.
    folder: an existing one; files of these names are replaced.

  Raises:
    OSError: a file is gone.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...   _ = Path(root, "x").write_text("y")
    ...   os.mkdir(f"{root}/new")
    ...   copy_files([Path(root, "x")], Path(root, "new"))
    ...   Path(root, "new", "x").read_text()
    'y'
  """
  for file in files:
    with open(file, "rb") as stream:
      parts = iter(lambda stream=stream: stream.read(_READ), b"")
      replace_file(folder / file.name, parts)


def _places_of(source: Any) -> tuple[Path, tuple[Path, ...]] | None:
  """Returns what was opened and where its arrays lie, of what has a place."""
  if isinstance(source, str | os.PathLike):
    return Path(source), ()
  if not hasattr(source, "places"):
    return None
  return source.path, tuple(source.places)


def _is_part(out: Path, path: Path, places: tuple[Path, ...]) -> bool:
  """Returns whether a new file or folder would belong to a checkpoint."""
  if not path.is_dir():
    return False
  is_orbax = any(place.is_dir() for place in places)
  if is_orbax:
    return _identity(path) in _lineage(out)
  is_beside = _identity(path) == _identity(out.parent)
  return out.suffix == ".safetensors" and is_beside


def _identity(path: Path) -> tuple[int, int] | None:
  """Returns what tells a file or folder from all others; None without one."""
  try:
    stat = os.stat(path)
  except OSError:
    return None
  return stat.st_dev, stat.st_ino


def _lineage(path: Path, *, real_only: bool = False) -> Iterator[tuple | None]:
  """Yields the identities of a path and of all folders that it lies in.

  Those of its name and, where links lead elsewhere, those of its target.
  """
  names = [Path(os.path.realpath(path))]
  names += [] if real_only else [Path(os.path.abspath(path))]
  for name in names:
    yield from filter(None, map(_identity, (name, *name.parents)))
