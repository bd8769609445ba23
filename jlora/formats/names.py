# SPDX-License-Identifier: Apache-2.0
"""Names of image and video models: diffusers' and the original ones, as data.

The rows of `name_rows` are looked up here, either way: the same rows read and
write, with dots or flattened by `_`, as kohya's files have them.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jlora.formats import name_rows
from jlora.formats.name_rows import Numbers, Plan, Row


class Family(NamedTuple):
  """A family of models and how each tool spells it.

  Attributes:
    name: as users give it.
    component: of the denoiser in a pipeline.
    rows: its names.
    kohya_ours: whether kohya's files have diffusers' names.
    text: component of a text encoder -> kohya's prefix.
    comfy_text: component of a text encoder -> ComfyUI's prefix.
    network: kohya's module for it.
    version: kohya's `ss_base_model_version`.
    architecture: `modelspec.architecture`, without what follows the slash.
    attended: numbers of a UNet's upward blocks that have attention.
    parameters: rows of whole parameters that are in no module with a LoRA.
    comfy_ours: whether ComfyUI's files have diffusers' names.
    sign: regex of modules of which one must be there, where other families have
      the rest of the names too; with dots or flattened.
    foreign: regex of modules that none of the family has.
  """

  name: str
  component: str
  rows: tuple[Row, ...]
  kohya_ours: bool
  text: Mapping[str, str]
  comfy_text: Mapping[str, str]
  network: str
  version: str
  architecture: str
  attended: frozenset[int] = frozenset()
  parameters: tuple[Row, ...] = ()
  comfy_ours: bool = False
  sign: str = ""
  foreign: str = ""

  def can_be(self, modules: Iterable[str]) -> bool:
    """Returns whether nothing in some modules' names is against the family.

    Args:
      modules: names, either side's, without the component.
    """
    names = list(modules)

    def has(pattern: str) -> bool:
      return any(re.search(pattern, name) for name in names)

    return (not self.sign or has(self.sign)) and not (
      self.foreign and has(self.foreign)
    )


_L, _G, _T5 = (
  f"text_encoders.{one}.transformer" for one in ("clip_l", "clip_g", "t5xxl")
)
FAMILIES = {
  family.name: family
  for family in (
    Family(
      "sd1", "unet", name_rows.UNET, True, {"text_encoder": "lora_te"},
      {"text_encoder": _L}, "networks.lora", "sd_v1", "stable-diffusion-v1",
      frozenset({1, 2, 3}),
    ),
    Family(
      "sd2", "unet", name_rows.UNET, True, {"text_encoder": "lora_te"},
      {"text_encoder": "text_encoders.clip_h.transformer"}, "networks.lora",
      "sd_v2", "stable-diffusion-v2-768-v", frozenset({1, 2, 3}),
    ),
    Family(
      "sdxl", "unet", name_rows.UNET, False,
      {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
      {"text_encoder": _L, "text_encoder_2": _G}, "networks.lora",
      "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", frozenset({0, 1}),
    ),
    Family(
      "flux", "transformer", name_rows.FLUX, False,
      {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
      {"text_encoder": _L, "text_encoder_2": _T5}, "networks.lora_flux",
      "flux1", "flux-1-dev", parameters=name_rows.FLUX_PARAMETERS,
    ),
    Family(
      "sd3", "transformer", name_rows.SD3, False,
      {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2",
       "text_encoder_3": "lora_te3"},
      {"text_encoder": _L, "text_encoder_2": _G, "text_encoder_3": _T5},
      "networks.lora_sd3", "sd3", "stable-diffusion-3-medium",
      parameters=name_rows.SD3_PARAMETERS,
    ),
    Family(
      "wan", "transformer", name_rows.WAN, False, {}, {},
      "networks.lora_wan", "wan", "wan2.1",
      parameters=name_rows.WAN_PARAMETERS,
    ),
    Family(
      "qwen-image", "transformer", name_rows.QWEN_IMAGE, True, {}, {},
      "networks.lora_qwen_image", "qwen_image", "qwen-image",
    ),
    Family(
      "flux2", "transformer", name_rows.FLUX2, False, {}, {},
      "networks.lora_flux_2", "flux_2_dev", "Flux.2-dev",
      parameters=name_rows.FLUX_PARAMETERS,
      sign=r"stream_modulation|time_guidance_embed|to_qkv_mlp_proj"
      r"|ff(_context)?[._]linear_(in|out)$",
    ),
    Family(
      "hunyuan-video", "transformer", name_rows.HUNYUAN_VIDEO, False, {}, {},
      "networks.lora", "hunyuan_video", "hunyuan-video",
      parameters=name_rows.HUNYUAN_VIDEO_PARAMETERS,
      sign=r"(img|txt)_attn_(qkv|proj)$|(img|txt)_mlp[._]fc\d"
      r"|^(context_embedder|txt_in)[._]\w|^(x_embedder|img_in)[._]proj$",
      foreign=r"^(byt5_in|vision_in|cond_type_embedding)",
    ),
    Family(
      "z-image", "transformer", name_rows.Z_IMAGE, True, {}, {},
      "networks.lora_zimage", "z_image", "Z-Image",
      parameters=name_rows.Z_IMAGE_PARAMETERS,
      comfy_ours=True,
      sign=r"adaLN_modulation[._]0$|attention[._]to_[qkv]$",
      foreign=r"layers[._]\d+[._]adaLN_modulation[._]1$",  # Lumina 2's
    ),
    Family(
      "ltx", "transformer", name_rows.LTX, False, {}, {}, "", "", "",
      parameters=name_rows.LTX_PARAMETERS,
      sign=r"^(patchify_proj|proj_in)$|^time_embed[._]",
      foreign=r"^audio_|[._]audio_",  # LTX-2's
    ),
  )
}  # fmt: skip


class Found(NamedTuple):
  """A name found in a table.

  Attributes:
    row: the row.
    part: which of the row's modules of diffusers, or None for the original.
    numbers: that stand for `#`.
  """

  row: Row
  part: int | None
  numbers: Numbers


def flatten(name: str) -> str:
  """Returns a name as kohya's files have it, with `_` for dots.

  Args:
    name: of a module.
  """
  return name.replace(".", "_")


def fill(pattern: str, numbers: Numbers) -> str:
  """Puts numbers into a pattern.

  Args:
    pattern: with a `#` for each number.
    numbers: in order.
  """
  rest = iter(numbers)
  return re.sub("#", lambda _: str(next(rest)), pattern)


@functools.cache
def _regex(pattern: str, is_flat: bool) -> re.Pattern[str]:
  """Returns the expression of a name with dots, or flattened."""
  text = re.escape(flatten(pattern) if is_flat else pattern)
  return re.compile(text.replace(r"\#", r"(\d+)"))


def find_ours(name: str, rows: Iterable[Row], flat: bool = False):
  """Finds a name of diffusers in a table.

  Args:
    name: with dots, or flattened.
    rows: the table.
    flat: whether it is flattened.

  Returns:
    Found, or None.
  """
  for row in rows:
    for part, pattern in enumerate(row.ours):
      if match := _regex(pattern, flat).fullmatch(name):
        return Found(row, part, tuple(map(int, match.groups())))
  return None


def find_theirs(name: str, rows: Iterable[Row], plan: Plan, flat: bool = False):
  """Finds an original name in a table.

  Args:
    name: with dots, or flattened.
    rows: the table.
    plan: of a UNet.
    flat: whether it is flattened.

  Returns:
    Found with the numbers of diffusers' names, or None.
  """
  for row in rows:
    match = _regex(row.theirs, flat).fullmatch(name)
    if match:
      numbers = row.back(tuple(map(int, match.groups())), plan)
      if numbers is not None:
        return Found(row, None, numbers)
  return None


def names_of(found: Found) -> tuple[str, ...]:
  """Returns the names of diffusers that a row has for some numbers.

  Args:
    found: from either search.
  """
  return tuple(fill(pattern, found.numbers) for pattern in found.row.ours)


def original_of(found: Found, plan: Plan) -> str:
  """Returns the original name that a row has for some numbers.

  Args:
    found: from either search.
    plan: of a UNet.
  """
  return fill(found.row.theirs, found.row.to(found.numbers, plan))


def is_exchanged(row: Row, shape: tuple[int, ...]) -> bool:
  """Returns whether the halves of a module's outputs change places.

  Besides the rows that say so that is the context of the last block of Stable
  Diffusion 3: it has no attention after it, and so two parts instead of six.

  Args:
    row: the module's.
    shape: of its weight, (out, in, ...).
  """
  if row.theirs == "joint_blocks.#.context_block.adaLN_modulation.1":
    return shape[0] == 2 * shape[1]
  return row.exchanged


def families_of(modules: Iterable[str]) -> list[Family]:
  """Lists the families whose tables have every one of some modules.

  Args:
    modules: names of diffusers, without the component.
  """
  modules = list(modules)
  if not modules:
    return []
  return [
    family
    for family in FAMILIES.values()
    if family.can_be(modules)
    and all(find_ours(name, family.rows) for name in modules)
  ]


def covering(
  modules: Iterable[str], find: Callable[[str, Family], Any]
) -> Family | None:
  """Returns the family that has most of some modules, None if none has half.

  Args:
    modules: names, without the component.
    find: (name, family) -> whether its table has the name.
  """
  modules = list(modules)
  counts = {
    family.name: sum(bool(find(name, family)) for name in modules)
    for family in FAMILIES.values()
    if family.can_be(modules)
  }
  best = max(counts, key=lambda name: counts[name])
  return FAMILIES[best] if 2 * counts[best] >= max(len(modules), 1) else None


def plan_of(modules: Iterable[str], layers: int | None = None) -> Plan:
  """Returns a UNet's plan from its modules.

  Args:
    modules: names of diffusers, without the component.
    layers: `layers_per_block` of its configuration; 2 if not known.
  """
  pattern = re.compile(r"up_blocks\.(\d+)\.attentions\.")
  attended = {int(m[1]) for name in modules if (m := pattern.match(name))}
  return Plan(2 if layers is None else layers, frozenset(attended))
