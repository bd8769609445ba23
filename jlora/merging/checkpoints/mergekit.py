# SPDX-License-Identifier: Apache-2.0
"""Reads mergekit's recipes in YAML; whatever it does not know is an error.

A recipe gives the merge that mergekit would compute from it: `FORMS` translates
each of its method names and parameters into a method of ours and its options.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jlora.checkpoints.documents import NUMBER, shortened
from jlora.checkpoints.yaml_documents import read_yaml
from jlora.merging.arrays.averages import (
  linear,
  model_stock,
  nearswap,
  passthrough,
)
from jlora.merging.arrays.pruning import breadcrumbs, dare, della
from jlora.merging.arrays.sparsifiers import match_l1, unscaled
from jlora.merging.arrays.spherical import karcher, multislerp, nuslerp, slerp
from jlora.merging.arrays.task_vectors import (
  by_mass_or_plus,
  sce,
  task_arithmetic,
  ties,
)
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
from jlora.messages import name_some
from jlora.pairing.match import common_rows, same_rows


class Form(NamedTuple):
  """How one of mergekit's methods is written with ours.

  Attributes:
    method: our method, with the options that make it mergekit's.
    numbers: parameters that may vary by layer and tensor: mergekit's name ->
      ours.
    constants: parameters that may not: mergekit's name -> (ours, {mergekit's
      value: ours} or None if any number is allowed).
    base: whether a base is needed; None: it is optional; False: it only gives
      the result its names and tokenizer.
    required: the `numbers` without a default.
  """

  method: Callable[..., Any]
  numbers: Mapping[str, str] = {}
  constants: Mapping[str, tuple[str, Mapping[Any, Any] | None]] = {}
  base: bool | None = False
  required: tuple[str, ...] = ()


# Parts of the forms below. Constants that are named "" are only checked.
_YES_NO = {True: True, False: False}
_NORMALIZE = {"normalize": ("normalize", _YES_NO)}
_RESCALE = {"rescale": ("rescale", {True: match_l1, False: unscaled})}
_NO_RESCALE = {"rescale": ("", {False: None})}
_EPSILON = {**_RESCALE, "epsilon": ("epsilon", None)}
_GAMMA = {**_NO_RESCALE, "gamma": ("gamma", None)}
# Numbers of methods that add changes, thinned out or not.
_ADDED = {"weight": "weight", "lambda": "scale"}
_THINNED = {**_ADDED, "density": "density"}
_WEIGHT = ("weight",)
# Options of our methods.
_ELECTED = {"elect": by_mass_or_plus}
_L1 = {"rescale": match_l1}
_SMALL = {"erases_small": True}


def _thinned(method: Callable[..., Any], constants=None, **options) -> Form:
  """Returns the form of a method that sparsifies changes before adding them."""
  method = functools.partial(method, density=1.0, **options)
  rest = _NO_RESCALE if constants is None else constants
  return Form(method, _THINNED, {**_NORMALIZE, **rest}, True, _WEIGHT)


FORMS = {
  "linear": Form(
    linear, {"weight": "weight"}, _NORMALIZE, required=("weight",)
  ),
  "passthrough": Form(passthrough, {"scale": "weight"}),
  "slerp": Form(slerp, {"t": "t"}, required=("t",)),
  "nuslerp": Form(
    nuslerp,
    {"weight": "weight"},
    {
      "nuslerp_flatten": ("flatten", _YES_NO),
      "nuslerp_row_wise": ("row_wise", _YES_NO),
    },
    None,
    _WEIGHT,
  ),
  "multislerp": Form(
    multislerp,
    {"weight": "weight"},
    {"normalize_weights": ("", {True: None}), "eps": ("", None)},
    None,
    _WEIGHT,
  ),
  "karcher": Form(
    karcher, {}, {"max_iter": ("steps", None), "tol": ("tol", None)}
  ),
  "model_stock": Form(
    model_stock, {}, {"filter_wise": ("axis", {True: -1, False: None})}, True
  ),
  "nearswap": Form(nearswap, {"t": "t"}, {}, True, ("t",)),
  "sce": Form(sce, {"select_topk": "density"}, {}, True),
  "task_arithmetic": Form(
    task_arithmetic, _ADDED, {**_NORMALIZE, **_NO_RESCALE}, True, _WEIGHT
  ),
  "ties": _thinned(ties, **_ELECTED),
  "dare_linear": _thinned(dare, _RESCALE, **_L1),
  "dare_ties": _thinned(dare, _RESCALE, **_L1, **_ELECTED),
  "della": _thinned(della, _EPSILON, **_L1, **_ELECTED),
  "della_linear": _thinned(della, _EPSILON, **_L1, elect=None, normalize=False),
  "breadcrumbs": _thinned(breadcrumbs, _GAMMA, **_SMALL),
  "breadcrumbs_ties": _thinned(breadcrumbs, _GAMMA, **_SMALL, **_ELECTED),
}


def read_recipe(path: str | os.PathLike) -> Recipe:
  r"""Reads a recipe from a YAML file in mergekit's format.

  Known keys: `merge_method` (all of mergekit's documented ones except
  arcee_fusion), `models` or `slices` with `sources` and `layer_range`,
  `base_model`, `parameters` (numbers, gradients, conditions by `filter`) at
  every level, `dtype`, `out_dtype`, and `tokenizer_source: base`.

  The last one gives embeddings the base's rows (`common_rows`): further rows of
  a model are left out, rows that it lacks are the base's, and rows that stand
  for other tokens in its tokenizer are an error. Without it, a vocabulary of
  another size is an error. Paths are used as they are written. Merges are
  computed in float32; `out_dtype`, or else `dtype`, is the result's dtype.

  Args:
    path: the file.

  Returns:
    Recipe; its method and options are those of `FORMS`.

  Raises:
    ValueError: the file is no YAML, or holds anything unknown, which is named.

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
  raw = read_yaml(path)
  if len(raw) != 1:
    raise ValueError(f"{path} holds {len(raw)} documents; a recipe is one.")
  try:
    return _recipe(raw[0])
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


_TOP = {
  "merge_method": str,
  "models": list,
  "slices": list,
  "base_model": str,
  "parameters": dict,
  "dtype": str,
  "out_dtype": str,
  "tokenizer_source": str,
}
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _recipe(raw: Any) -> Recipe:
  """Translates a parsed YAML file into a Recipe."""
  _check_keys("the recipe", raw, _TOP)
  name = raw.get("merge_method")
  if name not in FORMS:
    raise ValueError(
      f"merge_method {shortened(name)} is none of {', '.join(FORMS)}."
    )
  form, base = FORMS[name], raw.get("base_model")
  if form.base and base is None:
    raise ValueError(f"{name} needs a base_model.")
  if ("models" in raw) == ("slices" in raw):
    raise ValueError("Give `models` or `slices`, one of the two.")
  slices = raw["slices"] if "slices" in raw else [{"sources": raw["models"]}]
  if not slices:
    raise ValueError("There are no models to merge; list at least one.")
  keys = {"model": str, "parameters": dict}
  if "slices" in raw:
    keys["layer_range"] = list
  parts = tuple(_slice(form, part, keys) for part in slices)
  options = _constants(form, raw)
  if name == "slerp":
    parts = tuple(_from_base(part, base) for part in parts)
  _check_required(form, parts, raw)
  source = raw.get("tokenizer_source")
  if source not in (None, "base"):
    raise ValueError(f"tokenizer_source {source!r}: only `base` is known.")
  dtype = raw.get("out_dtype") or raw.get("dtype")
  for key in ("dtype", "out_dtype"):
    if raw.get(key) not in (None, *_DTYPES):
      raise ValueError(f"{key} {raw[key]!r} is none of {', '.join(_DTYPES)}.")
  return Recipe(
    method=functools.partial(form.method, **options)
    if options
    else form.method,
    slices=parts,
    settings=_numbers(form, raw.get("parameters") or {}),
    base=None if form.base is False else base,
    reference=base,
    dtype=dtype,
    vocabulary=same_rows if source is None else common_rows,
  )


# Only these numbers may differ between inputs.
_OF_INPUTS = ("weight", "density")


def _slice(form: Form, raw: Any, keys: Mapping[str, type]) -> Slice:
  """Translates one slice and its sources."""
  _check_keys("a slice", raw, {"sources": list, "parameters": dict})
  inputs = []
  for source in raw.get("sources") or []:
    _check_keys("a model", source, keys)
    if source.get("model") is None:
      raise ValueError(f"A source has no `model`: {shortened(source)}.")
    given = source.get("parameters") or {}
    wide = [
      key for key in given if form.numbers.get(key, "weight") not in _OF_INPUTS
    ]
    if wide:
      raise ValueError(
        f"{name_some(wide)} of {source['model']}: one for all models; say it "
        "in `parameters` outside of them."
      )
    layers = source.get("layer_range")
    if layers is not None and not _is_range(layers):
      raise ValueError(
        f"layer_range {layers} of {source['model']} is no [start, end]."
      )
    inputs.append(
      Input(
        source["model"],
        None if layers is None else (layers[0], layers[1]),
        _numbers(form, given),
      )
    )
  if not inputs:
    raise ValueError("There are no models to merge; list at least one.")
  return Slice(tuple(inputs), _numbers(form, raw.get("parameters") or {}))


def _is_range(layers: list[Any]) -> bool:
  """Returns whether a layer range is two integers of at least 0."""
  return len(layers) == 2 and all(type(x) is int and x >= 0 for x in layers)


def _from_base(part: Slice, base: str | None) -> Slice:
  """Puts the base first among the inputs, as slerp has it at t = 0."""
  if base is None:
    raise ValueError("slerp needs a base_model: t = 0 is that.")
  first = [one for one in part.inputs if one.model == base]
  rest = [one for one in part.inputs if one.model != base]
  layers = rest[0].layers if rest else None
  return part._replace(inputs=(*(first or [Input(base, layers)]), *rest))


# Accepted and ignored: it only affects how much memory mergekit takes.
_IDLE = ("int8_mask",)


def _numbers(form: Form, given: Mapping[str, Any]) -> dict[str, Any]:
  """Translates the parameters that may vary; raises for unknown ones."""
  known = {*form.numbers, *form.constants, *_IDLE}
  if form.base and "density" not in form.numbers:
    known.add("density")  # mergekit accepts it here and ignores it
  unknown = sorted(map(str, set(given) - known))
  if unknown:
    raise ValueError(
      f"parameters {name_some(unknown)} are not known for this method, which "
      f"has {', '.join(sorted(known))}."
    )
  for key in form.numbers:
    if key in given:
      _check_setting(key, given[key])
  return {
    form.numbers[key]: value
    for key, value in given.items()
    if key in form.numbers
  }


def _check_setting(key: str, value: Any) -> None:
  """Raises unless a value is a number, a gradient or conditions."""
  if NUMBER.fits(value):
    return
  if isinstance(value, list) and value:
    if all(isinstance(one, dict) for one in value):
      for one in value:
        _check_keys(
          f"a condition of {key}", one, {"filter": str, "value": None}
        )
        _check_setting(key, one.get("value"))
      return
    if not any(isinstance(one, dict | list) for one in value):
      for one in value:
        _check_setting(key, one)
      return
  raise ValueError(
    f"{key}: {shortened(value)} is no number of float32, list of them, or list "
    "of conditions {filter, value}."
  )


def _constants(form: Form, raw: Mapping[str, Any]) -> dict[str, Any]:
  """Translates the options of the whole merge, given at any level."""
  found: dict[str, Any] = {}
  for key, value in _said(raw):
    if key not in form.constants:
      continue
    table = form.constants[key][1]
    is_known = (
      (NUMBER.fits(value) if table is None else value in table)
      if isinstance(value, int | float)
      else False
    )
    if not is_known:
      wanted = "a number" if table is None else name_some(map(str, table))
      raise ValueError(
        f"{key}: {shortened(value)} is not known here, only {wanted}."
      )
    if found.setdefault(key, value) != value:
      raise ValueError(
        f"{key} is {found[key]} and {value}; it must be one for the merge."
      )
  options = {}
  for key, value in found.items():
    name, table = form.constants[key]
    options[name] = value if table is None else table[value]
  options.pop("", None)
  if "flatten" in options or "row_wise" in options:
    is_flat, is_row = options.pop("flatten", True), options.pop("row_wise", 0)
    options["axis"] = None if is_flat else 0 if is_row else -1
  return options


def _said(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields every parameter at every level."""
  parts = raw.get("slices") or []
  sources = [one for part in parts for one in part.get("sources") or []]
  for level in (raw, *parts, *sources, *(raw.get("models") or [])):
    yield from (level.get("parameters") or {}).items()


def _check_required(form: Form, parts: tuple[Slice, ...], raw: Any) -> None:
  """Raises unless every model is given the required parameters."""
  top = raw.get("parameters") or {}
  for key in form.required:
    ours = form.numbers[key]
    lacking = [
      one.model
      for part in parts
      for one in part.inputs
      if one.model != raw.get("base_model")
      and not (key in top or ours in part.settings or ours in one.settings)
    ]
    if lacking:
      raise ValueError(f"{key} is not given for {name_some(lacking)}.")


def _check_keys(what: str, raw: Any, known: Mapping[str, type | None]) -> None:
  """Raises unless a mapping has only known keys of the right types."""
  if not isinstance(raw, dict):
    raise ValueError(f"{what} is no mapping: {shortened(raw)}.")
  if unknown := sorted(map(str, set(raw) - set(known))):
    raise ValueError(
      f"{what} has {name_some(unknown)}, which is not known; known "
      f"are {', '.join(known)}."
    )
  for key, kind in known.items():
    value = raw.get(key)
    if value is not None and kind is not None and not isinstance(value, kind):
      raise ValueError(
        f"{key} of {what} is {shortened(value)}, no {kind.__name__}."
      )
