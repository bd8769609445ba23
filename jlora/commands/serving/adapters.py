# SPDX-License-Identifier: Apache-2.0
"""The adapters that a server knows: folders, host memory, slots on the device.

folder  ─►  Shelf, in the background  ─►  Room, when a request starts
"""

import concurrent.futures
import itertools
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.adapting.serving import Lease, Room, Shapes, Shelf
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.commands.entry import nearest
from jlora.commands.serving.refusals import Refused
from jlora.formats.fingerprints import check_fingerprint, read_fingerprint
from jlora.formats.peft.layouts import CONFIG
from jlora.formats.peft.reading import load_peft
from jlora.loras import Loras
from jlora.messages import name_some
from jlora.models.folders import read_config
from jlora.models.names import from_hf

_NAME = re.compile(r"[\w.][\w.:@+-]{0,199}")


class Base(NamedTuple):
  """What is to be known of the base to read adapters for it.

  Attributes:
    spec: tensor's name -> its shape, of the checkpoint.
    config: the contents of config.json.
    samples: of its tensors, to compare adapters' bases with.
  """

  spec: Mapping[str, Any]
  config: Mapping[str, Any]
  samples: "Samples"


class Samples:
  """A checkpoint of which each region is read once, for many adapters.

  Args:
    checkpoint: open.

  Attributes:
    spec: the checkpoint's.
  """

  def __init__(self, checkpoint: Checkpoint):
    self.spec, self._read = checkpoint.spec, checkpoint.read
    self._kept: dict[tuple[str, str], Any] = {}

  def read(self, name: str, index: Any = ()) -> Any:
    """Reads a region as the checkpoint does; a whole tensor is not kept."""
    if not index:
      return self._read(name)
    key = name, str(index)
    if key not in self._kept:
      self._kept[key] = self._read(name, index)
    return self._kept[key]


class Survey(NamedTuple):
  """What lies in a folder of adapters.

  Attributes:
    folders: name -> folder, of those that can be read.
    damaged: name -> why it cannot.
    shapes: path -> (..., in, out), of all modules that they change.
    rank: the largest; 0 for no adapters.
  """

  folders: dict[str, Path]
  damaged: dict[str, str]
  shapes: dict[str, tuple[int, ...]]
  rank: int


class Loading(NamedTuple):
  """An adapter on its way to host memory.

  Attributes:
    version: of the name, when it was asked for.
    future: of its Loras.
  """

  version: int
  future: "concurrent.futures.Future[Loras]"


def open_base(folder: str) -> Base:
  """Reads the names and shapes of a base; its tensors are not read yet."""
  checkpoint = open_checkpoint(folder)
  return Base(checkpoint.spec, read_config(folder), Samples(checkpoint))


def read_adapter(folder: Path, base: Base) -> Loras:
  """Reads a PEFT folder as Loras of the reference models.

  Args:
    folder: of PEFT.
    base: what it is for.

  Returns:
    Loras by paths of the models' parameters.

  Raises:
    ValueError: a folder that cannot be read, that does not fit the base, or
      that changes more than a Lora can: biases, or whole tensors.
  """
  found = load_peft(folder, like=base.spec, config=base.config, on_host=True)
  if others := [*found.biases, *found.full]:
    raise ValueError(
      f"{folder} also changes {len(others)} biases or whole tensors: "
      f"{name_some(others)}; a slot holds Loras alone. Serve it as a base."
    )
  return {from_hf(name)[0]: lora for name, lora in found.loras.items()}


def survey(folder: Path, base: Base) -> Survey:
  """Reads every adapter of a folder once, to know how much room they need.

  Args:
    folder: whose subfolders are PEFT's; others are left alone.
    base: what they are for.

  Returns:
    Survey.

  Warns:
    OtherBaseWarning: an adapter says that it was made on another base.

  Raises:
    ValueError: no such folder.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder} is no folder; give one that holds adapters")
  found = Survey({}, {}, {}, 0)
  for own in sorted(folder.iterdir()):
    if not (own / CONFIG).exists():
      continue
    try:
      check_name(own.name)
      loras = read_adapter(own, base)
      check_fingerprint(read_fingerprint(own), base.samples, name=own.name)
    except (ValueError, OSError) as error:
      found.damaged[own.name] = str(error)
      continue
    found.folders[own.name] = own
    for path, lora in loras.items():
      shape = (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
      found.shapes.setdefault(path, shape)
      found = found._replace(rank=max(found.rank, lora.rank))
  return found


def check_name(name: str) -> None:
  """Raises unless something can be the name of an adapter."""
  if not _NAME.fullmatch(name):
    raise ValueError(
      f"{name!r} is no name for an adapter; give up to 200 letters, digits and "
      "any of _.:@+-"
    )


class Adapters:
  """All adapters of a server, by name; may be asked from any thread.

  Args:
    root: the folder that they must lie in.
    base: what they are for.
    base_name: a name that no adapter may have.
    found: what there is at the start.
    room: of slots.
    nbytes: of adapters in host memory.
  """

  def __init__(
    self,
    root: Path,
    base: Base,
    base_name: str,
    found: Survey,
    room: Room,
    nbytes: int,
  ):
    self.root, self.base_name, self.room = root.resolve(), base_name, room
    self._base = base
    self._folders = dict(found.folders)
    self._damaged = dict(found.damaged)
    self._lock = threading.RLock()
    self._count = itertools.count(1)
    self._versions = {name: 0 for name in self._folders}
    self._shelf = Shelf(self._read, nbytes=nbytes)

  @property
  def folders(self) -> dict[str, Path]:
    """Returns name -> folder of all that may be asked for."""
    with self._lock:
      return dict(self._folders)

  def check(self, name: str) -> None:
    """Raises Refused unless an adapter is known."""
    with self._lock:
      if name in self._folders:
        return
      if why := self._damaged.get(name):
        raise Refused(400, "damaged_adapter", f"{name} is damaged: {why}")
      near = nearest(name, [self.base_name, *self._folders])
    raise Refused(404, "model_not_found", f"There is no model {name}{near}")

  def is_in_slot(self, name: str) -> bool:
    """Returns whether an adapter is on the device.

    Raises:
      Refused: there is none of that name.
    """
    with self._lock:
      self.check(name)
      return self.room.has(name)

  def hold(self, name: str) -> Lease | None:
    """Holds an adapter that is in a slot; None if it is not.

    Raises:
      Refused: there is none of that name.
    """
    with self._lock:
      self.check(name)
      return self.room.hold(name)

  def ask(self, name: str) -> Loading:
    """Begins to bring an adapter to host memory, if it is not there.

    Raises:
      Refused: there is none of that name.
    """
    with self._lock:
      self.check(name)
      return Loading(self._versions[name], self._shelf.ask(name))

  def is_current(self, name: str, loading: Loading) -> bool:
    """Returns whether a name still means what was asked for."""
    with self._lock:
      return self._versions.get(name) == loading.version

  def lease(self, name: str, loading: Loading) -> Lease | None:
    """Brings an adapter that was read to a slot, and holds it.

    Args:
      name: of the adapter.
      loading: done.

    Returns:
      A Lease; None while all slots are in use, or if it was replaced
      since it was asked for.

    Raises:
      Refused: it cannot be read, does not fit, or its name is gone.
    """
    with self._lock:
      self.check(name)
      if not self.is_current(name, loading):
        return None
      if lease := self.room.hold(name):  # since it was asked for
        return lease
      try:
        loras = loading.future.result(timeout=0)
        return None if self.room.is_full else self.room.fill(name, loras)
      except (ValueError, OSError) as error:
        raise Refused(400, "damaged_adapter", str(error)) from error

  def load(self, name: str, folder: str, *, in_place: bool = False) -> None:
    """Makes another adapter known, after reading it.

    Args:
      name: it is asked for by.
      folder: of PEFT, within the server's folder of adapters.
      in_place: whether it may take the place of another of that name.

    Raises:
      Refused: a name that is taken, a folder elsewhere, or one that cannot be
        read or does not fit the room.
    """
    try:
      check_name(name)
      place = (self.root / folder).resolve()
      if self.root not in place.parents:
        raise ValueError(f"{folder} does not lie in the folder of adapters")
      self._check_free(name, in_place)
      loras = read_adapter(place, self._base)
      self.room.check(loras, name)
      known = read_fingerprint(place)
      check_fingerprint(known, self._base.samples, name=name)
    except (ValueError, OSError) as error:
      raise Refused(400, "bad_adapter", str(error)) from error
    with self._lock:
      self._check_free(name, in_place)
      self._drop(name)
      self._damaged.pop(name, None)
      self._folders[name] = place
      self._versions[name] = next(self._count)
      self._shelf.put(name, loras)

  def unload(self, name: str) -> None:
    """Forgets an adapter; what runs with it is finished.

    Raises:
      Refused: there is none of that name.
    """
    with self._lock:
      self.check(name)
      self._drop(name)

  def close(self) -> None:
    """Stops reading."""
    self._shelf.close()

  def _check_free(self, name: str, in_place: bool) -> None:
    """Raises if a name is taken."""
    if name == self.base_name:
      raise ValueError(f"{name} is the base's name; give another")
    if name in self.folders and not in_place:
      raise ValueError(
        f"there is an adapter {name}; unload it, or say load_inplace"
      )

  def _drop(self, name: str) -> None:
    """Forgets an adapter on all levels."""
    self._folders.pop(name, None)
    self._versions.pop(name, None)
    self._shelf.forget(name)
    self.room.forget(name)

  def _read(self, name: str) -> Loras:
    """Reads an adapter from its folder; called by the shelf."""
    with self._lock:
      folder = self._folders.get(name)
    if folder is None:
      raise ValueError(f"{name} was unloaded")
    loras = read_adapter(folder, self._base)
    self.room.check(loras, name)
    return loras


def shapes_of(params: Mapping[str, Any], pattern: str) -> Shapes:
  """Returns the modules of a model that a regex finds, with (in, out).

  Args:
    params: path -> parameter.
    pattern: searched for in the paths of kernels.

  Returns:
    path -> (in, out).

  Raises:
    ValueError: it finds none, or is no regex.
  """
  try:
    search = re.compile(pattern).search
  except re.error as error:
    raise ValueError(f"--modules={pattern} is no regex: {error}") from error
  kernels = {p: x.shape for p, x in params.items() if p.endswith("/kernel")}
  found = {path: shape for path, shape in kernels.items() if search(path)}
  if not found:
    raise ValueError(
      f"--modules={pattern} finds none of {name_some(kernels)}; give a regex "
      "of parts of such paths"
    )
  return found
