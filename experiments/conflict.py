# SPDX-License-Identifier: Apache-2.0
"""Where do two adapters get in each other's way: which modules, which layers?

  python -m experiments.conflict [--first=kjv:150:3e-4] [--second=pydoc:60:3e-4]
    [--rank=64] [--intruders] [--cache=FOLDER] [--out=FOLDER] [--smoke]

Two finetunes of SmolLM2-135M, extracted: cosines, sign conflicts, and how much
of what they read and write is shared, by kind of module and by layer; whether
what the second writes falls into what the first reads, a layer on. Beside each
figure stands that of the second adapter with its channels shuffled, which keeps
every norm and spectrum. --out writes the figure.

Takes 4 minutes on two cores beside other jobs, 22 with --intruders. Expect
nearly orthogonal changes that share some of the directions they read and write.
"""

import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from experiments.lib.data import texts
from experiments.lib.figures import conflicts, plots
from experiments.lib.figures.conflicts import (
  KINDS,
  LINKS,
  Rows,
  as_depth_table,
  as_stream_table,
  as_table,
  by_layer,
)
from experiments.lib.figures.grids import layer_of
from experiments.lib.models import finetunes, skills
from jlora.checkpoints import Checkpoint, open_checkpoint
from jlora.commands import keep_compilations
from jlora.evaluation import (
  compare_adapters,
  compare_layers,
  find_intruders,
  link_layers,
)
from jlora.extraction import extract
from jlora.loras import Lora, Loras
from jlora.paths import matching

#: Matches the names of a layer's modules; the group is its number.
_LAYER = r"model\.layers\.(\d+)\.(?:mlp|self_attn)\."


def read_adapter(base: Checkpoint, folder: pathlib.Path, rank: int) -> Loras:
  """Extracts a finetune's Loras of all matrices of the layers.

  Args:
    base: the base.
    folder: the finetune.
    rank: of every module.

  Returns:
    name -> Lora, NumPy's.
  """
  select = matching(_LAYER + r"\w+_proj\.weight")
  return extract(base, open_checkpoint(folder), rank=rank, select=select)


def shuffle_channels(loras: Loras, seed: int) -> Loras:
  """Shuffles the channels of adapters; keeps all spectra and norms.

  Args:
    loras: name -> Lora.
    seed: of the orders, which differ between modules.

  Returns:
    name -> Lora.

  Example:
    >>> lora = Lora(np.eye(2), np.eye(2), np.float32(1))
    >>> shuffle_channels({"w": lora}, 0)["w"].a.sum()
    np.float64(2.0)
  """
  rng = np.random.default_rng(seed)
  return {
    name: Lora(
      lora.a[:, rng.permutation(lora.a.shape[1])],
      lora.b[:, rng.permutation(lora.b.shape[1])],
      lora.scale,
    )
    for name, lora in loras.items()
  }


def behind_norms(loras: Loras, base: Mapping[str, Any]) -> Loras:
  """Rewrites Loras to read the residual stream before its norm's scale.

      a ← a diag(scale of the norm)

  Args:
    loras: name -> Lora.
    base: name -> array, with the norms of its layers.

  Returns:
    name -> Lora; of q, k, v, gate and up alone.
  """
  norms = {r".*\.[qkv]_proj\..*": "input_layernorm",
           r".*\.(?:gate|up)_proj\..*": "post_attention_layernorm"}  # fmt: skip
  found = {}
  for name, lora in loras.items():
    for pattern, norm in norms.items():
      if re.fullmatch(pattern, name):
        path = f"model.layers.{layer_of(name)}.{norm}.weight"
        scale = np.asarray(base[path], np.float32)
        found[name] = Lora(lora.a * scale[None], lora.b, lora.scale)
  return found


def follow_stream(
  first: Loras, second: Loras, base: Mapping[str, Any]
) -> dict[str, dict[int, dict[str, float]]]:
  """Compares what the second adapter writes with what the first reads next.

  Args:
    first: reads.
    second: writes.
    base: of both.

  Returns:
    name of LINKS -> layer that writes -> overlap, level, leading and
    leading_level, means over the modules that read.
  """
  readers, found = behind_norms(first, base), {}
  for name, writing, reading, ahead in LINKS:
    links = link_layers(
      second,
      _LAYER + rf"{writing}_proj\.weight",
      _LAYER + rf"{reading}_proj\.weight",
      ahead=ahead,
    )
    layers: dict[int, list[Any]] = {}
    for (writer, _), shared in compare_layers(readers, second, links).items():
      layers.setdefault(layer_of(writer) or 0, []).append(shared)
    found[name] = {
      layer: {
        field: float(np.mean([getattr(shared, field) for shared in group]))
        for field in ("overlap", "level", "leading", "leading_level")
      }
      for layer, group in sorted(layers.items())
    }
  return found


def count_intruders(
  base: Mapping[str, Any], loras: Loras
) -> dict[str, tuple[int, int]]:
  """Counts intruder dimensions among the ten leading directions.

  Args:
    base: name -> weight, (out, in).
    loras: name -> Lora.

  Returns:
    kind -> (modules with any, all intruders).
  """
  found: dict[str, list[int]] = {kind: [] for kind in KINDS}
  for name, lora in loras.items():
    weight = np.asarray(base[name], np.float32).T
    found[name.split(".")[-2]].append(len(find_intruders(weight, lora)))
  return {
    kind: (sum(count > 0 for count in counts), sum(counts))
    for kind, counts in found.items()
  }


def pair_of(
  recipe: str, cache: str | None
) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns SmolLM2 and a finetune of it, made if missing.

  Args:
    recipe: "domain:steps:learning rate".
    cache: folder for downloads and models; None is ~/.cache/jlora.

  Returns:
    The base's folder and the finetune's.
  """
  domain, steps, rate = recipe.split(":")
  return finetunes.smollm2_pair(
    cache, domain, steps=int(steps), learning_rate=float(rate)
  )


def panels_of(
  rows: Rows, shuffled: Rows
) -> dict[str, tuple[dict[str, np.ndarray], np.ndarray]]:
  """Returns the lines of `conflicts.draw_layers`.

  Args:
    rows: of the two adapters.
    shuffled: of the first and the second shuffled.

  Returns:
    title -> (line by group, line of all modules, shuffled).
  """
  return {
    title: (
      {
        name: by_layer(rows, kinds, field)
        for name, kinds in conflicts.GROUPS.items()
      },
      by_layer(shuffled, KINDS, field),
    )
    for title, field in conflicts.PANELS
  }


def print_tables(
  base: Checkpoint, first: Loras, second: Loras
) -> tuple[Rows, Rows, dict[str, Any]]:
  """Prints the tables of two adapters' conflicts.

  Args:
    base: of both.
    first: name -> Lora.
    second: the same.

  Returns:
    Rows of the two, of the first and the second shuffled, and `follow_stream`
    by who writes.
  """
  other = shuffle_channels(second, 0)
  rows, shuffled = (compare_adapters(first, each) for each in (second, other))
  writers = {"second": second, "first itself": first, "shuffled second": other}
  streams = {
    name: follow_stream(first, each, base) for name, each in writers.items()
  }
  print(as_table(rows, shuffled), end="\n\n")
  print(as_depth_table(rows), end="\n\n")
  print(as_stream_table(streams), flush=True)
  return rows, shuffled, streams


def tiny_pairs(folder: str) -> list[tuple[Any, Any]]:
  """Makes a random base and two random changes of it, in a moment."""
  made = skills.tiny_skills(folder).folders
  return [(made["base"], made[name]) for name in skills.TITLES]


def compare_pairs(
  pairs: Sequence[tuple[Any, Any]], rank: int, *, intruders: bool = False
) -> Callable[[], Figure]:
  """Extracts two finetunes' adapters and prints their conflicts.

  Args:
    pairs: folders of a base and its finetune, twice.
    rank: of the adapters.
    intruders: whether these are counted.

  Returns:
    What draws the figure.
  """
  bases = [open_checkpoint(base) for base, _ in pairs]
  adapters = [
    read_adapter(base, folder, rank)
    for base, (_, folder) in zip(bases, pairs, strict=True)
  ]
  rows, shuffled, streams = print_tables(bases[0], *adapters)
  if intruders:
    for name, base, loras in zip(
      ("first", "second"), bases, adapters, strict=True
    ):
      print(f"intruders of the {name}: {count_intruders(base, loras)}")
  panels = panels_of(rows, shuffled)
  return lambda: conflicts.draw_layers(panels, streams["second"])


def main(_: list[str]) -> None:
  """Compares two adapters, prints tables and draws the figure."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  print(texts.pydoc_source())
  with tempfile.TemporaryDirectory() as work:
    if values.smoke:
      pairs, rank = tiny_pairs(work), 4
    else:
      given = values.first, values.second
      pairs, rank = [pair_of(x, values.cache) for x in given], values.rank
    draw = compare_pairs(pairs, rank, intruders=values.intruders)
  if values.out:
    plots.save_figure(pathlib.Path(values.out) / "conflict_by_layer.png", draw)


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_string("first", "kjv:150:3e-4", "Text:steps:learning rate.")
  flags.DEFINE_string("second", "pydoc:60:3e-4", "The same.")
  flags.DEFINE_integer("rank", 64, "Of every module.")
  flags.DEFINE_bool("intruders", False, "Count these too, some minutes.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "Folder of the figure.")
  flags.DEFINE_bool("smoke", False, "Tiny random models, in seconds.")
  app.run(main)
