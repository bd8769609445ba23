# SPDX-License-Identifier: Apache-2.0
"""mergekit's form of each method: ours with its options, and its names.

Where a paper's form is another, mergekit's is taken: densities are 1 unless
given, what is dropped by chance is made up for by `match_l1`, signs are elected
by `by_mass_or_plus`, Breadcrumbs erases changes of tensors of few entries.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jlora.merging.averages import linear, nearswap, passthrough
from jlora.merging.consensus import by_mass_or_plus
from jlora.merging.pruning import breadcrumbs, dare, della
from jlora.merging.rescalings import match_l1, unscaled
from jlora.merging.spherical import karcher, multislerp, nuslerp, slerp
from jlora.merging.stocks import model_stock
from jlora.merging.task_vectors import sce, task_arithmetic, ties


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
