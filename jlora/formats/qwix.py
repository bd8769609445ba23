# SPDX-License-Identifier: Apache-2.0
"""Writes adapters for qwix and tunix: LoRA parameters beside their weights."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epy

from jlora.formats.jax_layouts import Form, equation_for, form_of
from jlora.formats.jax_states import (
  NO_WHOLE,
  RULES,
  Part,
  check_dtype,
  check_output,
  check_some,
  make_pair,
  module_pattern,
  parts_of,
  write_folder,
)
from jlora.formats.storing import Select, everything
from jlora.formats.tunix_names import renamed
from jlora.loras import Lora
from jlora.views import MatrixView

with epy.lazy_imports():  # they take a third of a second: only if needed
  import orbax.checkpoint as ocp

#: Where the state lies in a folder: of qwix, and of a step of tunix.
STATE, STEP = "state", "0/model_params"
SIDES = ("_lora_a", "_lora_b")


def to_qwix(
  loras: Mapping[str, Lora],
  *,
  like: Mapping[str, Any],
  equations: Mapping[str, str] | None = None,
  views: Any = None,
  pad: bool = True,
  dtype: Any = np.float32,
) -> dict[str, Any]:
  """Makes the tree of qwix's LoRA parameters, for `flax.nnx.update`.

      W' - W = W_lora_a W_lora_b        (alpha = rank, the scale is in b)

  Args:
    loras: parameter -> Lora, by paths with slashes.
    like: parameter -> anything with `.shape`, of the base.
    equations: regex of whole names -> the einsum whose second operand the
      parameter is, such as "BTD,DNH->BTNH", or "dot" for any other product.
      Needed of a weight with several axes on a side, unless its name ends in
      `w` or has `einsum` or `conv` in it.
    views: how parameters are read as matrices, as for `jlora.extract`.
    pad: whether all have the largest rank, by zeros. Otherwise the provider
      needs a rule for each rank.
    dtype: of the arrays.

  Returns:
    A nested dict, with integers where a part of a path is a number. Tables of
    tokens are left out.

  Raises:
    ValueError: as `save_qwix`.

  Example:
    >>> lora = Lora(np.ones((1, 3)), np.ones((1, 2)), np.float32(2))
    >>> tree = to_qwix({"fc/kernel": lora}, like={"fc/kernel": (3, 2)})
    >>> {name: x.shape for name, x in tree["fc"].items()}
    {'kernel_lora_a': (3, 1), 'kernel_lora_b': (1, 2)}
  """
  check_dtype(dtype)
  left: dict[str, str] = {}
  parts = parts_of(loras, like, _forms(equations), views, everything, left)
  check_some(parts, left)
  tree = _tree(parts, loras, pad, dtype)
  return {_key(name): _numbered(value) for name, value in tree.items()}


def save_qwix(
  folder: str | os.PathLike,
  loras: Mapping[str, Lora],
  *,
  like: Mapping[str, Any],
  equations: Mapping[str, str] | None = None,
  views: Any = None,
  shifts: Mapping[str, Any] | None = None,
  pad: bool = True,
  dtype: Any = np.float32,
  select: Select = everything,
) -> dict[str, str]:
  """Writes the state of a model with qwix's LoRA.

      W' - W = W_lora_a W_lora_b        (alpha = rank, the scale is in b)

  Args:
    folder: a new one. `state` is an orbax checkpoint of what
      `nnx.state(model, nnx.LoRAParam)` is; `lora_config.json` has the arguments
      of `qwix.LoraProvider`, or with `pad=False` those of its rules.
    loras: as for `to_qwix`; may be lazy.
    like: as for `to_qwix`, or an open checkpoint.
    equations: as for `to_qwix`.
    views: as for `to_qwix`.
    shifts: parameter -> change, of what is no Lora; it is not carried.
    pad: as for `to_qwix`.
    dtype: storage dtype.
    select: which parameters, by name and shape.

  Returns:
    {name: why it is not in the state}. Where a batch axis is of one factor
    alone, as that of experts in an einsum, the rank is multiplied by its
    length.

  Raises:
    ValueError: the folder exists, no Lora, names that `like` lacks, shapes that
      differ, a product that is not known, or entries that the dtype cannot
      hold.

  Example:
    >>> import tempfile
    >>> from jlora.formats import open_adapter
    >>> lora = Lora(np.ones((1, 3)), np.ones((1, 2)), np.float32(2))
    >>> with tempfile.TemporaryDirectory() as place:
    ...   left = save_qwix(f"{place}/x", {"fc/kernel": lora},
    ...                    like={"fc/kernel": (3, 2)})
    ...   adapter = open_adapter(f"{place}/x")
    ...   left, adapter.format, dict(adapter.shapes)
    ({}, 'qwix', {'fc/kernel': (2, 3)})

  References:
    google/qwix 0.1.8, `qwix/_src/providers/lora.py`.

  Approximation:
    A convolution in groups has the kernel of one without; qwix adds no LoRA of
    the same meaning to it, and nothing here tells it apart.
  """
  left = dict.fromkeys(shifts or {}, NO_WHOLE)
  check_output(folder, loras, like, dtype)
  parts = parts_of(loras, like, _forms(equations), views, select, left)
  check_some(parts, left)
  tree = _tree(parts, loras, pad, dtype)
  rules = _rules(parts, pad)
  told = rules[0] if len(rules) == 1 else {"rules": rules}

  def fill(place: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(place.absolute() / STATE, tree)

  write_folder(folder, fill, {RULES: told})
  return left


def save_tunix(
  folder: str | os.PathLike,
  loras: Mapping[str, Lora],
  *,
  like: Mapping[str, Any] | None = None,
  config: Mapping[str, Any] | None = None,
  equations: Mapping[str, str] | None = None,
  shifts: Mapping[str, Any] | None = None,
  dtype: Any = np.float32,
  select: Select = everything,
) -> dict[str, str]:
  """Writes the LoRAs of one of tunix's models, as its trainer restores them.

  Args:
    folder: a new one, the root of `tunix.sft.checkpoint_manager`: step 0 has
      the state as `model_params`. `lora_config.json` has `module_path`, `rank`
      and `alpha`, as tunix's `lora_config`; the step's metadata have
      `lora_rank` and `lora_alpha`, as MaxText's trainer reads them.
    loras: parameter -> Lora; may be lazy.
    like: parameter -> anything with `.shape`, of tunix's model.
    config: instead of `like`, where the names are those of transformers: the
      contents of config.json, of Llama, Qwen 2 or Qwen 3.
    equations: as for `to_qwix`; tunix's language models need none.
    shifts: parameter -> change, of what is no Lora; it is not carried.
    dtype: storage dtype.
    select: which parameters, by tunix's name and shape.

  Returns:
    {name: why it is not in the state}. All have the largest rank, by zeros.

  Raises:
    ValueError: as `save_qwix`; neither `like` nor `config`; a model of which
      the names are not known.

  Example:
    >>> import json, tempfile
    >>> config = {"model_type": "llama", "num_attention_heads": 2,
    ...           "num_key_value_heads": 1}
    >>> lora = Lora(np.ones((1, 4)), np.ones((1, 2)), np.float32(2))
    >>> loras = {"model.layers.0.self_attn.k_proj.weight": lora}
    >>> with tempfile.TemporaryDirectory() as place:
    ...   left = save_tunix(f"{place}/x", loras, config=config)
    ...   left, json.loads(Path(place, "x", "lora_config.json").read_text())
    ({}, {'module_path': 'layers/0/attn/k_proj', 'rank': 1, 'alpha': 1.0})

  References:
    google/tunix 0.1.7, `tunix/sft/checkpoint_manager.py`.
  """
  if (like is None) == (config is None):
    raise ValueError(
      "give either `like`, the shapes of tunix's model, or `config`, the "
      "config.json of transformers' model."
    )
  left = dict.fromkeys(shifts or {}, NO_WHOLE)
  check_output(folder, loras, like, dtype)
  given, views = loras, None
  if config is not None:
    given = renamed(loras, config, left)
    like, views = given.like, given.views
    check_some(like, left)
  own: dict[str, str] = {}
  parts = parts_of(given, like or {}, _forms(equations), views, select, own)
  back = getattr(given, "names", {})
  left |= {back.get(path, path): reason for path, reason in own.items()}
  check_some(parts, left)
  tree = _tree(parts, given, True, dtype)
  (rule,) = _rules(parts, True)
  said = {"lora": {"lora_rank": rule["rank"], "lora_alpha": rule["alpha"]}}

  def fill(place: Path) -> None:
    step, name = STEP.split("/")
    handlers = {name: ocp.PyTreeCheckpointHandler()}
    with ocp.CheckpointManager(
      place.absolute(), item_handlers=handlers
    ) as manager:
      manager.save(
        int(step),
        args=ocp.args.Composite(**{name: ocp.args.PyTreeSave(tree)}),
        custom_metadata=said,
      )
      manager.wait_until_finished()

  write_folder(folder, fill, {RULES: rule})
  return left


def _forms(
  equations: Mapping[str, str] | None,
) -> Callable[[str, MatrixView], Form]:
  """Returns what tells where the axes of a parameter go."""

  def make(path: str, view: MatrixView) -> Form:
    return form_of(path, view, equation_for(path, equations))

  return make


def _tree(
  parts: Mapping[str, Part], loras: Mapping[str, Lora], pad: bool, dtype: Any
) -> dict[str, Any]:
  """Makes the nested state, every array under `value` as NNX keeps it."""
  most = max(part.rank for part in parts.values())
  tree: dict[str, Any] = {}
  for path, part in parts.items():
    *above, leaf = path.split("/")
    node = tree
    for name in above:
      node = node.setdefault(name, {})
    pair = make_pair(part, loras, most if pad else part.rank, dtype)
    for side, array in zip(SIDES, pair, strict=True):
      node[leaf + side] = {"value": array}
  return tree


def _rules(parts: Mapping[str, Part], pad: bool) -> list[dict[str, Any]]:
  """Returns the arguments of each rule of qwix's provider."""
  most = max(part.rank for part in parts.values())
  modules: dict[int, list[str]] = {}
  for path, part in parts.items():
    rank = most if pad else part.rank
    modules.setdefault(rank, []).append(path.rpartition("/")[0])
  return [
    {"module_path": module_pattern(own), "rank": rank, "alpha": float(rank)}
    for rank, own in sorted(modules.items())
  ]


def _key(name: str) -> Any:
  """Returns a part of a path as NNX has it: numbers are integers."""
  return int(name) if name.isdecimal() else name


def _numbered(node: dict[str, Any]) -> Any:
  """Returns a state without `value`, and with numbers for keys."""
  if set(node) == {"value"}:
    return node["value"]
  return {_key(name): _numbered(value) for name, value in node.items()}
