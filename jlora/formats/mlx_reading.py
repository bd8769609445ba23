# SPDX-License-Identifier: Apache-2.0
"""Reads adapters of mlx-lm."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.documents import read_json
from jlora.formats.adapters import Adapter
from jlora.formats.bases import Base, Split
from jlora.formats.mlx import WEIGHTS
from jlora.formats.mlx_names import KINDS, Kind, Place, places_of
from jlora.formats.peft.layouts import CONFIG
from jlora.loras import Lora
from jlora.messages import name_some

_SIDES = ("lora_a", "lora_b")
_TABLE = "embed_tokens"
_LARGEST = 1e30  # float32 holds it


class Stored(NamedTuple):
  """A module of the file.

  Attributes:
    a: shape of its lora_a.
    b: of its lora_b.
  """

  a: tuple[int, ...]
  b: tuple[int, ...]

  @property
  def is_stack(self) -> bool:
    """Returns whether it is a stack of experts."""
    return len(self.a) == 3

  @property
  def rank(self) -> int:
    """Returns its rank."""
    return self.b[-1] if self.is_stack else self.b[0]


def is_mlx(folder: Path) -> bool:
  """Returns whether a folder's `adapter_config.json` is one of mlx-lm.

  Args:
    folder: with that file.
  """
  config = read_json(folder / CONFIG)
  if not isinstance(config, dict) or "peft_type" in config:
    return False
  return "fine_tune_type" in config or "lora_parameters" in config


def open_mlx(folder: Path, base: Base | None, allow: bool) -> Adapter:
  """Opens an adapter of mlx-lm.

  Args:
    folder: with `adapter_config.json` and `adapters.safetensors`.
    base: the model, whose names are used; None: mlx-lm's.
    allow: whether modules that the base lacks are left out, not an error.

  Returns:
    Adapter. Experts are stacks, a (experts, r, in), or modules of their own
    where the base has those.

  Raises:
    ValueError: another kind of fine-tuning than LoRA, a damaged file, or
      modules that the base lacks.
  """
  scale = _scale_of(folder)
  file = open_checkpoint(folder / WEIGHTS)
  stored = _pairs_in(file, folder)
  placed, at = _placed(stored, base)
  used = {place.module for places in placed.values() for place in places}
  lost = [module for module in stored if module not in used]
  if lost and not allow:
    raise ValueError(
      f"{folder}: the base has no module for {len(lost)} names of the file: "
      f"{name_some(lost)}. Give its own base, or leave them out: "
      "allow_missing=True."
    )
  adapter = Adapter(folder, "mlx", {})
  adapter.left_out = dict.fromkeys(lost, "the base has no such module")
  for name, places in placed.items():
    whole = None if base is None else base.shapes[at[name]]
    read = _ReadMlx(file, places, stored, scale, whole)
    own = read.shape(name)
    if whole is not None and (own != whole or not read.fits):
      raise ValueError(
        f"{folder}: {name} is for a weight {own}, the base has {whole}; it was "
        "made for another model."
      )
    adapter.readers[name] = read
    adapter.shapes[name], adapter.ranks[name] = own, read.rank
    adapter.alphas[name] = scale * read.rank
  adapter.metadata = dict(file.metadata)
  return adapter


class _ReadMlx(NamedTuple):
  """Reads one module.

  Attributes:
    file: the tensors.
    places: what it is in the file; of two, the halves of its outputs, one can
      be missing there.
    stored: all modules of the file.
    scale: of all.
    whole: shape of its weight in the base, None if that is not known.
  """

  file: Checkpoint
  places: tuple[Place, ...]
  stored: Mapping[str, Stored]
  scale: float
  whole: tuple[int, ...] | None

  @property
  def own(self) -> list[Stored]:
    """Returns the modules of the file that are there."""
    return [self.stored[p.module] for p in self.places
            if p.module in self.stored]  # fmt: skip

  @property
  def rank(self) -> int:
    """Returns the rank; that of halves adds up."""
    return sum(one.rank for one in self.own)

  @property
  def fits(self) -> bool:
    """Returns whether halves are of one size, and the expert is there."""
    sizes = {(one.a[0], one.b[1], *one.a[2:]) for one in self.own}
    return len(sizes) == 1 and (self.places[0].expert or 0) < self.own[0].a[0]

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of the weight."""
    one = self.own[0]
    if not one.is_stack:
      sides = (one.b[1], one.a[0])
      return sides[::-1] if name.rpartition(".")[2] == _TABLE else sides
    sides = (one.b[1] * len(self.places), one.a[2])
    is_member = self.places[0].expert is not None
    return sides if is_member else (one.a[0], *sides)

  def __call__(self) -> Lora:
    """Reads it."""
    parts = [self._part(place) for place in self.places]
    known = [part for part in parts if part is not None]
    scale: Any = np.full(known[0][0].shape[:-2], self.scale, np.float32)
    if len(parts) == 1:
      return Lora(*known[0], scale)  # type: ignore[arg-type]
    a = np.concatenate([a for a, _ in known], -2)
    inner, start = known[0][1].shape[-1], 0
    b = np.zeros((*a.shape[:-1], inner * len(parts)), a.dtype)
    for half, part in enumerate(parts):
      if part is not None:
        stop = start + part[1].shape[-2]
        b[..., start:stop, half * inner : (half + 1) * inner] = part[1]
        start = stop
    return Lora(a, b, scale)  # type: ignore[arg-type]

  def _part(self, place: Place) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns a (..., r, in) and b (..., r, out); None if it is not there."""
    if place.module not in self.stored:
      return None
    a, b = (self.file[f"{place.module}.{side}"] for side in _SIDES)
    if not self.stored[place.module].is_stack:
      return np.ascontiguousarray(a.T), b
    if place.expert is not None:
      a, b = a[place.expert], b[place.expert]
    return a, np.ascontiguousarray(np.swapaxes(b, -1, -2))


def _scale_of(folder: Path) -> float:
  """Returns the scale of all modules; raises unless they are LoRAs."""
  config = read_json(folder / CONFIG)
  kind = config.get("fine_tune_type", "lora")
  if kind != "lora":
    raise ValueError(
      f"{folder} is an adapter of mlx-lm of the type {kind!r}, which is not "
      "read; only 'lora' is. Fuse it with mlx_lm.fuse and extract from that."
    )
  told = config.get("lora_parameters")
  scale = told.get("scale") if isinstance(told, dict) else None
  # Flags are integers to Python.
  is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
  if not is_number or not abs(scale) < _LARGEST:  # type: ignore[arg-type]
    raise ValueError(
      f"{folder / CONFIG}: lora_parameters must have a finite scale, got "
      f"{scale!r}; the file is damaged."
    )
  return float(scale)  # type: ignore[arg-type]


def _pairs_in(file: Checkpoint, folder: Path) -> dict[str, Stored]:
  """Returns the modules of a file; raises unless all are whole."""
  stems = {key.rpartition(".")[0]: None for key in file}
  keys = {f"{stem}.{side}" for stem in stems for side in _SIDES}
  if odd := sorted(set(file) ^ keys):
    lacking = [key for key in odd if key in keys]
    what = "lacks" if lacking else "has, besides lora_a and lora_b,"
    raise ValueError(
      f"{folder / WEIGHTS} {what} {name_some(lacking or odd)}; it is damaged, "
      "or no LoRA."
    )
  found = {
    stem: Stored(*(tuple(file.spec[f"{stem}.{s}"].shape) for s in _SIDES))
    for stem in stems
  }
  wrong = [
    f"{stem}: lora_a {one.a}, lora_b {one.b}"
    for stem, one in found.items()
    if not _fits(one)
  ]
  if wrong:
    raise ValueError(
      f"{folder / WEIGHTS}: the factors of {len(wrong)} modules have different "
      f"ranks: {name_some(wrong)}; the file is damaged."
    )
  return found


def _fits(one: Stored) -> bool:
  """Returns whether two factors have one rank."""
  if (len(one.a), len(one.b)) == (2, 2):
    return one.a[1] == one.b[0]
  is_stack = (len(one.a), len(one.b)) == (3, 3)
  return is_stack and (one.a[0], one.a[1]) == (one.b[0], one.b[2])


def _placed(
  stored: Mapping[str, Stored], base: Base | None
) -> tuple[dict[str, tuple[Place, ...]], dict[str, Split]]:
  """Returns each module's places in the file, and where the base has it."""
  if base is None:
    return {module: (Place(module),) for module in stored}, {}
  config = next(iter(base.configs.values()), {})
  kind = KINDS.get(str(config.get("model_type")), Kind(False))
  found, at = {}, {}
  for split, name in base.names.items():
    own = [Place(name)] if name in stored else places_of(name, kind)
    if any(place.module in stored for place in own):
      found[name], at[name] = tuple(own), split
  return found, at
