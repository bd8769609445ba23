# SPDX-License-Identifier: Apache-2.0
"""Merges of checkpoints beside mergekit 0.1.5's: results, time and memory.

  python -m experiments.bench_merge --mergekit=/path/to/mergekit-yaml

Both read the same recipe files. Results are compared on a small float32 model,
where rounding is small and no two changes are equally large; time and memory
are of whole processes on a bfloat16 Llama of 1 GiB. What was measured is kept
in the work folder, so that parts can be run one by one (--parts, --methods).
"""

import pathlib
import tempfile

from absl import app, flags

from experiments.bench_merges import Bench

_MERGEKIT = flags.DEFINE_string("mergekit", None, "mergekit-yaml, of 0.1.5.")
_WORK = flags.DEFINE_string(
  "work", None, "Folder for models and figures; a temporary one by default."
)
_LAYERS = flags.DEFINE_integer("layers", 8, "Of the large model.")
_PARTS = flags.DEFINE_multi_enum(
  "parts",
  ["results", "ours", "mergekit"],
  ["models", "results", "ours", "mergekit", "table"],
  "What to measure; models are made and the table is printed in any case.",
)
_METHODS = flags.DEFINE_list("methods", None, "Those to take; all by default.")


def main(argv: list[str]) -> None:
  """Measures what is asked for and prints all that is known."""
  del argv
  with tempfile.TemporaryDirectory() as temporary:
    work = pathlib.Path(_WORK.value or temporary)
    bench = Bench(work, _MERGEKIT.value, _LAYERS.value, _METHODS.value)
    for part in _PARTS.value:
      getattr(bench, part)()
    bench.table()


if __name__ == "__main__":
  app.run(main)
