# SPDX-License-Identifier: Apache-2.0
"""The flags that say how a model is opened, the same of every command."""

from collections.abc import Mapping
from typing import Any

from absl import flags

#: For a command's help: flag -> its value.
OPENING = {"components": "LIST", "variant": "NAME", "names": "", "float8": ""}
# What a flag says if it is not given.
_PLAIN = {"names": "stored", "float8": "scaled"}


def define_opening(values: flags.FlagValues) -> dict[str, Any]:
  """Defines the flags of `OPENING`.

  Args:
    values: the command's.

  Returns:
    {name: flag}.
  """
  return {
    "components": flags.DEFINE_list(
      "components",
      None,
      "Of a pipeline's folder or a single file: unet, transformer, "
      "text_encoder, ... By default all but vae, image_encoder and "
      "safety_checker.",
      flag_values=values,
    ),
    "variant": flags.DEFINE_string(
      "variant",
      None,
      "Take name.VARIANT.safetensors of the folders, such as fp16.",
      flag_values=values,
    ),
    "names": flags.DEFINE_enum(
      "names",
      _PLAIN["names"],
      ["stored", "diffusers"],
      "Names as they are stored, or those of diffusers for what has the names "
      "of the original's authors, on both sides.",
      flag_values=values,
    ),
    "float8": flags.DEFINE_enum(
      "float8",
      _PLAIN["float8"],
      ["scaled", "cast"],
      "float8 weights without a scale: refused where others have one, or read "
      "as they are, for files that were cast.",
      flag_values=values,
    ),
  }


def read_opening(found: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arguments of `open_components` that flags give.

  Args:
    found: from `define_opening`, of flags that are parsed.

  Returns:
    All four; None where a flag says nothing.
  """
  return {
    name: None if flag.value == _PLAIN.get(name) else flag.value
    for name, flag in found.items()
  }
