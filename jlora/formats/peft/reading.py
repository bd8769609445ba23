# SPDX-License-Identifier: Apache-2.0
"""Reads PEFT adapter folders strictly.

PEFT ignores tensors that it cannot place, and fills missing ones with zeros.
Here both are errors.
"""

import collections
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.hub import locate
from jlora.formats.peft.config import (
  check_config,
  is_saved,
  is_targeted,
  rank_and_scale,
  read_adapter_config,
  wrapped_parameters,
)
from jlora.formats.peft.conversions import (
  Conversion,
  convert_base,
  find_conversions,
  revert_full,
  revert_loras,
)
from jlora.formats.peft.layouts import (
  BIAS,
  CONFIG,
  CONVOLUTION,
  EMBEDDING,
  EXPERTS,
  IN_OUT,
  LINEAR_FILE,
  PARAMETER_ORDER,
  PREFIX,
  TENSORS,
  TRANSPOSED,
  FileLayout,
)
from jlora.formats.peft.parts import HEAD, Base, describe_base, ties_of
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.selection import is_floating
from jlora.views import view_of

# A key without its prefix: the module, nested wrappers, and the tensor's role.
_KEY = re.compile(
  r"(?P<module>.+?)(?P<nest>(\.base_layer)*)\."
  r"(?P<role>lora_A\.weight|lora_B\.weight|lora_B\.bias"
  r"|lora_embedding_A|lora_embedding_B)"
)
_ROLES = {
  "lora_A.weight": "a",
  "lora_embedding_A": "a",
  "lora_B.weight": "b",
  "lora_embedding_B": "b",
  "lora_B.bias": "bias",
}


class PeftAdapter(NamedTuple):
  """The contents of an adapter folder, by Hugging Face parameter names.

  Attributes:
    loras: parameter -> Lora, as stored, with the effective scale.
    biases: bias parameter -> its change (out,) float32; zeros are left out.
    full: parameter -> its new value. PEFT stores an embedding's table beside
      its LoRA; that table is here too, and the Lora adds to it.
  """

  loras: dict[str, Lora]
  biases: dict[str, jax.Array]
  full: dict[str, jax.Array]


class StoredLora(NamedTuple):
  """One LoRA layer of the file.

  Attributes:
    name: the parameter that it changes.
    layout: how it is stored.
    rank: of each of its matrices.
    scale: by which its product is multiplied.
    keys: "a", "b" and, if it has one, "bias" -> key in the file.
  """

  name: str
  layout: FileLayout
  rank: int
  scale: float
  keys: dict[str, str]


class StoredAdapter(NamedTuple):
  """An adapter folder as it lies on disk, without its base.

  Attributes:
    config: the contents of `adapter_config.json`.
    file: the tensors.
    layers: all LoRA layers, by the names of the model's modules.
    full: parameter -> key, of what is stored whole.
  """

  config: dict[str, Any]
  file: Checkpoint
  layers: list[StoredLora]
  full: dict[str, str]


def load_peft(
  folder: str | os.PathLike,
  *,
  like: Any = None,
  model_type: str | None = None,
  config: Mapping[str, Any] | None = None,
  on_host: bool = False,
) -> PeftAdapter:
  """Reads the Loras, biases and whole tensors of a PEFT adapter folder.

      scale = lora_alpha / r   (/ sqrt(r) with use_rslora), after the patterns

  Args:
    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    like: every parameter of the base, as `save_peft` takes them; Loras then
      have its paths. If given, shapes must fit, every module that the
      configuration targets must be there, and a tied head's copy of the
      embedding's change is left out.
    model_type: `model_type` of the base's config.json, used with `like`.
    config: the contents of the base's config.json, used with `like`: then the
      adapter has the names of the model's modules, or those on disk as one for
      vLLM can have, and `like` those on disk.
    on_host: whether arrays are NumPy's. JAX's take a small program for each
      shape, which is compiled when it is new.

  Returns:
    PeftAdapter, in the dtypes of the file; by the names of `like` where
    `config` is given.

  Raises:
    ValueError: a method other than plain LoRA, tensors that the configuration
      does not explain, an A without its B, ranks that disagree with each other
      or with the configuration, or anything that does not fit `like`.

  Example:
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from jlora.checkpoints import write_safetensors
    >>> tensors = {"base_model.model.q.lora_A.weight": np.ones((1, 3), "f4"),
    ...            "base_model.model.q.lora_B.weight": np.ones((2, 1), "f4")}
    >>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 4,
    ...           "target_modules": ["q"]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_safetensors(f"{folder}/adapter_model.safetensors", tensors)
    ...   _ = Path(folder, CONFIG).write_text(json.dumps(config))
    ...   load_peft(folder).loras["q.weight"].scale
    Array(4., dtype=float32)
  """
  entries, file = _open(folder)
  stored = base = None
  conversions: list[Conversion] = []
  if like is not None:
    stored = describe_base(like, model_type, "auto", None, config)
    conversions = _conversions_for(stored, file)
    base = convert_base(stored, conversions)
  order = _order_in(base)
  found, full = _sort_keys(file, entries, order)
  wrappers = _wrappers(found, file, entries, order)
  paths: Mapping[str, str] = {}
  if base is not None:
    wrappers = [_renamed(each, base) for each in wrappers]
    shapes = {str(base.rename(p)): shape for p, shape in base.shapes.items()}
    paths = {str(base.rename(path)): path for path in base.shapes}
    ties = {to for name in shapes for to in ties_of(name, base)} - {HEAD}
    wrappers = [each for each in wrappers if each.name not in ties]
    full = {name: key for name, key in full.items() if name not in ties}
    wrappers, full = _without_tied_head(wrappers, full, file, shapes)
    _check_complete(entries, wrappers, shapes, base)
    _check_shapes(wrappers, file, shapes, paths, base)
  biases = {
    wrapper.name.removesuffix("weight") + "bias": wrapper.scale
    * file.read_float32(wrapper.keys["bias"])
    for wrapper in wrappers
    if "bias" in wrapper.keys
  }
  as_array: Any = np.asarray if on_host else jnp.asarray
  loras = {
    paths.get(each.name, each.name): jax.tree.map(
      as_array, _read(each, file, base)
    )
    for each in wrappers
  }
  whole = {
    paths.get(name, name): as_array(file[key]) for name, key in full.items()
  }
  if stored is not None:
    loras = revert_loras(loras, conversions, stored)
    whole = revert_full(whole, conversions, stored)
  return PeftAdapter(
    loras,
    {
      paths.get(name, name): as_array(bias)
      for name, bias in biases.items()
      if bias.any()
    },
    whole,
  )


def open_stored(folder: str | os.PathLike) -> StoredAdapter:
  """Opens an adapter folder as it is, without what is known of a base.

  Args:
    folder: as for `load_peft`.

  Returns:
    StoredAdapter; only headers are read.

  Raises:
    ValueError: as `load_peft` without a base.
  """
  entries, file = _open(folder)
  order = _order_in(None)
  found, full = _sort_keys(file, entries, order)
  return StoredAdapter(
    entries, file, _wrappers(found, file, entries, order), full
  )


def read_stored(layer: StoredLora, file: Checkpoint) -> Lora:
  """Reads one LoRA layer of a file, as NumPy arrays.

  Returns:
    Lora a (..., r, in), b (..., r, out), in the file's dtype.
  """
  keys = layer.keys
  stored = file[keys["a"]], file[keys["b"]]
  factors: list[Any] = [*layer.layout.load(*stored, layer.rank)]
  scale: Any = np.full(factors[0].shape[:-2], layer.scale, np.float32)
  return Lora(factors[0], factors[1], scale)


def _open(folder: str | os.PathLike) -> tuple[dict[str, Any], Checkpoint]:
  """Opens a folder: its checked configuration, and its tensors."""
  folder = locate(folder)
  for name in (CONFIG, TENSORS):
    if not (folder / name).is_file():
      raise ValueError(f"{folder} has no {name}; it is not an adapter folder.")
  entries = read_adapter_config(folder / CONFIG)
  check_config(entries, str(folder / CONFIG))
  if isinstance(entries.get("target_modules"), list):
    entries["target_modules"] = frozenset(entries["target_modules"])
  return entries, open_checkpoint(folder / TENSORS)


def _conversions_for(stored: Base, file: Checkpoint) -> list[Conversion]:
  """Lists the conversions to the parameters that the file's Loras are for.

  There are none if they are for tensors on disk, as those for vLLM can be.
  """
  conversions = find_conversions(stored)
  sources = {path for each in conversions for path in each.paths}
  matches = [_KEY.fullmatch(key.removeprefix(PREFIX)) for key in file]
  if any(match and f"{match['module']}.weight" in sources for match in matches):
    return []
  return conversions


def _renamed(wrapper: StoredLora, base: Base) -> StoredLora:
  """Gives a layer named as on disk the parameter's name."""
  is_path = wrapper.name in base.shapes and wrapper.name not in base.names
  name = str(base.rename(wrapper.name)) if is_path else wrapper.name
  return wrapper._replace(name=name)


def _order_in(base: Base | None) -> Callable[[str], Sequence[str]]:
  """Returns the order in which a module's parameters are wrapped, as known."""
  if base is None or base.family is None:
    return lambda module: PARAMETER_ORDER
  return base.family.order_of


def _sort_keys(file: Checkpoint, config: Mapping[str, Any], order):
  """Sorts keys into {(module, depth): {role: key}} and {parameter: key}."""
  found: dict[tuple[str, int], dict[str, str]] = {}
  full: dict[str, str] = {}
  unexplained = []
  for key in file:
    name = key.removeprefix(PREFIX)
    if match := _KEY.fullmatch(name):
      module, role = match["module"], match["role"]
      roles = found.setdefault((module, match["nest"].count(".")), {})
      is_first = roles.setdefault(_ROLES[role], key) == key
      explained = is_targeted(config, module) or wrapped_parameters(
        config, module, order(module)
      )
      explained = explained and (role != BIAS or config.get("lora_bias"))
      explained = explained and is_first
    else:
      module, _, leaf = name.rpartition(".")
      plain = module.removesuffix(".base_layer")
      full[f"{plain}.{leaf}"] = key
      explained = is_saved(config, module) or (
        plain != module and is_targeted(config, plain)
      )
    if not explained or not key.startswith(PREFIX):
      unexplained.append(key)
  if unexplained:
    raise ValueError(
      f"{len(unexplained)} tensors that {CONFIG} does not explain, so PEFT"
      f" would ignore them: {name_some(unexplained)}."
    )
  return found, full


def _wrappers(found, file: Checkpoint, config, order) -> list[StoredLora]:
  """Returns every LoRA layer; raises if one contradicts the configuration."""
  wrappers, wrong = [], []
  depths = collections.Counter(module for module, _ in found)
  for (module, nest), keys in found.items():
    if not {"a", "b"} <= keys.keys():
      wrong.append(f"{module}: only {name_some(sorted(keys.values()))}")
      continue
    parameters = (
      []
      if is_targeted(config, module)
      else wrapped_parameters(config, module, order(module))
    )
    if depths[module] != max(len(parameters), 1):
      wrong.append(
        f"{module}: {depths[module]} LoRA layers, configured"
        f" {name_some(parameters)}"
      )
      continue
    a, b = file.spec[keys["a"]].shape, file.spec[keys["b"]].shape
    name = f"{module}.{parameters[-1 - nest]}" if parameters else module
    rank, scale = rank_and_scale(config, name)
    kinds = [file.spec[keys[role]].dtype for role in ("a", "b")]
    if not all(map(is_floating, kinds)):
      wrong.append(f"{name}: A {kinds[0]}, B {kinds[1]}, needed are floats")
      continue
    layout = _layout(keys["a"], a, name if parameters else "")
    bias = file.spec[keys["bias"]].shape if "bias" in keys else b[:1]
    if not _is_pair(a, b, rank, layout) or bias != b[:1]:
      wrong.append(f"{name}: A {a}, B {b}, configured rank {rank}")
      continue
    name = name if parameters else f"{module}.weight"
    wrappers.append(StoredLora(name, layout, rank, scale, keys))
  if wrong:
    raise ValueError(
      f"{len(wrong)} LoRA layers are not whole or contradict {CONFIG}:"
      f" {name_some(wrong)}."
    )
  return wrappers


def _is_pair(a, b, rank: int, layout: FileLayout) -> bool:
  """Returns whether two tensors' shapes are those of A and B of a rank."""
  axes = len(b) if layout is CONVOLUTION else 2
  if len(a) < 2 or len(b) != axes or a[0] != b[1] or math.prod(b[2:]) != 1:
    return False
  if layout is EXPERTS:
    return a[0] > 0 and a[0] % rank == 0 and len(a) == 2
  return a[0] == rank


def _layout(key: str, shape: tuple[int, ...], parameter: str) -> FileLayout:
  """Returns the file layout of a LoRA layer, from its key and shape.

  The parameter is "" where PEFT wraps a module.
  """
  if parameter:
    is_turned = parameter.rpartition(".")[2] in IN_OUT
    return TRANSPOSED if is_turned else EXPERTS
  if key.endswith(EMBEDDING.a):
    return EMBEDDING
  return CONVOLUTION if len(shape) > 2 else LINEAR_FILE


def _read(wrapper: StoredLora, file: Checkpoint, base: Base | None) -> Lora:
  """Reads the Lora of a layer, in NumPy; a stack of one becomes a matrix.

  Unless the base has a parameter of three axes there.
  """
  a, b, scale = jax.tree.leaves(read_stored(wrapper, file))
  path = base.paths.get(wrapper.name) if base else None
  is_stack = base and path and len(base.shapes[path]) > 2
  if wrapper.layout is EXPERTS and len(a) == 1 and not is_stack:
    a, b, scale = a[0], b[0], scale[0]
  return Lora(a, b, scale)


def _without_tied_head(wrappers: list[StoredLora], full, file, shapes):
  """Drops a head that repeats the embedding it is tied to."""
  if HEAD in shapes:
    return wrappers, full
  heads = [wrapper for wrapper in wrappers if wrapper.name == HEAD]
  tables = [wrapper for wrapper in wrappers if wrapper.layout is EMBEDDING]
  repeats = heads and any(
    np.array_equal(file[heads[0].keys[one]], file[table.keys[other]].T)
    for table in tables
    for one, other in (("a", "b"), ("b", "a"))
  )
  same = HEAD in full and any(
    np.array_equal(file[full[HEAD]], file[key])
    for name, key in full.items()
    if name != HEAD and file.spec[key].shape == file.spec[full[HEAD]].shape
  )
  if (heads and not repeats) or (HEAD in full and not same):
    raise ValueError(
      f"{HEAD} is not a parameter of `like`, and its change is not that of the"
      " embedding it is tied to; untie the base first."
    )
  kept = {name: key for name, key in full.items() if name != HEAD}
  return [wrapper for wrapper in wrappers if wrapper.name != HEAD], kept


def _check_complete(
  config, wrappers: list[StoredLora], shapes, base: Base
) -> None:
  """Raises unless the file has every module of an explicit target list."""
  if (
    config.get("target_modules") == "all-linear"
    or config.get("layers_to_transform") is not None
  ):
    return
  present = {wrapper.name for wrapper in wrappers}
  missing = [
    name
    for name, shape in shapes.items()
    if len(shape) > 1
    and name.endswith(".weight")
    and name not in present
    and is_targeted(config, name.removesuffix(".weight"))
    and not (base.family and base.family.kind_of(name, len(shape)).why)
  ]
  if missing:
    raise ValueError(
      f"{len(missing)} modules that {CONFIG} targets are not in the file:"
      f" {name_some(missing)}."
    )


def _check_shapes(
  wrappers: list[StoredLora], file, shapes, paths, base: Base
) -> None:
  """Raises unless every Lora fits the parameter it changes."""
  wrong = []
  for wrapper in wrappers:
    blank = [
      np.broadcast_to(np.int8(0), file.spec[wrapper.keys[role]].shape)
      for role in ("a", "b")
    ]
    a, b = wrapper.layout.load(*blank, wrapper.rank)
    given = (*a.shape[:-2], a.shape[-1], b.shape[-1])
    shape = shapes.get(wrapper.name, ())
    path = paths.get(wrapper.name, wrapper.name)
    view = (
      base.family.kind_of(wrapper.name, len(shape)).view
      if base.family
      else view_of(path, shape, base.table, given)
    )
    needed = view and view.shape(shape)
    if needed not in (given, given[1:]):
      wrong.append(f"{wrapper.name}: {given}, needed {needed}")
  if wrong:
    raise ValueError(
      f"{len(wrong)} Loras do not fit `like`: {name_some(wrong)}."
    )
