# SPDX-License-Identifier: Apache-2.0
"""What does carrying an adapter over take, beside extracting it?

  python -m experiments.bench.port [--layers=N] [--methods=add,project]
    [--rank=64] [--k=64] [--turns=3]

Writes a bfloat16 Llama of width 2048, a finetune of it and another finetune
that stands for the updated base; extracts the adapter and ports it, as a user
starts both, in turns. Ratios are of processor time within this run. Two layers
are 446 MiB a model; 2 GiB is `--layers=18`. Disk: three times the model.

The goal, at most 1.3 times the extraction's time, is for `add`, which most
ports are. Others factor weights at `--k`.
"""

import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence

from absl import app, flags

from experiments.bench.arrays import Row
from experiments.lib.data import pairs
from experiments.lib.machines.processes import Usage, measure

METHODS = ("add", "project", "both_parts", "rotate")
_ROOT = pathlib.Path(__file__).parents[2]
_GOAL = "<= 1.3"


def measure_ports(
  work: pathlib.Path,
  config: dict,
  methods: Sequence[str],
  *,
  rank: int,
  k: int,
  turns: int,
) -> Iterator[Row]:
  """Measures extraction and ports of its adapter, in turns.

  Args:
    work: folder for the models and adapters.
    config: of the Llama.
    methods: of `jlora port`.
    rank: of the adapter.
    k: leading singular vectors of a space, of all methods but `add`.
    turns: runs of which each figure is the median.

  Yields:
    Row.
  """
  old, tuned, new = pairs.write_family(work / "models", config)
  found: dict[str, list[Usage]] = {"extract": [], **{m: [] for m in methods}}
  for turn in range(turns):
    adapter = work / f"adapter{turn}"
    found["extract"].append(
      _run(
        ["extract", f"--base={old}", f"--finetuned={tuned}", f"--rank={rank}"],
        adapter, work,
      )
    )  # fmt: skip
    for method in methods:
      words = ["port", str(adapter), f"--from={old}", f"--to={new}"]
      words.append(f"--method={method}")
      words += [] if method == "add" else [f"--k={k}"]
      found[method].append(_run(words, work / f"{method}{turn}", work))
  yield from _rows(found, work, old)


def _run(words: Sequence[str], out: pathlib.Path, work: pathlib.Path) -> Usage:
  """Runs a command of jlora as a user starts it."""
  name, *rest = words
  command = [sys.executable, "-m", f"jlora.commands.{name}", *rest]
  command += [f"--out={out}", f"--cache={work / 'cache'}"]
  return measure(command, {"PYTHONPATH": str(_ROOT)})


def _rows(found, work: pathlib.Path, model: pathlib.Path) -> Iterator[Row]:
  """Yields the figures of all commands, those of ports beside extraction's."""
  yield Row("bytes", "a model", _size(model) / 2**20, "MiB")
  for name in found:
    folder = work / ("adapter0" if name == "extract" else f"{name}0")
    yield Row("bytes", f"adapter, {name}", _size(folder) / 2**20, "MiB")
  middle = {
    name: Usage(*map(statistics.median, zip(*usages, strict=True)))
    for name, usages in found.items()
  }
  whole = middle["extract"]
  for name, one in middle.items():
    note = f"{one.wall:.1f} s, peak {one.peak / 2**20:.0f} MiB"
    yield Row("time", name, one.processor, "s of processor", "", note)
  for name, one in middle.items():
    if name != "extract":
      ratio = one.processor / whole.processor
      goal = _GOAL if name == "add" else ""
      yield Row("time", f"{name} over extract", ratio, "x", goal)


def _size(folder: pathlib.Path) -> int:
  """Returns the bytes of the tensors in a folder."""
  return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main(argv: list[str]) -> None:
  """Measures and prints all figures."""
  del argv
  config = {**pairs.LLAMA, "num_hidden_layers": _LAYERS.value}
  with tempfile.TemporaryDirectory() as folder:
    for row in measure_ports(
      pathlib.Path(folder), config, _METHODS.value,
      rank=_RANK.value, k=_K.value, turns=_TURNS.value,
    ):  # fmt: skip
      value = f"{row.value:9.2f} {row.unit}"
      print(f"{row.what:24} {value:24} {row.goal:8} {row.note}".rstrip())


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  _LAYERS = flags.DEFINE_integer("layers", 2, "Of the models.", 1)
  _METHODS = flags.DEFINE_multi_enum(
    "methods", ["add", "project"], list(METHODS), "What to port by."
  )
  _RANK = flags.DEFINE_integer("rank", 64, "Of the adapter.", 1)
  _K = flags.DEFINE_integer("k", 64, "Leading singular vectors.", 1)
  _TURNS = flags.DEFINE_integer("turns", 3, "Runs of each.", 1)
  app.run(main)
