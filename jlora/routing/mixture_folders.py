# SPDX-License-Identifier: Apache-2.0
"""Writes a Mixtral checkpoint that combines finetunes of one base.

Its experts are the finetunes' MLPs; attention, embeddings and norms are the
base's.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.documents import COUNT, check_fields
from jlora.checkpoints.huggingface import stream_checkpoint
from jlora.checkpoints.merged import config_as, merged_dtype
from jlora.checkpoints.new_files import check_new, new_folder, replace_text
from jlora.checkpoints.sources import check_apart, copy_files, list_companions
from jlora.loras import Lora, dense
from jlora.messages import name_some
from jlora.numerics.backends import wide_dtype
from jlora.numerics.finite import rounded
from jlora.routing.mixtures import check_chosen
from jlora.selection import is_floating
from jlora.views import LINEAR, as_parameter

Expert = Checkpoint | Mapping[str, Lora]

# Parts of an MLP: the base's name -> Mixtral's.
_PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_MLP = "model.layers.{0}.mlp.{1}.weight"
_EXPERT = "model.layers.{0}.block_sparse_moe.experts.{1}.{2}.weight"
_ROUTER = "model.layers.{0}.block_sparse_moe.gate.weight"
_FAMILIES = ("llama", "mistral")


def save_mixture(
  folder: str | os.PathLike,
  base: Checkpoint,
  experts: Sequence[Expert],
  routers: Any,
  *,
  chosen: int = 2,
  max_shard_bytes: int = 5 * 2**30,
) -> None:
  """Writes a Mixtral checkpoint whose experts are the MLPs of finetunes.

  Holds one tensor in memory at a time. The folder gets its name once it is
  complete; transformers, vLLM and `jlora.models` load it.

  Args:
    folder: must not exist.
    base: an open checkpoint of a Llama or Mistral without biases. Everything
      but the MLPs comes from it, tokenizer and configuration too.
    experts: for each expert an open checkpoint of the base's shapes, or an
      adapter {name: Lora} whose changes are added to the base's MLPs.
    routers: (experts, d) for every layer, or {layer: (experts, d)}, as from
      `router_rows`.
    chosen: number of experts for each token.
    max_shard_bytes: a new file begins before this size would be exceeded.

  Raises:
    ValueError: before anything is written, if the folder exists or would be a
      part of what is read, the base is of another family, its MLPs are not
      floating or its small files are links to elsewhere, shapes differ, or
      routers or `chosen` do not fit; or an expert is not finite in the base's
      dtype.

  Warns:
    UserWarning: an adapter changes modules other than MLPs, which are left out.

  Example:
    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from jlora.checkpoints import open_checkpoint
    >>> from jlora.checkpoints import write_safetensors
    >>> names = [_MLP.format(0, part) for part in _PARTS]
    >>> mlp = {name: np.ones((2, 2), np.float32) for name in names}
    >>> law = {names[0]: Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones(()))}
    >>> with tempfile.TemporaryDirectory() as root:
    ...   os.mkdir(f"{root}/base")
    ...   write_safetensors(f"{root}/base/model.safetensors", mlp)
    ...   _ = Path(f"{root}/base/config.json").write_text(json.dumps(
    ...     {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 2}))
    ...   base = open_checkpoint(f"{root}/base")
    ...   save_mixture(f"{root}/moe", base, [base, law], np.eye(2))
    ...   moe = open_checkpoint(f"{root}/moe")
    ...   len(moe), moe[_EXPERT.format(0, 1, "w1")].tolist()
    (7, [[2.0, 2.0], [2.0, 2.0]])

  References:
    Jiang et al. (2024), Mixtral of Experts; mergekit-moe.
  """
  folder = Path(folder)
  check_new(folder)
  sources = [base, *filter(_is_whole, experts)]
  check_apart(folder, sources)
  small = list_companions(base)
  config = base.config
  layers = _check_base(base, config)
  _check_experts(base, experts, layers)
  rows = _rows_of(routers, len(layers), len(experts), config["hidden_size"])
  check_chosen(chosen, len(experts))
  spec = _spec_of(base, layers, len(experts))
  arrays = _arrays_of(base, experts, rows, layers)
  text = json.dumps(
    _mixed(config_as(base, None), len(experts), chosen), indent=2
  )
  with new_folder(folder) as partial:
    copy_files(small, partial)
    replace_text(partial / "config.json", text + "\n")
    stream_checkpoint(partial, spec, arrays, max_shard_bytes=max_shard_bytes)


def _check_base(base: Checkpoint, config: Mapping[str, Any]) -> list[int]:
  """Returns the base's layer numbers; raises if it cannot be a Mixtral."""
  kind = config.get("model_type")
  if kind not in _FAMILIES:
    raise ValueError(
      f"{base.path} is of type {kind}; a Mixtral is made of a {_FAMILIES[0]} "
      f"or {_FAMILIES[1]}."
    )
  sizes = {"num_hidden_layers": COUNT, "hidden_size": COUNT}
  check_fields(config, sizes, f"{base.path}: config.json", required=sizes)
  count = min(config["num_hidden_layers"], len(base))
  layers = list(range(count))
  needed = [_MLP.format(i, part) for i in layers for part in _PARTS]
  missing = [name for name in needed if name not in base]
  missing += [f"layer {count}"] * (count < config["num_hidden_layers"])
  biases = [name for name in base if name.endswith("_proj.bias")]
  if missing or biases:
    raise ValueError(
      f"{base.path} does not fit a Mixtral: missing are "
      f"{name_some(missing) or 'none'}, biases {name_some(biases) or 'none'}."
    )
  kinds = {name: base.spec[name].dtype for name in needed}
  whole = [f"{n}: {kind}" for n, kind in kinds.items() if not is_floating(kind)]
  if whole:
    raise ValueError(
      f"{base.path}: MLPs must be floating, not {name_some(whole)}."
    )
  return layers


def _check_experts(base, experts, layers) -> None:
  """Raises unless every expert has MLPs of the base's shapes."""
  mlps = {_MLP.format(i, part) for i in layers for part in _PARTS}
  if not experts:
    raise ValueError("A mixture needs at least one expert.")
  for i, expert in enumerate(experts):
    is_whole = _is_whole(expert)
    shapes = {
      name: expert.spec[name].shape if is_whole else _shape(expert[name])
      for name in mlps
      if name in expert
    }
    wrong = [
      f"{name}: {shapes.get(name)}, base {base.spec[name].shape}"
      for name in sorted(mlps if is_whole else shapes)
      if shapes.get(name) != base.spec[name].shape
    ]
    wrong += [
      f"{name}: {expert.spec[name].dtype}"
      for name in sorted(mlps & expert.keys() if is_whole else ())
      if not is_floating(expert.spec[name].dtype)
    ]
    if wrong or not shapes:
      raise ValueError(
        f"expert {i} does not fit the base: "
        f"{name_some(wrong) or 'it has no change of an MLP'}."
      )
    others = [] if is_whole else sorted(set(expert) - mlps)
    if others:
      warnings.warn(
        f"expert {i} changes {len(others)} modules that are no MLPs, which are "
        f"the base's in a mixture: {name_some(others)}.",
        stacklevel=3,
      )


def _is_whole(expert: Any) -> bool:
  """Returns whether an expert is an open checkpoint, not an adapter."""
  return hasattr(expert, "spec")


def _shape(lora: Lora) -> tuple[int, ...]:
  """Returns the shape (..., out, in) of a Lora's change."""
  if not isinstance(lora, Lora):
    raise ValueError(
      f"an expert holds {type(lora).__name__}: give an open checkpoint, or the "
      "Loras of an adapter."
    )
  return (*lora.a.shape[:-2], lora.b.shape[-1], lora.a.shape[-1])


def _rows_of(routers, layers, experts, d) -> dict[int, np.ndarray]:
  """Returns layer -> router; raises if one does not fit."""
  is_each = isinstance(routers, Mapping)
  found = {
    i: np.asarray(routers[i] if is_each else routers, np.float32)
    for i in range(layers)
    if not is_each or i in routers
  }
  wrong = [
    f"layer {i}: {x.shape}"
    for i, x in found.items()
    if x.shape != (experts, d) or not np.all(np.isfinite(x))
  ]
  wrong += [f"layer {i}: none" for i in range(layers) if i not in found]
  extra = [i for i in (routers if is_each else ()) if i not in found]
  wrong += [f"no layer {i} is there" for i in extra]
  if wrong:
    raise ValueError(
      f"Routers must be finite and ({experts}, {d}), one for each of {layers} "
      f"layers: {name_some(wrong)}."
    )
  return found


def _renamed(base: Checkpoint, layers: Sequence[int]) -> dict[str, tuple]:
  """Returns MLP name -> (layer, part)."""
  return {
    _MLP.format(i, part): (i, part)
    for i in layers
    for part in _PARTS
    if _MLP.format(i, part) in base
  }


def _spec_of(base, layers, experts) -> dict[str, Any]:
  """Returns name -> (shape, dtype) of the mixture, layer by layer."""
  places, spec = _renamed(base, layers), {}
  for name, stored in base.spec.items():
    dtype = merged_dtype(stored.dtype, None)
    if name not in places:
      spec[name] = (stored.shape, dtype)
      continue
    layer, part = places[name]
    for expert in range(experts):
      spec[_EXPERT.format(layer, expert, _PARTS[part])] = (
        stored.shape,
        dtype,
      )
    if part == "gate_proj":
      d = stored.shape[1]
      spec[_ROUTER.format(layer)] = ((experts, d), dtype)
  return spec


def _arrays_of(base, experts, rows, layers) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, array) of the mixture, one at a time."""
  places = _renamed(base, layers)
  for name, stored in base.spec.items():
    dtype = merged_dtype(stored.dtype, None)
    if name not in places:
      yield name, base[name].astype(dtype, copy=False)
      continue
    layer, part = places[name]
    for i, expert in enumerate(experts):
      target = _EXPERT.format(layer, i, _PARTS[part])
      array = _tensor_of(expert, base, name)
      yield target, rounded(target, array, dtype)
    if part == "gate_proj":
      target = _ROUTER.format(layer)
      yield target, rounded(target, rows[layer], dtype)


def _tensor_of(expert: Any, base: Checkpoint, name: str) -> np.ndarray:
  """Returns an expert's tensor, or the base's plus the expert's change."""
  if _is_whole(expert):
    return expert[name]
  if name not in expert:
    return base[name]
  wide = wide_dtype(base.spec[name])
  array = base[name].astype(wide)
  change = np.asarray(dense(expert[name]), wide)
  with np.errstate(over="ignore", invalid="ignore"):  # told when rounded
    return array + as_parameter(change, LINEAR, array.shape)


def _mixed(config, experts: int, chosen: int) -> dict[str, Any]:
  """Returns the mixture's config.json."""
  taken = {
    k: v for k, v in config.items() if k not in ("mlp_bias", "attention_bias")
  }
  return {
    **taken,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": experts,
    "num_experts_per_tok": chosen,
    "sliding_window": config.get("sliding_window"),
  }
