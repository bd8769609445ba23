# SPDX-License-Identifier: Apache-2.0
"""Which layers can a model stand to have twice, without training?

  python -m experiments.frankenmerge [--only=KIND,...] [--cache=FOLDER]
    [--rows=FILE] [--out=FOLDER] [--smoke]

SmolLM2-135M with some of its 30 layers repeated, at several depths, and with
those of its finetunes on the King James Bible and pydoc put behind each other:
held-out losses on both texts. --rows keeps what was measured, and a second run
goes on with it; --out writes the figure.

Takes 15 minutes on two cores beside other jobs. Expect every repetition to cost
loss, least in the middle and most at both ends.
"""

import functools
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments.lib.data import texts
from experiments.lib.figures import merges, plots
from experiments.lib.models import skills
from jlora import models
from jlora.commands import keep_compilations
from jlora.pairing import configure_layers
from jlora.paths import flatten

Row = dict[str, Any]

#: First layers of the blocks of 4, and single layers, in a model of 30.
BLOCKS = (0, 2, 8, 13, 20, 25, 26)
SINGLES = (0, 3, 8, 14, 21, 27, 29)

_LAYER = re.compile(r"layers/(\d+)/(.+)")


class Slice(NamedTuple):
  """Layers of one model, from `start` up to but not including `stop`."""

  model: str
  start: int
  stop: int


class Schedule(NamedTuple):
  """A model put together from slices of layers, first layer first.

  Attributes:
    kind: which question it belongs to.
    name: in words.
    slices: the slices; a layer may be in several.
    where: the first layer that is repeated; -1 if none is.
  """

  kind: str
  name: str
  slices: tuple[Slice, ...]
  where: int = -1


def repeat_block(start: int, stop: int, depth: int) -> Schedule:
  """Repeats a block of layers as a whole: a b c a b c."""
  first, second = Slice("base", 0, stop), Slice("base", start, depth)
  name = f"{start} to {stop - 1}, as a block"
  return Schedule(f"block of {stop - start}", name, (first, second), start)


def repeat_each(start: int, stop: int, depth: int) -> Schedule:
  """Repeats each layer of a block: a a b b c c."""
  twice = tuple(
    Slice("base", i, i + 1) for i in range(start, stop) for _ in range(2)
  )
  slices = (Slice("base", 0, start), *twice, Slice("base", stop, depth))
  name = f"{start} to {stop - 1}, each by itself"
  return Schedule(f"each of {stop - start}", name, slices, start)


def leave_out(start: int, stop: int, depth: int) -> Schedule:
  """Leaves out a block of layers."""
  slices = (Slice("base", 0, start), Slice("base", stop, depth))
  name = f"without {start} to {stop - 1}"
  return Schedule(f"without {stop - start}", name, slices, start)


def schedules_of(depth: int) -> list[Schedule]:
  """Lists what is tried with a model of a depth, 30 or a few layers.

  Args:
    depth: layers.

  Returns:
    Schedules; those of equal depth lie beside each other.
  """
  size = max(1, round(4 * depth / 30))
  starts = [round(x * (depth - size) / 26) for x in BLOCKS]
  few = starts[1::2]
  found = [Schedule("base", "as it is", (Slice("base", 0, depth),))]
  found += [repeat_block(i, i + size, depth) for i in starts]
  found += [
    repeat_block(i, i + 1, depth)
    for i in (round(x * (depth - 1) / 29) for x in SINGLES)
  ]
  found += [repeat_each(i, i + size, depth) for i in few]
  found += [leave_out(i, i + size, depth) for i in few]
  third = depth // 3
  found += [
    Schedule("overlapping halves", f"0 to {2 * third - 1}, then {third} to "
             f"{depth - 1}", (Slice(first, 0, 2 * third),
                              Slice(second, third, depth)), third)
    for first, second in (("base", "base"), ("kjv", "pydoc"), ("pydoc", "kjv"))
  ]  # fmt: skip
  middle = depth // 2
  found += [
    Schedule("two finetunes, no repeats", f"0 to {middle - 1}, then {middle} "
             f"to {depth - 1}", (Slice(first, 0, middle),
                                 Slice(second, middle, depth)))
    for first, second in (("kjv", "pydoc"), ("pydoc", "kjv"))
  ]  # fmt: skip
  unique = {(one.kind, one.slices): one for one in found}
  return list(unique.values())


def restack(
  trees: Mapping[str, Any], slices: Sequence[Slice]
) -> tuple[dict[str, Any], list[int]]:
  """Puts together the parameters of slices; arrays are shared, not copied.

  Args:
    trees: name -> parameters, of one shape.
    slices: first layers first. Embedding, head and last norm are the first
      slice's.

  Returns:
    path -> array, and the layer that each of its layers was.

  Example:
    >>> tree = {"layers": {"0": {"w": 5}, "1": {"w": 6}}, "norm": 7}
    >>> restack({"base": tree}, [Slice("base", 0, 2), Slice("base", 1, 2)])[0]
    {'norm': 7, 'layers/0/w': 5, 'layers/1/w': 6, 'layers/2/w': 6}
  """
  flat = {name: flatten(tree) for name, tree in trees.items()}
  found = {
    path: leaf
    for path, leaf in flat[slices[0].model].items()
    if not _LAYER.fullmatch(path)
  }
  taken: list[int] = []
  for one in slices:
    for layer in range(one.start, one.stop):
      for path, leaf in flat[one.model].items():
        match = _LAYER.fullmatch(path)
        if match and int(match[1]) == layer:
          found[f"layers/{len(taken)}/{match[2]}"] = leaf
      taken.append(layer)
  return found, taken


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Nests a dict of paths.

  Args:
    flat: path -> array.

  Returns:
    A dict.

  Example:
    >>> nest({"a/b": 1, "a/c": 2, "d": 3})
    {'a': {'b': 1, 'c': 2}, 'd': 3}
  """
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *above, last = path.split("/")
    functools.reduce(lambda x, k: x.setdefault(k, {}), above, tree)[last] = leaf
  return tree


def measure_all(
  found: skills.Skills, only: Sequence[str], done: Sequence[Row]
) -> Iterator[Row]:
  """Measures each schedule that has no row yet.

  Args:
    found: base, finetunes and texts.
    only: kinds; none is all.
    done: rows of an earlier run.

  Yields:
    kind, name, slices, where, depth, and for each text the loss of every row.
    Models of equal depth share a program.
  """
  trees = {"base": found.base, **found.finetuned}
  known = {(row["kind"], as_text(row["slices"])) for row in done}
  depth = found.config["num_hidden_layers"]
  for one in schedules_of(depth):
    if (one.kind, as_text(one.slices)) in known or (
      only and one.kind not in only
    ):
      continue
    flat, taken = restack(trees, one.slices)
    apply = models.build(configure_layers(found.config, taken))
    yield {
      **one._asdict(), "depth": len(taken),
      **skills.measure(apply, nest(flat), found.held_out),
    }  # fmt: skip


def as_text(slices: Sequence[Any]) -> str:
  """Describes slices in words, such as "base 0-19, 10-29".

  Args:
    slices: (model, start, stop) each.

  Returns:
    Ends included.

  Example:
    >>> as_text([("base", 0, 20), ("base", 10, 12), ("kjv", 12, 13)])
    'base 0-19, 10-11, kjv 12'
  """
  parts, before = [], None
  for model, start, stop in slices:
    if stop > start:
      last = "" if stop == start + 1 else f"-{stop - 1}"
      named = "" if model == before else f"{model} "
      parts.append(f"{named}{start}{last}")
      before = model
  return ", ".join(parts)


def as_table(rows: Sequence[Row]) -> str:
  """Formats rows as a Markdown table.

  Args:
    rows: as measured.

  Returns:
    Lines.
  """
  heads = " | ".join(f"loss on {name}" for name in skills.TITLES.values())
  lines = [f"| what | layers | depth | {heads} |", "|---|---|---|---|---|"]
  for row in rows:
    losses = " | ".join(f"{np.mean(row[name]):.3f}" for name in skills.TITLES)
    layers = as_text(row["slices"])
    lines.append(f"| {row['kind']} | {layers} | {row['depth']} | {losses} |")
  return "\n".join(lines)


def main(_: list[str]) -> None:
  """Measures every schedule, prints the table and draws the figure."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  print(texts.pydoc_source())
  kept = pathlib.Path(values.rows) if values.rows else None
  rows = json.loads(kept.read_text()) if kept and kept.exists() else []
  only = ["base", "block of 1"] if values.smoke else values.only
  with tempfile.TemporaryDirectory() as work:
    found = (
      skills.tiny_skills(work)
      if values.smoke
      else skills.smollm2_skills(values.cache)
    )
    for row in measure_all(found, only, rows):
      rows.append(row)
      print(as_table([row]).splitlines()[-1], flush=True)
      if kept:
        kept.write_text(json.dumps(rows, indent=1) + "\n")
  print(f"\n{as_table(rows)}")
  if values.out:
    path = pathlib.Path(values.out) / "frankenmerge.png"
    plots.save_figure(path, lambda: merges.draw_depths(rows, skills.TITLES))


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_list("only", [], "Some kinds; all without it.")
  flags.DEFINE_string("rows", None, "JSON file of what was measured.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "Folder of the figure.")
  flags.DEFINE_bool("smoke", False, "Tiny random models, in seconds.")
  app.run(main)
