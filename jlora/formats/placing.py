# SPDX-License-Identifier: Apache-2.0
"""Turns the names of a file's modules into the names that models have.

Each tool puts its own prefix before a name, with dots or flattened by `_`, and
some use the original model's names. With a base a name is looked up in the
base; without one, in the tables of `names`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jlora.formats.bases import CLIP, COMPONENTS, Base, Split
from jlora.formats.name_rows import TEXT_ROWS, Plan, Row
from jlora.formats.names import (
  FAMILIES,
  Family,
  Found,
  covering,
  families_of,
  find_ours,
  find_theirs,
  flatten,
  names_of,
  original_of,
  plan_of,
)
from jlora.formats.originals import MAIN as _MAIN
from jlora.formats.originals import PREFIXES
from jlora.formats.originals import T5 as _T5
from jlora.messages import name_some

# Prefix -> (component, whether what follows is flattened). First match wins.
_PREFIXES = {
  "lora_unet_": (_MAIN, True),
  "lora_transformer_": (_MAIN, True),
  "lycoris_": (_MAIN, True),
  "lora_te_": ("text_encoder", True),
  "lora_te1_": ("text_encoder", True),
  "lora_te2_": ("text_encoder_2", True),
  "lora_te3_": (_T5, True),
  "base_model.model.": ("", False),
  **{prefix: (component, False) for prefix, component in PREFIXES.items()},
  **{f"{name}.": (name, False) for name in COMPONENTS},
}
_SPELLINGS = (
  r"(down_blocks|mid_block|up_blocks)[._]",
  r"(input_blocks|middle_block|output_blocks)[._]",
)


class Stem(NamedTuple):
  """A module's name in a file, taken apart.

  Attributes:
    component: one of a pipeline's, "" where the file does not say, or which.
    rest: the name without its prefix.
    is_flat: whether `_` stands for dots.
  """

  component: str
  rest: str
  is_flat: bool


class Placed(NamedTuple):
  """Where a module of a file belongs.

  Attributes:
    at: (component, module) of each module that it changes; several where the
      original has one for them, in the order of its outputs.
    row: of the table, or None.
  """

  at: tuple[Split, ...]
  row: Row | None


def place_stems(
  stems: Iterable[str], base: Base | None, place: str
) -> tuple[dict[str, Placed | None], Family | None]:
  """Finds the modules of all names in a file.

  Args:
    stems: the names.
    base: the model, or None.
    place: the file, for errors.

  Returns:
    {stem: Placed, or None if the base has no such module}, and the family, None
    if it is not known.

  Raises:
    ValueError: two spellings of a UNet, a flattened name that is in no table,
      or that two modules of the base have.
  """
  parts = {stem: _take_apart(stem) for stem in stems}
  main = [p for p in parts.values() if p.component in (_MAIN, "", "unet",
          "transformer", "transformer_2")]  # fmt: skip
  _check_one_spelling(parts, place)
  plan = _plan(base, [part.rest for part in main])
  family = _family_of(main, base, plan)
  if base is not None:
    index = _Index(base, plan)
    placed = {
      stem: index.find(part, family, f"{place}: {stem}")
      for stem, part in parts.items()
    }
    return placed, family
  found = {stem: _by_tables(p, family, plan) for stem, p in parts.items()}
  if lost := [stem for stem, one in found.items() if one is None]:
    raise ValueError(
      f"{place}: {len(lost)} flattened names are in no table, so that their "
      f"dots are not known: {name_some(lost)}. Give the base, whose names tell."
    )
  return found, family


def _take_apart(stem: str) -> Stem:
  """Splits a name into component and rest, by the table of prefixes."""
  if re.match(r"transformer\.(h|wte|wpe)\b", stem):  # GPT-2's
    return Stem("", stem, False)
  for prefix, (component, is_flat) in _PREFIXES.items():
    if stem.startswith(prefix):
      rest = stem[len(prefix) :]
      if component == "":
        return _take_apart(rest)
      return Stem(component, rest, is_flat)
  return Stem("", stem, False)


def _check_one_spelling(parts: Mapping[str, Stem], place: str) -> None:
  """Raises if a file names blocks of a UNet in both ways."""
  found = [
    next((s for s, p in parts.items() if re.match(pattern, p.rest)), None)
    for pattern in _SPELLINGS
  ]
  if all(found):
    raise ValueError(
      f"{place} names blocks of a UNet in two ways, as {found[0]} and as "
      f"{found[1]}; a reader would leave out one half. Write it anew from one."
    )


def _plan(base: Base | None, rests: Sequence[str]) -> Plan:
  """Returns the plan of the UNet: the base's, or what the names tell."""
  if base is None:
    return plan_of(rests)
  layers = base.configs.get("unet", {}).get("layers_per_block")
  return plan_of(
    base.in_component("unet"), layers if isinstance(layers, int) else None
  )


def _family_of(
  main: Sequence[Stem], base: Base | None, plan: Plan
) -> Family | None:
  """Returns the family whose table has most names; None without one."""
  if base is not None:
    for component in ("unet", "transformer"):
      matrices = [
        m for m, s in base.in_component(component).items() if len(s) > 1
      ]
      found = covering(matrices, lambda n, family: find_ours(n, family.rows))
      if found is not None:
        return found
  parts = {part.rest: part for part in main}
  return covering(parts, lambda n, family: _in_family(parts[n], family, plan))


def _in_family(part: Stem, family: Family, plan: Plan) -> Found | None:
  """Finds the denoiser's name in one family's table, either side."""
  return find_ours(part.rest, family.rows, part.is_flat) or find_theirs(
    part.rest, family.rows, plan, part.is_flat
  )


def _component(part: Stem, family: Family | None) -> str:
  """Returns the component that a name is of, as far as it is known."""
  if part.component == _MAIN:
    return family.component if family else "transformer"
  if part.component == _T5:
    text = family.text if family else {}
    own = [name for name, prefix in text.items() if prefix == "lora_te3"]
    return own[0] if own else "text_encoder_3"
  return part.component


def _by_tables(part: Stem, family: Family | None, plan: Plan) -> Placed | None:
  """Finds a name without a base; one with dots that is in no table stays."""
  component = _component(part, family)
  is_text = component.startswith("text_encoder")
  rows = TEXT_ROWS if is_text else family.rows if family else ()
  if found := find_ours(part.rest, rows, part.is_flat):
    name = names_of(found)[found.part or 0]
    return Placed(((component, name),), None)
  if found := find_theirs(part.rest, rows, plan, part.is_flat):
    component = component or (family.component if family else "")
    return Placed(
      tuple((component, name) for name in names_of(found)), found.row
    )
  return None if part.is_flat else Placed(((component, part.rest),), None)


class _Index:
  """The modules of a base by every name that a file can give them."""

  def __init__(self, base: Base, plan: Plan):
    self.base, self.plan = base, plan
    self.components = sorted({component for component, _ in base.shapes})
    self.flat: dict[Split, list[Split]] = {}
    for component, module in base.shapes:
      names = {module, module.removeprefix(CLIP)}
      if component.startswith("text_encoder"):
        names.add(CLIP + module.removeprefix(CLIP))
      for name in names:
        at = (component, flatten(name))
        self.flat.setdefault(at, []).append((component, module))

  def find(
    self, part: Stem, family: Family | None, place: str
  ) -> Placed | None:
    """Finds the modules of one name; None if the base lacks any."""
    component = self._component(part, family)
    direct = self._direct(component, part, place)
    if direct is not None:
      return Placed((direct,), None)
    rows = family.rows if family else ()
    found = find_theirs(part.rest, rows, self.plan, part.is_flat)
    if found is None:
      return None
    at = [self.base.find((component, name)) for name in names_of(found)]
    known = tuple(one for one in at if one is not None)
    return Placed(known, found.row) if len(known) == len(at) else None

  def _component(self, part: Stem, family: Family | None) -> str:
    """Returns the base's component that a name is of."""
    own = _component(part, family)
    if part.component in (_MAIN, "") and len(self.components) == 1:
      return self.components[0]
    if part.component == _MAIN:
      main = [c for c in ("unet", "transformer") if c in self.components]
      return main[0] if main else own
    return own

  def _direct(self, component: str, part: Stem, place: str) -> Split | None:
    """Finds a name as the base has it, with dots or flattened."""
    if not part.is_flat:
      return self.base.find((component, part.rest))
    found = self.flat.get((component, part.rest), [])
    if len(found) > 1:
      raise ValueError(
        f"{place} can be {name_some(module for _, module in found)}: they are "
        "one name once flattened. Give a file with dots."
      )
    return found[0] if found else None


def guess_family(
  modules: Iterable[Split],
  shapes: Mapping[Split, tuple[int, ...]],
  metadata: Mapping[str, Any] | None = None,
) -> list[Family]:
  """Lists the families that some modules can be of, best known first.

  Args:
    modules: (component, module), of diffusers.
    shapes: their weights' shapes.
    metadata: of a file: what kohya wrote of the model.

  Returns:
    Families; one, if the modules tell.
  """
  modules = list(modules)
  main = [m for c, m in modules if c in ("unet", "transformer")]
  found = families_of(main) if main else list(FAMILIES.values())
  given = (metadata or {}).get("ss_base_model_version")
  if own := [family for family in found if family.version == given]:
    return own
  components = {component for component, _ in modules}
  if not main:
    found = [one for one in found if one.text and components <= set(one.text)]
  text = {c for c in components if c.startswith("text_encoder")}
  found = [one for one in found if text <= set(one.text)]
  for told, names in _SIGNS:
    if any(re.match(told, module) for module in main):
      found = [one for one in found if one.name in names] or found
  widths = {
    shape[1]
    for (_, module), shape in shapes.items()
    if re.search(r"attn2\.to_k$|transformer_blocks\.\d+\.attn\.to_q$", module)
  }
  names = {name for width in widths for name in _WIDTHS.get(width, ())}
  found = [one for one in found if one.name in names] or found
  if {one.name for one in found} <= {"sd1", "sd2"}:
    return found[:1]  # the names are the same
  return found


# What a module's being there tells of the family.
_SIGNS = (
  (r"down_blocks\.0\.attentions|up_blocks\.3\.attentions", {"sd1", "sd2"}),
  (r"add_embedding|.*\.attentions\.\d+\.transformer_blocks\.[1-9]", {"sdxl"}),
  (r"single_transformer_blocks|time_text_embed\.guidance", {"flux"}),
  (r"pos_embed|.*\.attn2\.|blocks\.", {"sd1", "sd2", "sdxl", "sd3", "wan"}),
)
# Width of what attention reads -> families.
_WIDTHS = {
  768: {"sd1"},
  1024: {"sd2"},
  2048: {"sdxl"},
  1536: {"sd3"},
  2432: {"sd3"},
  3072: {"flux", "qwen-image"},
}


def spelled(
  module: str, family: Family, plan: Plan
) -> tuple[str, Row, tuple[str, ...]] | None:
  """Returns the original name that a module is part of; None if no row has it.

  Args:
    module: of diffusers, without its component.
    family: its table.
    plan: of a UNet.

  Returns:
    The name, its row, and all modules of diffusers that make it up.
  """
  found = find_ours(module, family.rows)
  if found is None:
    return None
  return original_of(found, plan), found.row, names_of(found)
