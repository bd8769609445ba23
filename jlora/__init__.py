# SPDX-License-Identifier: Apache-2.0
"""Weight changes as composable programs: two checkpoints in, a LoRA out.

checkpoints ─► deltas ─► factors ─► {path: Lora} ─► measured, exported

Example:
  >>> import jax.numpy as jnp
  >>> base = {"mlp": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}}
  >>> finetuned = {"mlp": {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(5)}}
  >>> loras = extract(base, finetuned, rank=1)
  >>> list(loras), loras["mlp/kernel"].rank
  (['mlp/kernel'], 1)
  >>> bool(jnp.allclose(apply(base, loras)["mlp"]["kernel"], 1, atol=1e-5))
  True
  >>> round(compare(base, finetuned, loras)["mlp/kernel"]["energy"], 4)
  1.0
"""

from jlora.adapted import Adapted as Adapted
from jlora.advice import Advice as Advice
from jlora.advice import advise as advise
from jlora.advice import error_of as error_of
from jlora.alignment import Alignment as Alignment
from jlora.alignment import match_activations as match_activations
from jlora.alignment import match_weights as match_weights
from jlora.alignment import merge_many as merge_many
from jlora.application import adapt as adapt
from jlora.application import adapt_rows as adapt_rows
from jlora.application import apply as apply
from jlora.application import lora_dot as lora_dot
from jlora.binding import bind as bind
from jlora.certificates import Certificate as Certificate
from jlora.certificates import certificate as certificate
from jlora.checkpoints import Checkpoint as Checkpoint
from jlora.checkpoints import open_checkpoint as open_checkpoint
from jlora.checkpoints import save_orbax as save_orbax
from jlora.conflicts import compare_adapters as compare_adapters
from jlora.conflicts import find_intruders as find_intruders
from jlora.divergences import Divergence as Divergence
from jlora.divergences import Score as Score
from jlora.divergences import mean_kl as mean_kl
from jlora.divergences import recovered as recovered
from jlora.divergences import score as score
from jlora.edit_values import fit_value as fit_value
from jlora.editing import address_of as address_of
from jlora.editing import edit_key as edit_key
from jlora.editing import edit_keys as edit_keys
from jlora.editing import edit_layers as edit_layers
from jlora.evaluation import compare as compare
from jlora.evaluation import spectral_norm as spectral_norm
from jlora.exporting import PEFT as PEFT
from jlora.exporting import VLLM as VLLM
from jlora.exporting import load_peft as load_peft
from jlora.exporting import save_merged as save_merged
from jlora.exporting import save_peft as save_peft
from jlora.extraction import extract as extract
from jlora.factoring import cheapest as cheapest
from jlora.factoring import gram as gram
from jlora.factoring import krylov as krylov
from jlora.factoring import recompress as recompress
from jlora.factoring import svd as svd
from jlora.hosts import LostProcess as LostProcess
from jlora.initialisation import init_lora as init_lora
from jlora.loras import Factors as Factors
from jlora.loras import Lora as Lora
from jlora.loras import Loras as Loras
from jlora.loras import dense as dense
from jlora.loras import from_factors as from_factors
from jlora.loras import from_in_rank as from_in_rank
from jlora.loras import to_in_rank as to_in_rank
from jlora.merge_runs import merge_checkpoints as merge_checkpoints
from jlora.merging.averages import linear as linear
from jlora.merging.averages import nearswap as nearswap
from jlora.merging.averages import passthrough as passthrough
from jlora.merging.common_spaces import core_space as core_space
from jlora.merging.common_spaces import knots as knots
from jlora.merging.concatenation import concat as concat
from jlora.merging.concatenation import fill_missing as fill_missing
from jlora.merging.concatenation import svd_merge as svd_merge
from jlora.merging.concatenation import truncate as truncate
from jlora.merging.pruning import breadcrumbs as breadcrumbs
from jlora.merging.pruning import dare as dare
from jlora.merging.pruning import della as della
from jlora.merging.singular_vectors import iso_c as iso_c
from jlora.merging.singular_vectors import tsv as tsv
from jlora.merging.spherical import karcher as karcher
from jlora.merging.spherical import multislerp as multislerp
from jlora.merging.spherical import nuslerp as nuslerp
from jlora.merging.spherical import slerp as slerp
from jlora.merging.stocks import model_stock as model_stock
from jlora.merging.task_vectors import sce as sce
from jlora.merging.task_vectors import task_arithmetic as task_arithmetic
from jlora.merging.task_vectors import ties as ties
from jlora.merging.trees import magnitude_thresholds as magnitude_thresholds
from jlora.merging.trees import merge as merge
from jlora.mixture_folders import save_mixture as save_mixture
from jlora.mixtures import mix_experts as mix_experts
from jlora.mixtures import random_rows as random_rows
from jlora.mixtures import router_rows as router_rows
from jlora.moments import Moment as Moment
from jlora.moments import dense_inputs as dense_inputs
from jlora.moments import second_moments as second_moments
from jlora.moments import weighted_error as weighted_error
from jlora.overlaps import overlap as overlap
from jlora.packed_files import load_packed as load_packed
from jlora.packed_files import save_packed as save_packed
from jlora.packing import Packed as Packed
from jlora.packing import pack as pack
from jlora.packing import unpack as unpack
from jlora.pairing import common_rows as common_rows
from jlora.pairing import keep_whole as keep_whole
from jlora.pairing import refuse as refuse
from jlora.paths import flatten as flatten
from jlora.paths import matching as matching
from jlora.paths import unflatten as unflatten
from jlora.programs import Branch as Branch
from jlora.programs import Rows as Rows
from jlora.programs import Shift as Shift
from jlora.programs import prepend as prepend
from jlora.ranks import Spectra as Spectra
from jlora.recipe_files import read_recipe as read_recipe
from jlora.recipes import Recipe as Recipe
from jlora.refinement import Refiner as Refiner
from jlora.refinement import refine as refine
from jlora.reordering import permute as permute
from jlora.reordering import permute_loras as permute_loras
from jlora.reporting import Report as Report
from jlora.reporting import read_report as read_report
from jlora.restoration import restore as restore
from jlora.restoration import restore_loras as restore_loras
from jlora.routing import stack as stack
from jlora.runs import extract_checkpoint as extract_checkpoint
from jlora.selection import is_matrix as is_matrix
from jlora.sharding import adapter_shardings as adapter_shardings
from jlora.snapshots import Snapshot as Snapshot
from jlora.snapshots import load_snapshot as load_snapshot
from jlora.snapshots import save_snapshot as save_snapshot
from jlora.starts import relative_to_base as relative_to_base
from jlora.starts import split_base as split_base
from jlora.training import Trainer as Trainer
from jlora.training import lora_plus as lora_plus
from jlora.training import train as train
from jlora.whole_thresholds import trim_wholes as trim_wholes

__all__ = [
  "Adapted",
  "Advice",
  "Alignment",
  "Branch",
  "Certificate",
  "Checkpoint",
  "Divergence",
  "Factors",
  "Lora",
  "Loras",
  "LostProcess",
  "Moment",
  "PEFT",
  "Packed",
  "Recipe",
  "Refiner",
  "Report",
  "Rows",
  "Score",
  "Shift",
  "Snapshot",
  "Spectra",
  "Trainer",
  "VLLM",
  "adapt",
  "adapt_rows",
  "adapter_shardings",
  "address_of",
  "advise",
  "apply",
  "bind",
  "breadcrumbs",
  "certificate",
  "cheapest",
  "common_rows",
  "compare",
  "compare_adapters",
  "concat",
  "core_space",
  "dare",
  "della",
  "dense",
  "dense_inputs",
  "edit_key",
  "edit_keys",
  "edit_layers",
  "error_of",
  "extract",
  "extract_checkpoint",
  "fill_missing",
  "find_intruders",
  "fit_value",
  "flatten",
  "from_factors",
  "from_in_rank",
  "gram",
  "init_lora",
  "is_matrix",
  "iso_c",
  "karcher",
  "keep_whole",
  "knots",
  "krylov",
  "linear",
  "load_packed",
  "load_peft",
  "load_snapshot",
  "lora_dot",
  "lora_plus",
  "magnitude_thresholds",
  "match_activations",
  "match_weights",
  "matching",
  "mean_kl",
  "merge",
  "merge_checkpoints",
  "merge_many",
  "mix_experts",
  "model_stock",
  "multislerp",
  "nearswap",
  "nuslerp",
  "open_checkpoint",
  "overlap",
  "pack",
  "passthrough",
  "permute",
  "permute_loras",
  "prepend",
  "random_rows",
  "read_recipe",
  "read_report",
  "recompress",
  "recovered",
  "refine",
  "refuse",
  "relative_to_base",
  "restore",
  "restore_loras",
  "router_rows",
  "save_merged",
  "save_mixture",
  "save_orbax",
  "save_packed",
  "save_peft",
  "save_snapshot",
  "sce",
  "score",
  "second_moments",
  "slerp",
  "spectral_norm",
  "split_base",
  "stack",
  "svd",
  "svd_merge",
  "task_arithmetic",
  "ties",
  "to_in_rank",
  "train",
  "trim_wholes",
  "truncate",
  "tsv",
  "unflatten",
  "unpack",
  "weighted_error",
]
