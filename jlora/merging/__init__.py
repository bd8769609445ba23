# SPDX-License-Identifier: Apache-2.0
"""Changes, adapters and checkpoints put together.

    merge(models, method=ties)        trees of arrays or Loras
    merge_checkpoints(recipe, out)    folders on disk, tensor by tensor

Every method is a function of stacked arrays (`merging/arrays`) or of Loras
(`merging/adapters`), with its paper's defaults.
"""

from jlora.merging.adapters.common_spaces import core_space as core_space
from jlora.merging.adapters.common_spaces import knots as knots
from jlora.merging.adapters.concatenation import concat as concat
from jlora.merging.adapters.concatenation import fill_missing as fill_missing
from jlora.merging.adapters.concatenation import svd_merge as svd_merge
from jlora.merging.adapters.concatenation import truncate as truncate
from jlora.merging.adapters.lego import given_units as given_units
from jlora.merging.adapters.lego import lego as lego
from jlora.merging.adapters.lego import prune as prune
from jlora.merging.adapters.lego import singular_units as singular_units
from jlora.merging.arrays.averages import linear as linear
from jlora.merging.arrays.averages import model_stock as model_stock
from jlora.merging.arrays.averages import nearswap as nearswap
from jlora.merging.arrays.averages import passthrough as passthrough
from jlora.merging.arrays.fusion import arcee_fusion as arcee_fusion
from jlora.merging.arrays.inputs import read_inputs as read_inputs
from jlora.merging.arrays.overlaps import ram as ram
from jlora.merging.arrays.pruning import breadcrumbs as breadcrumbs
from jlora.merging.arrays.pruning import dare as dare
from jlora.merging.arrays.pruning import della as della
from jlora.merging.arrays.singular_vectors import iso_c as iso_c
from jlora.merging.arrays.singular_vectors import tsv as tsv
from jlora.merging.arrays.sparsifiers import match_l1 as match_l1
from jlora.merging.arrays.spherical import karcher as karcher
from jlora.merging.arrays.spherical import multislerp as multislerp
from jlora.merging.arrays.spherical import nuslerp as nuslerp
from jlora.merging.arrays.spherical import slerp as slerp
from jlora.merging.arrays.task_vectors import by_mass as by_mass
from jlora.merging.arrays.task_vectors import (
  merge_task_vectors as merge_task_vectors,
)
from jlora.merging.arrays.task_vectors import sce as sce
from jlora.merging.arrays.task_vectors import task_arithmetic as task_arithmetic
from jlora.merging.arrays.task_vectors import ties as ties
from jlora.merging.checkpoints.mergekit import read_recipe as read_recipe
from jlora.merging.checkpoints.mergekit import read_recipes as read_recipes
from jlora.merging.checkpoints.mergekit_forms import FORMS as FORMS
from jlora.merging.checkpoints.recipes import Input as Input
from jlora.merging.checkpoints.recipes import Recipe as Recipe
from jlora.merging.checkpoints.recipes import Slice as Slice
from jlora.merging.checkpoints.recipes import Tokenizer as Tokenizer
from jlora.merging.checkpoints.recipes import TokenSource as TokenSource
from jlora.merging.checkpoints.run import merge_checkpoints as merge_checkpoints
from jlora.merging.checkpoints.trimming import trim_models as trim_models
from jlora.merging.trees import magnitude_thresholds as magnitude_thresholds
from jlora.merging.trees import merge as merge

__all__ = [
  "FORMS",
  "Input",
  "Recipe",
  "Slice",
  "TokenSource",
  "Tokenizer",
  "arcee_fusion",
  "breadcrumbs",
  "by_mass",
  "concat",
  "core_space",
  "dare",
  "della",
  "fill_missing",
  "given_units",
  "iso_c",
  "karcher",
  "knots",
  "lego",
  "linear",
  "magnitude_thresholds",
  "match_l1",
  "merge",
  "merge_checkpoints",
  "merge_task_vectors",
  "model_stock",
  "multislerp",
  "nearswap",
  "nuslerp",
  "passthrough",
  "prune",
  "ram",
  "read_inputs",
  "read_recipe",
  "read_recipes",
  "sce",
  "singular_units",
  "slerp",
  "svd_merge",
  "task_arithmetic",
  "ties",
  "trim_models",
  "truncate",
  "tsv",
]
