# SPDX-License-Identifier: Apache-2.0
"""What beats truncated SVD at the same bytes: one table with every variant.

  python -m experiments.equal_bytes [--domain=kjv] [--tuning_steps=25]
    [--learning_rate=1e-4] [--ranks=16] [--seeds=0] [--only=...] [--skip=...]
  python -m experiments.equal_bytes --read=A.json,B.json [--figure=C.png]
  python -m experiments.equal_bytes --smoke

The finetune is of SmolLM2 (`experiments.finetune`); an adapter's distance is
KL(finetuned ‖ base + adapter) on held-out text of the finetune's domain and of
the other. Whatever is fitted is fitted to training text of the first domain.
The bytes are those of plain SVD at each of `--ranks` in bfloat16; every variant
stays within them. They are of the numbers; the column "file" has names and
shapes besides. A seed draws both texts' excerpts, the order of refining and the
labels of the Fisher information; "none" takes the beginnings of equal parts of
the texts, and 0 for the rest. `--read` puts rows of earlier runs of one pair,
written by `--out`, into one table without running anything.

Takes an hour a pair and seed with --costly on two loaded cores.
"""

import functools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments.lib.adapters import ladders, teachers, trials
from experiments.lib.adapters.trials import Trial
from experiments.lib.adapters.variants import COSTLY, PLAIN, VARIANTS, Variant
from experiments.lib.figures import plots
from jlora.commands import keep_compilations

Row = dict[str, Any]

_NO_TEXT = {"variant", "rank", "seed", "bytes", "file_bytes", "seconds"}


def compare_variants(
  trial: Trial,
  listened: Mapping[str, teachers.Teacher],
  rank: int,
  variants: Mapping[str, Variant] = VARIANTS,
) -> Iterator[Row]:
  """Measures every variant; yields its row as soon as it is there.

  Args:
    trial: the pair.
    listened: name -> the finetune on held-out text.
    rank: of plain SVD, whose bytes are the budget.
    variants: name -> what makes the adapter.

  Yields:
    variant, rank, seed, bytes, file_bytes, seconds to make without what
    `trial.spent` has, and for each text `kl` and `kl_error`.
  """
  ladder = trial.ladder
  for name, make in variants.items():
    before, began = sum(trial.spent.values()), time.perf_counter()
    made = make(trial, rank)
    seconds = time.perf_counter() - began
    seconds -= sum(trial.spent.values()) - before
    params = ladders.with_loras(ladder.base, made.loras)
    row = {
      "variant": name,
      "rank": rank,
      "seed": trial.seed,
      "bytes": made.nbytes,
      "file_bytes": made.file_bytes,
      "seconds": round(seconds, 1),
    }
    for text, teacher in listened.items():
      kl, error = teachers.distance_from(teacher, params)
      row[text] = {"kl": kl, "kl_error": error}
    yield row


def summarise(rows: Sequence[Row], texts: Sequence[str]) -> list[Row]:
  """Averages rows over seeds, one for each rank and variant.

  Args:
    rows: as measured; plain SVD among them for each rank and seed.
    texts: names.

  Returns:
    variant, rank, seeds, bytes, file_bytes (NaN where rows lack it) and
    seconds (means), and for each text `kl`, `kl_error`, `ratio` to plain SVD of
    the same seed and `ratio_error`: means over seeds, errors their standard
    deviation over seeds; for one seed `kl_error` is the standard error over
    sequences and `ratio_error` NaN.

  Raises:
    ValueError: where plain SVD is missing.

  Example:
    >>> plain = {"variant": PLAIN, "rank": 4, "seed": 0, "bytes": 8,
    ...          "seconds": 1.0, "kjv": {"kl": 0.5, "kl_error": 0.1}}
    >>> half = {**plain, "variant": "x", "kjv": {"kl": 0.25, "kl_error": 0.1}}
    >>> summarise([plain, half], ["kjv"])[1]["kjv"]["ratio"]
    0.5
  """
  reference = {
    (row["rank"], row["seed"]): row for row in rows if row["variant"] == PLAIN
  }
  groups: dict[tuple[int, str], list[Row]] = {}
  for row in rows:
    if (row["rank"], row["seed"]) not in reference:
      raise ValueError(
        f"{PLAIN} is missing at rank {row['rank']}, seed {row['seed']}: "
        "measure it as well, all others are told relative to it."
      )
    groups.setdefault((row["rank"], row["variant"]), []).append(row)
  found = []
  for (rank, variant), members in groups.items():
    whole: Row = {"variant": variant, "rank": rank, "seeds": len(members)}
    for column in ("bytes", "file_bytes", "seconds"):
      values = [row.get(column, np.nan) for row in members]
      whole[column] = float(np.mean(values))
    for text in texts:
      kl = [row[text]["kl"] for row in members]
      ratios = [
        row[text]["kl"] / reference[rank, row["seed"]][text]["kl"]
        for row in members
      ]
      several = len(members) > 1
      whole[text] = {
        "kl": float(np.mean(kl)),
        "kl_error": float(np.std(kl, ddof=1))
        if several
        else members[0][text]["kl_error"],
        "ratio": float(np.mean(ratios)),
        "ratio_error": float(np.std(ratios, ddof=1))
        if several
        else float("nan"),
      }
    found.append(whole)
  return found


def as_table(summaries: Sequence[Row], texts: Sequence[str]) -> str:
  """Formats the summaries of one rank as a Markdown table.

  Args:
    summaries: as `summarise` gives them.
    texts: names, a pair of columns each.

  Returns:
    Lines.
  """
  heads = "".join(f" KL on {name} | x plain |" for name in texts)
  lines = [
    f"| variant | seeds | MiB | file |{heads} s |",
    f"|---|---|---|---|{'---|---|' * len(texts)}---|",
  ]
  for row in summaries:
    cells = []
    for text in texts:
      found = row[text]
      spread = found["ratio_error"]
      cells.append(f"{found['kl']:.5f} ± {found['kl_error']:.5f}")
      cells.append(
        f"{found['ratio']:.3f}"
        + ("" if np.isnan(spread) else f" ± {spread:.3f}")
      )
    lines.append(
      f"| {row['variant']} | {row['seeds']} | {row['bytes'] / 2**20:.2f} | "
      f"{row['file_bytes'] / 2**20:.2f} | "
      + " | ".join(cells)
      + f" | {row['seconds']:.1f} |"
    )
  return "\n".join(lines)


def _trials(values: Any) -> Iterator[tuple[Trial, dict[str, np.ndarray]]]:
  """Yields a trial and its held-out texts for each seed; factors once."""
  seeds = [None if seed == "none" else int(seed) for seed in values.seeds]
  if values.smoke:
    with tempfile.TemporaryDirectory() as work:
      yield trials.tiny_trial(work, seeds[0] or 0)
    return
  ladder, encode = trials.smollm2_ladder(
    values.cache,
    values.domain,
    values.tuning_steps,
    values.learning_rate,
    values.highest,
  )
  for seed in seeds:
    calibration, held_out = trials.draw_texts(
      encode, values.cache, values.domain, values.rows, seed
    )
    yield Trial(ladder, calibration, values.steps, seed or 0), held_out


def _chosen(values: Any) -> dict[str, Variant]:
  """Returns the variants asked for; costly ones by name or with --costly."""
  skipped = () if values.costly else COSTLY
  names = values.only or [name for name in VARIANTS if name not in skipped]
  unknown = [name for name in names if name not in VARIANTS]
  if unknown:
    raise app.UsageError(f"no variants: {unknown}; there are {list(VARIANTS)}")
  return {name: VARIANTS[name] for name in names}


def _measure(values: Any) -> Iterator[Row]:
  """Yields a row for every seed, rank and variant; prints their times."""
  ranks = [2] if values.smoke else [int(rank) for rank in values.ranks]
  for trial, held_out in _trials(values):
    ladder = trial.ladder
    listened = {
      name: teachers.listen(ladder.model, ladder.finetuned, tokens)
      for name, tokens in held_out.items()
    }
    for rank in ranks:
      yield from compare_variants(trial, listened, rank, _chosen(values))
    for name, seconds in trial.spent.items():
      print(f"seed {trial.seed}: {name}, {seconds:.0f} s")


def read_rows(files: Sequence[str | os.PathLike[str]]) -> list[Row]:
  """Reads rows of several files; the last one of what was measured twice.

  Args:
    files: as `--out` writes them, of one pair.

  Returns:
    The rows.
  """
  found = {}
  for file in files:
    for row in json.loads(pathlib.Path(file).read_text()):
      found[row["rank"], row["seed"], row["variant"]] = row
  return list(found.values())


def main(_: list[str]) -> None:
  """Prints a row as it is measured, then the tables; writes rows as JSON."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  rows: list[Row] = read_rows(values.read) if values.read else []
  for row in () if values.read else _measure(values):
    rows.append(row)
    print(json.dumps(row), flush=True)
    if values.out:
      text = json.dumps(rows, indent=1)
      pathlib.Path(values.out).write_text(text + "\n")
  names = [name for name in rows[0] if name not in _NO_TEXT]
  whole = summarise(rows, names)
  for rank in dict.fromkeys(row["rank"] for row in rows):
    shown = [row for row in whole if row["rank"] == rank]
    print(f"\nThe bytes of rank {rank}:\n\n{as_table(shown, names)}")
  if values.figure:
    first = [row for row in whole if row["rank"] == rows[0]["rank"]]
    title = f"At the bytes of plain SVD at rank {rows[0]['rank']} in bfloat16"
    draw = functools.partial(plots.draw_ratios, first, names, title)
    plots.save_figure(values.figure, draw)


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_string("domain", "kjv", "Text of the finetune.")
  flags.DEFINE_integer("tuning_steps", 25, "Of the finetune.")
  flags.DEFINE_float("learning_rate", 1e-4, "Of the finetune.")
  flags.DEFINE_list("ranks", ["16"], "Of plain SVD, whose bytes are budgets.")
  flags.DEFINE_list("seeds", ["0"], "Of what is drawn.")
  flags.DEFINE_integer("steps", 80, "Of refining.")
  flags.DEFINE_integer("rows", 16, "Held-out rows of 128 tokens, each text.")
  flags.DEFINE_integer("highest", 256, "Rank up to which is factored.")
  flags.DEFINE_list("only", None, "Some variants by name.")
  flags.DEFINE_bool("costly", False, "Refined and sensitivity as well.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "JSON file for the rows.")
  flags.DEFINE_list("read", None, "Such files, instead of running.")
  flags.DEFINE_string("figure", None, "Image file, of the first rank.")
  flags.DEFINE_bool("smoke", False, "The tiny pair, in seconds.")
  app.run(main)
