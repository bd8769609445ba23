# SPDX-License-Identifier: Apache-2.0
"""Reads the LoRA states of qwix, tunix and MaxText from orbax checkpoints."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.documents import read_json
from jlora.checkpoints.orbax import find_item
from jlora.formats.adapters import Adapter
from jlora.formats.bases import Base
from jlora.formats.jax_layouts import (
  Form,
  plain_name,
  read,
  read_alone,
  ways_to_read,
)
from jlora.formats.jax_states import RULES
from jlora.formats.maxtext import ITEMS
from jlora.formats.peft.layouts import CONFIG
from jlora.formats.tunix_names import is_known, place_of
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.tree_views import table_for
from jlora.views import MatrixView, Readings, view_of

_PARAMS = "model_params"
_STEP = "_CHECKPOINT_METADATA"
_KEY = r"(.*)_lora_(a|b)"
_MAXTEXT_KEY = r"(.*/)?lora_(a|b)\.kernel"


class Weight(NamedTuple):
  """A weight of the base that a state can be for.

  Attributes:
    name: in the base.
    shape: of the weight.
    readings: how it can be read as a matrix.
  """

  name: str
  shape: tuple[int, ...]
  readings: Readings


class Rule(NamedTuple):
  """What is said of ranks and alphas.

  Attributes:
    pattern: regex of whole modules.
    rank: theirs, None if it is not said.
    alpha: theirs.
  """

  pattern: str
  rank: int | None
  alpha: float


def is_state(folder: Path) -> bool:
  """Returns whether a folder holds a LoRA state of one of JAX's libraries.

  Args:
    folder: with or without `adapter_config.json`.
  """
  if (folder / CONFIG).is_file():
    return (folder / ITEMS).is_dir()
  return _item_of(folder) is not None


def _item_of(folder: Path) -> Path | None:
  """Returns the folder with the arrays; of tunix's steps the newest."""
  if (folder / ITEMS).is_dir():
    return folder / ITEMS
  steps = {
    int(child.name): child / _PARAMS
    for child in (folder, *folder.iterdir())
    if child.name.isdecimal() and (child / _PARAMS).is_dir()
  }
  return steps[max(steps)] if steps else find_item(folder)


def open_state(folder: Path, base: Base | None, allow: bool) -> Adapter:
  """Opens the LoRA state of a model of qwix, tunix or MaxText.

  Args:
    folder: what `save_qwix`, `save_tunix` or `save_maxtext` wrote, tunix's own
      checkpoints, or an orbax checkpoint of `nnx.state(model, nnx.LoRAParam)`.
    base: the model, by its own names or, of tunix, by transformers'; None: the
      names of the state.
    allow: whether modules that the base lacks are left out, not an error.

  Returns:
    Adapter; its modules are parameters' names, or transformers' modules.

  Raises:
    ValueError: no LoRA parameters, a factor missing, factors of different
      ranks or of another weight than the base's, a rank that is not the one in
      `lora_config.json`, or modules that the base lacks.
  """
  item = _item_of(folder)
  if item is None:
    raise ValueError(f"{folder} holds no finished orbax checkpoint.")
  file = open_checkpoint(item)
  pairs = _pairs_in(file, folder)
  rules = _rules_of(folder, item)
  weights = None if base is None else _weights_of(base)
  lost = [path for path in pairs if weights is not None and path not in weights]
  if lost and not allow:
    raise ValueError(
      f"{folder}: the base has no parameter for {len(lost)} names of the "
      f"state: {name_some(lost)}. Give its own base, or leave them out: "
      "allow_missing=True."
    )
  adapter = Adapter(folder, _tool_of(item), {})
  adapter.left_out = dict.fromkeys(lost, "the base has no such parameter")
  for path, keys in pairs.items():
    if path in lost:
      continue
    shapes = tuple(file.spec[key].shape for key in keys)
    weight = None if weights is None else weights[path]
    view, form, shape = _read_as(path, shapes, weight, folder)
    rank = math.prod(shapes[0]) // math.prod(form.shapes(shape, 1)[0])
    alpha = _alpha_of(path, rank, rules, folder)
    name = path if weight is None else weight.name
    scale = 1.0 if alpha is None else alpha / rank
    adapter.readers[name] = _ReadState(file, keys, view, form, shape, scale)
    *batch, n_in, n_out = view.shape(shape)
    adapter.shapes[name] = (*batch, n_out, n_in)
    adapter.ranks[name], adapter.alphas[name] = rank, alpha
  own = {name for name in adapter.readers if base is None or "/" in name}
  adapter.parameters = frozenset(own)
  if None in adapter.alphas.values():
    adapter.notes.append("no alpha: the scale is 1")
  return adapter


class _ReadState(NamedTuple):
  """Reads one parameter's pair.

  Attributes:
    file: the arrays.
    keys: of both factors.
    view: the weight's axes' roles.
    form: where they lie.
    shape: of the weight.
    scale: alpha / rank.
  """

  file: Checkpoint
  keys: tuple[str, str]
  view: MatrixView
  form: Form
  shape: tuple[int, ...]
  scale: float

  def __call__(self) -> Lora:
    """Reads it."""
    pair = (self.file[self.keys[0]], self.file[self.keys[1]])
    a, b = read(pair, self.view, self.form, self.shape)
    scale = np.full(a.shape[:-2], self.scale, np.float32)
    return Lora(a, b, scale)  # type: ignore[arg-type]


def _tool_of(item: Path) -> str:
  """Names the tool by where its state lies."""
  if f"{item.parent.name}/{item.name}" == ITEMS:
    return "maxtext"
  return "tunix" if item.name == _PARAMS else "qwix"


def _pairs_in(file: Checkpoint, folder: Path) -> dict[str, tuple[str, str]]:
  """Returns {parameter: keys of both factors}; raises unless all have both."""
  found: dict[str, dict[str, str]] = {}
  for key in file:
    path = plain_name(key)
    if match := re.fullmatch(_MAXTEXT_KEY, path):
      found.setdefault(f"{match[1] or ''}kernel", {})[match[2]] = key
    elif match := re.fullmatch(_KEY, path):
      found.setdefault(match[1], {})[match[2]] = key
  if not found:
    raise ValueError(
      f"{folder} is an orbax checkpoint without LoRA parameters: no name ends "
      "in _lora_a or lora_a.kernel."
    )
  lacking = [
    f"{path} lacks lora_{side}"
    for path, keys in found.items()
    for side in "ab"
    if side not in keys
  ]
  if lacking:
    raise ValueError(
      f"{folder}: {len(lacking)} parameters are not whole: "
      f"{name_some(lacking)}."
    )
  return {path: (keys["a"], keys["b"]) for path, keys in found.items()}


def _rules_of(folder: Path, item: Path) -> list[Rule] | None:
  """Returns what is said of ranks and alphas; None if nothing is."""
  if (folder / RULES).is_file():
    said = read_json(folder / RULES)
    rows = said.get("rules", [said]) if isinstance(said, dict) else [said]
    return _checked_rules(rows, ("rank", "alpha"), folder / RULES)
  if (folder / CONFIG).is_file():
    rows = [read_json(folder / CONFIG)]
    return _checked_rules(rows, ("r", "lora_alpha"), folder / CONFIG)
  if (item.parent / _STEP).is_file():
    said = read_json(item.parent / _STEP)
    own = said.get("custom_metadata") if isinstance(said, dict) else None
    if isinstance(own, dict) and "lora" in own:
      names = ("lora_rank", "lora_alpha")
      return _checked_rules([own["lora"]], names, item.parent / _STEP)
  return None


def _checked_rules(
  rows: Any, names: tuple[str, str], place: Path
) -> list[Rule]:
  """Returns rules; raises unless each has a pattern, a rank and an alpha."""
  found = []
  for row in rows if isinstance(rows, list) and rows else [None]:
    row = row if isinstance(row, dict) else {}
    rank: Any = row.get(names[0])
    alpha: Any = row.get(names[1])
    pattern = row.get("module_path", ".*")
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    is_alpha = isinstance(alpha, int | float) and math.isfinite(alpha)
    try:
      re.compile(pattern)
    except (re.error, TypeError):
      is_rank = False
    if not is_rank or not is_alpha:
      raise ValueError(
        f"{place}: a rule needs a regex module_path, a {names[0]} of 1 or more "
        f"and a finite {names[1]}, got {row}; the file is damaged."
      )
    found.append(Rule(pattern, rank, float(alpha)))
  return found


def _alpha_of(
  path: str, rank: int, rules: list[Rule] | None, folder: Path
) -> float | None:
  """Returns a module's alpha; raises if another rank is said than stored."""
  if rules is None:
    return None
  module = path.rpartition("/")[0]
  rule = next((r for r in rules if re.fullmatch(r.pattern, module)), None)
  if rule is None or rule.rank != rank:
    said = "no rule" if rule is None else f"rank {rule.rank}"
    raise ValueError(
      f"{folder}: {path} has rank {rank}, and {said} in the configuration; one "
      "of them is another adapter's."
    )
  return rule.alpha


def _weights_of(base: Base) -> dict[str, Weight]:
  """Returns {name in a state: weight of the base}."""
  config = next(iter(base.configs.values()), {})
  names = {at: name for at, name in base.names.items()}
  if is_known(config) and not any("/" in name for name in names.values()):
    found = {}
    for at, name in names.items():
      own = base.shapes[at]
      place = place_of(name, own[::-1], config) if len(own) == 2 else None
      if place is not None:
        path, shape, view = place
        found[path] = Weight(name, shape, (view,))
    return found
  shapes = {plain_name(name): base.shapes[at] for at, name in names.items()}
  table = table_for(shapes)
  found = {}
  for at, name in names.items():
    path = plain_name(name)
    if isinstance(table, Mapping):
      readings: Readings = table.get(path, ())
    else:
      view = view_of(path, base.shapes[at], table)
      readings = () if view is None else (view,)
    found[path] = Weight(name, base.shapes[at], readings)
  return found


def _read_as(
  path: str,
  shapes: tuple[tuple[int, ...], ...],
  weight: Weight | None,
  folder: Path,
) -> tuple[MatrixView, Form, tuple[int, ...]]:
  """Returns how a pair is read: by the base, or by its shapes alone."""
  a, b = shapes
  if min(map(math.prod, shapes), default=0) < 1 or min(len(a), len(b)) < 2:
    raise ValueError(
      f"{folder}: {path} has factors {a} and {b}; it is damaged."
    )
  if weight is None:
    try:
      return read_alone(path, a, b)
    except ValueError as error:
      raise ValueError(f"{folder}: {error}") from None
  ways = ways_to_read((a, b), weight.readings, weight.shape)
  if len(ways) != 1:
    how = "can be read in several ways beside" if ways else "do not fit"
    raise ValueError(
      f"{folder}: the factors {a} and {b} of {path} {how} the base's "
      f"{weight.shape}; "
      + (
        "the tree does not tell which." if ways else "it is for another model."
      )
    )
  ((view, form),) = ways
  return view, form, weight.shape
