# SPDX-License-Identifier: Apache-2.0
"""How each of mergekit's methods is written with ours, as a table."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from jlora.merging.arrays.averages import (
  linear,
  model_stock,
  nearswap,
  passthrough,
)
from jlora.merging.arrays.fusion import arcee_fusion
from jlora.merging.arrays.overlaps import ram
from jlora.merging.arrays.pruning import breadcrumbs, dare, della
from jlora.merging.arrays.sparsifiers import match_l1, unscaled
from jlora.merging.arrays.spherical import karcher, multislerp, nuslerp, slerp
from jlora.merging.arrays.task_vectors import (
  by_mass_or_plus,
  sce,
  task_arithmetic,
  ties,
)

Base = Literal["subtracted", "optional", "lent", "first", "averaged"]


class Form(NamedTuple):
  """How one of mergekit's methods is written with ours.

  Attributes:
    method: our method, with the options that make it mergekit's.
    numbers: parameters that may vary by layer and tensor: mergekit's name ->
      ours.
    by_model: those of them that each model may have for itself.
    constants: parameters that may not vary: mergekit's name -> (ours,
      {mergekit's value: ours} or None if any number is allowed).
    base: what `base_model` is. "subtracted": needed, changes are those of it;
      "optional": likewise, but without it models are merged themselves;
      "lent": it only gives the result its names and tokenizer; "first": needed,
      the first of the models; "averaged": one more of the models.
    required: the `numbers` without a default.
  """

  method: Callable[..., Any]
  numbers: Mapping[str, str] = {}
  by_model: tuple[str, ...] = ()
  constants: Mapping[str, tuple[str, Mapping[Any, Any] | None]] = {}
  base: Base = "lent"
  required: tuple[str, ...] = ()


# Parts of the forms below. Constants that are named "" are only checked.
_YES_NO = {True: True, False: False}
_NORMALIZE = {"normalize": ("normalize", _YES_NO)}
_RESCALE = {"rescale": ("rescale", {True: match_l1, False: unscaled})}
_THINNED = {"weight": "weight", "density": "density", "lambda": "scale"}
_WEIGHT = ("weight",)
# Options of our methods.
_ELECTED: dict[str, Any] = {"elect": by_mass_or_plus}
_L1: dict[str, Any] = {"rescale": match_l1}


def _thinned(
  method: Callable[..., Any], more: tuple[str, ...] = (), **options: Any
) -> Form:
  """Returns the form of a method that sparsifies changes before adding them."""
  return Form(
    functools.partial(method, density=1.0, **options),
    {**_THINNED, **{name: name for name in more}},
    ("weight", "density", *more),
    {**_NORMALIZE, **_RESCALE},
    "subtracted",
    _WEIGHT,
  )


FORMS = {
  "linear": Form(
    linear, {"weight": "weight"}, _WEIGHT, _NORMALIZE, required=_WEIGHT
  ),
  "passthrough": Form(passthrough, {"scale": "weight"}, ("scale",)),
  "slerp": Form(slerp, {"t": "t"}, base="first", required=("t",)),
  "nuslerp": Form(
    nuslerp,
    {"weight": "weight"},
    _WEIGHT,
    {
      "nuslerp_flatten": ("flatten", _YES_NO),
      "nuslerp_row_wise": ("row_wise", _YES_NO),
    },
    "optional",
    _WEIGHT,
  ),
  "multislerp": Form(
    multislerp,
    {"weight": "weight"},
    _WEIGHT,
    {"normalize_weights": ("", {True: None}), "eps": ("", None)},
    "optional",
    _WEIGHT,
  ),
  "karcher": Form(
    karcher,
    constants={"max_iter": ("steps", None), "tol": ("tol", None)},
    base="averaged",
  ),
  "model_stock": Form(
    model_stock,
    constants={"filter_wise": ("axis", {True: -1, False: None})},
    base="subtracted",
  ),
  "nearswap": Form(nearswap, {"t": "t"}, base="subtracted", required=("t",)),
  "arcee_fusion": Form(arcee_fusion, base="subtracted"),
  "sce": Form(sce, {"select_topk": "density"}, base="subtracted"),
  "ram": Form(ram, {"epsilon": "epsilon"}, base="subtracted"),
  "ramplus_tl": Form(
    functools.partial(ram, strength=0.1),
    {"epsilon": "epsilon", "r": "strength", "alpha": "bound"},
    base="subtracted",
  ),
  "task_arithmetic": Form(
    task_arithmetic,
    {"weight": "weight", "lambda": "scale"},
    _WEIGHT,
    _NORMALIZE,
    "subtracted",
    _WEIGHT,
  ),
  "ties": _thinned(ties, **_ELECTED),
  "dare_linear": _thinned(dare, **_L1),
  "dare_ties": _thinned(dare, **_L1, **_ELECTED),
  "della": _thinned(della, ("epsilon",), **_L1, **_ELECTED),
  "della_linear": _thinned(
    della, ("epsilon",), **_L1, elect=None, normalize=False
  ),
  "breadcrumbs": _thinned(breadcrumbs, ("gamma",)),
  "breadcrumbs_ties": _thinned(breadcrumbs, ("gamma",), **_ELECTED),
}

#: Parameters that some method has, or that recipes hold and no method reads:
#: elsewhere they are left out with a note. Others are an error.
KNOWN = frozenset(
  name for form in FORMS.values() for name in (*form.numbers, *form.constants)
) | {"dtype", "out_dtype", "int8_mask"}
#: Those that say nothing of the result, and are left out without a note.
IDLE = frozenset({"int8_mask"})
