# SPDX-License-Identifier: Apache-2.0
"""A merge of checkpoints by a recipe in mergekit's form.

  python -m experiments.merge --config=recipe.yml --out=DIR

Writes a checkpoint folder that transformers loads, with `merge.json`: the
recipe, and what is not as usual. Models are safetensors files, Hugging Face
folders or orbax directories, or `base+adapter` with a PEFT folder.
"""

import json
import sys

import jax
from absl import app, flags

import jlora
from experiments.caches import keep_compilations

_CONFIG = flags.DEFINE_string("config", None, "The recipe.", required=True)
_OUT = flags.DEFINE_string("out", None, "The output folder.", required=True)
_VOCABULARY = flags.DEFINE_enum(
  "vocabulary",
  None,
  ["error", "common", "whole"],
  "An embedding whose number of rows is not the reference's: stop, merge the "
  "common rows, or take the reference's unmerged; by default as the recipe "
  "says: common with `tokenizer_source: base`, else error.",
)
_WHOLE = flags.DEFINE_float(
  "whole_model_density",
  None,
  "Of ties: trim each model as a whole, as the paper does, to this share of "
  "its changes, instead of each tensor by the recipe's density. Reads the "
  "models twice more.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is dropped by chance.")
_SHARD = flags.DEFINE_float(
  "shard_mib", 1024, "A new file begins before this size.", lower_bound=1e-6
)
_RESUME = flags.DEFINE_bool("resume", False, "Go on with an unfinished run.")
_OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace a checkpoint that is in the output folder."
)
_JSON = flags.DEFINE_bool("json", False, "Print merge.json.")
_CACHE = flags.DEFINE_string(
  "cache", None, "Folder of compiled programs; ~/.cache/jlora by default."
)

_VOCABULARIES = {
  "error": jlora.pairing.same_rows,
  "common": jlora.pairing.common_rows,
  "whole": jlora.pairing.keep_whole,
}


def main(argv: list[str]) -> None:
  """Runs the merge; a bad recipe or model is one message and exit code 1."""
  try:
    _run(argv)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


def _run(argv: list[str]) -> None:
  if len(argv) > 1:
    raise ValueError(f"only flags are taken, got {' '.join(argv[1:])}")
  keep_compilations(_CACHE.value)
  recipe = jlora.merging.read_recipe(_CONFIG.value)
  if _VOCABULARY.value is not None:
    recipe = recipe._replace(vocabulary=_VOCABULARIES[_VOCABULARY.value])
  if _WHOLE.value is not None:
    recipe = jlora.merging.trim_wholes(recipe, _WHOLE.value)
  report = jlora.merge_checkpoints(
    recipe,
    _OUT.value,
    key=jax.random.key(_SEED.value),
    max_shard_bytes=int(_SHARD.value * 2**20),
    resume=_RESUME.value,
    overwrite=_OVERWRITE.value,
  )
  if _JSON.value:
    print(json.dumps(report._asdict()))
    return
  for note in report.notes:
    print(note)
  print(f"{report.tensors} tensors, {report.nbytes / 2**20:.1f} MiB")
  print(f"written: {_OUT.value}")


if __name__ == "__main__":
  app.run(main)
