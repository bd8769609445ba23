# SPDX-License-Identifier: Apache-2.0
"""Finding, reading and saving the arrays of an orbax checkpoint directory.

A directory is a root of steps, a step of named items, or an item. The item that
holds arrays has a `_METADATA` file, whatever its name. orbax tells names,
shapes and dtypes; tensorstore, with which orbax writes, reads parts of leaves.

References:
  orbax.readthedocs.io, "Checkpoint format guide".
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath, epy

from jlora.checkpoints.new_files import (
  check_new,
  is_temporary,
  move,
  name_temporary,
  sync_folder,
)
from jlora.checkpoints.sources import check_apart
from jlora.messages import name_some

with epy.lazy_imports():  # they take a third of a second: only if needed
  import orbax.checkpoint as ocp
  import tensorstore as ts
  from jax.experimental import multihost_utils

_TREE = "_METADATA"
_STEP = "_CHECKPOINT_METADATA"
_TEMPORARY = ".orbax-checkpoint-tmp"
_LONGEST = 256  # bytes of a file's name, and one


class Leaf(NamedTuple):
  """One stored array: its shape, its dtype, and how to open it.

  Attributes:
    shape: lengths of the axes.
    dtype: as stored.
    store: the tensorstore spec that opens it.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  store: dict[str, Any]


def find_item(path: str | os.PathLike) -> Path | None:
  """Finds the folder that holds the arrays of an orbax checkpoint.

  Args:
    path: an item, a step, or a root of steps, of which the newest finished one
      is taken. Temporary directories are ignored.

  Returns:
    The folder, or None if the path is no orbax checkpoint.

  Raises:
    ValueError: if several items or several series of steps hold arrays, or if
      the path itself is a temporary directory.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_orbax(f"{folder}/run/20/params", {"w": np.ones(2)})
    ...   save_orbax(f"{folder}/run/3/params", {"w": np.ones(2)})
    ...   str(find_item(f"{folder}/run").relative_to(folder))
    'run/20/params'
  """
  path = Path(path)
  if _TEMPORARY in path.name or is_temporary(path):
    raise ValueError(f"{path} was never finished; open a finished step")
  if (path / _TREE).is_file():
    return path
  if not (path / _STEP).is_file() and (steps := _steps(path)):
    path = steps[max(steps)]
    if (path / _TREE).is_file():
      return path
  items = [child for child in _finished(path) if (child / _TREE).is_file()]
  if len(items) > 1:
    raise ValueError(
      f"{path} holds several trees of arrays,"
      f" {name_some([item.name for item in items])}: open one of them by its"
      " own path"
    )
  return items[0] if items else None


def list_leaves(folder: Path) -> dict[str, Leaf]:
  """Lists the arrays of an item, named by their tree paths joined with "/".

  Args:
    folder: from `find_item`.

  Returns:
    {name: Leaf}. Only metadata is read. Leaves that are not arrays, such as
    strings, are left out.

  Raises:
    ValueError: if the metadata is damaged, two leaves have the same name, or
      one would lie outside the folder.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_orbax(f"{folder}/c", {"layer": {"kernel": np.ones((2, 3))}})
    ...   leaves = list_leaves(Path(folder, "c"))
    >>> leaves["layer/kernel"].shape
    (2, 3)
  """
  folder = Path(folder).absolute()
  _check_files(folder)
  try:
    found = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder))
  except Exception as error:  # damaged metadata fails in many ways
    raise ValueError(f"{folder}: unreadable orbax metadata: {error}") from error
  leaves = {}
  for keys, value in jax.tree_util.tree_leaves_with_path(found.tree):
    if getattr(value, "shape", None) is None or value.dtype is None:
      continue
    name = jax.tree_util.keystr(keys, simple=True, separator="/")
    if name in leaves:
      raise ValueError(f"{folder}: two leaves are named {name}")
    _check_inside(folder, value.name)
    store = _store(folder, value.name, found.use_zarr3)
    leaves[name] = Leaf(tuple(value.shape), np.dtype(value.dtype), store)
  return leaves


def read_leaf(leaf: Leaf, region: Sequence[range]) -> np.ndarray:
  """Reads one rectangular region of a stored array.

  Only the stored chunks that the region touches are read and decompressed. By
  default orbax makes each shard one chunk, so an array that was not sharded is
  read whole.

  Args:
    leaf: from `list_leaves`.
    region: for each axis a `range` within it, with a positive step.

  Returns:
    The array, of the ranges' lengths and the stored dtype.

  Raises:
    ValueError: if the store is damaged, a chunk is missing, or its arrays
      differ from the metadata.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_orbax(f"{folder}/c", {"w": np.arange(6.0).reshape(3, 2)})
    ...   leaf = list_leaves(Path(folder, "c"))["w"]
    ...   read_leaf(leaf, (range(1, 3), range(1)))
    array([[2.], [4.]])
  """
  shape = [len(indices) for indices in region]
  if 0 in shape:
    return np.empty(shape, leaf.dtype)
  # orbax stores every chunk, also of zeros: one that is not there was lost.
  spec = leaf.store | {"fill_missing_data_reads": False}
  store = ts.open(spec, open=True, read=True).result()
  if store.shape != leaf.shape or store.dtype.numpy_dtype != leaf.dtype:
    raise ValueError(
      f"{leaf.store['kvstore']}: {store.dtype.name} {store.shape} is stored,"
      f" but the metadata says {leaf.dtype} {leaf.shape}"
    )
  slices = tuple(slice(r.start, r.stop, r.step) for r in region)
  out = np.empty(shape, leaf.dtype)  # the metadata alone could say anything
  out[...] = store[slices].read().result()
  return out


def save_orbax(path: str | os.PathLike, tree: Any) -> None:
  """Writes an orbax checkpoint of a pytree, or of a flat {path: array}.

  A mapping of arrays is nested at the slashes of its paths, so that other
  readers see the tree that the paths describe. Any other pytree is saved as it
  is. The call returns when the checkpoint is complete and on the disk.

  Args:
    path: the directory to make; it has this name only when complete. Several
      `jax.distributed` processes all make the call.
    tree: a pytree of arrays, or {path: array}, which may be a Checkpoint.

  Raises:
    ValueError: if the path exists, or does once all is written, which then
      stays where it is; if it would be a part of the Checkpoint that is
      saved, or one array's path lies within another's.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_orbax(f"{folder}/c", {"layer/kernel": np.ones((2, 3))})
    ...   list(open_checkpoint(f"{folder}/c"))
    ['layer/kernel']
  """
  path = Path(path).absolute()
  check_new(path)
  check_apart(path, [tree])
  if isinstance(tree, Mapping):
    tree = dict(tree)
    if all(isinstance(name, str) for name in tree):
      tree = _nested(tree)
  place = _agreed_temporary(path)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(place, tree)
    _sync(place)
  except BaseException:
    if jax.process_index() == 0:
      shutil.rmtree(place, ignore_errors=True)
    raise
  _move_for_all(place, path)


def _agreed_temporary(path: Path) -> Path:
  """Returns a temporary name beside a path, the same one on all processes."""
  place = name_temporary(path)
  if jax.process_count() == 1:
    return place
  own = np.frombuffer(os.fsencode(place.name).ljust(_LONGEST, b"\0"), np.uint8)
  found = np.asarray(multihost_utils.broadcast_one_to_all(own), np.uint8)
  return path.with_name(os.fsdecode(found.tobytes().rstrip(b"\0")))


def _move_for_all(place: Path, path: Path) -> None:
  """Gives a folder its name once all processes have synced what is in it."""
  is_alone, why = jax.process_count() == 1, ""
  if not is_alone:
    multihost_utils.sync_global_devices(f"synced {path}")
  if jax.process_index() == 0:
    try:
      move(place, path)
    except OSError as error:
      why = f" ({error.strerror})"
  is_there = not why
  if not is_alone:
    is_there = bool(multihost_utils.broadcast_one_to_all(np.bool_(is_there)))
  if not is_there:
    raise ValueError(
      f"{path} cannot be given to what was saved{why}. It is complete and lies "
      f"in {place}: move it where it is wanted."
    )
  sync_folder(path.parent)


def _sync(folder: Path) -> None:
  """Brings a folder onto the disk, with all that is in it."""
  for place, _, names in os.walk(folder):
    for name in names:
      with open(Path(place, name), "rb") as file:
        os.fsync(file.fileno())
    sync_folder(Path(place))


def _check_files(folder: Path) -> None:
  """Raises if anything in a folder is no file: reading a pipe would not end."""
  folders, within = [folder], Path(os.path.realpath(folder))
  while folders:
    try:
      with os.scandir(folders.pop()) as inside:
        for entry in inside:
          if entry.is_dir():
            # Links could lead round and round; within they lead to what is
            # looked at anyhow.
            if entry.is_symlink():
              _check_leads_inside(Path(entry.path), within)
            else:
              folders.append(Path(entry.path))
          elif not entry.is_file():
            raise ValueError(f"{entry.path} is no regular file; give one")
    except OSError as error:
      raise ValueError(
        f"{error.filename} cannot be read: {error.strerror}"
      ) from error


def _check_leads_inside(link: Path, within: Path) -> None:
  """Raises unless a link to a folder leads to one inside the checkpoint.

  What lies elsewhere is not looked at when it is asked whether a result would
  be written there, or whether files have changed.
  """
  target = Path(os.path.realpath(link))
  if not target.is_relative_to(within):
    raise ValueError(
      f"{link} leads to {target}, outside of the checkpoint; put a copy in its "
      "place (cp -rL)"
    )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Nests a flat mapping into dicts, one level for each slash."""
  inside = [
    name
    for name in flat
    if any(name[:at] in flat for at, c in enumerate(name) if c == "/")
  ]
  if inside:
    raise ValueError(f"{name_some(inside)}: within the path of another array")
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *folders, last = name.split("/")
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = leaf
  return tree


def _finished(path: Path) -> list[Path]:
  """Lists the finished checkpoint folders in a folder."""
  return [
    child
    for child in sorted(path.iterdir())
    if child.is_dir() and not is_temporary(child)
    if ocp.utils.is_checkpoint_finalized(child)
  ]


def _steps(path: Path) -> dict[int, Path]:
  """Finds finished steps: folders that end in their number and hold arrays."""
  steps, series = {}, set()
  for child in _finished(path):
    found = re.fullmatch(r"(.*?)(\d+)", child.name)
    if found and any(_holds_tree(f) for f in (child, *_finished(child))):
      steps[int(found[2])] = child
      series.add(found[1])
  if len(series) > 1:
    raise ValueError(
      f"{path} holds several series of steps, {name_some(sorted(series))}: open"
      " one step by its own path"
    )
  return steps


def _holds_tree(path: Path) -> bool:
  """Returns whether a folder is an item that holds arrays."""
  return (path / _TREE).is_file()


def _check_inside(folder: Path, name: str) -> None:
  """Raises unless an array of this name is stored inside the folder."""
  place, within = folder / name, Path(os.path.realpath(folder))
  is_plain = place.is_relative_to(folder) and ".." not in Path(name).parts
  if "\0" in name or not (
    is_plain and Path(os.path.realpath(place)).is_relative_to(within)
  ):
    raise ValueError(
      f"{folder}: the metadata has an array {name!r}, which is not stored in "
      "this folder; save or download the checkpoint again"
    )


def _store(folder: Path, name: str, zarr3: bool) -> dict[str, Any]:
  """Returns the tensorstore spec of one array, as orbax lays it out."""
  if (folder / "manifest.ocdbt").is_file():
    base = {"driver": "file", "path": f"{folder}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
  else:
    kvstore = {"driver": "file", "path": f"{folder / name}/"}
  return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
