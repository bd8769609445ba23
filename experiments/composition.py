# SPDX-License-Identifier: Apache-2.0
"""Do two skills that were learned apart do what needs both at once?

  python -m experiments.composition [--works=WORK,...] [--seeds=3]
    [--only=TEXT,...] [--out=FOLDER] [--cache=FOLDER] [--smoke]

Two adapters of one base, put together by every method of `jlora.merging`, and
beside them the controls: random adapters, and models that are trained. Works
are digits of a new class in a style, strings under two operations, and the
words of one text in the form of another. Prints a table a work: what asks for
both, what is kept of each skill, how far the base moved elsewhere, the numbers
trained and the seconds; then all works side by side, unit-wise merges at
several ranks, and what a pool of adapters is worth.

--out keeps a row a file; a second run goes on with it, and draws the figure.

Takes 22 minutes of processor time for three seeds of digits, and as long for
texts. Expect learned columns to be ahead of the plain sum of digits and
strings, orthogonal ones not of others, learned sums of few examples to be ahead
of both on texts, and a LoRA to need the skills' data.
"""

import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from experiments.lib.adapters import pools
from experiments.lib.adapters.benches import Bench, measure
from experiments.lib.adapters.compositions import (
  BESIDE,
  FEW,
  PLAIN,
  SEARCH,
  TRAINED,
  WHOLE,
  ZIPS,
  methods,
)
from experiments.lib.adapters.equal_ranks import MERGES
from experiments.lib.adapters.weighings import ENTROPIC, MIXES
from experiments.lib.adapters.works import Work
from experiments.lib.figures import compositions, plots
from experiments.lib.measures import kept_rows
from experiments.lib.models import digit_skills, string_skills, text_skills
from jlora.commands import keep_compilations

Row = dict[str, Any]


class Opening(NamedTuple):
  """How a work is opened.

  Attributes:
    title: in tables and figures.
    open: (seed, size) -> Work.
    full: its size.
    smoke: a size of seconds.
    measures: name of a figure -> its title in tables, "both" first.
    has_entropy: whether predictions are distributions.
    is_loss: whether smaller figures are better.
    gap: the figure of which a pool closes a share.
  """

  title: str
  open: Callable[[int, Any], Work]
  full: Any
  smoke: Any
  measures: Mapping[str, str]
  has_entropy: bool = False
  is_loss: bool = False
  gap: str = "both"


#: Every work that is compared.
WORKS = {
  **{
    style: Opening(
      f"digits, {style}",
      functools.partial(digit_skills.open_work, style),
      digit_skills.FULL,
      digit_skills.SMOKE,
      digit_skills.MEASURES,
    )
    for style in digit_skills.STYLES
  },
  "strings": Opening(
    "strings under two operations",
    string_skills.open_work,
    string_skills.FULL,
    string_skills.SMOKE,
    string_skills.MEASURES,
    has_entropy=True,
    gap="nats",
  ),
  "texts": Opening(
    "words in a form, nats a token",
    text_skills.open_work,
    text_skills.FULL,
    text_skills.SMOKE,
    text_skills.MEASURES,
    has_entropy=True,
    is_loss=True,
  ),
}
#: Methods that are compared with another than the plain sum.
COMPARED = (
  *(
    (f"dot {x}", "no penalty") for x in ("1e-6", "1e-5", "1e-4", "1e-3", "0.01")
  ),
  ("TSV in Core Space", "SVD of the sum"),
  ("LEGO, singular units", "SVD of the sum"),
  ("LEGO, given units", "SVD of the sum"),
  ("free, the 64", "LoRA on the 64"),
  ("leaky, with the own LoRA", "leaky, with the own LoRA, random entries"),
  *(
    (f"{one}{own}", f"{other}{own}")
    for own in ("", ", with own")
    for one, other in (
      ("3 of least loss", "3 of random entries"),
      ("3 of least loss", "3 of random directions"),
      ("3 of least loss", "3 at random"),
    )
  ),
  ("3 of least loss, with own", pools.OWN),
)
#: Methods that the figure names.
NAMED = (
  "base",
  PLAIN,
  "best of 16, on validation",
  "SVD of the sum",
  "no penalty",
  "softmax, skills' data (CAT)",
  "free, the 64",
  "LoRA on the 64",
  "LoRA on both skills' data",
  "LoRA on the 64 and both skills' data",
)


#: Methods of the table that puts works side by side.
SHOWN = (
  *BESIDE, PLAIN, "best of 16, on validation",
  *(x.name for x in MERGES if x.name != "LEGO, given units"),
  *ZIPS,
  *(x for x in MIXES if not x.startswith("leaky")), *ENTROPIC, SEARCH,
  "random entries, 1 and 1", FEW, *TRAINED, *WHOLE,
)  # fmt: skip


def measure_all(
  name: str, seed: int, only: Sequence[str], folder: pathlib.Path, smoke: bool
) -> Iterator[Row]:
  """Measures each method of a work that has no file yet, and writes it.

  Args:
    name: of WORKS.
    seed: of the work.
    only: texts of which one must be in a method's name; none is all.
    folder: of the rows' files.
    smoke: whether the size is that of seconds.

  Yields:
    Rows, also of earlier runs.
  """
  opening = WORKS[name]
  bench: Bench | None = None
  for method in methods(has_entropy=opening.has_entropy):
    named = f"{method.kind} {method.name}"
    file = kept_rows.file_of(folder, name, seed, named)
    if file.exists():
      yield json.loads(file.read_text())
    elif not only or any(text in method.name for text in only):
      if bench is None:
        began = time.monotonic()
        size = opening.smoke if smoke else opening.full
        bench = Bench(opening.open(seed, size), seed)
        spent = time.monotonic() - began
        print(f"{opening.title}, seed {seed}: {spent:.0f} s", flush=True)
      row = {
        "work": name, "seed": seed, "kind": method.kind, "method": method.name,
        **measure(bench, method.make),
      }  # fmt: skip
      kept_rows.keep(file, row)
      said = {key: round(x, 3) for key, x in row["figures"].items()}
      spent = f"{row['seconds']:.1f} s {row['notes']}"
      print(f"  {method.kind}: {method.name} {said} {spent}", flush=True)
      yield row


def run(
  works: Sequence[str],
  seeds: int,
  only: Sequence[str],
  folder: pathlib.Path,
  smoke: bool,
) -> list[Row]:
  """Measures all works and seeds, and prints the tables.

  Args:
    works: of WORKS.
    seeds: how many.
    only: as for `measure_all`.
    folder: of the rows' files.
    smoke: as for `measure_all`.

  Returns:
    All rows.
  """
  rows = []
  for seed in range(seeds):
    for name in works:
      rows += measure_all(name, seed, only, folder, smoke)
  tables = {WORKS[name].title: [name] for name in works}
  styles = [name for name in works if name in digit_skills.STYLES]
  if len(styles) > 1:
    tables["digits, all styles"] = styles
  for title, names in tables.items():
    own = [row for row in rows if row["work"] in names]
    measures = WORKS[names[0]].measures
    table = compositions.as_table(own, measures, ("sum", PLAIN))
    differences = compositions.as_differences(own, measures, COMPARED)
    print(f"\n{title}\n\n{table}\n\n{differences}\n", flush=True)
  titles = {name: WORKS[name].title for name in works}
  gaps = {name: WORKS[name].gap for name in works}
  print(compositions.as_overview(rows, titles, SHOWN))
  print(f"\n{compositions.as_units(rows, titles, MERGES[0].name)}")
  print(f"\n{compositions.as_gaps(rows, titles, gaps, ('base', pools.OWN))}")
  return rows


def main(_: list[str]) -> None:
  """Prints the tables; with --out, goes on with its rows and draws them."""
  values = flags.FLAGS
  began = time.process_time()
  keep_compilations(values.cache)
  seeds = 1 if values.smoke else values.seeds
  with tempfile.TemporaryDirectory() as work:
    folder = pathlib.Path(values.out or work)
    rows = run(values.works, seeds, values.only, folder, values.smoke)
    if values.out:
      titles = {name: opening.title for name, opening in WORKS.items()}
      losses = [name for name, opening in WORKS.items() if opening.is_loss]
      plots.save_figure(
        folder / "composition.png",
        lambda: compositions.draw(rows, titles, NAMED, losses),
      )
  print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_list("works", list(WORKS), "Some of the works.")
  flags.DEFINE_integer("seeds", 3, "Bases and pairs of adapters a work.")
  flags.DEFINE_list("only", [], "Methods whose names have one of these texts.")
  flags.DEFINE_string("out", None, "Folder for the rows and the figure.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_bool("smoke", False, "Tiny models, in seconds.")
  app.run(main)
