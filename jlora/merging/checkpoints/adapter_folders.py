# SPDX-License-Identifier: Apache-2.0
"""Merges adapter folders of one base into an adapter folder, without it.

folders ─► layers by their keys ─► Loras merged, one at a time ─► folder

What is merged are the changes s aᵀ b. Their factors are never merged apart:
equal changes have many, and sums of factors have cross terms.
"""

import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.hub import locate
from jlora.checkpoints.merged import merged_dtype
from jlora.formats.fingerprints import (
  Fingerprint,
  OtherBaseWarning,
  check_fingerprint,
  metadata_of,
  parse_fingerprint,
)
from jlora.formats.peft.layouts import BIAS, CONFIG, CONVOLUTION, PREFIX
from jlora.formats.peft.reading import (
  StoredAdapter,
  StoredLora,
  open_stored,
  read_stored,
)
from jlora.formats.peft.writing import write_folder
from jlora.loras import Lora
from jlora.merging.arrays.task_vectors import ties
from jlora.merging.checkpoints.adapter_layers import (
  ADDING,
  BY_ENTRY,
  OF_LORAS,
  coefficients,
  merge_layer,
)
from jlora.merging.checkpoints.piecewise import unbind
from jlora.merging.checkpoints.recipes import (
  Recipe,
  all_settings,
  check_recipe,
  is_gradient,
  number_at,
)
from jlora.merging.trees import merge
from jlora.messages import name_some
from jlora.numerics.finite import is_finite, rounded
from jlora.pairing.layers import LayerNames, find_layers, place_in_stack
from jlora.selection import is_floating

_METHODS = (*ADDING, *BY_ENTRY, *OF_LORAS)


class Layer(NamedTuple):
  """One LoRA layer of the result.

  Attributes:
    first: where the first adapter that changes the parameter has it.
    inputs: where each adapter has it; None: it does not change it.
    a: shape of the first factor of the result, (..., r, in).
    b: shape of the second, (..., r, out).
    dtype: of the stored factors.
    kernel: of a convolution, (in channels, height, width).
  """

  first: StoredLora
  inputs: tuple[StoredLora | None, ...]
  a: tuple[int, ...]
  b: tuple[int, ...]
  dtype: np.dtype
  kernel: tuple[int, ...]


class AdapterPlan(NamedTuple):
  """A merge of adapters.

  Attributes:
    recipe: of the merge.
    adapters: the open folders, in the recipe's order.
    layers: of the result.
    names: the layers of the model.
    config: the result's `adapter_config.json`.
    notes: what is unusual.
    fingerprint: of the base, as far as all adapters agree.
  """

  recipe: Recipe
  adapters: list[StoredAdapter]
  layers: list[Layer]
  names: LayerNames
  config: dict[str, Any]
  notes: list[str]
  fingerprint: Fingerprint


def is_adapter(name: str) -> bool:
  """Returns whether a model of a recipe is a folder of an adapter alone.

  Args:
    name: a path, a Hub id, or `base+adapter`.

  Example:
    >>> is_adapter("/nowhere")
    False
  """
  try:
    return (locate(name) / CONFIG).is_file()
  except ValueError:
    return False


def plan_adapters(recipe: Recipe) -> AdapterPlan:
  """Plans a merge of adapter folders, from their headers.

  Args:
    recipe: what to merge; all models are folders of adapters.

  Returns:
    AdapterPlan.

  Warns:
    OtherBaseWarning: adapters say that they were made on different bases, or on
      another than the recipe's.

  Raises:
    ValueError: a method that does not work on changes, a slice of layers, a
      base that is an adapter, or adapters that do not belong to one model.
  """
  check_recipe(recipe)
  _check(recipe)
  inputs = recipe.slices[0].inputs
  adapters = [open_stored(one.model) for one in inputs]
  stems = [{_stem(layer): layer for layer in own.layers} for own in adapters]
  layers = [
    _layer(recipe, adapters, stem, tuple(own.get(stem) for own in stems))
    for stem in dict.fromkeys(stem for own in stems for stem in own)
  ]
  names = _layers(recipe, [layer.first.name for layer in layers])
  notes = [*recipe.notes, *_lacking(recipe, stems)]
  notes += _other_bases(recipe, adapters)
  if recipe.tokenizer is not None or recipe.chat_template is not None:
    notes.append("tokenizer, chat_template: left out, adapters have none")
  _check_whole(recipe, adapters)
  config = _configure(recipe, adapters, layers)
  known = _fingerprint(recipe, adapters)
  return AdapterPlan(recipe, adapters, layers, names, config, notes, known)


def write_adapters(
  plan: AdapterPlan, out: str | os.PathLike, key: jax.Array | None
) -> list[str]:
  """Merges adapters and writes the folder; returns notes.

  Args:
    plan: of the merge.
    out: the folder.
    key: PRNG key of methods that draw.

  Returns:
    Notes: what is missing in Loras of the rank that was asked for.

  Raises:
    ValueError: numbers that are not finite, or become so in the dtype that is
      stored; nothing is then written.
  """
  spec: dict[str, tuple] = {}
  for layer in plan.layers:
    blank = [
      np.broadcast_to(np.empty((), layer.dtype), x) for x in (layer.a, layer.b)
    ]
    for name, array in _stored(layer, *blank):
      spec[name] = array.shape, layer.dtype
    if plan.config.get("lora_bias"):
      spec[_bias_key(layer)] = layer.b[-1:], layer.dtype
  whole = _whole(plan)
  spec |= {name: (x.shape, x.dtype) for name, x in whole.items()}
  losses: dict[str, tuple[float, float]] = {}
  arrays = _arrays(plan, key, losses, whole)
  said = metadata_of(plan.fingerprint)
  write_folder(Path(out), spec, arrays, plan.config, said)
  return _told(losses)


def _check(recipe: Recipe) -> None:
  """Raises unless a recipe says what can be done with changes."""
  plain, _ = unbind(recipe.method)
  if plain not in _METHODS:
    raise ValueError(
      f"{plain.__name__} merges models, not the changes that adapters hold: "
      f"for these there are {', '.join(one.__name__ for one in _METHODS)}. "
      "Give the models as `base+adapter` to merge them with it."
    )
  ranges = any(one.layers for part in recipe.slices for one in part.inputs)
  if ranges or len(recipe.slices) != 1:
    raise ValueError(
      f"{len(recipe.slices)} slices, or ranges of layers: adapters are merged "
      "whole; list them as `models`."
    )
  names = [one.model for one in recipe.slices[0].inputs]
  if recipe.base is not None and is_adapter(recipe.base):
    raise ValueError(
      f"The base {recipe.base} is an adapter: adapters are changes already; "
      "leave it out, or give the model that they change."
    )
  if wrong := [name for name in names if not is_adapter(name)]:
    raise ValueError(
      f"Some models are adapters, and {name_some(wrong)} are not; give models "
      "as `base+adapter`, or adapters alone."
    )


def _stem(layer: StoredLora) -> str:
  """Returns what the keys of a layer begin with."""
  return layer.keys["a"].removesuffix(layer.layout.a)


def _bias_key(layer: Layer) -> str:
  """Returns the key of a layer's bias."""
  return _stem(layer.first) + BIAS


def _shapes(layer: StoredLora, adapter: StoredAdapter) -> list[tuple[int, ...]]:
  """Returns the shapes of a layer's factors, (..., r, in) and (..., r, out)."""
  blank = [
    np.broadcast_to(np.int8(0), adapter.file.spec[layer.keys[role]].shape)
    for role in "ab"
  ]
  return [x.shape for x in layer.layout.load(*blank, layer.rank)]


def _layer(recipe: Recipe, adapters, stem: str, inputs) -> Layer:
  """Plans one layer of the result."""
  there = [(one, own) for one, own in zip(inputs, adapters, strict=True) if one]
  first = there[0][0]
  shapes = [_shapes(one, own) for one, own in there]
  ends = {(*a[:-2], a[-1], b[-1]) for a, b in shapes}
  stored = [own.file.spec[one.keys["a"]] for one, own in there]
  kernels = {tuple(x.shape[1:]) for x in stored}
  layouts = {one.layout for one, _ in there}
  if len(ends) > 1 or len(kernels) > 1 or len(layouts) > 1:
    raise ValueError(
      f"{first.name}: changes of {name_some(map(str, sorted(ends)))} (..., in, "
      "out) do not belong to one parameter: give adapters of one base."
    )
  *lead, rows, columns = ends.pop()
  rank = sum(a[-2] for a, _ in shapes)
  plain, _ = unbind(recipe.method)
  if plain in BY_ENTRY:  # what comes out has any rank
    rank = min(recipe.rank or rank, rows, columns)
  elif recipe.rank is not None or plain not in ADDING:
    rank = min(recipe.rank or rank, rank, rows, columns)
  dtype = merged_dtype(stored[0].dtype, recipe.dtype)
  kernel = kernels.pop() if first.layout is CONVOLUTION else ()
  return Layer(
    first, inputs, (*lead, rank, rows), (*lead, rank, columns), dtype, kernel
  )


def _layers(recipe: Recipe, names: Sequence[str]) -> LayerNames:
  """Finds the layers that settings vary along; without such there are none."""
  every = [one for own in all_settings(recipe) for one in own.values()]
  varies = any(map(is_gradient, every))
  return find_layers(names) if varies else LayerNames("", 0)


def _lacking(recipe: Recipe, stems: Sequence[Mapping[str, Any]]) -> list[str]:
  """Notes which modules an adapter does not change."""
  every, notes = {stem for own in stems for stem in own}, []
  for one, own in zip(recipe.slices[0].inputs, stems, strict=True):
    if lacking := sorted(every - own.keys()):
      names = [stem.removeprefix(PREFIX).rstrip(".") for stem in lacking]
      notes.append(
        f"{one.model} does not change {name_some(names)}, which counts as a "
        "change of zero"
      )
  return notes


def _other_bases(recipe: Recipe, adapters) -> list[str]:
  """Notes adapters that say they are for different models."""
  found = {
    one.model: own.config.get("base_model_name_or_path")
    for one, own in zip(recipe.slices[0].inputs, adapters, strict=True)
  }
  names = {name for name in found.values() if name}
  if len(names) < 2:
    return []
  said = name_some(f"{model} of {base}" for model, base in found.items())
  return [f"the adapters name different bases: {said}"]


def _fingerprint(recipe: Recipe, adapters) -> Fingerprint:
  """Returns what adapters say of their base, and warns where it is another."""
  names = [one.model for one in recipe.slices[0].inputs]
  said = {
    name: parse_fingerprint(own.file.metadata, name)
    for name, own in zip(names, adapters, strict=True)
  }
  base = _base_of(recipe) if any(said.values()) else {}
  for name, known in said.items():
    check_fingerprint(known, base, name=name)
  found: Fingerprint = {}
  differing = {}
  for name, known in said.items():
    for path, one in known.items():
      first = found.setdefault(path, one)
      if (first["shape"], first["hash"]) != (one["shape"], one["hash"]):
        differing[path] = name
  if differing:
    some = name_some(f"{path} of {name}" for path, name in differing.items())
    warnings.warn(
      f"The adapters were made on different bases: {len(differing)} weights "
      f"are not those of the first, {some}. Give adapters of one base, or "
      "carry them over with `jlora port`.",
      OtherBaseWarning,
      stacklevel=3,
    )
  return {path: one for path, one in found.items() if path not in differing}


def _base_of(recipe: Recipe) -> Any:
  """Opens a recipe's base; {} if it names none, or one that is not here."""
  try:
    return {} if recipe.base is None else open_checkpoint(recipe.base)
  except ValueError:  # only its name is needed
    return {}


def _check_whole(recipe: Recipe, adapters: Sequence[StoredAdapter]) -> None:
  """Raises unless what is stored whole has one value, or a mean."""
  parameters = {name for own in adapters for name in own.full}
  if not parameters:
    return
  lacking = [
    name
    for name in sorted(parameters)
    if not all(name in own.full for own in adapters)
  ]
  plain, _ = unbind(recipe.method)
  if lacking or plain not in ADDING:
    raise ValueError(
      f"{name_some(lacking or sorted(parameters))}: stored whole "
      "(modules_to_save), so what it changes is known only with the base. Give "
      "the models as `base+adapter`."
    )


def _configure(
  recipe: Recipe, adapters: Sequence[StoredAdapter], layers: Sequence[Layer]
) -> dict[str, Any]:
  """Returns the result's `adapter_config.json`."""
  rank = max(layer.a[-2] for layer in layers)
  wrapped = [x for x in layers if x.first.layout.wraps_parameter]
  patterns = {
    f"^{re.escape(_target(layer))}": layer.a[-2]
    for layer in layers
    if layer.a[-2] != rank
  }
  first = adapters[0].config
  is_one = all(_targets(own.config) == _targets(first) for own in adapters)
  named = {
    "target_modules": sorted({_target(x) for x in layers if x not in wrapped}),
    "target_parameters": sorted({x.first.name for x in wrapped}),
  }
  base = recipe.base or recipe.reference
  name = None if base is None or is_adapter(base) else base
  optional = {
    **(_targets(first) if is_one else named),
    "alpha_pattern": patterns,
    "base_model_name_or_path": name or first.get("base_model_name_or_path"),
    "fan_in_fan_out": first.get("fan_in_fan_out"),
    "lora_bias": any("bias" in x.keys for own in adapters for x in own.layers),
    "modules_to_save": first.get("modules_to_save"),
    "rank_pattern": patterns,
    "task_type": first.get("task_type"),
  }
  entries = {"lora_alpha": rank, "peft_type": "LORA", "r": rank}
  return entries | {key: value for key, value in optional.items() if value}


_TARGETS = (
  "target_modules", "exclude_modules", "target_parameters",
  "layers_to_transform", "layers_pattern", "ensure_weight_tying",
)  # fmt: skip


def _targets(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the entries that say which modules are changed."""
  found = {key: config[key] for key in _TARGETS if config.get(key)}
  return {
    key: sorted(value) if isinstance(value, list | frozenset) else value
    for key, value in found.items()
  }


def _target(layer: Layer) -> str:
  """Returns the name that PEFT compares with its patterns."""
  own = layer.first
  is_whole = own.layout.wraps_parameter
  return own.name if is_whole else own.name.rpartition(".")[0]


def _options(plan: AdapterPlan, name: str) -> dict[str, Any]:
  """Returns the method's numbers for one layer, one for each adapter."""
  part = plan.recipe.slices[0]
  place = place_in_stack(name, {plan.names.prefix: plan.names.count})
  own = [one.settings for one in part.inputs]
  levels = [part.settings, plan.recipe.settings]
  options = {}
  for key in sorted({"weight"}.union(*own, *levels)):
    values = tuple(
      number_at([settings, *levels], key, name, place) for settings in own
    )
    is_own = key == "weight" or any(key in settings for settings in own)
    ours = "weights" if key == "weight" else key
    options[ours] = values if is_own else values[0]
  return options


def _loras(plan: AdapterPlan, layer: Layer) -> list[Lora | None]:
  """Reads the Loras of a layer; None for adapters that do not change it."""
  inputs = plan.recipe.slices[0].inputs
  found: list[Lora | None] = []
  for model, own, one in zip(inputs, plan.adapters, layer.inputs, strict=True):
    lora = None if one is None else read_stored(one, own.file)
    if not all(map(is_finite, map(np.asarray, jax.tree.leaves(lora)))):
      raise ValueError(f"{model.model}: {layer.first.name} is not finite.")
    found.append(lora)
  return found


def _stored(layer: Layer, a, b) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the tensors of a layer by their keys."""
  layout, stem = layer.first.layout, _stem(layer.first)
  stored = layout.store(a, b, layer.kernel)
  yield from zip((stem + layout.a, stem + layout.b), stored, strict=True)


def _arrays(
  plan: AdapterPlan, key, losses, whole
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields every tensor of the result; notes losses by name."""
  method = plan.recipe.method
  for layer in plan.layers:
    name = layer.first.name
    options, loras = _options(plan, name), _loras(plan, layer)
    merged = merge_layer(name, loras, method, options, layer.a[-2], key)
    losses[name] = merged.lost, merged.energy
    lora = merged.lora
    b = np.asarray(lora.b) * np.asarray(lora.scale)[..., None, None]
    factors = [_filled(np.asarray(lora.a), layer.a), _filled(b, layer.b)]
    factors = [rounded(name, x, layer.dtype) for x in factors]
    yield from _stored(layer, *factors)
    if plan.config.get("lora_bias"):
      yield _bias_key(layer), _bias(plan, layer, options, key)
  yield from whole.items()


def _filled(factor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Adds units of zeros, or drops those that are, up to a shape."""
  factor = factor[..., : shape[-2], :]
  widths = [(0, 0)] * factor.ndim
  widths[-2] = (0, shape[-2] - factor.shape[-2])
  return np.pad(factor, widths)


def _bias(plan: AdapterPlan, layer: Layer, options, key) -> np.ndarray:
  """Merges the biases of a layer as its matrix is."""
  biases = []
  for own, one in zip(plan.adapters, layer.inputs, strict=True):
    bias = np.zeros(layer.b[-1:], np.float32)
    if one is not None and "bias" in one.keys:
      bias = one.scale * own.file.read_float32(one.keys["bias"])
    biases.append(bias)
  method = plan.recipe.method
  if unbind(method)[0] in OF_LORAS:
    method = unbind(method)[1].get("method", ties)
  name = layer.first.name.removesuffix("weight") + "bias"
  merged = merge(
    [{name: bias} for bias in biases],
    method=method,
    base={name: np.zeros(layer.b[-1:], np.float32)},
    settings=options,
    key=key,
  )
  return rounded(name, merged[name], layer.dtype)


def _whole(plan: AdapterPlan) -> dict[str, np.ndarray]:
  """Returns what all adapters store whole: equal, or its mean."""
  found = {}
  for name in plan.adapters[0].full:
    arrays = [own.file[own.full[name]] for own in plan.adapters]
    key = plan.adapters[0].full[name]
    if all(np.array_equal(arrays[0], other) for other in arrays[1:]):
      found[key] = arrays[0]
      continue
    if not is_floating(arrays[0].dtype):
      raise ValueError(
        f"{name} is stored whole as {arrays[0].dtype} and differs: integers "
        "have no mean. Give the models as `base+adapter`."
      )
    weights = coefficients(
      plan.recipe.method, len(arrays), _options(plan, name)
    )
    if abs(weights.sum() - 1) > 1e-6:
      raise ValueError(
        f"{name} is stored whole (modules_to_save) and differs; its changes "
        f"can be added without the base only if the weights, "
        f"{weights.tolist()}, sum to one. Give the models as `base+adapter`."
      )
    mean = sum(
      w * np.asarray(x, np.float32)
      for w, x in zip(weights, arrays, strict=True)
    )
    found[key] = rounded(name, mean, arrays[0].dtype)
  return found


def _told(losses: Mapping[str, tuple[float, float]]) -> list[str]:
  """Says what is missing in the result, in norm."""
  lost, energy = (sum(x) for x in zip(*losses.values(), strict=True))
  if lost <= 1e-12 * energy:
    return []
  worst = max(losses, key=lambda name: losses[name][0] / (losses[name][1] or 1))
  shares = [math.sqrt(a / b) for a, b in ((lost, energy), losses[worst])]
  return [
    f"{shares[0]:.1%} of the merged change, in norm, does not fit into these "
    f"ranks; the worst module is {worst}: {shares[1]:.1%}"
  ]
