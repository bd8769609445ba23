# SPDX-License-Identifier: Apache-2.0
"""Describes a merge of checkpoints as plain data.

A setting is a number, a flag, a gradient (numbers along the layers), or a list
of conditions {filter, value}, of which the first whose filter is part of the
tensor's name counts. `read_recipe` reads the same from mergekit's YAML.
"""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.documents import shortened
from jlora.messages import name_some
from jlora.pairing.match import Vocabulary, same_rows

Setting = Any  # a number, a flag, a gradient, or conditions
Settings = Mapping[str, Setting]

#: What each model has for itself in every method that knows it.
OF_INPUTS = ("weight", "density", "gamma", "threshold")


class Input(NamedTuple):
  """A model in a merge.

  Attributes:
    model: path of a checkpoint, or `base+adapter` with the folder of an adapter
      that `load_peft` reads; or, for all inputs alike, the adapter's folder
      alone.
    layers: range of its layers, end exclusive; None is all.
    settings: settings of its tensors alone.
  """

  model: str
  layers: tuple[int, int] | None = None
  settings: Settings = {}


class Slice(NamedTuple):
  """Consecutive layers of the result that come from the same inputs.

  Attributes:
    inputs: what is merged, the same number of layers of each.
    settings: settings of these layers alone.
    base: what the method subtracts here; None is the recipe's.
  """

  inputs: tuple[Input, ...]
  settings: Settings = {}
  base: str | None = None


class TokenSource(NamedTuple):
  """Where the rows of one token come from in models that lack the token.

  Attributes:
    model: the model that has it; None is a row of zeros.
    token: the token there; None is the same token.
    number: the row there, instead of a token.
    force: whether models that have the token take this row too.
  """

  model: str | None = None
  token: str | None = None
  number: int | None = None
  force: bool = False


class Tokenizer(NamedTuple):
  """Which tokens the result has; rows are then merged by token.

  Attributes:
    source: "base" is the reference's, "union" that and all others' tokens after
      it, else a path with a tokenizer.
    tokens: token -> where its rows come from, where the rules are not wanted;
      None is by the rules. Tokens that the source lacks are added.
    multiple: the number of rows is rounded up to a multiple of this.
  """

  source: str
  tokens: Mapping[str, TokenSource | None] = {}
  multiple: int = 1


class Recipe(NamedTuple):
  """A merge of checkpoints.

  Attributes:
    method: a method of `jlora.merging`, its options bound by
      `functools.partial`.
    slices: one of whole models, or several whose layers follow each other.
    settings: numbers of the method and `weight`, for all inputs. The method
      gets one number per input of `weight`, and of each setting that any input
      has for itself.
    base: what the method subtracts; not merged if it is among the inputs.
    reference: the model that gives the result names, configuration and
      tokenizer; None is the base, or the first input.
    dtype: dtype of the result's floating tensors; None keeps the reference's.
    vocabulary: what happens to an embedding whose number of rows is not the
      reference's. `same_rows`: an error. `common_rows`: rows that a model lacks
      are the reference's, so the smallest model as the reference crops all
      tables. `keep_whole`: the reference's table, not merged.
    tokenizer: the result's tokens, where it has not simply the reference's;
      `vocabulary` then decides nothing.
    chat_template: the result's, as a template, or `auto`: the one that most
      models have. None is that of the tokenizer.
    of_inputs: settings that are evaluated for each input, even if they are
      given for all: conditions then see the names that tensors have in that
      input, whose layers may have other numbers than the result's.
    notes: what the report says of the recipe itself.
    rank: of merged adapters: the largest of a module's result. None is the sum
      of the adapters' ranks, so that sums of changes are exact.
  """

  method: Callable[..., Any]
  slices: tuple[Slice, ...]
  settings: Settings = {}
  base: str | None = None
  reference: str | None = None
  dtype: str | None = None
  vocabulary: Vocabulary = same_rows
  tokenizer: Tokenizer | None = None
  chat_template: str | None = None
  of_inputs: tuple[str, ...] = OF_INPUTS
  notes: tuple[str, ...] = ()
  rank: int | None = None

  @property
  def models(self) -> list[str]:
    """Lists every model that is merged or subtracted, the reference first."""
    inputs = [one.model for part in self.slices for one in part.inputs]
    bases = [part.base for part in self.slices]
    named = [self.reference or self.base, self.base, *bases, *inputs]
    return list(dict.fromkeys(name for name in named if name is not None))


def check_recipe(recipe: Recipe) -> None:
  """Raises unless a recipe has inputs, and settings and ranges that are such.

  Args:
    recipe: made by hand; what `read_recipe` reads is checked.

  Raises:
    ValueError: names up to three.

  Example:
    >>> check_recipe(Recipe(print, (Slice((Input("a", (0,)),)),)))
    Traceback (most recent call last):
    ...
    ValueError: layers of a are (0,): layers are (start, end), a setting is a
    number, a flag, a list of these along the layers, or a list of conditions
    {filter, value}.
  """
  inputs = [one for part in recipe.slices for one in part.inputs]
  if not inputs or not all(part.inputs for part in recipe.slices):
    raise ValueError("A recipe merges inputs: give slices, each with some.")
  wrong = [
    f"layers of {one.model} are {shortened(one.layers)}"
    for one in inputs
    if one.layers is not None and not is_range(one.layers)
  ]
  wrong += [
    f"{key} is {shortened(value)}"
    for level in all_settings(recipe)
    for key, value in level.items()
    if not _is_setting(value)
  ]
  if wrong:
    raise ValueError(
      f"{name_some(wrong)}: layers are (start, end), a setting is a number, a "
      "flag, a list of these along the layers, or a list of conditions "
      "{filter, value}."
    )


def all_settings(recipe: Recipe) -> list[Settings]:
  """Lists all settings of a recipe, of its slices and of their inputs.

  Example:
    >>> all_settings(Recipe(print, (Slice((Input("a"),), {"t": 1}),)))
    [{}, {'t': 1}, {}]
  """
  inputs = [one for part in recipe.slices for one in part.inputs]
  return [
    recipe.settings,
    *(part.settings for part in recipe.slices),
    *(one.settings for one in inputs),
  ]


def is_range(layers: Any) -> bool:
  """Returns whether a layer range is two integers of at least 0.

  Example:
    >>> is_range([0, 2]), is_range((2,)), is_range((0, True))
    (True, False, False)
  """
  is_pair = isinstance(layers, tuple | list) and len(layers) == 2
  return is_pair and all(type(x) is int and x >= 0 for x in layers)


def _is_setting(value: Any) -> bool:
  """Returns whether `setting_at` can read a setting."""
  if isinstance(value, numbers.Real | np.bool_):
    return True
  if not isinstance(value, Sequence) or isinstance(value, str) or not value:
    return False
  if all(isinstance(one, Mapping) for one in value):
    return all(
      "value" in one
      and isinstance(one.get("filter"), str | None)
      and _is_setting(one["value"])
      for one in value
    )
  return all(isinstance(one, numbers.Real | np.bool_) for one in value)


def setting_at(setting: Setting, name: str, place: float) -> Any:
  """Evaluates a setting for one tensor.

  Args:
    setting: a number, a flag, a gradient or conditions.
    name: the tensor's name.
    place: position of its layer, 0 the first and 1 the last; 0 outside layers.

  Returns:
    A number or a flag; None if no condition holds.

  Example:
    >>> setting_at([0.0, 1.0, 0.0], "layers.1.q", 0.25)
    0.5
    >>> setting_at([{"filter": "mlp", "value": 2}, {"value": 1}], "norm", 0)
    1
  """
  if not isinstance(setting, Sequence) or isinstance(setting, str):
    return setting
  if not isinstance(setting[0], Mapping):
    at = place * (len(setting) - 1)
    low = min(int(at), len(setting) - 1)
    high = min(low + 1, len(setting) - 1)
    if isinstance(setting[0], bool) or low == high:
      return setting[low]
    return (1 - (at - low)) * setting[low] + (at - low) * setting[high]
  for condition in setting:
    wanted = condition.get("filter")
    if wanted in (None, "*") or wanted in name:
      return setting_at(condition["value"], name, place)
  return None


def number_at(
  levels: Sequence[Settings], key: str, name: str, place: float
) -> float:
  """Evaluates a number of a method for one tensor.

  Args:
    levels: the most specific first.
    key: name of the setting; a weight is 1 where no level has one.
    name: the tensor's name.
    place: as for `setting_at`.

  Raises:
    ValueError: a level has the setting, but none of its conditions holds.

  Example:
    >>> number_at([{}], "weight", "w", 0), number_at([{"t": 2}], "t", "w", 0)
    (1.0, 2.0)
  """
  value = first_setting(levels, key, name, place)
  if value is not None:
    return float(value)
  if key == "weight" and not any(key in level for level in levels):
    return 1.0
  raise ValueError(
    f"{key} says nothing of {name}: none of its conditions holds. Add one "
    "without filter."
  )


def is_gradient(setting: Setting) -> bool:
  """Returns whether a setting, or any of its conditions, varies by layer.

  Example:
    >>> is_gradient([0, 1]), is_gradient([{"value": 1}]), is_gradient(2)
    (True, False, False)
  """
  if not isinstance(setting, Sequence) or isinstance(setting, str):
    return False
  if isinstance(setting[0], Mapping):
    return any(is_gradient(one["value"]) for one in setting)
  return len(setting) > 1


def filters_of(setting: Setting) -> list[str]:
  """Returns the filters of a setting's conditions.

  Example:
    >>> filters_of([{"filter": "mlp", "value": 1}, {"value": 2}]), filters_of(3)
    (['mlp'], [])
  """
  if not isinstance(setting, Sequence) or isinstance(setting, str):
    return []
  conditions = [one for one in setting if isinstance(one, Mapping)]
  return [one["filter"] for one in conditions if one.get("filter")]


def first_setting(
  levels: Sequence[Settings], key: str, name: str, place: float
) -> Any:
  """Evaluates a setting at the first level that has a value for a tensor.

  Args:
    levels: the most specific first.
    key: name of the setting.
    name: the tensor's name.
    place: as for `setting_at`.

  Returns:
    A number or a flag; None if no level has one.

  Example:
    >>> first_setting([{}, {"weight": 2}, {"weight": 3}], "weight", "w", 0)
    2
  """
  for level in levels:
    if key in level:
      found = setting_at(level[key], name, place)
      if found is not None:
        return found
  return None
