# SPDX-License-Identifier: Apache-2.0
"""Does extraction lose more from larger models? One recipe, several widths.

  python -m experiments.width_family [--widths=64,128,256,512] [--seeds=3]

Byte-level Llamas of four layers are trained on technical English, then wholly
finetuned on the King James Bible, all by the same steps and learning rates. The
relative error of extraction at fixed ranks and at a fixed share of the width is
printed for MLPs and attention, over seeds.

Takes over 30 minutes on two loaded cores. Expect the error to grow with width
at a fixed rank, and to fall at a fixed share of the width.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments.lib.adapters import ladders
from experiments.lib.data import smollm2, texts
from experiments.lib.data.llamas import config_of
from experiments.lib.models import finetunes
from jlora import models
from jlora.commands import keep_compilations
from jlora.ranks import error_of

RANKS = (4, 8, 16)
SHARE = 8  # rank is the width over this


def train_member(
  width: int,
  seed: int,
  corpora: Sequence[np.ndarray],
  steps: tuple[int, int],
) -> ladders.Ladder:
  """Trains and finetunes a member of the family, and factors its change.

  Args:
    width: hidden size.
    seed: of its start and of the order of texts.
    corpora: rows (n, time + 1) of the first and of the second text.
    steps: of training and of finetuning, 4 rows each.

  Returns:
    Ladder up to a rank of half the width.
  """
  apply, params = models.init(config_of(width), jax.random.key(seed))
  trained = []
  for tokens, count, rate in zip(corpora, steps, (1e-3, 3e-4), strict=True):
    rng = np.random.default_rng(seed)
    rows = tokens[rng.permutation(len(tokens))[: 4 * count]]
    params = finetunes.finetune(
      apply,
      params,
      texts.batches(rows, 4, seed),
      steps=count,
      learning_rate=rate,
    )
    trained.append(params)
  base, tuned = trained
  return ladders.build_ladder(apply, base, tuned, width // 2)


def measure_member(ladder: ladders.Ladder, width: int) -> dict[str, Any]:
  """Measures what extraction loses of a member, by part.

  Args:
    ladder: as `train_member` gives it.
    width: its hidden size.

  Returns:
    parameters, and for "mlp" and "attn" the relative error by rank, at the
    fixed share (key "share"), and the mean stable rank.
  """
  found: dict[str, Any] = {
    "width": width,
    "parameters": sum(x.size for x in jax.tree.leaves(ladder.base)),
  }
  for part in ("mlp", "attn"):
    paths = [path for path in ladder.loras if f"/{part}/" in path]
    spectra, norms, rests = (
      {path: given[path] for path in paths}
      for given in (ladder.spectra, ladder.norms, ladder.rests)
    )
    measure = error_of(spectra, norms, rests)

    def error(rank, measure=measure, spectra=spectra):
      """Computes the relative error at a rank."""
      return measure({path: min(rank, len(s)) for path, s in spectra.items()})

    stable = [
      (ladder.norms[path] / float(ladder.spectra[path][0])) ** 2
      for path in paths
    ]
    found[part] = {
      **{str(rank): error(rank) for rank in RANKS},
      "share": error(width // SHARE),
      "stable_rank": float(np.mean(stable)),
    }
  return found


def as_table(rows: Iterable[Mapping[str, Any]]) -> str:
  """Formats means and standard deviations over seeds, by width.

  Args:
    rows: of `measure_member`, any seeds.

  Returns:
    A Markdown table.
  """
  columns = [*map(str, RANKS), "share", "stable_rank"]
  heads = [
    *(f"rank {rank}" for rank in RANKS),
    f"width / {SHARE}",
    "stable rank",
  ]
  lines = [
    "| width | parameters | part | " + " | ".join(heads) + " |",
    "|---" * (3 + len(heads)) + "|",
  ]
  groups: dict[int, list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault(row["width"], []).append(row)
  for width, members in sorted(groups.items()):
    for part in ("mlp", "attn"):
      cells = []
      for column in columns:
        values = [row[part][column] for row in members]
        spread = np.std(values, ddof=1) if len(values) > 1 else float("nan")
        digits = 1 if column == "stable_rank" else 3
        cells.append(f"{np.mean(values):.{digits}f} ± {spread:.{digits}f}")
      size = members[0]["parameters"]
      lines.append(
        f"| {width} | {size / 1e6:.2f}M | {part} | " + " | ".join(cells) + " |"
      )
  return "\n".join(lines)


def main(_: list[str]) -> None:
  """Trains the family, prints the table and writes the rows as JSON."""
  values = flags.FLAGS
  keep_compilations(values.cache)
  print(texts.pydoc_source())
  first, second = texts.pydoc(), smollm2.kjv(values.cache)
  steps = (values.steps, values.steps // 2)
  corpora = [
    texts.excerpts(
      texts.split(text)[0], texts.encode_bytes, rows=4 * count, length=128
    )
    for text, count in zip((first, second), steps, strict=True)
  ]
  rows = []
  for width in map(int, values.widths):
    for seed in range(values.seeds):
      ladder = train_member(width, seed, corpora, steps)
      rows.append({"seed": seed, **measure_member(ladder, width)})
      print(f"  {rows[-1]}", flush=True)
  print(as_table(rows))
  if values.out:
    pathlib.Path(values.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_list("widths", ["64", "128", "256", "512"], "Hidden sizes.")
  flags.DEFINE_integer("seeds", 3, "Runs of every width.")
  flags.DEFINE_integer("steps", 200, "Of training; half as many of finetuning.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_string("out", None, "JSON file.")
  app.run(main)
