# SPDX-License-Identifier: Apache-2.0
"""Does routing find the adapter that an example needs?

  python -m experiments.routing [--beds=BED,...] [--seeds=3] [--only=TEXT,...]
    [--out=FOLDER] [--cache=FOLDER] [--smoke]

Five testbeds of `jlora.routing`, each with its controls: ReMix on a toy of six
regimes (five seeds) and on a Llama whose texts have hidden regimes, modalities
beside text, visual analogies of 32 and of 96 tasks, and a library of eight
skills routed by prototypes. Prints a table a testbed.

--out keeps a row a file; a second run goes on with it, and draws the figure.

Takes about an hour of processor time. Expect routers that are trained to find
their adapters, and prototypes to lose to the plain sum.
"""

import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from experiments.lib.adapters import routers
from experiments.lib.figures import plots, routings
from experiments.lib.measures import kept_rows
from experiments.lib.models import (
  analogies,
  hidden_regimes,
  modal_strings,
  regimes,
  skill_library,
)
from jlora.commands import keep_compilations

Row = dict[str, Any]


class Bed(NamedTuple):
  """A testbed.

  Attributes:
    title: in tables and figures.
    methods: names of what is compared, in the table's order.
    measure: (method, seed, size) -> "figures", and further notes.
    full: its size.
    smoke: a size of seconds.
    measures: name of a figure -> its title.
    compared: methods whose difference to another is printed, with that one.
    seeds: how many, at most; None is what is asked for.
  """

  title: str
  methods: Sequence[str]
  measure: Callable[[str, int, Any], Row]
  full: Any
  smoke: Any
  measures: Mapping[str, str]
  compared: Sequence[tuple[str, str]] = ()
  seeds: int | None = None


_REMIX = "ReMix"
_SOFTMAX = tuple(
  name for name in routers.METHODS if name.startswith("softmax top-k")
)
_AGAINST_REMIX = tuple(
  (name, _REMIX) for name in (*_SOFTMAX, "ReMix, frozen random router")
)
_ANALOGIES = Bed(
  "analogies, 32 tasks",
  tuple(analogies.METHODS),
  analogies.measure,
  analogies.FULL,
  analogies.SMOKE,
  analogies.MEASURES,
  tuple((name, analogies.ONE) for name in analogies.METHODS)[1:],
)
#: Every testbed.
BEDS = {
  "regimes": Bed(
    "six regimes of a linear layer",
    tuple(routers.METHODS),
    regimes.measure,
    regimes.FULL,
    regimes.SMOKE,
    regimes.MEASURES,
    _AGAINST_REMIX,
    seeds=5,
  ),
  "llama": Bed(
    "hidden regimes of a Llama",
    hidden_regimes.METHODS,
    hidden_regimes.measure,
    hidden_regimes.FULL,
    hidden_regimes.SMOKE,
    hidden_regimes.MEASURES,
    _AGAINST_REMIX,
  ),
  "modalities": Bed(
    "modalities beside text",
    tuple(modal_strings.METHODS),
    modal_strings.measure,
    modal_strings.FULL,
    modal_strings.SMOKE,
    modal_strings.MEASURES,
    (("projectors alone", "adapters by the table"),),
  ),
  "analogies": _ANALOGIES,
  "analogies_96": _ANALOGIES._replace(
    title="analogies, 96 tasks",
    methods=analogies.LARGE_METHODS,
    full=analogies.LARGE,
    smoke=analogies.LARGE_SMOKE,
  ),
  "library": Bed(
    "a library of eight skills",
    tuple(skill_library.METHODS),
    skill_library.measure,
    skill_library.FULL,
    skill_library.SMOKE,
    skill_library.MEASURES,
    tuple((name, "the plain sum") for name in skill_library.METHODS
          if name.startswith("Arrow")),
  ),
}  # fmt: skip


def measure_all(
  name: str, seed: int, only: Sequence[str], folder: pathlib.Path, smoke: bool
) -> Iterator[Row]:
  """Measures each method of a testbed that has no file yet, and writes it.

  Args:
    name: of BEDS.
    seed: of the testbed.
    only: texts of which one must be in a method's name; none is all.
    folder: of the rows' files.
    smoke: whether the size is that of seconds.

  Yields:
    Rows, also of earlier runs.
  """
  bed = BEDS[name]
  size = bed.smoke if smoke else bed.full
  for method in bed.methods:
    file = kept_rows.file_of(folder, name, seed, method)
    if file.exists():
      yield json.loads(file.read_text())
    elif not only or any(text in method for text in only):
      began, spent = time.monotonic(), time.process_time()
      row = {
        "bed": name, "seed": seed, "method": method,
        **bed.measure(method, seed, size),
        "seconds": time.monotonic() - began,
        "processor": time.process_time() - spent,
      }  # fmt: skip
      kept_rows.keep(file, row)
      said = {key: round(x, 4) for key, x in row["figures"].items()}
      print(f"  {name} {seed}: {method} {said} {row['seconds']:.0f} s",
            flush=True)  # fmt: skip
      yield row


def run(
  beds: Sequence[str],
  seeds: int,
  only: Sequence[str],
  folder: pathlib.Path,
  smoke: bool,
) -> list[Row]:
  """Measures all testbeds and seeds, and prints the tables.

  Args:
    beds: of BEDS.
    seeds: how many, where a testbed says nothing else.
    only: as for `measure_all`.
    folder: of the rows' files.
    smoke: as for `measure_all`; one seed.

  Returns:
    All rows.
  """
  rows = []
  for name in beds:
    bed = BEDS[name]
    own = []
    for seed in range(1 if smoke else bed.seeds or seeds):
      own += measure_all(name, seed, only, folder, smoke)
    table = routings.as_table(own, bed.measures)
    less = routings.as_differences(own, bed.measures, bed.compared)
    print(f"\n{bed.title}\n\n{table}\n\n{less}\n", flush=True)
    print(routings.as_task_differences(own, bed.compared), flush=True)
    rows += own
  return rows


def main(_: list[str]) -> None:
  """Prints the tables; with --out, goes on with its rows and draws them."""
  values = flags.FLAGS
  began = time.process_time()
  keep_compilations(values.cache)
  with tempfile.TemporaryDirectory() as work:
    folder = pathlib.Path(values.out or work)
    rows = run(values.beds, values.seeds, values.only, folder, values.smoke)
    if values.out:
      titles = {name: bed.title for name, bed in BEDS.items()}
      draw = functools.partial(routings.draw, rows, titles)
      plots.save_figure(folder / "routing.png", draw)
  print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_list("beds", list(BEDS), "Some of the testbeds.")
  flags.DEFINE_integer("seeds", 3, "Of most testbeds.")
  flags.DEFINE_list("only", [], "Methods whose names have one of these texts.")
  flags.DEFINE_string("out", None, "Folder for the rows and the figure.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_bool("smoke", False, "Tiny sizes, one seed: does it run?")
  app.run(main)
