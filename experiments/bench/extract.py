# SPDX-License-Identifier: Apache-2.0
"""How near to the optimum is extraction, how fast, and in how much memory?

  python -m experiments.bench.extract [--part=errors,factoring] [--quick]
    [--mergekit=VENV/bin/mergekit-extract-lora] [--real=BASE,FINETUNED]

Prints one table: every goal is a ratio within this run, on this machine, or a
peak of memory. The pair of the process and memory parts is a bfloat16 Llama of
width 2048 whose finetune leaves embeddings and norms as they are: ours reads
and compares them, mergekit 0.1.5 is told to leave the embeddings out (it would
store them whole).

Takes 7 minutes on two cores, many more with mergekit; the largest pair takes
3.8 GB of disk. The goals stand beside the values.
"""

import json
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from absl import app, flags

from experiments.bench.arrays import Row, measure_errors, measure_factoring
from experiments.bench.processes import Bench
from experiments.lib.data import pairs

PARTS = ("errors", "factoring", "process", "memory", "small")


class Sizes(NamedTuple):
  """The sizes that are measured.

  Attributes:
    errors: shape of the synthetic matrices.
    factoring: shape of the matrix that is timed.
    repeats: of the timed functions.
    rank: of all but the small matrices.
    config: the Llama, but for its number of layers.
    layers: of the whole runs; twice as many give the time of a further one.
    memory: layers of the runs whose memory is compared.
    small: sides of the small matrices, from and to, and how many there are.
    small_rank: their rank.
  """

  errors: tuple[int, int]
  factoring: tuple[int, int]
  repeats: int
  rank: int
  config: Mapping[str, Any]
  layers: int
  memory: tuple[int, ...]
  small: tuple[int, int, int]
  small_rank: int


_QUICK_WIDTHS = {
  "vocab_size": 256,
  "hidden_size": 64,
  "intermediate_size": 64,
  "num_attention_heads": 2,
  "num_key_value_heads": 2,
  "head_dim": 32,
}
FULL = Sizes(
  errors=(1024, 2816),
  factoring=(2048, 5632),
  repeats=15,
  rank=64,
  config=pairs.LLAMA,
  layers=8,
  memory=(4, 8, 16),
  small=(64, 512, 150),
  small_rank=32,
)
QUICK = Sizes(
  errors=(192, 256),
  factoring=(256, 512),
  repeats=3,
  rank=8,
  config={**pairs.LLAMA, **_QUICK_WIDTHS},
  layers=1,
  memory=(1, 2),
  small=(16, 20, 2),
  small_rank=4,
)


def small_matrices(
  low: int, high: int, count: int
) -> dict[str, tuple[int, int]]:
  """Names many small matrices of few shapes, 20 if there are enough.

  Args:
    low: the smallest side.
    high: the largest side.
    count: of matrices.

  Returns:
    Name -> shape.

  Example:
    >>> len(set(small_matrices(64, 512, 150).values()))
    20
  """
  step = (high - low) // 4
  sides = range(low, high + 1, step)
  shapes = [(m, n) for m in sides for n in sides if m != n]
  return {
    f"blocks.{index}.in_proj.weight": shapes[index % len(shapes)]
    for index in range(count)
  }


def measure_parts(
  parts: Iterable[str],
  sizes: Sizes,
  work: pathlib.Path,
  *,
  mergekit: str | None = None,
  real: tuple[str, str] | None = None,
) -> Iterator[Row]:
  """Measures the chosen parts; yields each row as soon as it is there.

  Args:
    parts: of PARTS.
    sizes: FULL or QUICK.
    work: folder for pairs.
    mergekit: its mergekit-extract-lora, or None.
    real: base and finetuned checkpoint, or None.

  Yields:
    Row.
  """
  bench = Bench(work, mergekit, sizes.config, sizes.rank)
  small = Bench(work, mergekit, sizes.config, sizes.small_rank)
  low, high, count = sizes.small
  llama = {
    **sizes.config,
    "vocab_size": 256,
    "hidden_size": high // 2,
    "intermediate_size": high,
    "num_attention_heads": high // 64 or 1,
    "num_key_value_heads": high // 128 or 1,
    "head_dim": 32,
    "num_hidden_layers": count // 7 or 1,
  }
  rows = {
    "errors": lambda: measure_errors(sizes.errors, sizes.rank, real),
    "factoring": lambda: measure_factoring(
      sizes.factoring, sizes.rank, sizes.repeats
    ),
    "process": lambda: bench.measure_process(sizes.layers),
    "memory": lambda: bench.measure_memory(sizes.memory),
    "small": lambda: small.measure_small(
      small_matrices(low, high, count), llama
    ),
  }
  for part in parts:
    yield from rows[part]()


def as_line(row: Row) -> str:
  """Formats a row of the table in Markdown.

  Args:
    row: as measured.

  Returns:
    A Markdown table's line.

  Example:
    >>> as_line(Row("errors", "krylov, flat", 1.00051, "x", "<= 1.001"))
    '| errors | krylov, flat | 1.0005 x | <= 1.001 |  |'
  """
  if row.value is None:
    value = "-"
  else:
    value = f"{row.value:.4f}" if row.part == "errors" else f"{row.value:.4g}"
    value = f"{value} {row.unit}".strip()
  return f"| {row.part} | {row.what} | {value} | {row.goal} | {row.note} |"


def main(_: list[str]) -> None:
  """Measures the chosen parts and prints the table."""
  values = flags.FLAGS
  if values.real and len(values.real) != 2:
    raise app.UsageError("--real takes two checkpoints: BASE,FINETUNED")
  if unknown := [part for part in values.part if part not in PARTS]:
    raise app.UsageError(f"--part takes {', '.join(PARTS)}, got {unknown}")
  real = tuple(values.real) if values.real else None
  sizes = QUICK if values.quick else FULL
  if not values.json:
    print("| part | what | value | goal | how |\n|---|---|---|---|---|")
  with tempfile.TemporaryDirectory(dir=values.work) as work:
    for row in measure_parts(
      values.part,
      sizes,
      pathlib.Path(work),
      mergekit=values.mergekit,
      real=real,
    ):
      line = json.dumps(row._asdict()) if values.json else as_line(row)
      print(line, flush=True)


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_list("part", list(PARTS), "What is measured.")
  flags.DEFINE_bool("quick", False, "Tiny sizes: does it run?")
  flags.DEFINE_bool("json", False, "Lines of JSON instead of the table.")
  flags.DEFINE_string("mergekit", None, "Its mergekit-extract-lora, 0.1.5.")
  flags.DEFINE_list("real", None, "Two checkpoints: BASE,FINETUNED.")
  flags.DEFINE_string("work", None, "Existing folder for the pairs; /tmp.")
  app.run(main)
