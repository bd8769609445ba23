# SPDX-License-Identifier: Apache-2.0
"""Are our merges from disk to disk mergekit's, and how fast are they beside it?

  python -m experiments.bench.merge --mergekit=VENV/bin/mergekit-yaml
    [--parts=results] [--methods=ties,slerp] [--layers=8] [--work=FOLDER]

Both tools run the same recipe files. Results are compared on a small float32
model; times and peaks of memory are those of whole processes on a large
bfloat16 one. Not timed as a whole: --work keeps models and figures, and another
run adds to them. Expect differences of rounding, and single entries beyond that
for the methods that trim by magnitude. --parts=sizes runs both in turns on
models of 1 MiB and more, nothing of ours compiled by an earlier run.
"""

import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import yaml
from absl import app, flags

from experiments.lib.data import pairs
from experiments.lib.machines.processes import measure
from jlora.checkpoints import open_checkpoint
from jlora.merging import match_l1, merge_task_vectors, read_inputs

_MERGEKIT = flags.DEFINE_string("mergekit", None, "mergekit-yaml, of 0.1.5.")
_WORK = flags.DEFINE_string(
  "work", None, "Folder for models and figures; a temporary one by default."
)
_LAYERS = flags.DEFINE_integer("layers", 8, "Of the large model.")
_PARTS = flags.DEFINE_multi_enum(
  "parts",
  ["results", "ours", "mergekit"],
  ["models", "results", "ours", "mergekit", "sizes", "table"],
  "What to measure; models are made and the table is printed in any case.",
)
_METHODS = flags.DEFINE_list("methods", None, "Those to take; all by default.")
_SIZES = flags.DEFINE_list("sizes", None, "Of the part; all by default.")
_ROOT = pathlib.Path(__file__).parents[2]
_QUIET = {
  "PYTHONPATH": str(_ROOT),
  "HF_HUB_OFFLINE": "1",
  "PYTHONDONTWRITEBYTECODE": "",
}
_SMALL = {
  **pairs.LLAMA,
  "vocab_size": 512,
  "hidden_size": 256,
  "intermediate_size": 640,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "num_hidden_layers": 3,
  "torch_dtype": "float32",
}
#: Size in bfloat16 -> vocabulary, width, inner width, heads, layers.
SIZES = {
  "1MiB": (512, 128, 344, 4, 2),
  "16MiB": (4096, 256, 704, 4, 8),
  "128MiB": (8192, 768, 2048, 12, 7),
  "1GiB": (32000, 1536, 4096, 24, 15),
}
_WEIGHTS = ({"weight": 0.7}, {"weight": 0.3})
_THINNED = tuple({**one, "density": 0.5} for one in _WEIGHTS)
_WHOLE = tuple({**one, "density": 1.0} for one in _WEIGHTS)
_RAMP: dict[str, Any] = {"t": [0.0, 0.3, 1.0]}
#: Method -> (parameters of each finetune, of all; whether it has a base).
METHODS: dict[str, tuple[tuple[dict, ...], dict, bool]] = {
  "linear": (_WEIGHTS, {}, False),
  "slerp": (({},), _RAMP, True),
  "nuslerp": (_WEIGHTS, {}, True),
  "multislerp": (_WEIGHTS, {}, True),
  "karcher": (({}, {}), {}, False),
  "task_arithmetic": (_WEIGHTS, {"lambda": 0.8}, True),
  "ties": (_THINNED, {}, True),
  "breadcrumbs": (_THINNED, {"gamma": 0.05}, True),
  "breadcrumbs_ties": (_THINNED, {"gamma": 0.05}, True),
  "sce": (({}, {}), {"select_topk": 0.5}, True),
  "model_stock": (({}, {}), {}, True),
  "nearswap": (({},), {"t": 0.0005}, True),
  "dare_linear": (_WHOLE, {}, True),
  "dare_ties": (_WHOLE, {}, True),
  "della": (_WHOLE, {}, True),
  "della_linear": (_WHOLE, {}, True),
}
_TIMED = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear")
_FRANKENMERGE = "passthrough"
_MASKED = "dare_linear with its mask"


class Bench:
  """Merges by both tools; keeps the figures in a file of the work folder.

  Args:
    work: the folder.
    mergekit: path of mergekit-yaml, or None.
    layers: number of layers of the large model.
    methods: the methods to run; None is all.
    sizes: those of the part `sizes`; None is all.
  """

  def __init__(
    self,
    work: pathlib.Path,
    mergekit: str | None = None,
    layers: int = 8,
    methods: Sequence[str] | None = None,
    sizes: Sequence[str] | None = None,
  ):
    """Creates the work folder."""
    self._work, self._mergekit = work, mergekit
    self._layers, self._methods = layers, methods
    self._sizes = list(SIZES) if sizes is None else sizes
    work.mkdir(parents=True, exist_ok=True)
    self._file = work / "figures.json"

  def _found(self) -> dict[str, Any]:
    """Reads what was measured so far, by other processes too."""
    return json.loads(self._file.read_text()) if self._file.exists() else {}

  def models(self) -> None:
    """Writes a base and two finetunes, small and large, if missing."""
    large = {**pairs.LLAMA, "num_hidden_layers": self._layers}
    kinds = (
      ("small", _SMALL, np.float32),
      ("large", large, ml_dtypes.bfloat16),
    )
    for size, config, dtype in kinds:
      folder = self._work / size
      if not folder.exists():
        pairs.write_family(folder, config, dtype=dtype)

  def results(self) -> None:
    """Compares both tools' results on the small model."""
    self.models()
    for method in self._taken([*METHODS, _FRANKENMERGE]):
      recipe = self.write_recipe(method, "small", {"dtype": "float32"})
      ours, theirs = self._both(recipe, method)
      self._keep("results", method, difference_of(ours, theirs))
    for method in self._taken([_MASKED]):
      self._keep("results", method, self._masked())

  def ours(self) -> None:
    """Measures whole processes of ours on the large model."""
    self._time("ours", self._ours)

  def mergekit(self) -> None:
    """Measures whole processes of mergekit on the large model."""
    self._time("mergekit", self._theirs)

  def sizes(self) -> None:
    """Measures whole processes of both in turns, of one size after another."""
    for size in self._sizes:
      if not (self._work / size).exists():
        pairs.write_family(self._work / size, config_of(size))
      for method in self._taken(list(METHODS)):
        recipe = self.write_recipe(method, size, {"dtype": "bfloat16"})
        used = []
        for command in (self._ours, self._theirs):
          with tempfile.TemporaryDirectory(dir=self._work) as new:
            out = pathlib.Path(new)
            used.append(
              measure(command(recipe, f"{out}/out", out / "cache"), _QUIET)
            )
        self._keep("sizes", f"{size}, {method}", used)

  def table(self) -> None:
    """Prints the figures as Markdown."""
    print("| method | largest difference | same entries |\n|---|---|---|")
    found = self._found()
    for method, (largest, same) in found.get("results", {}).items():
      print(f"| {method} | {largest:.1e} | {same:.2%} |")
    print(
      "\n| method | ours | mergekit | time | memory |\n|---|---|---|---|---|"
    )
    ours, theirs = (found.get(side, {}) for side in ("ours", "mergekit"))
    for method in (name for name in ours if name in theirs):
      one, two = ours[method], theirs[method]
      cells = [
        f"{use[0]:.1f} s, {use[2] / 2**30:.2f} GiB" for use in (one, two)
      ]
      cells += [f"{one[i] / two[i]:.2f} x" for i in (0, 2)]
      print(f"| {method} | {' | '.join(cells)} |")
    print("\n| size, method | ours | mergekit | processor | wall |")
    print("|---|---|---|---|---|")
    for name, (one, two) in found.get("sizes", {}).items():
      cells = [f"{use[1]:.1f} s" for use in (one, two)]
      cells += [f"{one[i] / two[i]:.2f} x" for i in (1, 0)]
      print(f"| {name} | {' | '.join(cells)} |")

  def _taken(self, names: list[str]) -> list[str]:
    """Returns the names that were asked for."""
    return [n for n in names if self._methods is None or n in self._methods]

  def _keep(self, part: str, method: str, figures: Any) -> None:
    """Writes the figures of a method to the file, and prints them."""
    found = self._found()
    found.setdefault(part, {})[method] = figures
    self._file.write_text(json.dumps(found))
    print(part, method, figures, file=sys.stderr, flush=True)

  def _time(self, side: str, command) -> None:
    """Measures a tool's processes on all timed recipes."""
    self.models()
    for method in self._taken([*_TIMED, _FRANKENMERGE]):
      recipe = self.write_recipe(method, "large", {"dtype": "bfloat16"})
      with tempfile.TemporaryDirectory(dir=self._work) as out:
        used = measure(
          command(recipe, f"{out}/out", self._work / "cache"), _QUIET
        )
      self._keep(side, method, used)

  def _both(self, recipe: pathlib.Path, name: str) -> tuple[Any, Any]:
    """Merges a recipe by both tools; opens both results."""
    outs = []
    for command in (self._ours, self._theirs):
      out = self._work / "out" / name / command.__name__
      shutil.rmtree(out, ignore_errors=True)
      measure(command(recipe, str(out), self._work / "cache"), _QUIET)
      outs.append(open_checkpoint(out))
    return outs[0], outs[1]

  def write_recipe(
    self, method: str, size: str, more: Mapping[str, Any]
  ) -> pathlib.Path:
    """Writes the recipe file of a method.

    Args:
      method: mergekit's name.
      size: "small", "large" or one of `SIZES`, which models.
      more: keys beside the method's.

    Returns:
      The file.
    """
    folder = self._work / size
    base, *tuned = (str(folder / name) for name in pairs.FAMILY)
    if method == _FRANKENMERGE:
      recipe: dict[str, Any] = {
        "merge_method": method,
        "slices": [
          {"sources": [{"model": tuned[0], "layer_range": [0, 2]}]},
          {"sources": [{"model": tuned[1], "layer_range": [1, 3]}]},
        ],
      }
    else:
      own, shared, has_base = METHODS[method]
      if size != "small" and own is _WHOLE:
        own = _THINNED
      models = [
        {"model": model, **({"parameters": one} if one else {})}
        for model, one in zip(tuned, own, strict=False)
      ]
      recipe = {"merge_method": method, "models": models}
      if method == "slerp":
        models.insert(0, {"model": base})
      if shared:
        recipe["parameters"] = shared
      if has_base:
        recipe["base_model"] = base
    file = self._work / f"{size}-{method}.yml"
    file.write_text(yaml.safe_dump({**recipe, **more}))
    return file

  def _masked(self) -> tuple[float, float]:
    """Compares DARE of one finetune, given the mask that mergekit drew."""
    base, tuned = (str(self._work / "small" / n) for n in pairs.FAMILY[:2])
    recipe = self._work / "small-masked.yml"
    models = [{"model": tuned, "parameters": {"weight": 0.7, "density": 0.4}}]
    given = {"merge_method": "dare_linear", "base_model": base}
    recipe.write_text(
      yaml.safe_dump({**given, "models": models, "dtype": "float32"})
    )
    out = self._work / "out" / "masked"
    shutil.rmtree(out, ignore_errors=True)
    theirs = self._theirs(recipe, str(out), self._work / "cache")
    measure([*theirs, "--random-seed", "7"], _QUIET)
    found, under, own = map(open_checkpoint, (out, base, tuned))
    ours = {}
    for name in found:
      kept = found[name] != under[name]
      change = own[name] - under[name]
      assert not change.any() or 0.3 < kept[change != 0].mean() < 0.5, name
      stack = jnp.asarray(own[name])[None]
      given = read_inputs("dare", stack, [0.7], under[name])
      ours[name] = np.asarray(
        merge_task_vectors(
          given,
          sparsify=lambda delta, amount, key, kept=kept: match_l1(
            delta, jnp.where(kept, delta, 0.0)
          ),
        )
      )
    return difference_of(ours, found)

  def _ours(
    self, recipe: pathlib.Path, out: str, cache: pathlib.Path
  ) -> list[str]:
    """Returns our command for a recipe."""
    arguments = [f"--config={recipe}", f"--out={out}", f"--cache={cache}"]
    return [sys.executable, "-m", "jlora.commands.merge", *arguments]

  def _theirs(
    self, recipe: pathlib.Path, out: str, cache: pathlib.Path
  ) -> list[str]:
    """Returns mergekit's command for a recipe."""
    del cache
    if not self._mergekit:
      raise ValueError("mergekit-yaml is needed for this part.")
    quiet = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
    return [self._mergekit, str(recipe), out, *quiet]


def config_of(size: str) -> dict[str, Any]:
  """Returns the config.json of a Llama of one of `SIZES`.

  Example:
    >>> config_of("1MiB")["hidden_size"]
    128
  """
  rows, width, inner, heads, layers = SIZES[size]
  return {
    **pairs.LLAMA,
    "vocab_size": rows,
    "hidden_size": width,
    "intermediate_size": inner,
    "num_attention_heads": heads,
    "num_key_value_heads": heads,
    "head_dim": width // heads,
    "num_hidden_layers": layers,
  }


def difference_of(ours: Any, theirs: Any) -> tuple[float, float]:
  """Measures how far two results are from each other.

  Args:
    ours: name -> array.
    theirs: likewise.

  Returns:
    The largest difference over the largest entry of its tensor, and the share
    of entries that are equal.

  Raises:
    ValueError: they have different tensors.
  """
  if set(ours) != set(theirs):
    raise ValueError(f"tensors differ: {sorted(set(ours) ^ set(theirs))[:3]}")
  largest, equal, count = 0.0, 0, 0
  for name in ours:
    left, right = (np.asarray(x[name], np.float32) for x in (ours, theirs))
    gap = float(np.abs(left - right).max() / np.abs(right).max())
    largest = max(largest, gap)
    equal, count = equal + int((left == right).sum()), count + left.size
  return largest, equal / count


def main(argv: list[str]) -> None:
  """Measures the chosen parts; prints all figures there are."""
  del argv
  with tempfile.TemporaryDirectory() as temporary:
    work = pathlib.Path(_WORK.value or temporary)
    bench = Bench(
      work, _MERGEKIT.value, _LAYERS.value, _METHODS.value, _SIZES.value
    )
    for part in _PARTS.value:
      getattr(bench, part)()
    bench.table()


if __name__ == "__main__":
  app.run(main)
