# SPDX-License-Identifier: Apache-2.0
"""The formats of adapters by name, each written by one function."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.commands.states import check_slashes, is_jax
from jlora.formats.adapters import Adapter, Parameters
from jlora.formats.bases import base_of
from jlora.formats.comfy import save_comfy
from jlora.formats.components import has_original_names, open_components
from jlora.formats.diffusers import save_diffusers
from jlora.formats.gguf import save_gguf
from jlora.formats.jax_reading import is_state
from jlora.formats.kohya import kohya_layers, save_kohya
from jlora.formats.maxtext import save_maxtext
from jlora.formats.mlx import save_mlx
from jlora.formats.opening import open_adapter
from jlora.formats.peft.layouts import LLAMACPP, PEFT, Profile
from jlora.formats.peft.writing import save_peft
from jlora.formats.qwix import save_qwix, save_tunix
from jlora.formats.storing import (
  Select,
  attention_layers,
  everything,
  linear_layers,
)
from jlora.loras import Lora
from jlora.messages import name_some


class Output(NamedTuple):
  """Where an adapter is written, and how.

  Attributes:
    path: the file or folder.
    sources: the adapters that it is made of.
    base: path of the model, or None.
    family: of the model, or None.
    component: of the pipeline, or None.
    select: which modules.
    dtype: of the factors.
    one_alpha: as for `save_kohya`.
    equations: as for `save_qwix`.
    opening: how the model is opened, arguments of `open_components`.
  """

  path: str
  sources: Sequence[Adapter]
  base: str | None
  family: str | None
  component: str | None
  select: Select
  dtype: np.dtype
  one_alpha: bool
  equations: Mapping[str, str] = {}
  opening: Mapping[str, Any] = MappingProxyType({})


def _model(output: Output) -> Checkpoint | None:
  """Opens the model that an adapter is for, by diffusers' names."""
  if output.base is None:
    return None
  how = {**output.opening, "names": "diffusers"}
  return open_components(output.base, **how)


def layers_of(name: str) -> Select:
  """Returns the function that selects the layers of a name.

  Args:
    name: all, linear, attention or kohya.
  """
  return {
    "all": everything,
    "linear": linear_layers,
    "attention": attention_layers,
    "kohya": kohya_layers,
  }[name]


def _shared(output: Output) -> dict[str, Any]:
  """Returns the arguments that the writers of image models share."""
  shapes: dict[str, Any] = {}
  for adapter in output.sources:
    shapes |= adapter.shapes
  return {
    "like": base_of(_model(output) or shapes),
    "shifts": _shifts(output),
    "dtype": output.dtype,
    "select": output.select,
    "metadata": _kept_metadata(output.sources),
  }


def _shifts(output: Output) -> dict[str, np.ndarray]:
  """Returns the changes that adapters store whole, by parameter."""
  return {k: v for one in output.sources for k, v in one.shifts.items()}


def _kept_metadata(sources: Sequence[Adapter]) -> dict[str, str]:
  """Returns what files say of themselves that holds in any format."""
  names = ("jlora.report", "modelspec.title", "modelspec.resolution")
  own = sources[0].metadata if len(sources) == 1 else {}
  return {name: own[name] for name in names if name in own}


def _whole(output: Output) -> dict[str, str]:
  """Returns the ledger of what PEFT stores whole, which is no change."""
  reason = "stored whole, as a value and no change; merge it into a checkpoint"
  return {
    name: reason
    for one in output.sources
    for name in one.whole
    if name not in one.shifts
  }


def _diffusers(loras: Mapping[str, Lora], output: Output) -> dict[str, str]:
  """Writes a file for diffusers."""
  shared = _shared(output)
  left = save_diffusers(
    output.path, loras, component=output.component, **shared
  )
  return left | _whole(output)


def _kohya(loras: Mapping[str, Lora], output: Output) -> dict[str, str]:
  """Writes a file as kohya's scripts do."""
  more = {"family": output.family, "one_alpha": output.one_alpha}
  return save_kohya(output.path, loras, **more, **_shared(output)) | _whole(
    output
  )


def _comfy(loras: Mapping[str, Lora], output: Output) -> dict[str, str]:
  """Writes a file for ComfyUI."""
  left = save_comfy(output.path, loras, family=output.family, **_shared(output))
  return left | _whole(output)


def _peft(
  loras: Mapping[str, Lora], output: Output, profile: Profile = PEFT
) -> dict[str, str]:
  """Writes a PEFT folder."""
  base = _model(output)
  if base is None:
    raise ValueError(
      "PEFT's configuration names modules so that no other matches: give the "
      "model, --base=DIR."
    )
  full = {k: v for one in output.sources for k, v in one.whole.items()}
  biases = {
    name: np.asarray(change)
    for one in output.sources
    for name, change in one.shifts.items()
    if name.endswith(".bias") and name not in full
  }
  return save_peft(
    output.path,
    Parameters(loras, base.spec),
    like=base.spec,
    biases=biases or None,
    full=full or None,
    profile=profile,
    dtype=output.dtype,
    base_model=output.base,
    task_type="auto",
    config=base.config,
  )


def _for_llamacpp(loras: Mapping[str, Lora], output: Output) -> dict[str, str]:
  """Writes a PEFT folder of one rank, for llama.cpp's converter."""
  return _peft(loras, output, LLAMACPP)


def _gguf(loras: Mapping[str, Lora], output: Output) -> dict[str, str]:
  """Writes a file for llama.cpp."""
  base = _model(output)
  if base is None:
    raise ValueError("GGUF needs the model's config.json: give it, --base=DIR.")
  left = save_gguf(
    output.path,
    Parameters(loras, base.spec),
    config=base.config,
    like=base.spec,
    shifts=_shifts(output),
    dtype=output.dtype,
    name=Path(output.path).stem,
  )
  return left | _whole(output)


def _mlx(loras: Mapping[str, Lora], output: Output) -> dict[str, str]:
  """Writes a folder for mlx-lm."""
  base = _model(output)
  if base is None:
    raise ValueError("MLX needs the model's config.json: give it, --base=DIR.")
  left = save_mlx(
    output.path,
    loras,
    config=base.config,
    like=base.spec,
    shifts=_shifts(output),
    dtype=output.dtype,
    select=output.select,
  )
  return left | _whole(output)


def _for_jax(loras: Mapping[str, Lora], output: Output) -> dict[str, Any]:
  """Returns the arguments that the writers of JAX's states share."""
  if output.base is None:
    raise ValueError(
      "states of JAX need the shapes of the model's parameters: give it, "
      "--base=DIR."
    )
  base = open_checkpoint(output.base)
  return {
    "loras": Parameters(loras, base.spec),
    "like": base,
    "shifts": _shifts(output),
    "dtype": output.dtype,
    "select": output.select,
  }


def _qwix(loras: Mapping[str, Lora], output: Output) -> dict[str, str]:
  """Writes a state of qwix."""
  arguments = _for_jax(loras, output)
  check_slashes(arguments["like"], "qwix")
  left = save_qwix(output.path, equations=output.equations, **arguments)
  return left | _whole(output)


def _tunix(loras: Mapping[str, Lora], output: Output) -> dict[str, str]:
  """Writes a checkpoint of tunix's trainer."""
  arguments = _for_jax(loras, output)
  base = arguments["like"]
  if base.config and not is_jax(base):
    arguments |= {"like": None, "config": base.config}
  left = save_tunix(output.path, equations=output.equations, **arguments)
  return left | _whole(output)


def _maxtext(loras: Mapping[str, Lora], output: Output) -> dict[str, str]:
  """Writes a LoRA of MaxText."""
  arguments = _for_jax(loras, output)
  check_slashes(arguments["like"], "MaxText")
  return save_maxtext(output.path, **arguments) | _whole(output)


FORMATS: dict[str, Callable[[Mapping[str, Lora], Output], dict[str, str]]] = {
  "peft": _peft,
  "peft-llamacpp": _for_llamacpp,
  "diffusers": _diffusers,
  "kohya": _kohya,
  "comfy": _comfy,
  "gguf": _gguf,
  "mlx": _mlx,
  "qwix": _qwix,
  "tunix": _tunix,
  "maxtext": _maxtext,
}

#: Format -> file or folder in an adapter's. PEFT is the folder itself.
_FILES = {
  "diffusers": "pytorch_lora_weights.safetensors",
  "kohya": "kohya.safetensors",
  "comfy": "comfy.safetensors",
  "gguf": "adapter.gguf",
  "mlx": "mlx",
  "tunix": "tunix",
}
#: What an extraction writes. PEFT has no names of JAX's models: their
#: states are written instead of its folder, by `jlora.commands.states`.
EXTRACTED = ("peft", *_FILES, "qwix", "maxtext")


# Formats of which readers know the modules by diffusers' names, or by names
# that are made from these.
_NAMED = ("diffusers", "kohya", "comfy")


def check_names(
  base: str, formats: Sequence[str], opening: Mapping[str, Any]
) -> None:
  """Raises if a format asked for needs other names than the model has.

  Args:
    base: path of the model.
    formats: keys of `FORMATS`.
    opening: arguments of `open_components`.

  Raises:
    ValueError: as `open_components`, or the model has the original's names.
  """
  asked = [name for name in formats if name in _NAMED]
  if not asked or opening.get("names"):
    return
  if has_original_names(open_components(base, **opening)):
    raise ValueError(
      f"{base} has the original's names, and the format {asked[0]} is made "
      "from those of diffusers: say --names=diffusers (names='diffusers')."
    )


def write_formats(
  folder: str,
  base: str,
  names: Sequence[str],
  opening: Mapping[str, Any] = MappingProxyType({}),
  *,
  with_kernels: bool = False,
) -> Iterator[str]:
  """Writes an extracted adapter in further formats, beside it.

  Args:
    folder: of PEFT, from an extraction.
    base: path of the model.
    names: keys of `FORMATS`; those of PEFT's folders are passed over.
    opening: arguments of `open_components`, by which the model was opened.
    with_kernels: whether kohya's files have all modules, not only those that
      kohya's own networks have without `conv_dim`.

  Yields:
    Lines for a reader: what was written, and what it cannot carry.

  Raises:
    ValueError: as the writers.
  """
  for name in dict.fromkeys(names):
    if name not in _FILES:
      continue
    path = Path(folder) / "formats" / _FILES[name]
    path.parent.mkdir(exist_ok=True)
    if path.is_dir() and is_state(path):  # of the run before
      shutil.rmtree(path)
    is_kohya = name == "kohya"
    output = Output(
      path=str(path),
      sources=[],
      base=base,
      family=None,
      component=None,
      select=kohya_layers if is_kohya and not with_kernels else everything,
      dtype=np.dtype(np.float16),
      one_alpha=True,
      opening=opening,
    )
    adapter = open_adapter(folder, _model(output))
    output = output._replace(sources=[adapter])
    yield from left_lines(FORMATS[name](adapter, output))
    yield f"written: {path} ({name})"


def left_lines(left: Mapping[str, str]) -> Iterator[str]:
  """Yields a line for each reason, with the names that it is of.

  Args:
    left: name -> reason.
  """
  by_reason: dict[str, list[str]] = {}
  for name, reason in left.items():
    by_reason.setdefault(reason, []).append(name)
  for reason, names in by_reason.items():
    yield f"not carried: {len(names)}, {name_some(names)}: {reason}"
