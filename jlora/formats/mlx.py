# SPDX-License-Identifier: Apache-2.0
"""Writes adapters of language models as mlx-lm loads them.

mlx itself is not needed: the folder holds safetensors and JSON.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jlora.checkpoints.new_files import (
  move,
  name_temporary,
  replace_text,
  sync_folder,
)
from jlora.checkpoints.safetensors import stream_safetensors
from jlora.checkpoints.sources import check_apart
from jlora.formats.bases import shape_of
from jlora.formats.mlx_names import keys_of, kind_of, places_of
from jlora.formats.peft.layouts import CONFIG
from jlora.formats.storing import Select, balanced, everything
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.numerics.finite import rounded

#: The file's name in a folder, beside `adapter_config.json`.
WEIGHTS = "adapters.safetensors"
Weighted = tuple[np.ndarray, np.ndarray, np.ndarray]  # a, b and scale
_DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
_SIDES = ("lora_a", "lora_b")
_TABLE, _HEAD = "model.embed_tokens", "lm_head"
_NO_WHOLE = "mlx-lm's adapters hold LoRAs alone; merge it into a checkpoint"


class Source(NamedTuple):
  """What a module of mlx-lm, or one of its experts, is made of.

  Attributes:
    name: in `loras`.
    expert: which expert it is; None: all of them, or there are none.
    half: which half of its outputs; None: all.
  """

  name: str
  expert: int | None
  half: int | None


def save_mlx(
  folder: str | os.PathLike,
  loras: Mapping[str, Lora],
  *,
  config: Mapping[str, Any],
  like: Mapping[str, Any] | None = None,
  shifts: Mapping[str, Any] | None = None,
  dtype: Any = np.float16,
  select: Select = everything,
) -> dict[str, str]:
  """Writes an adapter of a language model for mlx-lm's `--adapter-path`.

      change = (M.lora_a M.lora_b)ᵀ,   lora_a (in, r),  lora_b (r, out)
      of experts: lora_a (experts, r, in),  lora_b (experts, out, r)

  Args:
    folder: gets `adapters.safetensors` and `adapter_config.json`.
    loras: module or parameter of transformers -> Lora; each is read twice.
    config: the base's config.json: model_type, layers and experts.
    like: parameter -> anything with `.shape`, of the base; tells kernels from
      matrices.
    shifts: parameter -> change, of what is no Lora; it is not carried.
    dtype: float32, float16 or bfloat16.
    select: which modules, by name and shape.

  Returns:
    {name: why it is not in the folder}. mlx-lm has one rank for all modules:
    the others get units of zeros. The scale is in B. Experts that are modules
    of their own become one stack, and those without a Lora in it are zeros.

  Raises:
    ValueError: a model_type that is not known here, no Lora left, factors that
      do not fit, or entries that the dtype cannot hold.

  Example:
    >>> import tempfile
    >>> config = {"model_type": "qwen3", "num_hidden_layers": 4}
    >>> lora = Lora(np.ones((2, 8)), np.ones((2, 5)), np.float32(1))
    >>> loras = {"model.layers.1.mlp.up_proj": lora}
    >>> with tempfile.TemporaryDirectory() as place:
    ...   left = save_mlx(place, loras, config=config)
    ...   told = json.loads(Path(place, "adapter_config.json").read_text())
    ...   left, told["num_layers"], told["lora_parameters"]["keys"]
    ({}, 3, ['mlp.up_proj'])

  References:
    ml-explore/mlx-lm, `mlx_lm/tuner/utils.py`, `mlx_lm/tuner/lora.py`.

  Approximation:
    Checked against the rules of that loader; mlx-lm itself was not run.
  """
  if np.dtype(dtype) not in [np.dtype(known) for known in _DTYPES]:
    names = ", ".join(np.dtype(known).name for known in _DTYPES)
    raise ValueError(f"dtype must be one of {names}; {np.dtype(dtype).name}.")
  kind = kind_of(config)
  check_apart(folder, [p for x in (loras, getattr(loras, "adapter", None))
                       if (p := getattr(x, "path", None))])  # fmt: skip
  is_tied = bool(config.get("tie_word_embeddings", kind.is_tied))
  left = dict.fromkeys(shifts or {}, _NO_WHOLE)
  made: dict[str, list[Source]] = {}
  ranks = []
  for name, lora in loras.items():
    module = name.removesuffix(".weight")
    if reason := _refusal(module, lora, like, select, is_tied, loras):
      left[name] = reason
      continue
    for place in places_of(module, kind):
      own = Source(name, place.expert, place.half)
      ranks.append(_cut(own, lora)[0].shape[-2])
      made.setdefault(place.module, []).append(own)
  if not made:
    reasons = name_some(f"{name}: {reason}" for name, reason in left.items())
    raise ValueError(f"No module is left to write. {reasons}")
  most = max(ranks)

  def pairs() -> Iterator[tuple[str, np.ndarray]]:
    for module, sources in made.items():
      found = _stored(module, sources, loras, most, dtype, _experts_in(config))
      for side, tensor in zip(_SIDES, found, strict=True):
        yield f"{module}.{side}", tensor

  spec = {key: (x.shape, x.dtype) for key, x in pairs()}
  keys, layers = keys_of(made, config.get("num_hidden_layers"))
  told = {
    "fine_tune_type": "lora",
    "num_layers": layers,
    "lora_parameters": {
      "rank": most, "scale": 1.0, "dropout": 0.0, "keys": keys},
  }  # fmt: skip
  _write(Path(folder), spec, pairs(), told)
  return left


def _refusal(
  module: str, lora: Lora, like, select: Select, is_tied: bool, loras
) -> str:
  """Returns why mlx-lm cannot have a Lora, "" if it can."""
  shape = (lora.b.shape[-1], lora.a.shape[-1])
  for name in (module, f"{module}.weight"):
    if like is not None and name in like:
      shape = shape_of(like[name])
  if len(shape) > 2 and ".experts." not in module:
    return "mlx-lm has no LoRA for convolutions"
  if lora.a.ndim > 2 and ".experts." not in module:
    return "a stack of layers; write its members under their own names"
  if not select(module, shape[-2:]):
    return "not among the layers asked for"
  if module == _HEAD and is_tied:
    both = _TABLE in loras or f"{_TABLE}.weight" in loras
    also = "the embedding's change serves both" if both else "merge it instead"
    return f"the head is the table of tokens (tied): {also}"
  return "" if lora.rank else "rank 0: no change"


def _experts_in(config: Mapping[str, Any]) -> int | None:
  """Returns the number of experts of a layer, None if config.json has none."""
  names = ("num_local_experts", "num_experts")
  return next((int(config[name]) for name in names if config.get(name)), None)


def _stored(
  module: str,
  sources: Sequence[Source],
  loras: Mapping[str, Lora],
  most: int,
  dtype: Any,
  experts: int | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the two tensors of a module."""
  if ".switch_mlp." not in module:
    if len(sources) > 1:
      names = name_some(source.name for source in sources)
      raise ValueError(f"{names} are all {module} in mlx-lm; give one of them.")
    lora = loras[sources[0].name]
    a, b = _padded(module, lora.a, lora.b, lora.scale, most, dtype)
    return np.ascontiguousarray(a.T), b
  found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
  for source in sources:
    for expert, pair in _members(source, loras[source.name]).items():
      if expert in found:
        raise ValueError(f"{module}: expert {expert} is there twice.")
      name = f"{module}, expert {expert}"
      found[expert] = _padded(name, *pair, most, dtype)
  return _stacked(module, found, experts)


def _stacked(
  module: str,
  found: Mapping[int, tuple[np.ndarray, np.ndarray]],
  experts: int | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns a and b of all experts; those without a Lora are zeros."""
  count = max(found) + 1 if experts is None else experts
  if max(found) >= count:
    raise ValueError(
      f"{module} has an expert {max(found)}, config.json {count} experts; give "
      "the base that the adapter is for."
    )
  a, b = next(iter(found.values()))
  downs = np.zeros((count, *a.shape), a.dtype)
  ups = np.zeros((count, *b.shape[::-1]), b.dtype)
  for expert, (down, up) in found.items():
    if (down.shape, up.shape) != (a.shape, b.shape):
      raise ValueError(
        f"{module}: expert {expert} has a {down.shape}, b {up.shape}, others "
        f"a {a.shape}, b {b.shape}; they are for different models."
      )
    downs[expert], ups[expert] = down, up.T
  return downs, ups


def _cut(source: Source, lora: Lora) -> tuple[np.ndarray, np.ndarray]:
  """Returns a and b of a half of the outputs, without units that it lacks."""
  a, b = np.asarray(lora.a), np.asarray(lora.b)
  if source.half is None:
    return a, b
  inner = b.shape[-1] // 2
  b = b[..., source.half * inner : (source.half + 1) * inner]
  used = b.any(tuple(axis for axis in range(b.ndim) if axis != b.ndim - 2))
  return a[..., used, :], b[..., used, :]


def _members(source: Source, lora: Lora) -> dict[int, Weighted]:
  """Returns a, b and scale of each expert that a Lora changes."""
  a, b = _cut(source, lora)
  scale = np.asarray(lora.scale)
  if source.expert is not None:
    return {source.expert: (a, b, scale)}
  if a.ndim == 2:  # a stack of one expert
    a, b, scale = a[None], b[None], scale.reshape(-1)
  scales = np.broadcast_to(scale, a.shape[:1])
  return dict(enumerate(zip(a, b, scales, strict=True)))


def _padded(
  name: str, a: Any, b: Any, scale: Any, most: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
  """Returns a (most, in) and b (most, out), with the scale in b, rounded."""
  a, b = np.asarray(a), np.asarray(b)
  if a.ndim != 2 or b.ndim != 2:
    raise ValueError(
      f"{name}: a {a.shape}, b {b.shape} is a stack, not one matrix's pair; "
      "write its members under their own names."
    )
  if not (float(scale) == 1 and a.dtype == b.dtype == np.dtype(dtype)):
    a, b = balanced(
      a.astype(np.float32), np.float32(scale) * b.astype(np.float32)
    )
  rest = ((0, most - len(a)), (0, 0))
  down, up = rounded(f"{name}, A", a, dtype), rounded(f"{name}, B", b, dtype)
  return np.pad(down, rest), np.pad(up, rest)


def _write(folder: Path, spec, pairs, told: Mapping[str, Any]) -> None:
  """Writes both files, the configuration last; until then there is none."""
  folder.mkdir(parents=True, exist_ok=True)
  tensors = name_temporary(folder / WEIGHTS)
  try:
    stream_safetensors(tensors, spec, pairs, {"format": "mlx"})
    (folder / CONFIG).unlink(missing_ok=True)
    sync_folder(folder)
    move(tensors, folder / WEIGHTS)
    sync_folder(folder)
    replace_text(folder / CONFIG, json.dumps(told, indent=2) + "\n")
  except BaseException:
    tensors.unlink(missing_ok=True)
    raise
