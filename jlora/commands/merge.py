# SPDX-License-Identifier: Apache-2.0
"""A merge of checkpoints by a recipe in mergekit's form.

  jlora merge --config=recipe.yml --out=DIR

Writes a checkpoint folder that transformers loads, with `merge.json`: the
recipe, and what is not as usual. Models are safetensors files, Hugging Face
folders or orbax directories, or `base+adapter` with a PEFT folder. Of PEFT
folders alone it makes a PEFT folder: their changes are added exactly, whatever
their factors are, or merged by ties, dare, della, breadcrumbs or sce.
"""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jlora.commands import entry
from jlora.commands.caches import keep_compilations
from jlora.commands.help import Command
from jlora.merging.adapters.common_spaces import core_space, knots
from jlora.merging.checkpoints.mergekit import read_recipe, read_recipes
from jlora.merging.checkpoints.recipes import Recipe
from jlora.merging.checkpoints.run import merge_checkpoints
from jlora.merging.checkpoints.trimming import trim_models
from jlora.numerics.threefry import seed_words
from jlora.pairing.match import common_rows, keep_whole, same_rows

_FLAGS = flags.FlagValues()  # apart from those of other commands

_CONFIG = flags.DEFINE_string(
  "config", None, "The recipe.", required=True, flag_values=_FLAGS
)
_OUT = flags.DEFINE_string(
  "out", None, "The output folder.", required=True, flag_values=_FLAGS
)
_VOCABULARY = flags.DEFINE_enum(
  "vocabulary",
  None,
  ["error", "common", "whole"],
  "An embedding whose number of rows is not the reference's: stop, merge the "
  "common rows, or take the reference's unmerged. By default an error, unless "
  "the recipe names a tokenizer and rows are merged by token.",
  flag_values=_FLAGS,
)
_INTERMEDIATES = flags.DEFINE_string(
  "intermediates",
  None,
  "The file holds several recipes: the folder for the results of those with a "
  "name, on which others build. What is finished there is taken as it is, but "
  "with --overwrite made anew.",
  flag_values=_FLAGS,
)
_WHOLE = flags.DEFINE_float(
  "whole_model_density",
  None,
  "Of ties: trim each model as a whole, as the paper does, to this share of "
  "its changes, instead of each tensor by the recipe's density. Reads the "
  "models twice more.",
  flag_values=_FLAGS,
)
_RANK = flags.DEFINE_integer(
  "rank",
  None,
  "Of merged adapters: the largest rank of a module; by default the sum of the "
  "adapters' ranks, with which sums are exact.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_SPACE = flags.DEFINE_enum(
  "space",
  "entries",
  ["entries", "core", "knots"],
  "Of merged adapters: where ties and others that are no sums work: on the "
  "entries of the changes, or in a small space that all changes span.",
  flag_values=_FLAGS,
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Of what is dropped by chance.", flag_values=_FLAGS
)
_SHARD = flags.DEFINE_float(
  "shard_mib",
  1024,
  "A new file begins before this size.",
  lower_bound=1e-6,
  flag_values=_FLAGS,
)
_RESUME = flags.DEFINE_bool(
  "resume", False, "Go on with an unfinished run.", flag_values=_FLAGS
)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite",
  False,
  "Replace a checkpoint that is in the output folder.",
  flag_values=_FLAGS,
)
_JSON = flags.DEFINE_bool(
  "json", False, "Print merge.json.", flag_values=_FLAGS
)
_CACHE = flags.DEFINE_string(
  "cache",
  None,
  "Folder of compiled programs; ~/.cache/jlora by default.",
  flag_values=_FLAGS,
)

_VOCABULARIES = {
  "error": same_rows,
  "common": common_rows,
  "whole": keep_whole,
}

_SPACES = {"entries": None, "core": core_space, "knots": knots}


def main(words: Sequence[str]) -> None:
  """Runs the merge and prints what is not as usual.

  Args:
    words: those that are no flags; there should be none.

  Raises:
    ValueError: a bad recipe or model.
  """
  if words:
    raise ValueError(f"only flags are taken, got {' '.join(words)}")
  keep_compilations(_CACHE.value)
  for place, recipe in _recipes():
    _merge(recipe, _OUT.value if place is None else str(place), place is None)


def _recipes() -> list[tuple[Path | None, Recipe]]:
  """Reads the recipes, in their order; None is the one for `--out`."""
  if _INTERMEDIATES.value is None:
    return [(None, read_recipe(_CONFIG.value))]
  found = read_recipes(_CONFIG.value, _INTERMEDIATES.value)
  if all(place is not None for place, _ in found):
    raise ValueError(
      f"every recipe in {_CONFIG.value} has a name, so that nothing goes to "
      f"{_OUT.value}; take the name of the last one away."
    )
  return found


def _merge(recipe: Recipe, out: str, is_last: bool) -> None:
  """Runs one recipe; what others build on is kept, unless it is overwritten."""
  if _VOCABULARY.value is not None:
    if recipe.tokenizer is not None:
      raise ValueError(
        "the recipe names a tokenizer, so that rows are merged by token; leave "
        "--vocabulary out."
      )
    recipe = recipe._replace(vocabulary=_VOCABULARIES[_VOCABULARY.value])
  if _WHOLE.value is not None:
    recipe = trim_models(recipe, _WHOLE.value)
  if _SPACES[_SPACE.value] is not None:
    within = functools.partial(_SPACES[_SPACE.value], method=recipe.method)
    recipe = recipe._replace(method=within)
  recipe = recipe._replace(rank=_RANK.value)
  report = merge_checkpoints(
    recipe,
    out,
    key=seed_words(_SEED.value),
    max_shard_bytes=int(_SHARD.value * 2**20),
    resume=_RESUME.value or not (is_last or _OVERWRITE.value),
    overwrite=_OVERWRITE.value,
  )
  if _JSON.value:
    print(json.dumps(report._asdict()))
    return
  for note in report.notes:
    print(note)
  print(f"{report.tensors} tensors, {report.nbytes / 2**20:.1f} MiB")
  print(f"written: {out}")


COMMAND = Command(
  "merge",
  main,
  _FLAGS,
  required=("config", "out"),
  groups={
    "Input": {"config": "FILE", "vocabulary": "", "intermediates": "DIR"},
    "Method": {
      "whole_model_density": "X",
      "seed": "N",
      "rank": "N",
      "space": "",
    },
    "Output": {"out": "DIR", "shard_mib": "X", "json": ""},
    "Run": {"resume": "", "overwrite": "", "cache": "DIR"},
  },
  more="Models are safetensors files, Hugging Face folders, Hub ids that were "
  "downloaded, or orbax directories, or `base+adapter` with a PEFT folder. If "
  "all are PEFT folders alone, the result is one, too.",
)

if __name__ == "__main__":
  sys.exit(entry.run(COMMAND, sys.argv[1:]))
