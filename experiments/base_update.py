# SPDX-License-Identifier: Apache-2.0
"""Do programs still work when their base gets an update?

  python -m experiments.base_update [--parts=PART,...] [--seeds=3]
    [--only=TEXT,...] [--out=FOLDER] [--cache=FOLDER] [--smoke]

A transformer of strings is trained, adapters of it for skills, and then the
base goes on to other operations; the far end is a base of another seed. Prints
a table for each part: what every method of porting recovers, with a random part
and with retraining as controls, and whether drift or overlap of the weights
tell where plain re-use fails; two adapters added, at ranks 1 to 64; updates
held to a low rank or beside the adapters' spaces, at equal loss; and a layer
left out, or replaced by a map of low rank. --parts=texts carries adapters of
SmolLM2-135M, when asked for.

--out keeps a row a file; a second run goes on with it, and draws the figure.

Takes 27 minutes of processor time for three seeds; of SmolLM2 82 for one, and
5 GB.
Expect training on the old base's answers to port an adapter, and methods that
read weights alone to be behind plain re-use.
"""

import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from experiments.lib.adapters import (
  language_ports,
  ports,
  rank_interference,
)
from experiments.lib.figures import plots, updates
from experiments.lib.measures import kept_rows
from experiments.lib.models import constrained_updates, replaced_layers
from experiments.lib.models.updated_strings import FULL, SMOKE, Size
from jlora.commands import keep_compilations

Row = dict[str, Any]


class Part(NamedTuple):
  """A part of the experiment.

  Attributes:
    title: in tables.
    names: size -> names of its rows.
    measure: (name, seed, size) -> figures.
    tables: rows -> Markdown.
  """

  title: str
  names: Callable[[Size], Sequence[str]]
  measure: Callable[[str, int, Size], Row]
  tables: Callable[[Sequence[Row]], str]


def _at_rank(name: str, seed: int, size: Size) -> Row:
  """Measures the sum of two adapters of the rank that a name ends with."""
  return rank_interference.measure(int(name.split()[1]), seed, size)


def _replaced(name: str, seed: int, size: Size) -> Row:
  """Measures a layer replaced, of a name as "layer 0: nothing"."""
  layer, kind = name.removeprefix("layer ").split(": ")
  return replaced_layers.measure(kind, layer, seed, size)


def _language(size: Size) -> language_ports.Size:
  """Returns the sizes of the language model's part."""
  return language_ports.FULL if size is FULL else language_ports.SMOKE


def _layers(size: Size) -> list[str]:
  """Names what may be in the place of every layer."""
  return [
    f"layer {i}: {kind}"
    for i in range(size.layers)
    for kind in replaced_layers.KINDS
  ]


#: Every part, in the order in which it is measured.
PARTS = {
  "ports": Part(
    "recovered by a target and a method",
    ports.targets,
    ports.measure,
    updates.as_ports,
  ),
  "ranks": Part(
    "two adapters added, by rank",
    lambda size: [f"rank {x}" for x in size.ranks],
    _at_rank,
    updates.as_ranks,
  ),
  "updates": Part(
    "updates of one gain, and what they break",
    lambda size: list(constrained_updates.FORMS),
    constrained_updates.measure,
    updates.as_updates,
  ),
  "layers": Part(
    "a layer replaced", _layers, _replaced, updates.as_layers
  ),
  "texts": Part(
    "SmolLM2-135M, trained on",
    lambda size: language_ports.targets(_language(size)),
    lambda name, seed, size: language_ports.measure(
      name, seed, _language(size)
    ),
    updates.as_texts,
  ),
}  # fmt: skip

#: Those of the small transformer.
STRINGS = [name for name in PARTS if name != "texts"]


def measure_all(
  name: str, seed: int, only: Sequence[str], folder: pathlib.Path, size: Size
) -> Iterator[Row]:
  """Measures each row of a part that has no file yet, and writes it.

  Args:
    name: of PARTS.
    seed: of all bases.
    only: texts of which one must be in a row's name; none is all.
    folder: of the rows' files.
    size: how much is computed.

  Yields:
    Rows, also of earlier runs.
  """
  part = PARTS[name]
  for row_name in part.names(size):
    file = kept_rows.file_of(folder, name, seed, row_name)
    if file.exists():
      yield json.loads(file.read_text())
    elif not only or any(text in row_name for text in only):
      began, spent = time.monotonic(), time.process_time()
      row = {
        "part": name, "seed": seed, "name": row_name,
        "figures": part.measure(row_name, seed, size),
        "seconds": time.monotonic() - began,
        "processor": time.process_time() - spent,
      }  # fmt: skip
      kept_rows.keep(file, row)
      said = f"{row['seconds']:.0f} s, {row['processor']:.0f} of processor time"
      print(f"{name}, seed {seed}: {row_name}, {said}", flush=True)
      yield json.loads(file.read_text())


def run(
  parts: Sequence[str],
  seeds: int,
  only: Sequence[str],
  folder: pathlib.Path,
  size: Size,
) -> list[Row]:
  """Measures all parts and seeds, and prints the tables.

  Args:
    parts: of PARTS.
    seeds: how many.
    only: as for `measure_all`.
    folder: of the rows' files.
    size: how much is computed.

  Returns:
    All rows.
  """
  rows = []
  for name in parts:
    for seed in range(seeds):
      rows += measure_all(name, seed, only, folder, size)
  for name in parts:
    own = [row for row in rows if row["part"] == name]
    if own:
      print(f"\n{PARTS[name].title}\n\n{PARTS[name].tables(own)}\n", flush=True)
  return rows


def main(_: list[str]) -> None:
  """Prints the tables; with --out, goes on with its rows and draws them."""
  values = flags.FLAGS
  began = time.process_time()
  keep_compilations(values.cache)
  size, seeds = (SMOKE, 1) if values.smoke else (FULL, values.seeds)
  with tempfile.TemporaryDirectory() as work:
    folder = pathlib.Path(values.out or work)
    rows = run(values.parts, seeds, values.only, folder, size)
    drawn = [row for row in rows if row["part"] in STRINGS]
    if values.out and drawn:
      plots.save_figure(folder / "base_update.png", lambda: updates.draw(drawn))
  print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_list("parts", STRINGS, f"Some of {', '.join(PARTS)}.")
  flags.DEFINE_integer("seeds", 3, "Bases and skills.")
  flags.DEFINE_list("only", [], "Rows whose names have one of these texts.")
  flags.DEFINE_string("out", None, "Folder for the rows and the figure.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_bool("smoke", False, "Tiny sizes, one seed: does it run?")
  app.run(main)
