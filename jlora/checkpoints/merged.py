# SPDX-License-Identifier: Apache-2.0
"""Writing a base checkpoint with changes added, as a new checkpoint folder."""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.documents import shortened
from jlora.checkpoints.hub import without_paths
from jlora.checkpoints.huggingface import stream_checkpoint
from jlora.checkpoints.new_files import check_new, new_folder, replace_text
from jlora.checkpoints.sources import check_apart, copy_files, list_companions
from jlora.loras import Lora, check_loras, dense
from jlora.messages import name_some
from jlora.numerics.backends import wide_dtype
from jlora.numerics.finite import is_finite, not_finite, rounded
from jlora.selection import EMBEDDINGS, HEADS, is_floating
from jlora.tree_views import table_for
from jlora.views import as_parameter, views_of

_CONFIG = "config.json"
_DTYPES = "bfloat16, float16, float32 or float64"


def save_merged(
  folder: str | os.PathLike,
  base: Checkpoint,
  loras: Mapping[str, Lora],
  *,
  biases: Mapping[str, Any] | None = None,
  full: Mapping[str, Any] | None = None,
  dtype: Any = None,
  model_type: str | None = None,
  max_shard_bytes: int = 5 * 2**30,
) -> None:
  """Writes a checkpoint folder: the base with every change added.

      w' = round(float32(w) + scale * aᵀ b),  rounded once to the stored dtype

  One tensor and its change are in memory at a time. The folder gets its name
  only when it is complete.

  Args:
    folder: must not exist.
    base: an open checkpoint; where it is a folder, its other small files
      (config.json, tokenizer) are copied.
    loras: path -> Lora; may be a lazy mapping.
    biases: path -> change to add.
    full: path -> new value, which replaces the base's before a Lora is added.
    dtype: of floating tensors; None keeps each tensor's own. Without it float8
      weights become bfloat16, because their scales would not fit the sum.
    model_type: of config.json; None reads it there.
    max_shard_bytes: the most bytes of arrays in a file; a larger tensor gets a
      file of its own.

  Raises:
    ValueError: the folder exists or would be a part of the base, small files
      are links to elsewhere, a path or shape is not the base's, a change is no
      array or for integers, or a changed tensor is not finite or not in the
      dtype it is stored in; of others, entries that this dtype does not hold;
      or a dtype of integers or float8. Nothing is then written.

  Example:
    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from jlora.checkpoints import open_checkpoint
    >>> from jlora.checkpoints import write_safetensors
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(2))
    >>> with tempfile.TemporaryDirectory() as root:
    ...   write_safetensors(f"{root}/base.safetensors",
    ...                     {"h.q.weight": np.ones((2, 3), np.float32)})
    ...   base = open_checkpoint(f"{root}/base.safetensors")
    ...   save_merged(f"{root}/merged", base, {"h.q.weight": lora})
    ...   open_checkpoint(f"{root}/merged")["h.q.weight"]
    array([[3., 3., 3.],
           [3., 3., 3.]], dtype=float32)
  """
  folder, biases, full = Path(folder), biases or {}, full or {}
  check_new(folder)
  check_apart(folder, [base])
  small = list_companions(base)
  config = base.config
  table = table_for(base.spec, model_type or config.get("model_type"))
  shapes = {path: base.spec[path].shape for path in loras if path in base}
  known = {
    path: (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    for path in shapes
    if (lora := loras[path])
  }
  views = {**dict.fromkeys(shapes), **views_of(shapes, table, known)}
  check_changes(base, loras, views, biases, full)
  spec = {
    name: (
      full[name].shape if name in full else stored.shape,
      merged_dtype(stored.dtype, dtype),
    )
    for name, stored in base.spec.items()
  }
  arrays = (
    (name, _stored(name, base, loras, views, biases, full, kind))
    for name, (_, kind) in spec.items()
  )
  text = None
  if config:
    new = _merged_config(base, spec, dtype)
    text = json.dumps(new, indent=2, sort_keys=True) + "\n"
  with new_folder(folder) as partial:
    copy_files(small, partial)
    if text is not None:
      replace_text(partial / _CONFIG, text)
    stream_checkpoint(partial, spec, arrays, max_shard_bytes=max_shard_bytes)


def check_changes(base, loras, views, biases, full) -> None:
  """Raises unless every change is for a tensor of the base and has its shape.

  Args:
    base: an open checkpoint.
    loras: path -> Lora.
    views: path -> MatrixView, for the paths of `loras` that the base has.
    biases: path -> change.
    full: path -> new value.

  Example:
    >>> check_changes({}, {}, {}, {"b": np.ones(2)}, {})
    Traceback (most recent call last):
    ...
    ValueError: 1 changes are for parameters that the base does not have: b.
  """
  unknown = [path for path in (*loras, *biases, *full) if path not in base]
  if unknown:
    raise ValueError(
      f"{len(unknown)} changes are for parameters that the base does not have:"
      f" {name_some(unknown)}."
    )
  changes = [*biases.items(), *full.items()]
  lists = [path for path, value in changes if not hasattr(value, "dtype")]
  if lists:
    raise ValueError(
      f"{len(lists)} changes are no arrays: {name_some(lists)}. Use np.asarray "
      "with the dtype they should have."
    )
  whole = _cut_off(base, {*loras, *biases}, full)
  if whole:
    raise ValueError(
      f"{len(whole)} changes are for parameters that are not floating, where "
      f"they would be cut off: {name_some(whole)}. Give the base that they are "
      "of, or leave them out."
    )
  stored = {path: base.spec[path].shape for path in (*loras, *biases, *full)}
  wrong = [
    f"{path}: new value {value.shape}, base {stored[path]}"
    for path, value in full.items()
    if len(value.shape) != len(stored[path])
    or value.shape[1:] != stored[path][1:]  # a table may have other rows
  ]
  stored |= {path: value.shape for path, value in full.items()}
  wrong += [
    f"{path}: {value.shape}, base {stored[path]}"
    for path, value in biases.items()
    if value.shape != stored[path]
  ]
  for path, lora in loras.items():
    check_loras({path: lora})
    shape = (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
    view = views[path]
    if view is None or view.shape(stored[path]) != shape:
      wrong.append(f"{path}: Lora {shape}, base {stored[path]}")
  if wrong:
    raise ValueError(
      f"{len(wrong)} changes do not fit: {name_some(wrong)}. Give the base "
      "that they are of."
    )


def _cut_off(base, changes, full) -> list[str]:
  """Lists changes of integers, and integers that replace floats."""
  kinds = {path: base.spec[path].dtype for path in (*changes, *full)}
  found = [
    f"{path}: {kinds[path]}"
    for path in sorted(changes)
    if not is_floating(kinds[path])
  ]
  return found + [
    f"{path}: {kinds[path]}, the new value {value.dtype}"
    for path, value in full.items()
    if is_floating(kinds[path]) != is_floating(value.dtype)
    or (not is_floating(kinds[path]) and value.dtype != kinds[path])
  ]


def changed(name, base, loras, views, biases, full) -> np.ndarray:
  """Returns one tensor of the base with its changes.

  If it has any, it is float32, or float64 where the base is.

  Arguments as for `check_changes`.

  Example:
    >>> base = {"b": np.ones(2, np.float32)}
    >>> changed("b", base, {}, {}, {"b": np.ones(2)}, {})
    array([2., 2.], dtype=float32)
  """
  array = np.asarray(full[name]) if name in full else base[name]
  wide = wide_dtype(array)
  # What is not finite is told by who stores the sum.
  with np.errstate(over="ignore", invalid="ignore"):
    if name in biases:
      array = array.astype(wide) + np.asarray(biases[name], wide)
    if name in loras:
      change = np.asarray(dense(loras[name]), wide)
      change = as_parameter(change, views[name], array.shape)
      array = array.astype(wide) + change
  return array


def _stored(name, base, loras, views, biases, full, dtype) -> np.ndarray:
  """Returns one tensor with its changes as it is stored."""
  array = changed(name, base, loras, views, biases, full)
  if not is_floating(array.dtype):
    return array.astype(dtype)
  if name in loras or name in biases or name in full:
    return rounded(name, array, dtype)
  with np.errstate(over="ignore"):
    out = array.astype(dtype, copy=False)
  # Infinities of the base, in masks say, stay; none are added.
  if out.dtype != array.dtype and not is_finite(out) and is_finite(array):
    raise not_finite(name, array, dtype)
  return out


def merged_dtype(stored: np.dtype, dtype: Any) -> np.dtype:
  """Returns the dtype of a merged tensor; integers keep theirs.

  Without `dtype` a tensor keeps its stored one, but float8 becomes bfloat16.

  Raises:
    ValueError: a `dtype` that holds no floats as they are: integers, or float8,
      whose codes need scales.

  Example:
    >>> merged_dtype(np.dtype(np.int8), np.float32)
    dtype('int8')
  """
  kind = None if dtype is None else _checked_dtype(dtype)
  if not is_floating(stored):
    return stored
  if kind is not None:
    return kind
  return np.dtype(ml_dtypes.bfloat16) if stored.itemsize == 1 else stored


def _checked_dtype(dtype: Any) -> np.dtype:
  """Returns a dtype; raises unless it holds floats as they are."""
  try:
    found = np.dtype(dtype)
  except TypeError as error:
    raise ValueError(f"dtype is {shortened(dtype)}; give {_DTYPES}.") from error
  if not is_floating(found) or found.itemsize == 1:
    raise ValueError(f"dtype is {found.name}; give {_DTYPES}.")
  return found


def config_as(base: Any, dtype: Any) -> dict[str, Any]:
  """Returns config.json for tensors that are stored anew.

  Args:
    base: an open checkpoint.
    dtype: of all floating tensors; None is each tensor's own.

  Returns:
    A copy without paths of this machine, without a quantisation where weights
    were quantised, and with the dtype wherever there was one.

  Example:
    >>> import types
    >>> config = {"dtype": "float32", "text_config": {"torch_dtype": "float32"}}
    >>> base = types.SimpleNamespace(config=config, spec={}, companions={})
    >>> config_as(base, "bfloat16")
    {'dtype': 'bfloat16', 'text_config': {'torch_dtype': 'bfloat16'}}
  """
  config = copy.deepcopy(without_paths(base.config))
  stored = {entry.dtype.itemsize for entry in base.spec.values()}
  if 1 in stored or base.companions:
    config.pop("quantization_config", None)
  for level in levels_of(config) if dtype is not None else ():
    for key in {"dtype", "torch_dtype"} & level.keys():
      level[key] = np.dtype(dtype).name
  return config


def set_rows(config: dict[str, Any], before: int, rows: int, place: Any):
  """Sets the number of tokens wherever a configuration has the old one.

  Args:
    config: contents of config.json; is changed.
    before: how many rows the tables had.
    rows: how many they have.
    place: of the model, for the error.

  Raises:
    ValueError: the configuration has a number of tokens, but not the old one.

  Example:
    >>> config = {"text_config": {"vocab_size": 8}}
    >>> set_rows(config, 8, 9, "model")
    >>> config
    {'text_config': {'vocab_size': 9}}
  """
  levels = [one for one in levels_of(config) if "vocab_size" in one]
  if before == rows or not levels:
    return
  named = [one for one in levels if one["vocab_size"] == before]
  if not named:
    said = [str(one["vocab_size"]) for one in levels]
    raise ValueError(
      f"{place}: config.json's vocab_size is {name_some(said)}, but tables "
      f"have {before} rows; make the two the same."
    )
  for one in named:
    one["vocab_size"] = rows


def levels_of(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Yields a configuration and all that are part of it.

  Args:
    config: contents of config.json.

  Yields:
    Dicts; of at most 64 levels, as documents are read.

  Example:
    >>> len(list(levels_of({"text_config": {"a": {}}, "x": 1})))
    3
  """
  yield config
  for value in config.values():
    if isinstance(value, dict):
      yield from levels_of(value)


def _merged_config(base, spec, dtype) -> dict[str, Any]:
  """Returns config.json changed for a new dtype, or for a grown vocabulary."""
  config = config_as(base, dtype)
  heights = {
    (base.spec[name].shape[0], shape[0])
    for name, (shape, _) in spec.items()
    if shape != base.spec[name].shape and _is_table(name)
  }
  for before, rows in sorted(heights):
    set_rows(config, before, rows, base.path)
  return config


def _is_table(name: str) -> bool:
  """Returns whether a parameter has a row for each token, by its name."""
  is_known = any(re.fullmatch(rule, name) for rule in (EMBEDDINGS, HEADS))
  return is_known and not re.search(r"position|wpe|token_type", name)
