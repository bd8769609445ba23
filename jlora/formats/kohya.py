# SPDX-License-Identifier: Apache-2.0
"""Writes adapters as kohya-ss's scripts do, with flattened names."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.formats.bases import CLIP, Split
from jlora.formats.joining import halves_exchanged
from jlora.formats.name_rows import Plan, Row
from jlora.formats.names import (
  FAMILIES,
  Family,
  covering,
  find_ours,
  flatten,
  is_exchanged,
  names_of,
  original_of,
  plan_of,
)
from jlora.formats.placing import guess_family
from jlora.formats.storing import (
  Given,
  Select,
  Suffixes,
  Target,
  everything,
  given_by,
  rounded_change,
  write_file,
)
from jlora.loras import Lora
from jlora.messages import name_some

_SUFFIXES = Suffixes(".lora_down.weight", ".lora_up.weight", ".alpha")
_MAIN = ("unet", "transformer", "transformer_2")


class Spelling(NamedTuple):
  """How a format names modules.

  Attributes:
    original: whether denoisers have the original's names.
    main: (component, name) -> what the keys of a denoiser's module begin with.
    text: (component, name, family) -> the same of a text encoder's, None if the
      family has no such encoder.
    norm: suffixes of a norm's weight and bias.
  """

  original: Callable[[Family], bool]
  main: Callable[[str], str]
  text: Callable[[str, str, Family], str | None]
  norm: tuple[str, str]


class Place(NamedTuple):
  """The name of one or several modules in a file.

  Attributes:
    stem: what its keys begin with.
    at: the modules that make it up.
    row: of the table, None for a text encoder's.
  """

  stem: str
  at: tuple[Split, ...]
  row: Row | None


def _kohya_text(component: str, module: str, family: Family) -> str | None:
  """Returns a text encoder's flattened name."""
  prefix = family.text.get(component)
  return None if prefix is None else f"{prefix}_{flatten(module)}"


KOHYA = Spelling(
  lambda family: not family.kohya_ours,
  lambda name: f"lora_unet_{flatten(name)}",
  _kohya_text,
  (".w_norm", ".b_norm"),
)


def save_kohya(
  path: str | os.PathLike,
  loras: Mapping[str, Lora],
  *,
  like: Any = None,
  family: str | None = None,
  shifts: Mapping[str, Any] | None = None,
  dtype: Any = np.float16,
  select: Select = everything,
  one_alpha: bool = True,
  metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
  """Writes a file as kohya-ss's scripts do: flattened names and an alpha.

      P_m.lora_down.weight (r, in, *k),  P_m.lora_up.weight (out, r, *1),
      P_m.alpha = r,   of the largest rank where they differ

  Args:
    path: the file, written whole or not at all.
    loras: module or parameter of diffusers -> Lora; as for `save_diffusers`.
    like: as for `save_diffusers`. It tells of a UNet which blocks have
      attention, and how many layers.
    family: a key of `FAMILIES`; None: what the modules tell. SD 1.5 and 2 have
      diffusers' names, the others the original's, for which modules that are
      one there are joined.
    shifts: parameter -> change, of what is no Lora: norms as `w_norm` and
      `b_norm`, the rest as `diff` and `diff_b`.
    dtype: storage dtype.
    select: which modules, by name and shape; `kohya_layers` are those that
      kohya's own networks have.
    one_alpha: where ranks differ, whether every module has the largest as its
      alpha, and B is multiplied by `r / alpha`, which is the same change. With
      an alpha of its own for each, diffusers 0.42.1 applies the most frequent
      one to all of a UNet's attention. False: alpha is each module's rank, and
      factors already of that dtype keep their bytes.
    metadata: strings to strings, for the header; they replace what is written
      by itself.

  Returns:
    {name: why it is not in the file}.

  Raises:
    ValueError: as `save_diffusers`, a family that is not known, or that the
      modules do not tell.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import open_checkpoint
    >>> lora = Lora(np.ones((1, 8)), np.ones((1, 8)), np.float32(1))
    >>> name = "transformer.transformer_blocks.0.attn.to_q"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_kohya(f"{folder}/x.safetensors", {name: lora}, family="flux",
    ...              like={name: (8, 8), name[:-1] + "k": (8, 8),
    ...                    name[:-1] + "v": (8, 8)})
    ...   for key in open_checkpoint(f"{folder}/x.safetensors"): print(key)
    {}
    lora_unet_double_blocks_0_img_attn_qkv.alpha
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight
    lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight

  References:
    kohya-ss/sd-scripts, `networks/lora.py`, `networks/lora_flux.py`.
  """
  given = given_by(loras, like, shifts, select)
  own = family_of(given, family, metadata)
  if not own.network:
    raise ValueError(
      f"kohya's scripts have no network for {own.name}; write the format comfy "
      "or diffusers."
    )
  places = place_modules(given, own, KOHYA)
  targets = targets_of(given, places)
  extra = whole_tensors(given, own, KOHYA, shifts or {}, dtype)
  left = dict(given.left)

  def describe(ranks: Mapping[str, int]) -> dict[str, str]:
    return _metadata(ranks, targets, own) | dict(metadata or {})

  write_file(
    path, targets, loras, _SUFFIXES, dtype, extra, describe, left, one_alpha
  )
  return left


def kohya_layers(module: str, shape: tuple[int, ...]) -> bool:
  """Selects the modules that kohya's own networks have.

  Args:
    module: its name in diffusers.
    shape: of its weight.

  Returns:
    Whether it is a linear layer, or a convolution of 1x1, in a block of a
    transformer or of a text encoder, or its projection in or out.

  Example:
    >>> kohya_layers("down_blocks.0.attentions.0.proj_in", (320, 320, 1, 1))
    True
    >>> kohya_layers("down_blocks.0.resnets.0.conv1", (320, 320, 3, 3))
    False
  """
  inside = re.search(r"(^|\.)(attentions|\w*blocks?|layers)\.\d+\.", module)
  apart = re.search(r"(^|\.)(resnets|downsamplers|upsamplers)\.", module)
  return bool(inside) and not apart and math.prod(shape[2:]) == 1


def family_of(
  given: Given, family: str | None, metadata: Mapping[str, str] | None
) -> Family:
  """Returns the family by its name, or the one that the modules tell.

  Args:
    given: what is written.
    family: its name, or None.
    metadata: may name kohya's version of the base.

  Raises:
    ValueError: no such family, none with these modules, or several.
  """
  if family is not None:
    if family not in FAMILIES:
      raise ValueError(
        f"there is no family {family!r}; known are {', '.join(FAMILIES)}."
      )
    return FAMILIES[family]
  known = {
    at: shape
    for at, shape in given.shapes.items()
    if len(shape) > 1 and (at[0] not in _MAIN or at in given.names)
  }
  found = guess_family(given.names, known | {
    at: given.shapes[at] for at in given.names}, metadata)  # fmt: skip
  if rows := _rows_of_base(given):
    # Blocks of several families have the same names; what is around them tells.
    own = [one for one in FAMILIES.values() if one.rows is rows]
    found = [one for one in found if one in own] or own[:1]
  if len(found) == 1:
    return found[0]
  modules = name_some(given.names.values())
  if not found:
    raise ValueError(
      f"no family has a table of names with all of {modules}; known are "
      f"{', '.join(FAMILIES)}. Write the format diffusers, which needs none."
    )
  raise ValueError(
    f"{modules} can be of {', '.join(one.name for one in found)}; say which: "
    "family=..."
  )


def _rows_of_base(given: Given) -> tuple[Row, ...] | None:
  """Returns the rows of a base; None if they lack a module that is written.

  Of a base without other modules None as well: it tells no more than these do.
  """
  main = [
    module
    for (component, module), shape in given.base.shapes.items()
    if component in _MAIN and len(shape) > 1
  ]
  written = [at for at in given.names if at[0] in _MAIN]
  if len(main) <= len(written):
    return None
  found = covering(main, lambda name, family: find_ours(name, family.rows))
  if found is None or not all(find_ours(at[1], found.rows) for at in written):
    return None
  return found.rows


def place_modules(
  given: Given, family: Family, spelling: Spelling
) -> list[Place]:
  """Names all modules as a format does; what it cannot name is left out.

  Args:
    given: what is written; gets the reasons.
    family: of the model.
    spelling: of the format.

  Returns:
    Places, each once.
  """
  plan = _plan(given, family)
  found: dict[str, Place] = {}
  for at, name in given.names.items():
    place = place_one(at, family, spelling, plan)
    if place is None:
      given.left[name] = _unnamed(at, family)
    elif found.setdefault(place.stem, place).at != place.at:
      both = [".".join(one.at[0]) for one in (found[place.stem], place)]
      raise ValueError(
        f"{' and '.join(both)} have one name in the file, {place.stem}, and a "
        "reader would have one of them; leave one out, or write the format "
        "diffusers."
      )
  return list(found.values())


def _unnamed(at: Split, family: Family) -> str:
  """Returns why a module has no name in a format."""
  if at[0] in _MAIN or at[0].startswith("text_encoder"):
    return f"{family.name} has no such module in its table of names"
  return "which component it is of is not known"


def place_one(
  at: Split, family: Family, spelling: Spelling, plan: Plan
) -> Place | None:
  """Names a module as a format does.

  Args:
    at: component and module.
    family: of the model.
    spelling: of the format.
    plan: of a UNet.

  Returns:
    Place, or None if there is no name.
  """
  component, module = at
  if component not in _MAIN:
    is_clip = bool(re.match(r"(encoder\.layers|final_layer_norm)\b", module))
    full = CLIP + module if is_clip else module
    stem = spelling.text(component, full, family)
    return None if stem is None else Place(stem, (at,), None)
  found = find_ours(module, family.rows)
  if not spelling.original(family):
    return Place(spelling.main(module), (at,), None)
  if found is None:
    return None
  parts = tuple((component, name) for name in names_of(found))
  return Place(spelling.main(original_of(found, plan)), parts, found.row)


def _plan(given: Given, family: Family) -> Plan:
  """Returns the plan of a UNet, as the base tells, or its family."""
  layers = given.base.configs.get("unet", {}).get("layers_per_block")
  modules = given.base.in_component("unet")
  plan = plan_of(modules, layers if isinstance(layers, int) else None)
  if given.base.has_weights or len(given.shapes) > len(given.names):
    return plan
  # An adapter need not have the attention of each block that it is in.
  return plan._replace(attended=plan.attended | family.attended)


def targets_of(given: Given, places: Sequence[Place]) -> list[Target]:
  """Returns what a file holds, with the sizes of what is joined.

  Args:
    given: what is written.
    places: from `place_modules`.

  Returns:
    Targets; of parts that nothing is known of, the others' shares tell.
  """
  targets = []
  for place in places:
    names = tuple(given.names.get(at) for at in place.at)
    sizes = sizes_of(given.shapes, place)
    first = next(at for at in place.at if at in given.names)
    inputs = given.shapes[first][1:]
    whole = (sum(sizes), *inputs)
    exchanged = place.row is not None and is_exchanged(place.row, whole)
    targets.append(Target(place.stem, names, sizes, whole, exchanged))
  return targets


def sizes_of(
  shapes: Mapping[Split, tuple[int, ...]], place: Place
) -> tuple[int, ...]:
  """Returns how many outputs each part of a place has.

  Args:
    shapes: (component, module) -> shape, of one of its modules at least.
    place: one or several modules.
  """
  shares = place.row.shares if place.row else (1,)
  units = [
    shapes[at][0] // share
    for at, share in zip(place.at, shares, strict=True)
    if at in shapes
  ]
  return tuple(
    shapes[at][0] if at in shapes else share * units[0]
    for at, share in zip(place.at, shares, strict=True)
  )


def whole_tensors(
  given: Given,
  family: Family,
  spelling: Spelling,
  shifts: Mapping[str, Any],
  dtype: Any,
) -> dict[str, np.ndarray]:
  """Returns the tensors of changes that are no Loras.

  Args:
    given: what is written; gets the reasons.
    family: of the model.
    spelling: of the format.
    shifts: parameter -> change.
    dtype: storage dtype.

  Returns:
    key -> tensor.

  Raises:
    ValueError: entries that the dtype cannot hold.
  """
  plan, found = _plan(given, family), {}
  for at, own in given.shifts.items():
    place = place_one(at, family, spelling, plan)
    for leaf, name in own.items():
      if place is None or leaf not in ("weight", "bias"):
        given.left[name] = _unnamed(at, family)
        continue
      change = rounded_change(name, shifts[name], given.shapes.get(at), dtype)
      is_norm = at not in given.names and (
        change.ndim == 1 and (leaf == "weight" or "weight" in own)
      )
      suffix = spelling.norm if is_norm else (".diff", ".diff_b")
      key = place.stem + suffix[leaf == "bias"]
      if place.row is not None and is_exchanged(
        place.row, given.shapes.get(at, change.shape + (0,))
      ):
        change = halves_exchanged(change)
      if len(place.at) > 1:
        change = _among(change, at, place, given, found.get(key))
      elif key in found:
        raise ValueError(f"two changes have one name in the file, {key}.")
      found[key] = change
  return found


def _among(change, at: Split, place: Place, given: Given, whole):
  """Puts the change of one part among those of a joined module."""
  sizes = sizes_of({at: change.shape} | dict(given.shapes), place)
  if whole is None:
    whole = np.zeros((sum(sizes), *change.shape[1:]), change.dtype)
  start = sum(sizes[: place.at.index(at)])
  whole[start : start + len(change)] = change
  return whole


def _metadata(
  ranks: Mapping[str, int], targets: Sequence[Target], family: Family
) -> dict[str, str]:
  """Returns what kohya's scripts say of a network."""
  shapes = {target.stem: target.shape for target in targets}
  large = [r for s, r in ranks.items() if math.prod(shapes[s][2:]) > 1]
  small = [r for s, r in ranks.items() if math.prod(shapes[s][2:]) == 1]
  rank = _one_of(small or large)
  arguments = {}
  if large:
    arguments = {"conv_dim": _one_of(large), "conv_alpha": _one_of(large)}
  return {
    "format": "pt",
    "modelspec.architecture": f"{family.architecture}/lora",
    "modelspec.sai_model_spec": "1.0.1",
    "ss_base_model_version": family.version,
    "ss_network_alpha": rank,
    "ss_network_args": json.dumps(arguments),
    "ss_network_dim": rank,
    "ss_network_module": family.network,
    "ss_v2": str(family.name == "sd2"),
  }


def _one_of(ranks: Sequence[int]) -> str:
  """Returns the rank that all have, or `Dynamic`."""
  return str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
