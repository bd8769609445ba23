# SPDX-License-Identifier: Apache-2.0
"""mergekit's recipes in YAML, read as data; what is not known is an error.

Who brings mergekit's recipe wants mergekit's merge: `recipe_forms` has its form
of each method.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

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
  """mergekit's form of a method.

  Attributes:
    method: ours, with its options.
    numbers: what may vary by layer and tensor, its name -> ours.
    constants: what may not, its name -> (ours, {its value: ours} or None).
    base: whether a base is needed; None: it may be there; False: it only lends
      its names and tokenizer.
    required: numbers without default.
  """

  method: Callable[..., Any]
  numbers: Mapping[str, str] = {}
  constants: Mapping[str, tuple[str, Mapping[Any, Any] | None]] = {}
  base: bool | None = False
  required: tuple[str, ...] = ()


_YES_NO = {True: True, False: False}
_NORMALIZE = {"normalize": ("normalize", _YES_NO)}
_RESCALE = {"rescale": ("rescale", {True: match_l1, False: unscaled})}
_NO_RESCALE = {"rescale": ("", {False: None})}
_ADDED = {"weight": "weight", "lambda": "scale"}
_THINNED = {**_ADDED, "density": "density"}
_WEIGHT = ("weight",)


def _thinned(method: Callable[..., Any], constants=None, **options) -> Form:
  """A method that thins changes out before it adds them."""
  method = functools.partial(method, density=1.0, **options)
  rest = _NO_RESCALE if constants is None else constants
  return Form(method, _THINNED, {**_NORMALIZE, **rest}, True, _WEIGHT)


_EPSILON = {**_RESCALE, "epsilon": ("epsilon", None)}
_GAMMA = {**_NO_RESCALE, "gamma": ("gamma", None)}
_ELECTED = {"elect": by_mass_or_plus}
_L1 = {"rescale": match_l1}
_SMALL = {"erases_small": True}
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


# Of each input its own; all other numbers are of the merge.
_OF_INPUTS = ("weight", "density")
# How much memory mergekit takes, and nothing else.
_IDLE = ("int8_mask",)
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


def read_recipe(path: str | os.PathLike) -> Recipe:
  r"""The recipe in a file of mergekit's form.

  Known are `merge_method` (all of mergekit's but arcee_fusion and what it does
  not document), `models` or `slices` with `sources` and `layer_range`,
  `base_model`, `parameters` (numbers, gradients, conditions by `filter`) at
  every level, `dtype`, `out_dtype`, and `tokenizer_source: base`, which is
  `common_rows`: tables get the base's rows. Rows that a model has besides are
  left out, and for those that it lacks it has the base's; rows that are other
  tokens in a model's tokenizer are an error. Without it a vocabulary of another
  size is one. Paths are taken as they are written. Merges are computed in
  float32 whatever `dtype` says, which is that of the result unless `out_dtype`
  is given.

  Args:
    path: the file.

  Returns:
    Recipe, each method in mergekit's form, as `recipe_forms` says.

  Raises:
    ValueError: no YAML, or anything that is not known, by name.

  Example:
    >>> import tempfile
    >>> text = "merge_method: slerp\nbase_model: a\nmodels: [model: b]\n"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = Path(folder, "recipe.yml")
    ...   _ = file.write_text(text + "parameters: {t: [0, 0.5]}")
    ...   recipe = read_recipe(file)
    >>> recipe.models, recipe.settings, recipe.method.__name__
    (['a', 'b'], {'t': [0, 0.5]}, 'slerp')
  """
  try:
    raw = yaml.safe_load(Path(path).read_text())
  except (yaml.YAMLError, OSError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  try:
    return _recipe(raw)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _recipe(raw: Any) -> Recipe:
  _check_keys("the recipe", raw, _TOP)
  name = raw.get("merge_method")
  if name not in FORMS:
    raise ValueError(f"merge_method {name!r} is none of {', '.join(FORMS)}.")
  form, base = FORMS[name], raw.get("base_model")
  if form.base and base is None:
    raise ValueError(f"{name} needs a base_model.")
  if ("models" in raw) == ("slices" in raw):
    raise ValueError("Give `models` or `slices`, one of the two.")
  slices = raw.get("slices") or [{"sources": raw["models"]}]
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


def _slice(form: Form, raw: Any, keys: Mapping[str, type]) -> Slice:
  _check_keys("a slice", raw, {"sources": list, "parameters": dict})
  inputs = []
  for source in raw.get("sources") or []:
    _check_keys("a model", source, keys)
    if "model" not in source:
      raise ValueError(f"A source has no `model`: {source}.")
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
  return len(layers) == 2 and all(type(x) is int and x >= 0 for x in layers)


def _from_base(part: Slice, base: str | None) -> Slice:
  """The base first: t = 0 is that."""
  if base is None:
    raise ValueError("slerp needs a base_model: t = 0 is that.")
  first = [one for one in part.inputs if one.model == base]
  rest = [one for one in part.inputs if one.model != base]
  layers = rest[0].layers if rest else None
  return part._replace(inputs=(*(first or [Input(base, layers)]), *rest))


def _numbers(form: Form, given: Mapping[str, Any]) -> dict[str, Any]:
  """Settings that may vary, under our names; others must be known as well."""
  known = {*form.numbers, *form.constants, *_IDLE}
  if form.base and "density" not in form.numbers:
    known.add("density")  # mergekit takes it, and thins nothing out
  unknown = sorted(set(given) - known)
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
  """Nothing, for a number, a gradient or conditions."""
  if isinstance(value, int | float) and not isinstance(value, bool):
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
    f"{key}: {value!r} is no number, list of numbers, or list of conditions "
    "{filter, value}."
  )


def _constants(form: Form, raw: Mapping[str, Any]) -> dict[str, Any]:
  """Options that hold for the whole merge, wherever they are said."""
  found: dict[str, Any] = {}
  for key, value in _said(raw):
    if key not in form.constants:
      continue
    table = form.constants[key][1]
    is_known = (
      (type(value) in (int, float) if table is None else value in table)
      if isinstance(value, int | float)
      else False
    )
    if not is_known:
      wanted = "a number" if table is None else name_some(map(str, table))
      raise ValueError(f"{key}: {value!r} is not known here, only {wanted}.")
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
  """Every parameter at every level."""
  parts = raw.get("slices") or []
  sources = [one for part in parts for one in part.get("sources") or []]
  for level in (raw, *parts, *sources, *(raw.get("models") or [])):
    yield from (level.get("parameters") or {}).items()


def _check_required(form: Form, parts: tuple[Slice, ...], raw: Any) -> None:
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
  if not isinstance(raw, dict):
    raise ValueError(f"{what} is no mapping: {raw!r}.")
  if unknown := sorted(set(raw) - set(known)):
    raise ValueError(
      f"{what} has {name_some(map(str, unknown))}, which is not known; known "
      f"are {', '.join(known)}."
    )
  for key, kind in known.items():
    value = raw.get(key)
    if value is not None and kind is not None and not isinstance(value, kind):
      raise ValueError(f"{key} of {what} is {value!r}, no {kind.__name__}.")
