# SPDX-License-Identifier: Apache-2.0
"""Reads mergekit's recipes in YAML; whatever nobody knows is an error.

A recipe gives the merge that mergekit would compute from it: `FORMS` translates
each of its method names and parameters into a method of ours and its options.
What mergekit leaves out without a word, and where it computes something else
than a method's definition, is in the recipe's notes.
"""

import difflib
import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jlora.checkpoints.documents import NUMBER, shortened
from jlora.checkpoints.yaml_documents import read_yaml
from jlora.merging.checkpoints.mergekit_forms import FORMS, IDLE, KNOWN, Form
from jlora.merging.checkpoints.mergekit_tokenizers import (
  check_keys,
  read_chat_template,
  read_tokenizer,
)
from jlora.merging.checkpoints.recipes import (
  OF_INPUTS,
  Input,
  Recipe,
  Slice,
  is_range,
)
from jlora.messages import name_some


def read_recipe(path: str | os.PathLike) -> Recipe:
  r"""Reads a recipe from a YAML file in mergekit's format.

  Known keys: `merge_method` (all that mergekit documents), `models`, or
  `slices` with `sources` and `layer_range`, or either in `modules`;
  `base_model`, of a slice too; `parameters` (numbers, gradients, conditions by
  `filter`) at every level; `dtype`, `out_dtype`, `name`; `tokenizer` or
  `tokenizer_source`, and `chat_template`.

  With a tokenizer, rows of embeddings and heads are merged by token, those that
  a model lacks by mergekit's documented rules. Without one, a vocabulary of
  another size is an error. Paths are used as they are written. Merges are
  computed in float32; `out_dtype`, or else `dtype`, is the result's dtype.

  Args:
    path: the file, of one recipe; `read_recipes` reads files of several.

  Returns:
    Recipe; its method and options are those of `FORMS`. Its notes name what
    mergekit leaves out too, and where the two differ.

  Raises:
    ValueError: the file is no YAML, holds several recipes, or anything unknown,
      which is named.

  Example:
    >>> import pathlib, tempfile
    >>> text = "merge_method: slerp\nbase_model: a\nmodels: [model: b]\n"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = pathlib.Path(folder, "recipe.yml")
    ...   _ = file.write_text(text + "parameters: {t: [0, 0.5]}")
    ...   recipe = read_recipe(file)
    >>> recipe.models, recipe.settings, recipe.method.__name__
    (['a', 'b'], {'t': [0, 0.5]}, 'slerp')
  """
  found = read_yaml(path)
  if not found:
    raise ValueError(f"{path} holds no recipe.")
  if len(found) > 1:
    raise ValueError(
      f"{path} holds {len(found)} recipes; read them with read_recipes, or in "
      "a shell give --intermediates=DIR, for the results others build on."
    )
  try:
    return _recipe(found[0])
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def read_recipes(
  path: str | os.PathLike, intermediates: str | os.PathLike
) -> list[tuple[Path | None, Recipe]]:
  r"""Reads a file of several recipes, some of which build on others' results.

  Args:
    path: the file, its recipes apart by `---`. All but one have a `name`, by
      which others refer to their result.
    intermediates: the folder of the named results.

  Returns:
    (where its result goes, recipe), in an order in which they can be carried
    out; None stands for the one without a name, if there is any.

  Raises:
    ValueError: as `read_recipe`; two of the same name or without one, a name
      that is no plain one, or recipes that build on each other in a circle.

  Example:
    >>> import tempfile
    >>> first = "name: half\nmerge_method: passthrough\nmodels: [model: a]\n"
    >>> last = "merge_method: passthrough\nmodels: [model: half]\n"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = Path(folder, "recipes.yml")
    ...   _ = file.write_text(f"{last}---\n{first}")
    ...   found = read_recipes(file, "mid")
    >>> [(str(place), recipe.models) for place, recipe in found]
    [('mid/half', ['a']), ('None', ['mid/half'])]
  """
  raws = {}
  for raw in read_yaml(path):
    name = raw.get("name") if isinstance(raw, dict) else None
    is_name = isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,200}", name)
    if name is not None and not is_name:
      raise ValueError(f"{path}: {shortened(name)} is no name of a folder.")
    if name in raws:
      said = "no name" if name is None else f"the name {name}"
      raise ValueError(f"{path}: two recipes have {said}; name them apart.")
    raws[name] = raw
  places = {name: Path(intermediates, name) for name in raws if name}
  known = {name: str(place) for name, place in places.items()}
  try:
    recipes = {name: _recipe(raw, known) for name, raw in raws.items()}
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  order: list[tuple[Path | None, Recipe]] = []
  waiting = dict(recipes)
  while waiting:
    ready = [
      name
      for name, recipe in waiting.items()
      if not {known[other] for other in waiting if other} & _needed(recipe)
    ]
    if not ready:
      raise ValueError(
        f"{path}: {name_some(map(str, waiting))} build on each other."
      )
    order += [(places.get(name), waiting.pop(name)) for name in ready]
  return order


def _needed(recipe: Recipe) -> set[str]:
  """Returns the models and adapters that a recipe needs."""
  found = recipe.models
  if recipe.tokenizer:
    named = filter(None, recipe.tokenizer.tokens.values())
    found += [recipe.tokenizer.source, *(one.model or "" for one in named)]
  cut = [
    part
    for name in found
    for at, letter in enumerate(name)
    if letter == "+"
    for part in (name[:at], name[at + 1 :])
  ]
  return {*found, *cut}


_TOP = {
  "name": str,
  "merge_method": str,
  "models": list,
  "slices": list,
  "modules": dict,
  "base_model": object,
  "parameters": dict,
  "dtype": str,
  "out_dtype": str,
  "tokenizer": dict,
  "tokenizer_source": str,
  "chat_template": str,
}
_DTYPES = ("bfloat16", "float16", "float32", "float64")
# Of a form's `base`: it is no model that is merged.
_SUBTRACTED = ("subtracted", "optional")
#: The modules of which recipes list slices: a model's only one, or the language
#: model of several, whose layers config.json counts.
_MODULES = ("default", "text_decoder")


def _recipe(raw: Any, places: Mapping[str, str] | None = None) -> Recipe:
  """Translates a parsed YAML document into a Recipe."""
  notes: dict[str, None] = {}
  raw = _without_stray("the recipe", raw, _TOP, notes)
  _check_keys("the recipe", raw, _TOP)
  raw = {key: value for key, value in raw.items() if value is not None}
  name = raw.get("merge_method")
  if name not in FORMS:
    raise ValueError(
      f"merge_method {shortened(name)} is none of {', '.join(FORMS)}."
    )
  form, places = FORMS[name], places or {}
  raw = _without_modules(raw)
  base = _model(raw["base_model"], places) if "base_model" in raw else None
  slices = raw["slices"] if "slices" in raw else [{"sources": raw["models"]}]
  parts = tuple(
    _slice(name, part, "slices" in raw, places, notes) for part in slices
  )
  parts = _with_bases(name, parts, base, notes)
  settings = _numbers(name, raw.get("parameters", {}), False, notes)
  _check_required(form, parts, settings, base)
  options = _constants(form, raw, slices)
  notes |= dict.fromkeys(_differences(form, options, parts, settings))
  for key in ("dtype", "out_dtype"):
    if raw.get(key) not in (None, *_DTYPES):
      raise ValueError(f"{key} {raw[key]!r} is none of {', '.join(_DTYPES)}.")
  is_subtracted = form.base in _SUBTRACTED
  return Recipe(
    method=functools.partial(form.method, **options)
    if options
    else form.method,
    slices=parts,
    settings=settings,
    base=base if is_subtracted else None,
    reference=base,
    dtype=raw.get("out_dtype") or raw.get("dtype"),
    tokenizer=read_tokenizer(raw, places),
    chat_template=read_chat_template(raw),
    of_inputs=tuple(
      dict.fromkeys((*OF_INPUTS, *(form.numbers[k] for k in form.by_model)))
    ),
    notes=tuple(notes),
  )


def _without_modules(raw: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a recipe with the slices or models of its module, if it has any."""
  given = [key for key in ("models", "slices", "modules") if key in raw]
  if len(given) != 1:
    raise ValueError("Give `models`, `slices` or `modules`, one of them.")
  if given != ["modules"]:
    return dict(raw)
  modules = raw["modules"]
  if len(modules) != 1 or next(iter(modules)) not in _MODULES:
    raise ValueError(
      f"modules are {name_some(map(str, modules))}; known is one of "
      f"{' or '.join(_MODULES)}. To merge models whole, with all modules, list "
      "them as `models` instead; slices can be of the language model alone."
    )
  inner = next(iter(modules.values()))
  _check_keys("the module", inner, {"slices": list, "models": list})
  inner = {key: value for key, value in inner.items() if value is not None}
  if len(inner) != 1:
    raise ValueError("Give `models` or `slices` of the module.")
  return {key: raw[key] for key in raw if key != "modules"} | inner


def _model(given: Any, places: Mapping[str, str]) -> str:
  """Returns a model's path, of mergekit's short form or its long one."""
  if isinstance(given, str) and given:
    base, plus, adapter = given.partition("+")
    adapter = places.get(adapter, adapter)
    return places.get(base, base) + plus + adapter
  if isinstance(given, dict):
    parts = given.get("model", given), given.get("lora") or {}
    if "model" in given:
      _check_keys("a model", given, {"model": dict, "lora": dict})
    for part in parts:
      _check_keys("a model", part or {}, {"path": str})
    base, adapter = ((part or {}).get("path") for part in parts)
    if base:
      more = f"+{places.get(adapter, adapter)}" if adapter else ""
      return places.get(base, base) + more
  raise ValueError(f"{shortened(given)} is no path of a model.")


def _slice(
  name: str,
  raw: Any,
  is_sliced: bool,
  places: Mapping[str, str],
  notes: dict[str, None],
) -> Slice:
  """Translates one slice and its sources."""
  known = {"sources": list, "parameters": dict, "base_model": object}
  raw = _without_stray("a slice", raw, known, notes)
  _check_keys("a slice", raw, known)
  keys = {"model": object, "parameters": dict}
  if is_sliced:
    keys["layer_range"] = list
  inputs = []
  for source in raw.get("sources") or []:
    source = _without_stray("a model", source, keys, notes)
    _check_keys("a model", source, keys)
    if source.get("model") is None:
      raise ValueError(f"A source has no `model`: {shortened(source)}.")
    model, layers = _model(source["model"], places), source.get("layer_range")
    if layers is not None and not is_range(layers):
      said = shortened(layers)
      raise ValueError(f"layer_range {said} of {model} is no [start, end].")
    given = _numbers(name, source.get("parameters") or {}, True, notes)
    place = None if layers is None else (layers[0], layers[1])
    inputs.append(Input(model, place, given))
  if not inputs:
    raise ValueError("There are no models to merge; list at least one.")
  base = raw.get("base_model")
  return Slice(
    tuple(inputs),
    _numbers(name, raw.get("parameters") or {}, False, notes),
    None if base is None else _model(base, places),
  )


def _with_bases(
  name: str, parts: tuple[Slice, ...], base: str | None, notes: dict[str, None]
) -> tuple[Slice, ...]:
  """Makes the base what it is to a method; raises if it is lacking."""
  form = FORMS[name]
  if not parts:
    raise ValueError("There are no slices to merge; list at least one.")
  needs_base = form.base in ("subtracted", "first") and base is None
  if needs_base and not all(part.base for part in parts):
    raise ValueError(f"{name} needs a base_model.")
  if form.base == "averaged" and base is not None:
    notes[f"base_model {base}: {name} averages it too, as in mergekit"] = None
  if form.base in _SUBTRACTED:
    return parts
  for part in parts:
    if form.base == "lent" and part.base is not None:
      notes[f"base_model {part.base} of a slice: left out, {name} has none"] = (
        None
      )
  return tuple(_with_base(part, part.base or base, form) for part in parts)


def _with_base(part: Slice, base: str | None, form: Form) -> Slice:
  """Makes the base one of the inputs: the first, or one more, or nothing."""
  part = part._replace(base=None)
  if base is None or form.base == "lent":
    return part
  own = [one for one in part.inputs if one.model == base]
  rest = [one for one in part.inputs if one.model != base]
  layers = rest[0].layers if rest else None
  if form.base == "first":
    return part._replace(inputs=(*(own or [Input(base, layers)]), *rest))
  more = () if own else (Input(base, layers),)
  return part._replace(inputs=(*part.inputs, *more))


def _numbers(
  name: str, given: Mapping[str, Any], of_model: bool, notes: dict[str, None]
) -> dict[str, Any]:
  """Translates the parameters that may vary; notes what is left out."""
  form, found = FORMS[name], {}
  for key, value in given.items():
    if key not in KNOWN:
      near = difflib.get_close_matches(str(key), sorted(KNOWN), 1)
      known = sorted({*form.numbers, *form.constants})
      raise ValueError(
        f"parameters {key} are not known"
        + (f"; is {near[0]} meant?" if near else ".")
        + f" {name} has {', '.join(known) or 'none'}."
      )
    if key not in form.numbers and key not in form.constants:
      if key not in IDLE:
        notes[f"{key}: left out, {name} has no such parameter"] = None
    elif of_model and key not in form.by_model:
      notes[
        f"{key} of a single model: left out, {name} has one for all models; "
        "say it in `parameters` outside of them"
      ] = None
    elif key in form.numbers:
      found[form.numbers[key]] = _setting(key, value)
  return found


#: A number to YAML 1.2 and to everyone but YAML 1.1, which wants `1.0e-10`.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _plain(value: Any) -> Any:
  """Returns a number that YAML 1.1 reads as a string; other values as given."""
  is_number = isinstance(value, str) and _NUMBER.fullmatch(value)
  return float(value) if is_number else value


def _setting(key: str, value: Any) -> Any:
  """Returns a number, a gradient or conditions; raises for anything else."""
  value = _plain(value)
  if NUMBER.fits(value):
    return value
  if isinstance(value, dict):
    value = [value]
  if isinstance(value, list) and value:
    if all(isinstance(one, dict) for one in value):
      for one in value:
        _check_keys(
          f"a condition of {key}", one, {"filter": str, "value": object}
        )
      return [
        {**one, "value": _setting(key, one.get("value"))} for one in value
      ]
    if not any(isinstance(one, dict | list) for one in value):
      return [_setting(key, one) for one in value]
  raise ValueError(
    f"{key}: {shortened(value)} is no number of float32, list of them, or list "
    "of conditions {filter, value}."
  )


def _constants(
  form: Form, raw: Mapping[str, Any], slices: list[Any]
) -> dict[str, Any]:
  """Translates the options of the whole merge, one for all slices."""
  found = {}
  top = raw.get("parameters") or {}
  for key in form.constants:
    said = [
      _plain((part.get("parameters") or {}).get(key, top.get(key)))
      for part in slices
    ]
    if any(value != said[0] for value in said):
      raise ValueError(
        f"{key} is {name_some(map(str, said))} in slices; it must be one for "
        "the merge."
      )
    if said[0] is not None:
      _check_constant(key, said[0], form.constants[key][1])
      found[key] = said[0]
  options = {}
  for key, value in found.items():
    name, table = form.constants[key]
    options[name] = value if table is None else table[value]
  options.pop("", None)
  if "flatten" in options or "row_wise" in options:
    is_flat, is_row = options.pop("flatten", True), options.pop("row_wise", 0)
    options["axis"] = None if is_flat else 0 if is_row else -1
  return options


def _check_constant(key: str, value: Any, table: Mapping[Any, Any] | None):
  """Raises unless an option has one of its values."""
  is_number = isinstance(value, int | float)
  is_known = NUMBER.fits(value) if table is None else value in list(table)
  if not (is_number and is_known):
    wanted = "a number" if table is None else name_some(map(str, table))
    raise ValueError(
      f"{key}: {shortened(value)} is not known here, only {wanted}."
    )


def _check_required(
  form: Form, parts: tuple[Slice, ...], top: Mapping[str, Any], base: str | None
) -> None:
  """Raises unless every model is given the required parameters."""
  for key in form.required:
    ours = form.numbers[key]
    lacking = [
      one.model
      for part in parts
      for one in part.inputs
      if one.model != (part.base or base) or form.base not in _SUBTRACTED
      if not (ours in top or ours in part.settings or ours in one.settings)
    ]
    if lacking:
      raise ValueError(
        f"{key} is not given for {name_some(dict.fromkeys(lacking))}."
      )


def _differences(
  form: Form,
  options: Mapping[str, Any],
  parts: tuple[Slice, ...],
  settings: Mapping[str, Any],
) -> Iterator[str]:
  """Yields where mergekit computes something else, and what is done here."""
  plain = getattr(form.method, "func", form.method)
  defaults = getattr(plain, "__kwdefaults__", None) or {}
  bound = {**defaults, **getattr(form.method, "keywords", {}), **options}
  levels = [settings, *(part.settings for part in parts)]
  levels += [one.settings for part in parts for one in part.inputs]
  is_negative = any(
    number < 0
    for level in levels
    if "weight" in level
    for number in _all_numbers(level["weight"])
  )
  if bound.get("elect") and bound.get("normalize") and is_negative:
    yield (
      "negative weights under normalize: the sum of changes that agree is "
      "divided by the sum of their |weights|; mergekit divides by the sum of "
      "their weights, which turns the change around where it is negative"
    )


def _without_stray(
  what: str, raw: Any, known: Mapping[str, type], notes: dict[str, None]
) -> Any:
  """Returns a mapping without parameters that stand outside of `parameters`."""
  if not isinstance(raw, dict):
    return raw
  stray = [key for key in raw if key in KNOWN and key not in known]
  for key in stray:
    if key not in IDLE:
      notes[
        f"{key} of {what}: left out, as by mergekit; it goes to `parameters`"
      ] = None
  return {key: value for key, value in raw.items() if key not in stray}


def _all_numbers(setting: Any) -> Iterator[float]:
  """Yields every number in a setting."""
  if isinstance(setting, Mapping):
    yield from _all_numbers(setting["value"])
  elif isinstance(setting, list):
    for one in setting:
      yield from _all_numbers(one)
  else:
    yield setting


def _check_keys(what: str, raw: Any, known: Mapping[str, type]) -> None:
  """Raises unless a mapping has only known keys of the right types."""
  check_keys(what, raw, known)
  for key, kind in known.items():
    value = raw.get(key)
    if value is not None and not isinstance(value, kind):
      said = shortened(value)
      raise ValueError(f"{key} of {what} is {said}, no {kind.__name__}.")
