# SPDX-License-Identifier: Apache-2.0
"""Finds models by their Hugging Face Hub names, and names folders for others.

What was downloaded lies in the Hub's own cache, as
`models--org--name/snapshots/<commit>`; nothing here goes to the network.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.checkpoints.documents import read_object, read_text
from jlora.messages import name_some

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_SNAPSHOTS, _MODELS = "snapshots", "models--"
_LONGEST = 2**12  # bytes of a file that names a commit


def locate(path: str | os.PathLike) -> Path:
  """Finds a checkpoint: a path, or a Hub id in the local Hugging Face cache.

  Args:
    path: a file or folder, or what has been downloaded under a Hub id: the
      commit that its branch `main` was at, or the only one that is there.

  Returns:
    A path that exists.

  Raises:
    ValueError: there is neither; with the command that downloads it, if it may
      be a Hub id.

  Example:
    >>> locate("/nowhere")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere does not exist
  """
  text, given = os.fspath(path), Path(path)
  try:
    if given.exists():
      return given
  except OSError as error:  # too long, or in a folder that may not be read
    raise ValueError(f"{text} cannot be read: {error.strerror}") from error
  if not _ID.fullmatch(text) or text.endswith(
    (".safetensors", ".gguf", ".json")
  ):
    raise ValueError(f"{text} does not exist")
  if snapshot := _cached(text):
    return snapshot
  raise ValueError(
    f"{text} does not exist: no local file or folder; if it is a Hub id: "
    f"`hf download {text} --local-dir DIR`"
  )


def folder_name(path: str | os.PathLike) -> str:
  """Returns what a checkpoint is called away from the machine that read it.

  Args:
    path: as for `locate`; it need not exist.

  Returns:
    Its Hub id, if it was given as one or lies in the Hub's cache, else the last
    part of its path. Nothing of where it lies on this machine.

  Example:
    >>> folder_name("/home/me/models/smollm2"), folder_name("org/name")
    ('smollm2', 'org/name')
    >>> folder_name("/cache/models--org--name/snapshots/0123")
    'org/name'
  """
  if is_hub_id(path):
    return os.fspath(path)
  if repository := repository_of(path):
    return repository.name.removeprefix(_MODELS).replace("--", "/", 1)
  return Path(os.path.abspath(path)).name or "model"


def repository_of(path: str | os.PathLike) -> Path | None:
  """Returns the folder of the Hub's cache that holds all of a model.

  Args:
    path: of a snapshot, or of something in it.

  Returns:
    The folder `models--org--name`; None if the path is not in such a cache.

  Example:
    >>> repository_of("/cache/models--org--name/snapshots/0123").name
    'models--org--name'
  """
  whole = Path(os.path.abspath(path))
  for folder in (whole, *whole.parents):
    above = folder.parent
    if folder.name == _SNAPSHOTS and above.name.startswith(_MODELS):
      return above
  return None


def name_apart(paths: Mapping[str, str | os.PathLike]) -> dict[str, str]:
  """Names of checkpoints, each another, for a command line that others read.

  Args:
    paths: by role.

  Returns:
    By role `folder_name`; where two have the same, the role as a folder before.

  Example:
    >>> name_apart({"base": "/a/x", "finetuned": "/b/x", "out": "/c/y"})
    {'base': 'base/x', 'finetuned': 'finetuned/x', 'out': 'y'}
  """
  names = {role: folder_name(path) for role, path in paths.items()}
  shared = {name for name, n in Counter(names.values()).items() if n > 1}
  return {
    role: f"{role}/{name}" if name in shared else name
    for role, name in names.items()
  }


def model_name(path: str | os.PathLike) -> str:
  """Returns what an adapter's files call its base.

  Args:
    path: as for `locate`; it need not exist.

  Returns:
    Its Hub id, if it lies in the Hub's cache or its config.json has one in
    `_name_or_path`; else the name of its folder, or of the file without its
    ending if that is not one of those that all folders have.

  Example:
    >>> model_name("/home/me/smollm2"), model_name("/home/me/base.safetensors")
    ('smollm2', 'base')
  """
  if is_hub_id(path):
    return os.fspath(path)
  place = Path(os.path.abspath(path))
  if place.suffix == ".safetensors":
    if not place.stem.startswith("model"):
      return place.stem
    place = place.parent
  name, config = folder_name(place), place / "config.json"
  if "/" in name or not config.is_file():
    return name
  try:
    stored = read_object(config).get("_name_or_path")
  except ValueError:  # who reads the checkpoint tells
    return name
  return stored if isinstance(stored, str) and is_hub_id(stored) else name


def is_hub_id(name: str | os.PathLike) -> bool:
  """Returns whether a text looks like `org/name` and is no path that is here.

  Args:
    name: any text.

  Returns:
    bool. Names without an owner (`gpt2`) may be folders, and do not count.

  Example:
    >>> is_hub_id("org/name"), is_hub_id("../name"), is_hub_id("/a/b")
    (True, False, False)
  """
  text = os.fspath(name)
  return "/" in text and bool(_ID.fullmatch(text)) and not Path(text).exists()


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config.json that can be shared, without paths of this machine.

  Args:
    config: of a checkpoint.

  Returns:
    The same without `_name_or_path`, unless that is a Hub id.

  Example:
    >>> without_paths({"_name_or_path": "/home/me/x", "vocab_size": 8})
    {'vocab_size': 8}
  """
  stored = config.get("_name_or_path")
  if stored is None or (isinstance(stored, str) and is_hub_id(stored)):
    return dict(config)
  return {key: value for key, value in config.items() if key != "_name_or_path"}


def _cached(name: str) -> Path | None:
  """Returns the snapshot of a Hub id in the local cache, if there is one."""
  folder = _cache() / f"{_MODELS}{name.replace('/', '--')}"
  main = folder / "refs" / "main"
  if main.is_file():
    snapshot = folder / _SNAPSHOTS / read_text(main, _LONGEST).strip()
    if snapshot.is_dir():
      return snapshot
  found = sorted((folder / _SNAPSHOTS).glob("*"))
  if len(found) > 1:
    raise ValueError(
      f"{folder} holds {len(found)} snapshots and no refs/main: "
      f"{name_some([one.name for one in found])}; give the path of one"
    )
  return found[0] if found else None


def _cache() -> Path:
  """Returns the folder of the Hub's cache, by the variables its tools read."""
  if folder := os.environ.get("HF_HUB_CACHE"):
    return Path(folder).expanduser()
  root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  home = os.environ.get("HF_HOME") or f"{root}/huggingface"
  return Path(home).expanduser() / "hub"
