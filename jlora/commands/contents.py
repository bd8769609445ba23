# SPDX-License-Identifier: Apache-2.0
"""What lies at a path, from headers and small files: no tensor is read."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.hub import locate
from jlora.checkpoints.safetensors import TensorSpec
from jlora.extraction.report import REPORT, read_report
from jlora.formats.components import Components, open_components
from jlora.formats.jax_reading import is_state
from jlora.formats.mlx_reading import is_mlx
from jlora.formats.packed import SHAPES, packed_shapes
from jlora.formats.peft.config import read_adapter_config
from jlora.formats.peft.layouts import CONFIG, TENSORS, VLLM
from jlora.merging.checkpoints.report import MERGE, read_merge
from jlora.messages import name_some

_LARGEST = 5


def contents_of(
  path: str, opening: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
  """Tells what a path holds, as JSON has it.

  Args:
    path: a checkpoint in any format or its Hub id, a pipeline's folder, a PEFT
      folder, a file of packed Loras, a report.json or a folder with one.
    opening: how a checkpoint is opened, arguments of `open_components`.

  Returns:
    `kind` is "checkpoint", "packed", "adapter" or "report"; the rest is as
    follows from that. A merged model's has `merge`, and what has a report.json
    beside it `report`.

  Raises:
    ValueError: none of these, damaged, or an adapter of another tool.
  """
  place = locate(path)
  if place.suffix == ".json":
    return _describe_report(place)
  if place.is_dir() and (place / CONFIG).exists():
    if is_state(place) or is_mlx(place):
      raise _other_tool(place)
    return _describe_adapter(place)
  if place.is_dir() and (place / REPORT).exists():
    return _describe_report(place / REPORT)
  checkpoint = open_components(place, **opening)
  if any(re.search(_FACTORS, name) for name in checkpoint):
    raise _other_tool(place)
  if SHAPES in checkpoint.metadata:
    return _describe_packed(checkpoint)
  return _describe_checkpoint(checkpoint)


# What the factors of every tool that `open_adapter` reads are called.
_FACTORS = (
  r"[._]lora[._](A|B|up|down)\b|lora_linear_layer|lora_[ab]\b|"
  r"\.(hada|lokr)_w[12]"
)


def _other_tool(place: Path) -> ValueError:
  """Returns the error that says which command shows an adapter."""
  return ValueError(
    f"{place} is an adapter, and no PEFT folder: `jlora adapter show` tells of "
    "those of all tools."
  )


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
  found = {
    "kind": "checkpoint",
    "path": str(checkpoint.path),
    "format": checkpoint.format,
    "model_type": checkpoint.model_type,
    **_count(checkpoint.spec),
    "components": _components(checkpoint),
    "largest": _largest(checkpoint.spec),
  }
  merge = checkpoint.path / MERGE
  if merge.exists():
    found["merge"] = read_merge(merge)._asdict()
  return found


def _describe_packed(checkpoint: Checkpoint) -> dict[str, Any]:
  """Loras in few bits; bits are told on the average, by the bytes of codes."""
  shapes = packed_shapes(checkpoint)
  spec, modules = checkpoint.spec, []
  for name, shape in shapes.items():
    lacking = [
      part
      for part in ("bits", "codes")
      if len(getattr(spec.get(f"{name}.{part}"), "shape", ())) != 1
    ]
    if lacking:
      raise ValueError(
        f"{checkpoint.path}: {name} lacks {name_some(lacking)}; the file is "
        "damaged"
      )
    rank = spec[f"{name}.bits"].shape[0]
    entries = rank * sum(shape)
    modules.append(
      {
        "name": name,
        "shape": shape,
        "rank": rank,
        "bits": 8 * spec[f"{name}.codes"].nbytes / entries if entries else 0.0,
      }
    )
  return {
    "kind": "packed",
    "path": str(checkpoint.path),
    "modules": modules,
    "bytes": sum(one.nbytes for one in spec.values()),
  }


def _describe_adapter(folder: Path) -> dict[str, Any]:
  config = read_adapter_config(folder / CONFIG)
  checkpoint = open_checkpoint(folder / TENSORS)
  ranks = sorted(
    {config.get("r", 0), *dict(config.get("rank_pattern") or {}).values()}
  )
  found = {
    "kind": "adapter",
    "path": str(folder),
    "base": config.get("base_model_name_or_path"),
    "peft_type": config.get("peft_type"),
    "ranks": ranks,
    "targets": config.get("target_modules"),
    "whole": config.get("modules_to_save") or [],
    **_count(checkpoint.spec),
    "not_for_vllm": _not_for_vllm(config, checkpoint.spec, ranks[-1]),
  }
  if (folder / REPORT).exists():
    report = read_report(folder)
    found["profile"] = report.settings.get("profile")
    found["report"] = {"settings": report.settings, "totals": report.totals}
  return found


def _not_for_vllm(
  config: Mapping[str, Any], spec: Mapping[str, TensorSpec], rank: int
) -> list[str]:
  """Returns why vLLM would not load an adapter, or nothing."""
  reasons = {
    "bias": config.get("lora_bias"),
    "full": config.get("modules_to_save"),
    "convolution": any(
      len(one.shape) > 2 for name, one in spec.items() if ".lora_" in name
    ),
  }
  found = [VLLM.refused[kind] for kind, is_so in reasons.items() if is_so]
  if VLLM.max_rank is not None and rank > VLLM.max_rank:
    found.append(f"rank {rank} is over vLLM's {VLLM.max_rank}")
  return found


def _describe_report(file: Path) -> dict[str, Any]:
  if file.name == MERGE and file.exists():
    return {
      "kind": "merge",
      "path": str(file),
      "merge": read_merge(file)._asdict(),
    }
  if file.name != REPORT:
    raise ValueError(
      f"{file} is no {REPORT} or {MERGE}; give one, or a checkpoint or adapter"
    )
  report = read_report(file.parent)
  return {
    "kind": "report",
    "path": str(file),
    "report": {"settings": report.settings, "totals": report.totals},
  }


def _count(spec: Mapping[str, TensorSpec]) -> dict[str, Any]:
  """Tensors, parameters and bytes, together and by dtype."""
  kinds: dict[str, list[TensorSpec]] = {}
  for one in spec.values():
    kinds.setdefault(one.dtype.name, []).append(one)
  return {
    **_sums(spec.values()),
    "dtypes": {name: _sums(kinds[name]) for name in sorted(kinds)},
  }


def _sums(specs: Iterable[TensorSpec]) -> dict[str, int]:
  specs = list(specs)
  return {
    "tensors": len(specs),
    "parameters": sum(math.prod(one.shape) for one in specs),
    "bytes": sum(one.nbytes for one in specs),
  }


def _components(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
  """Returns {component: sums} of a model of several; {} of any other."""
  parts: dict[str, list[TensorSpec]] = {}
  if not isinstance(checkpoint, Components) or checkpoint.is_bare:
    return {}
  for name, one in checkpoint.spec.items():
    parts.setdefault(name.partition(".")[0], []).append(one)
  return {name: _sums(specs) for name, specs in parts.items()}


def _largest(spec: Mapping[str, TensorSpec]) -> list[dict[str, Any]]:
  names = sorted(spec, key=lambda name: (-spec[name].nbytes, name))
  return [
    {
      "name": name,
      "shape": list(spec[name].shape),
      "dtype": spec[name].dtype.name,
      "bytes": spec[name].nbytes,
    }
    for name in names[:_LARGEST]
  ]
