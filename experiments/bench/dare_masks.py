# SPDX-License-Identifier: Apache-2.0
"""Do DARE and DELLA merge as mergekit 0.1.5 does when their masks are the same?

  python -m experiments.bench.dare_masks --mergekit=/path/to/mergekit-yaml

mergekit draws the mask of every tensor and model from one generator, in an
order that its recipe and seed fix and that does not depend on weights. So the
recipe is run again for each model, with all other weights at zero: what then
differs from the base is what the model's mask keeps. The merge of both models
is compared with these masks in place of ours, on a small float32 model. Expect
differences of rounding.
"""

import inspect
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from absl import app, flags

from experiments.bench.merge import difference_of
from experiments.lib.data import pairs
from experiments.lib.machines.processes import measure
from jlora.checkpoints import open_checkpoint
from jlora.merging import FORMS, merge_task_vectors, read_inputs

#: Method -> the method with the same masks that is a plain sum.
METHODS = {
  "dare_linear": "dare_linear",
  "dare_ties": "dare_linear",
  "della_linear": "della_linear",
  "della": "della_linear",
}
SMALL = {
  **pairs.LLAMA,
  "vocab_size": 256,
  "hidden_size": 128,
  "intermediate_size": 320,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "num_hidden_layers": 2,
  "torch_dtype": "float32",
}
WEIGHTS = (0.7, 0.3)
DENSITIES = (0.4, 0.6)
_LARGE = 1024.0  # large enough that rounding loses no change that is kept
_SEED = "7"


def merge_masked(
  method: str, base: Any, tuned: Sequence[Any], masks: Sequence[Any]
) -> np.ndarray:
  """Merges one tensor by a method of recipes, its random masks given.

  Args:
    method: of `METHODS`.
    base: (...) float32.
    tuned: of each model (...).
    masks: of each model (...) bool, what is kept.

  Returns:
    (...) float32.

  Example:
    >>> base, ones = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> mask = np.array([True, False])
    >>> merge_masked("dare_linear", base, [ones, ones], [mask, ~mask])
    array([1.4, 0.6], dtype=float32)
  """
  settings = inspect.signature(FORMS[method].method).parameters
  options = {name: settings[name].default for name in ("elect", "normalize")}
  rescale = settings["rescale"].default
  kept = jnp.asarray(np.stack(masks))

  def sparsify(delta, index, key):
    """Keeps the entries of a model's mask, and rescales."""
    del key
    return rescale(delta, jnp.where(kept[index.astype(int)], delta, 0.0), None)

  given = read_inputs(method, jnp.asarray(np.stack(tuned)), WEIGHTS, base)
  numbered = np.arange(len(tuned))  # the amount selects a model's mask
  merged = merge_task_vectors(
    given, sparsify=sparsify, amounts=numbered, **options
  )
  return np.asarray(merged)


def compare(
  work: pathlib.Path, mergekit: str
) -> Iterator[tuple[str, float, float, float]]:
  """Merges two finetunes by both tools with the same masks, and compares.

  Args:
    work: folder for models and merges.
    mergekit: mergekit-yaml.

  Yields:
    method, largest difference over the largest entry of its tensor, share of
    equal entries, share of changed entries that both masks keep.
  """
  if not (work / "small").exists():
    pairs.write_family(work / "small", SMALL, dtype=np.float32)
  base, *tuned = (open_checkpoint(work / "small" / n) for n in pairs.FAMILY)
  masks: dict[str, list[dict[str, np.ndarray]]] = {}
  for method, plain in METHODS.items():
    if plain not in masks:
      alone = np.eye(len(tuned)) * _LARGE
      masks[plain] = [
        {name: found[name] != base[name] for name in base}
        for found in (_run(work, mergekit, plain, row) for row in alone)
      ]
    theirs = _run(work, mergekit, method, WEIGHTS)
    ours = {
      name: merge_masked(
        method,
        base[name],
        [one[name] for one in tuned],
        [mask[name] for mask in masks[plain]],
      )
      for name in base
    }
    changed = [name for name in base if masks[plain][0][name].any()]
    both = [(masks[plain][0][n] & masks[plain][1][n]).mean() for n in changed]
    yield method, *difference_of(ours, theirs), float(np.mean(both))


def write_recipe(
  file: pathlib.Path, method: str, models: Sequence[Any], weights: Sequence
) -> pathlib.Path:
  """Writes a recipe of mergekit's form.

  Args:
    file: to write.
    method: mergekit's name.
    models: folders, the base first.
    weights: of the others.

  Returns:
    file.
  """
  base, *tuned = map(str, models)
  parts: list[Mapping[str, Any]] = [
    {"model": x, "parameters": {"weight": float(w), "density": d}}
    for x, w, d in zip(tuned, weights, DENSITIES, strict=True)
  ]
  given = {"merge_method": method, "base_model": base, "dtype": "float32"}
  file.write_text(yaml.safe_dump({**given, "models": parts}))
  return file


def _run(work, mergekit, method, weights) -> Any:
  """Merges by mergekit; opens the result."""
  models = [work / "small" / name for name in pairs.FAMILY]
  recipe = write_recipe(work / "masks.yml", method, models, weights)
  out = work / "out" / f"{method}-{'-'.join(f'{w:g}' for w in weights)}"
  shutil.rmtree(out, ignore_errors=True)
  quiet = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
  command = [mergekit, str(recipe), str(out), *quiet, "--random-seed", _SEED]
  measure(command, {"HF_HUB_OFFLINE": "1"})
  return open_checkpoint(out)


def main(_: list[str]) -> None:
  """Compares, and prints the figures as Markdown."""
  values = flags.FLAGS
  with tempfile.TemporaryDirectory() as temporary:
    work = pathlib.Path(values.work or temporary)
    print("| method | largest difference | same entries | kept by both |")
    print("|---|---|---|---|", flush=True)
    for method, largest, same, both in compare(work, values.mergekit):
      print(
        f"| {method} | {largest:.1e} | {same:.2%} | {both:.3f} |", flush=True
      )


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_string("mergekit", None, "mergekit-yaml, of 0.1.5.")
  flags.DEFINE_string("work", None, "Folder; a temporary one by default.")
  flags.mark_flag_as_required("mergekit")
  app.run(main)
