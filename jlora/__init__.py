# SPDX-License-Identifier: Apache-2.0
"""Weight changes as composable programs: two checkpoints in, a LoRA out.

checkpoints ─► deltas ─► factors ─► {path: Lora} ─► measured, exported

The names here are those that most users need; each package has the rest:
`jlora.factoring`, `jlora.merging`, `jlora.adapting`, `jlora.training`, ... They
are imported when they are first asked for.

Example:
  >>> import jax.numpy as jnp
  >>> import jlora
  >>> base = {"mlp": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}}
  >>> finetuned = {"mlp": {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(5)}}
  >>> loras = jlora.extract(base, finetuned, rank=1)
  >>> list(loras), loras["mlp/kernel"].rank
  (['mlp/kernel'], 1)
  >>> whole = jlora.apply(base, loras)
  >>> bool(jnp.allclose(whole["mlp"]["kernel"], 1, atol=1e-5))
  True
  >>> figures = jlora.compare(base, finetuned, loras)
  >>> round(figures.totals["energy"], 4)
  1.0
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jlora.adapting.banks import make_bank as make_bank
  from jlora.adapting.binding import bind as bind
  from jlora.adapting.programs import Branch as Branch
  from jlora.adapting.programs import Rows as Rows
  from jlora.adapting.programs import Shift as Shift
  from jlora.adapting.rows import adapt_rows as adapt_rows
  from jlora.adapting.transforms import adapt as adapt
  from jlora.adapting.transforms import apply as apply
  from jlora.checkpoints.checkpoint import Checkpoint as Checkpoint
  from jlora.checkpoints.checkpoint import open_checkpoint as open_checkpoint
  from jlora.checkpoints.merged import save_merged as save_merged
  from jlora.evaluation.outputs import mean_kl as mean_kl
  from jlora.evaluation.outputs import score as score
  from jlora.evaluation.weights import compare as compare
  from jlora.extraction.report import Report as Report
  from jlora.extraction.run import extract_checkpoint as extract_checkpoint
  from jlora.extraction.trees import extract as extract
  from jlora.formats.peft.reading import load_peft as load_peft
  from jlora.formats.peft.writing import save_peft as save_peft
  from jlora.loras import Lora as Lora
  from jlora.loras import Loras as Loras
  from jlora.merging.checkpoints.run import (
    merge_checkpoints as merge_checkpoints,
  )
  from jlora.merging.trees import merge as merge
  from jlora.training.inits import init_lora as init_lora
  from jlora.training.trainer import train as train

__version__ = metadata.version("jlora")

# Where each public name is; a test holds it against the imports above.
_HOMES = {
  "Branch": "adapting.programs",
  "Checkpoint": "checkpoints.checkpoint",
  "Lora": "loras",
  "Loras": "loras",
  "Report": "extraction.report",
  "Rows": "adapting.programs",
  "Shift": "adapting.programs",
  "adapt": "adapting.transforms",
  "adapt_rows": "adapting.rows",
  "apply": "adapting.transforms",
  "bind": "adapting.binding",
  "compare": "evaluation.weights",
  "extract": "extraction.trees",
  "extract_checkpoint": "extraction.run",
  "init_lora": "training.inits",
  "load_peft": "formats.peft.reading",
  "make_bank": "adapting.banks",
  "mean_kl": "evaluation.outputs",
  "merge": "merging.trees",
  "merge_checkpoints": "merging.checkpoints.run",
  "open_checkpoint": "checkpoints.checkpoint",
  "save_merged": "checkpoints.merged",
  "save_peft": "formats.peft.writing",
  "score": "evaluation.outputs",
  "train": "training.trainer",
}

_PACKAGES = (
  "adapting",
  "alignment",
  "checkpoints",
  "commands",
  "declared_views",
  "editing",
  "evaluation",
  "extraction",
  "factoring",
  "formats",
  "loras",
  "merging",
  "models",
  "numerics",
  "pairing",
  "paths",
  "ranks",
  "routing",
  "runs",
  "selection",
  "sharding",
  "training",
  "tree_views",
  "views",
)

__all__ = [
  "Branch",
  "Checkpoint",
  "Lora",
  "Loras",
  "Report",
  "Rows",
  "Shift",
  "adapt",
  "adapt_rows",
  "apply",
  "bind",
  "compare",
  "extract",
  "extract_checkpoint",
  "init_lora",
  "load_peft",
  "make_bank",
  "mean_kl",
  "merge",
  "merge_checkpoints",
  "open_checkpoint",
  "save_merged",
  "save_peft",
  "score",
  "train",
]


def __getattr__(name: str) -> Any:
  """Imports a public name or a package when it is first asked for."""
  if name in _PACKAGES:
    return importlib.import_module(f"jlora.{name}")
  if name not in _HOMES:
    raise AttributeError(f"module 'jlora' has no attribute {name!r}")
  value = getattr(importlib.import_module(f"jlora.{_HOMES[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  """Lists what `jlora.` completes to, imported or not."""
  return sorted({*globals(), *_HOMES, *_PACKAGES})
