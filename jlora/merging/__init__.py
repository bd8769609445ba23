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
from jlora.merging.adapters.recycling import closeness as closeness
from jlora.merging.adapters.recycling import random_like as random_like
from jlora.merging.adapters.recycling import search_weights as search_weights
from jlora.merging.adapters.recycling import select as select
from jlora.merging.adapters.resizing import Joined as Joined
from jlora.merging.adapters.resizing import Resized as Resized
from jlora.merging.adapters.resizing import resize as resize
from jlora.merging.adapters.resizing import spectra_of as spectra_of
from jlora.merging.adapters.soups import by_adapter as by_adapter
from jlora.merging.adapters.soups import by_layer as by_layer
from jlora.merging.adapters.soups import by_module as by_module
from jlora.merging.adapters.soups import entropy as entropy
from jlora.merging.adapters.soups import free as free
from jlora.merging.adapters.soups import init_weights as init_weights
from jlora.merging.adapters.soups import leaky as leaky
from jlora.merging.adapters.soups import learn_weights as learn_weights
from jlora.merging.adapters.soups import mix as mix
from jlora.merging.adapters.soups import sigmoid as sigmoid
from jlora.merging.adapters.soups import softmax as softmax
from jlora.merging.adapters.soups import unit as unit
from jlora.merging.adapters.ziplora import absolute_cosine as absolute_cosine
from jlora.merging.adapters.ziplora import dot as dot
from jlora.merging.adapters.ziplora import init_columns as init_columns
from jlora.merging.adapters.ziplora import learn_columns as learn_columns
from jlora.merging.adapters.ziplora import mean_absolute as mean_absolute
from jlora.merging.adapters.ziplora import mean_square as mean_square
from jlora.merging.adapters.ziplora import zip_columns as zip_columns
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
  "Joined",
  "Recipe",
  "Resized",
  "Slice",
  "TokenSource",
  "Tokenizer",
  "absolute_cosine",
  "arcee_fusion",
  "breadcrumbs",
  "by_adapter",
  "by_layer",
  "by_mass",
  "by_module",
  "closeness",
  "concat",
  "core_space",
  "dare",
  "della",
  "dot",
  "entropy",
  "fill_missing",
  "free",
  "given_units",
  "init_columns",
  "init_weights",
  "iso_c",
  "karcher",
  "knots",
  "leaky",
  "learn_columns",
  "learn_weights",
  "lego",
  "linear",
  "magnitude_thresholds",
  "match_l1",
  "mean_absolute",
  "mean_square",
  "merge",
  "merge_checkpoints",
  "merge_task_vectors",
  "mix",
  "model_stock",
  "multislerp",
  "nearswap",
  "nuslerp",
  "passthrough",
  "prune",
  "ram",
  "random_like",
  "read_inputs",
  "read_recipe",
  "read_recipes",
  "resize",
  "sce",
  "search_weights",
  "select",
  "sigmoid",
  "singular_units",
  "slerp",
  "softmax",
  "spectra_of",
  "svd_merge",
  "task_arithmetic",
  "ties",
  "trim_models",
  "truncate",
  "tsv",
  "unit",
  "zip_columns",
]
