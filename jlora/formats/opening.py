# SPDX-License-Identifier: Apache-2.0
"""One reader for adapters of all tools; the format is found by the keys."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.hub import locate
from jlora.formats.adapters import Adapter
from jlora.formats.bases import Base, Split, base_of
from jlora.formats.diffusers_metadata import configuration_of
from jlora.formats.forms import MAGNITUDES, differing_axes
from jlora.formats.gguf import open_gguf
from jlora.formats.jax_reading import is_state, open_state
from jlora.formats.keys import Sorted, StoredModule, sort_keys
from jlora.formats.lazy import Finite
from jlora.formats.mlx_reading import is_mlx, open_mlx
from jlora.formats.names import Family, is_exchanged
from jlora.formats.peft.layouts import CONFIG, EMBEDDING, EXPERTS, ROUTER
from jlora.formats.peft.reading import open_stored
from jlora.formats.placing import Placed, guess_family, place_stems
from jlora.formats.reading import ReadChange, ReadLora, ReadPeft, ReadWhole
from jlora.messages import name_some


def open_adapter(
  path: str | os.PathLike, base: Any = None, *, allow_missing: bool = False
) -> Adapter:
  """Opens an adapter of any tool: PEFT, kohya, ComfyUI, diffusers, qwix, ...

      W' - W = scale · aᵀ b,   scale = alpha / r,  1 where there is no alpha

  LoRA with a Tucker core, LoHa and LoKr come as the LoRA that they equal. DoRA
  is no LoRA: with a base its change is formed and factored at full rank.

  Args:
    path: a safetensors file, or a folder with one; a folder of PEFT or mlx-lm;
      a GGUF file (extra `gguf`); an orbax checkpoint with the LoRA state of
      qwix, tunix or MaxText.
    base: the model that it is for: a path, a pipeline's folder, an open
      checkpoint, or parameter -> anything with `.shape`. Then the modules have
      the base's names. Without one they have diffusers' names, with the
      component in front (`unet.`), or those of the file.
    allow_missing: whether modules that the base lacks are left out, not an
      error.

  Returns:
    Adapter, a lazy mapping {module: Lora} of NumPy arrays in the dtype of the
    file: a (r, in), b (r, out), scale (). Kernels are flattened into `in`.

  Raises:
    ValueError: no adapter; one factor of a pair missing; factors of different
      ranks; an alpha that is not finite; OFT, BOFT, GLoRA, IA3 or an
      optimizer's state; DoRA without a base; modules that the base lacks; names
      that cannot be told. NaN and infinity when the module is read.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> stem = "lora_unet_double_blocks_0_img_attn_proj"
    >>> tensors = {f"{stem}.lora_down.weight": np.ones((2, 8), np.float16),
    ...            f"{stem}.lora_up.weight": np.ones((8, 2), np.float16),
    ...            f"{stem}.alpha": np.float16(1)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/x.safetensors", tensors)
    ...   adapter = open_adapter(f"{folder}/x.safetensors")
    ...   for module, lora in adapter.items():
    ...     print(adapter.format, module, lora.rank, lora.scale)
    kohya transformer.transformer_blocks.0.attn.to_out.0 2 0.5
  """
  place = locate(path)
  known = None if base is None else base_of(base)
  if place.is_dir() and is_state(place):
    return open_state(place, known, allow_missing)
  if place.is_dir() and (place / CONFIG).is_file():
    if is_mlx(place):
      return open_mlx(place, known, allow_missing)
    return _open_peft(place, known, allow_missing)
  if place.is_file() and place.suffix == ".gguf":
    return open_gguf(place, known)
  return _open_file(open_checkpoint(place), known, allow_missing)


def _open_file(file: Checkpoint, base: Base | None, allow: bool) -> Adapter:
  """Opens a safetensors file of any tool."""
  place = str(file.path)
  kinds = sort_keys(file, place)
  for module in kinds.modules.values():
    _check_factors(file, module)
  stems = [*kinds.modules, *(stem for stem, _ in kinds.whole)]
  placed, family = place_stems(dict.fromkeys(stems), base, place)
  scales = _scales(file, kinds, placed)
  opened = _Opened(file, base, scales, family)
  missing = [stem for stem, one in placed.items() if one is None]
  _check_missing(missing, allow, place)
  readers: dict[str, Any] = {}
  adapter = Adapter(file.path, _tool(kinds, file), readers)
  adapter.left_out = dict.fromkeys(missing, "the base has no such module")
  for stem, module in kinds.modules.items():
    if _is_empty(file, module):
      adapter.left_out[stem] = "rank 0: no change"
    elif one := placed[stem]:
      opened.add(adapter, module, one)
  adapter.shifts = Finite(opened.shifts(kinds, placed))
  adapter.metadata = dict(file.metadata)
  adapter.family = _family_name(adapter, opened, family, kinds)
  if None in adapter.alphas.values():
    adapter.notes.append("no alpha: the scale is 1")
  return adapter


def _check_missing(missing: list[str], allow: bool, place: str) -> None:
  """Raises if the base lacks modules, unless that is allowed."""
  if missing and not allow:
    raise ValueError(
      f"{place}: the base has no module for {len(missing)} names of the file: "
      f"{name_some(missing)}. Give its own base, or leave them out: "
      "allow_missing=True."
    )


def _tool(kinds: Sorted, file: Checkpoint) -> str:
  """Names the tool: ComfyUI's keys are those of others but for the prefix."""
  first = next(iter(file), "")
  dotted = not first.startswith(("lora_", "lycoris_"))
  if kinds.tool == "kohya" and dotted:
    return "kohya with dots"
  if kinds.tool == "diffusers" and first.startswith(
    ("diffusion_model.", "text_encoders.")
  ):
    return "comfy"
  if kinds.tool == "diffusers" and first.startswith("base_model.model."):
    return "PEFT without its configuration"
  return kinds.tool


def _family_name(
  adapter: Adapter, opened: "_Opened", family: Family | None, kinds: Sorted
) -> str | None:
  """Returns the family's name where the modules leave one."""
  shapes = {opened.at[name]: shape for name, shape in adapter.shapes.items()}
  found = guess_family(shapes, shapes, adapter.metadata)
  flat_names = [s for s in kinds.modules if s.startswith("lora_unet_")]
  original = any("put_blocks_" in s for s in flat_names)
  is_unet = family is not None and family.component == "unet"
  if is_unet and len(found) > 1 and flat_names:
    # kohya has original names for SDXL alone.
    wanted = {"sdxl"} if original else {"sd1", "sd2"}
    found = [one for one in found if one.name in wanted]
  return found[0].name if len({one.name for one in found}) == 1 else None


def _scales(
  file: Checkpoint,
  kinds: Sorted,
  placed: Mapping[str, Placed | None],
) -> dict[str, tuple[float | None, float]]:
  """Returns (alpha or None, scale) of every module of the file."""
  config = configuration_of(file)
  found, wrong = {}, []
  for stem, module in kinds.modules.items():
    rank = _alpha_rank(file, module)
    alpha: float | None = None
    if key := module.keys.get("alpha"):
      stored = np.asarray(file[key], np.float64)
      if stored.size != 1 or not np.isfinite(stored).all():
        wrong.append(f"{stem}: {stored.ravel()[:3]}")
        continue
      alpha = float(stored.ravel()[0])
    elif config and (one := placed[stem]):
      told = config.scale(one.at[0], rank)
      alpha = None if told is None else told * (rank or 1)
    scale = alpha / rank if alpha is not None and rank else 1.0
    found[stem] = (alpha, scale)
  if wrong:
    raise ValueError(
      f"{file.path}: alpha of {len(wrong)} modules is not one finite number: "
      f"{name_some(wrong)}; the file is damaged."
    )
  return found


def _alpha_rank(file: Checkpoint, module: StoredModule) -> int | None:
  """Returns the number that divides a module's alpha; None if none does."""
  for role, axis in module.form.rank:
    if key := module.keys.get(role):
      return file.spec[key].shape[axis]
  return None


def _unread(at: Split) -> np.ndarray:
  """Raises: without a base there is no weight."""
  raise ValueError(f"the weight of {at[1]} is not known; give the base.")


class _Opened:
  """What is known of an open file while its modules are described."""

  def __init__(self, file: Checkpoint, base: Base | None, scales, family):
    self.file, self.base, self.scales = file, base, scales
    self.family = family
    self.at: dict[str, Split] = {}

  def add(self, adapter: Adapter, module: StoredModule, placed: Placed) -> None:
    """Describes what one module of the file is, or several of the model."""
    whole = self._whole_shape(module, placed)
    parts = self._bounds(whole[0], placed)
    exchanged = placed.row is not None and is_exchanged(placed.row, whole)
    magnitude = next((r for r in MAGNITUDES if r in module.keys), None)
    if magnitude:
      self._check_base(module, placed)
    for at, (start, stop) in zip(placed.at, parts, strict=True):
      name = self._name(at)
      if name in adapter:
        raise ValueError(
          f"{self.file.path}: {name} is there twice, once as {module.stem}."
        )
      shape = (stop - start, *whole[1:])
      alpha, scale = self.scales[module.stem]
      cutting = None if len(parts) == 1 else (start, stop)
      read = ReadLora(
        self.file,
        _unread if self.base is None else self.base.read,
        module,
        at,
        scale,
        cutting,
        exchanged,
      )
      adapter.readers[name] = read
      adapter.shapes[name] = shape
      adapter.alphas[name] = alpha
      most = min(shape[0], int(np.prod(shape[1:])))
      adapter.ranks[name] = most if magnitude else min(read.rank, most)
      self.at[name] = at

  def _name(self, at: Split) -> str:
    """Returns the name of a module for users."""
    if self.base is not None:
      return self.base.names[at]
    return ".".join(filter(None, at))

  def _whole_shape(self, module: StoredModule, placed: Placed):
    """Returns the shape of the weight that the file's module changes."""
    form = module.form
    shapes = {
      role: self.file.spec[key].shape for role, key in module.keys.items()
    }
    own = form.shape(shapes)
    if self.base is None:
      return own
    known = [self.base.shapes[at] for at in placed.at]
    whole = (sum(shape[0] for shape in known), *known[0][1:])
    if (own[0], int(np.prod(own[1:]))) != (whole[0], int(np.prod(whole[1:]))):
      raise ValueError(
        f"{self.file.path}: {module.stem} is for a weight {own}, the base has "
        f"{whole}; it was made for another model."
      )
    return whole

  def _bounds(self, count: int, placed: Placed) -> list[tuple[int, int]]:
    """Returns which of the outputs each module of the model has."""
    if len(placed.at) == 1:
      return [(0, count)]
    if self.base is not None:
      sizes = [self.base.shapes[at][0] for at in placed.at]
    else:
      shares = placed.row.shares if placed.row else (1,) * len(placed.at)
      if count % sum(shares):
        raise ValueError(
          f"{self.file.path}: {count} outputs cannot be cut for "
          f"{name_some(placed.at)}; give the base, whose shapes tell."
        )
      sizes = [share * (count // sum(shares)) for share in shares]
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))

  def _is_exchanged(self, module: StoredModule | None, placed: Placed) -> bool:
    """Returns whether the halves of a bias change places, as the weight's."""
    if placed.row is None:
      return False
    if module is not None:
      return is_exchanged(placed.row, self._whole_shape(module, placed))
    if self.base is not None:
      return is_exchanged(placed.row, self.base.shapes[placed.at[0]])
    return placed.row.exchanged

  def _check_base(self, module: StoredModule, placed: Placed) -> None:
    """Raises if DoRA's weight is not known, or has several parts."""
    if self.base is None or not self.base.has_weights:
      raise ValueError(
        f"{self.file.path} is DoRA ({module.stem}): its change depends on the "
        "weights. Give the base it was trained on."
      )
    if len(placed.at) > 1:
      raise ValueError(
        f"{self.file.path}: {module.stem} is DoRA of a weight that the base "
        f"keeps in {len(placed.at)} parts; give a base with the file's names."
      )

  def shifts(self, kinds: Sorted, placed: Mapping[str, Placed | None]):
    """Returns readers of the changes that are stored whole, and of biases."""
    stored = [(stem, leaf, key, 1.0)
              for (stem, leaf), key in kinds.whole.items()]  # fmt: skip
    stored += [
      (stem, "bias", module.keys["bias"], self.scales[stem][1])
      for stem, module in kinds.modules.items()
      if "bias" in module.keys
    ]
    found: dict[str, Any] = {}
    for stem, leaf, key, scale in stored:
      if (one := placed[stem]) is None:
        continue
      parts = self._bounds(self._checked_length(key, leaf, one), one)
      exchanged = self._is_exchanged(kinds.modules.get(stem), one)
      for at, bounds in zip(one.at, parts, strict=True):
        name = f"{self._name(at)}.{leaf}"
        if name in found:
          raise ValueError(
            f"{self.file.path}: the change of {name} is there twice, as "
            f"{found[name].key} and as {key}; leave one out."
          )
        found[name] = ReadWhole(self.file, key, bounds, scale, exchanged)
    return found

  def _checked_length(self, key: str, leaf: str, placed: Placed) -> int:
    """Returns how many outputs a change has; raises if the base has others."""
    own = self.file.spec[key].shape
    if not own:
      raise ValueError(f"{self.file.path}: {key} is a number, no change.")
    if self.base is None:
      return own[0]
    known = [self.base.shapes[at] for at in placed.at]
    whole = (sum(shape[0] for shape in known), *known[0][1:])
    whole = whole[:1] if leaf == "bias" else whole
    if (own[0], math.prod(own[1:])) != (whole[0], math.prod(whole[1:])):
      raise ValueError(
        f"{self.file.path}: {key} is {own}, the base has {whole}; it was made "
        "for another model."
      )
    return own[0]


def _check_factors(file: Checkpoint, module: StoredModule) -> None:
  """Raises unless a module's factors can be multiplied."""
  shapes = {role: file.spec[key].shape for role, key in module.keys.items()}
  try:
    module.form.shape(shapes)
    wrong = differing_axes(shapes)
  except IndexError:
    raise ValueError(
      f"{file.path}: {module.stem} is no {module.form.name}, its tensors are "
      f"{name_some(shapes.values(), 9)}."
    ) from None
  if math.prod(shapes.get("up", ())[2:]) != 1:
    wrong.append(f"up {shapes['up']}")
  if wrong:
    raise ValueError(
      f"{file.path}: the factors of {module.stem} have different ranks: "
      f"{name_some(wrong)}; the file is damaged."
    )


def _is_empty(file: Checkpoint, module: StoredModule) -> bool:
  """Returns whether a module's factors have no entries."""
  return any(0 in file.spec[key].shape for key in module.keys.values())


def _open_peft(folder: Path, base: Base | None, allow: bool) -> Adapter:
  """Opens a PEFT folder."""
  stored = open_stored(folder)
  layers = {one.name.removesuffix(".weight"): one for one in stored.layers}
  placed = _placed_in(base, [*layers], allow, str(folder))
  readers = {
    placed[name]: ReadPeft(one, stored.file)
    for name, one in layers.items()
    if name in placed
  }
  adapter = Adapter(folder, "PEFT", readers)
  adapter.left_out = {
    name: "the base has no such module" for name in layers.keys() - placed
  }
  shifts = {}
  for module, one in layers.items():
    if (name := placed.get(module)) is None:
      continue
    a, b = (stored.file.spec[one.keys[side]].shape for side in ("a", "b"))
    tall = (a[1], b[0]) if one.layout is EMBEDDING else (b[0], *a[1:])
    if one.layout not in (EXPERTS, ROUTER):
      _check_shape(module, tall, name, base, folder)
    adapter.shapes[name] = tall
    adapter.ranks[name] = one.rank
    adapter.alphas[name] = one.scale * one.rank
    if "bias" in one.keys:
      shifts[f"{name}.bias"] = ReadWhole(
        stored.file, one.keys["bias"], None, one.scale, False
      )
  whole = {
    name: ReadWhole(stored.file, key, None, 1.0, False)
    for name, key in stored.full.items()
  }
  adapter.whole = Finite(whole)
  adapter.shifts = Finite(shifts | _changes(whole, layers, base))
  adapter.metadata = {"adapter_config": json.dumps(_plain(stored.config))}
  return adapter


def _changes(
  whole: Mapping[str, ReadWhole], layers: Mapping[str, Any], base: Base | None
) -> dict[str, ReadChange]:
  """Returns the changes of what is stored whole, where the base has it.

  A table of tokens beside its own LoRA is the base's, unchanged.
  """
  if base is None or not base.has_weights:
    return {}
  known = base.parameters
  return {
    name: ReadChange(read, known, name)
    for name, read in whole.items()
    if name in known and name.rpartition(".")[0] not in layers
  }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a configuration as JSON can hold it."""
  return {
    key: sorted(value) if isinstance(value, frozenset) else value
    for key, value in config.items()
  }


def _placed_in(
  base: Base | None, names: list[str], allow: bool, place: str
) -> dict[str, str]:
  """Returns the base's names of PEFT's modules, those that it has."""
  if base is None:
    return {name: name for name in names}
  placed, _ = place_stems(names, base, place)
  _check_missing([n for n, one in placed.items() if one is None], allow, place)
  if other := [n for n, one in placed.items() if one and _is_remade(one)]:
    raise ValueError(
      f"{place}: {len(other)} modules have their outputs in other parts or in "
      f"another order in the base: {name_some(other)}. Give a base with the "
      "adapter's names."
    )
  found = {n: base.names[one.at[0]] for n, one in placed.items() if one}
  ends = list(found.values())
  if twice := [f"{n} ({to})" for n, to in found.items() if ends.count(to) > 1]:
    raise ValueError(
      f"{place}: {len(twice)} names are one module of the base with another: "
      f"{name_some(twice)}."
    )
  return found


def _is_remade(placed: Placed) -> bool:
  """Returns whether a name is of a module that the base keeps otherwise."""
  return len(placed.at) > 1 or (placed.row is not None and placed.row.exchanged)


def _check_shape(
  module: str, own: tuple[int, ...], name: str, base: Base | None, place: Path
) -> None:
  """Raises if a base's weight has another shape than a change of PEFT's."""
  if base is None:
    return
  at = next(split for split, known in base.names.items() if known == name)
  shape = base.shapes[at]
  if sorted(own) != sorted(shape) and math.prod(own) != math.prod(shape):
    raise ValueError(
      f"{place}: {module} is for a weight {own}, the base has {shape}; it was "
      "made for another model."
    )
