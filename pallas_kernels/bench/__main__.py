# SPDX-License-Identifier: Apache-2.0
"""Prints what fusing a low-rank change costs and saves, compiled or timed.

  python -m pallas_kernels.bench              bytes and rooflines, v5e and v6e
  python -m pallas_kernels.bench --goals      the goals, with static cycles
  python -m pallas_kernels.bench --cpu        real times on this CPU, ratios

The first two compile for chips that are not there (extra `aot`); nothing they
print was timed. Each row is a line of JSON with `--out`.
"""

import argparse
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence

from pallas_kernels.aot.chips import CHIPS, MIB, TPUS, bound
from pallas_kernels.bench.measurements import Row, measure_cpu, measure_program
from pallas_kernels.bench.programs import FORWARD, STEP, Sizes, operations
from pallas_kernels.bench.shapes import MATRICES, ROWS
from pallas_kernels.bench.tables import print_table

GOAL = Sizes(8192, 4096, 4096, 16)
DECODE = Sizes(64, 4096, 4096, 16)
CPU_SIZES = (
  Sizes(512, 576, 1536, 16),
  Sizes(512, 2048, 2048, 16),
  Sizes(512, 2048, 2048, 64),
  Sizes(1024, 4096, 4096, 64),
)

_HEAD = (
  "matrix",
  "K x N",
  "rows",
  "rank",
  "chip",
  "programs",
  "HBM MB",
  "least",
  "roofline us",
  "bound by",
  "temporaries MB",
  "VMEM MiB",
)


def _cells(label: str, rows: Sequence[Row]) -> list[str]:
  """Makes one line of several programs of the same sizes, in that order."""
  m, k, n, r = rows[0].sizes

  def each(text):
    return " / ".join("refused" if row.refused else text(row) for row in rows)

  return [
    label,
    f"{k} x {n}",
    *(str(m), str(r), rows[0].chip),
    " / ".join(row.name for row in rows) + (" step" if rows[0].step else ""),
    each(lambda row: f"{row.moved / 1e6:.1f}"),
    f"{rows[-1].least / 1e6:.1f}",
    each(lambda row: f"{1e6 * row.estimated:.0f}"),
    " / ".join(dict.fromkeys(row.by for row in rows if not row.refused)),
    each(lambda row: f"{row.temporaries / 1e6:.1f}"),
    f"{max(row.vmem for row in rows) / MIB:.1f}",
  ]


def _keep(row: Row, out: pathlib.Path | None) -> Row:
  """Returns the row, after writing it to the file if there is one."""
  if out is not None:
    with out.open("a", encoding="utf-8") as file:
      line = row._asdict() | {"sizes": row.sizes._asdict()}
      file.write(json.dumps(line) + "\n")
  return row


def show_programs(options: argparse.Namespace) -> None:
  """Prints a line for each matrix, number of rows, rank and chip."""
  chosen = [
    (matrix, regime)
    for matrix in MATRICES
    if any(part in f"{matrix.model} {matrix.name}" for part in options.matrices)
    for regime in options.regimes
  ]

  def lines():
    kinds = itertools.product(options.ranks, options.chips)
    for (matrix, regime), (rank, chip) in itertools.product(chosen, kinds):
      sizes = Sizes(ROWS[regime], matrix.k, matrix.n, rank)
      with_step = options.step and regime == "training"
      for step in (False, True) if with_step else (False,):
        rows = [
          _keep(measure_program(name, step, chip, sizes), options.out)
          for name in (STEP if step else options.programs)
        ]
        for row in rows:
          if row.refused:
            print(f"{row.name}: {row.refused[:500]}", file=sys.stderr)
        yield _cells(f"{matrix.model} {matrix.name}", rows)

  print_table(_HEAD, lines())


def verdict(value: float | None, most: float) -> str:
  """Writes a value, on which side of its goal it lies, and the goal.

  Example:
    >>> verdict(1.2, 1.1)
    '1.200 > 1.1'
  """
  if value is None:
    return "no estimate"
  return f"{value:.3f} {'<=' if value <= most else '>'} {most}"


def _divided(a: float | None, b: float | None) -> float | None:
  """Divides two numbers; None where one is missing or zero."""
  return a / b if a and b else None


def _goals_of(chip: str, rank: int, out: pathlib.Path | None):
  """Yields (rows, goal, value or None, limit) of one chip and rank."""

  def get(name, step, sizes, cycles=False):
    row = measure_program(name, step, chip, sizes, cycles=cycles)
    if row.refused:
      raise ValueError(f"{name} on {chip}: {row.refused[:300]}")
    return _keep(row, out)

  many, few = GOAL._replace(r=rank), DECODE._replace(r=rank)
  plain = get("base", False, many._replace(r=16), cycles=True)
  apart = get("unfused", False, many, cycles=True)
  whole = get("fused", False, many, cycles=True)
  steps = [get(name, True, many).moved for name in ("fused", "unfused")]
  small = get("fused", False, few).moved - 2 * rank * (few.k + few.n)
  lone = get("base", False, few._replace(r=16)).moved
  quick = _divided(whole.cycles, plain.cycles)
  yield many.m, "bytes / base's least", whole.moved / plain.least, 1.05
  yield many.m, "cycles / base's", quick, 1.10
  yield many.m, "cycles / unfused's", _divided(whole.cycles, apart.cycles), 0.9
  paced = _divided(whole.paced, apart.paced)
  yield many.m, "cycles paced by HBM / unfused's", paced, 0.9
  yield many.m, "step's bytes / unfused's", steps[0] / steps[1], 0.65
  yield few.m, "bytes less the adapter's / base's", small / lone, 1.02


def show_goals(options: argparse.Namespace) -> None:
  """Prints the goals of the fused kernel, and whether they hold."""

  def rows():
    for chip in options.chips:
      for rank in options.ranks:
        for m, goal, value, most in _goals_of(chip, rank, options.out):
          yield [chip, str(m), str(rank), goal, verdict(value, most)]

  print_table(("chip", "rows", "rank", "fused", "found"), rows())


def show_rooflines(options: argparse.Namespace) -> None:
  """Prints the base product's least time on each chip, and its bound."""

  def rows():
    for name, chip in CHIPS.items():
      for rows_ in options.regimes:
        sizes = GOAL._replace(m=ROWS[rows_])
        flops = operations("base", False, sizes)
        m, k, n, _ = sizes
        found = bound(chip, flops, 2 * (m * k + k * n + m * n))
        yield [name, str(m), f"{1e6 * found.seconds:.1f}", found.by]

  print_table(("chip", "rows", "roofline us", "bound by"), rows())


def show_cpu(options: argparse.Namespace) -> None:
  """Prints times on this CPU as ratios to the base product, in one run."""

  def rows():
    for sizes in CPU_SIZES:
      found = measure_cpu(sizes, options.repeats)
      yield [
        " x ".join(map(str, sizes[:3])),
        str(sizes.r),
        f"{found.base_ms:.2f}",
        f"{found.ratio:.3f}",
        f"{found.share:.3f}",
        verdict(found.ratio, round(found.allowed, 3)),
      ]

  head = "M x K x N", "rank", "base ms", "layer / base", "1 + share", "goal"
  print_table(head, rows())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the flags; their help says what each does."""
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.bench",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--goals", action="store_true", help="what the fused kernel should reach")
  add("--cpu", action="store_true", help="real times on this CPU")
  add("--rooflines", action="store_true", help="no compiler, every chip")
  add("--step", action="store_true", help="forward and backward too")
  add("--chips", nargs="+", default=["v5e", "v6e"], choices=TPUS)
  add("--matrices", nargs="+", default=[""], help="parts of their names")
  add("--regimes", nargs="+", default=[*ROWS], choices=[*ROWS])
  default = ["base", "unfused", "fused", "merging"]
  add("--programs", nargs="+", default=default, choices=[*FORWARD])
  add("--ranks", nargs="+", type=int, default=[16])
  add("--repeats", type=int, default=21, help="of each program, with --cpu")
  add("--out", type=pathlib.Path, help="JSON lines, appended")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the table that the flags ask for."""
  options = parse(arguments)
  if options.cpu:
    show_cpu(options)
  elif options.goals:
    show_goals(options)
  elif options.rooflines:
    show_rooflines(options)
  else:
    show_programs(options)


if __name__ == "__main__":
  main()
