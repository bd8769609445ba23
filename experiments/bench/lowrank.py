# SPDX-License-Identifier: Apache-2.0
"""How fast is extraction beside a script around `torch.svd_lowrank`?

  python -m experiments.bench.lowrank [--layers=4,12] [--turns=3] [--quick]

The script is what many extractors do today: per matrix a float32 change,
`svd_lowrank` with 16 directions more than the rank and `niter` 4, the factors
saved, nothing certified. Whole processes in turns, on the pair of
`bench.extract` at two depths; both skip unchanged tensors. Then one process
with the arrays of two layers in memory: the first call, the next ones, and
those of `jax.jit`. Needs torch, which is in the extra `test`.

Takes 3 minutes on two cores and 8 GB of disk. Goals stand beside the values.
"""

import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from experiments.bench.arrays import Row
from experiments.bench.extract import FULL, QUICK, as_line
from experiments.lib.data import pairs
from experiments.lib.machines.processes import measure

_ROOT = pathlib.Path(__file__).parents[2]

_TORCH = """
import json, math, sys
import torch
from safetensors import safe_open
from safetensors.torch import save_file
base, finetuned, out, rank = *sys.argv[1:4], int(sys.argv[4])
torch.manual_seed(0)
factors, lost = {}, 0.0
with safe_open(base, "pt") as left, safe_open(finetuned, "pt") as right:
  for name in left.keys():
    one, two = left.get_tensor(name), right.get_tensor(name)
    if one.ndim != 2 or torch.equal(one, two):
      continue
    delta = two.float() - one.float()
    u, s, v = torch.svd_lowrank(delta, q=rank + 16, niter=4)
    a = (s[:rank].sqrt()[:, None] * v[:, :rank].T).contiguous()
    b = (u[:, :rank] * s[:rank].sqrt()).contiguous()
    factors[name + ".a"], factors[name + ".b"] = a, b
    lost += (delta.square().sum() - s[:rank].square().sum()).item()
save_file(factors, out)
with open(out + ".json", "w") as file:
  json.dump(math.sqrt(lost), file)
"""

_IN_MEMORY = """
import json, sys, time
import numpy as np
import jax, jax.numpy as jnp
import jlora, torch
base, finetuned, out, rank = *sys.argv[1:4], int(sys.argv[4])
sides = [jlora.open_checkpoint(path) for path in (base, finetuned)]
names = [name for name in sides[0] if sides[0][name].ndim == 2
         and (".layers.0." in name or ".layers.1." in name)]
ours = [{name: jnp.asarray(side[name]) for name in names} for side in sides]
theirs = [[torch.from_numpy(np.array(x).view(np.int16)).view(torch.bfloat16)
           for x in side.values()] for side in ours]
extract = lambda *trees: jlora.extract(*trees, rank=rank)
compiled = jax.jit(extract)
def lowrank(base, finetuned):
  return [torch.svd_lowrank(two.float() - one.float(), q=rank + 16, niter=4)
          for one, two in zip(base, finetuned)]
def seconds(function, *given):
  began = time.perf_counter()
  jax.block_until_ready(function(*given))
  return time.perf_counter() - began
times = {"first": seconds(extract, *ours)}
seconds(compiled, *ours), seconds(lowrank, *theirs)
for _ in range(int(sys.argv[5])):
  for name, call in (("warm", (extract, *ours)), ("jit", (compiled, *ours)),
                     ("torch", (lowrank, *theirs))):
    times.setdefault(name, []).append(seconds(*call))
with open(out, "w") as file:
  json.dump(times, file)
"""


def measure_files(
  work: pathlib.Path, config: Any, rank: int, layers: Sequence[int], turns: int
) -> Iterator[Row]:
  """Times whole processes at two depths, ours and torch's in turns.

  Args:
    work: folder for pairs and outputs.
    config: of the Llama, without its number of layers.
    rank: of every module.
    layers: two depths, the smaller first.
    turns: runs of each, of which the medians count.

  Yields:
    Rows: the ratio of a further layer, of the whole of the larger, of errors.
  """
  walls: dict[tuple[str, int], list[float]] = {}
  spent: dict[tuple[str, int], list[float]] = {}
  errors: dict[str, float] = {}
  for count in layers:
    folder = work / str(count)
    made = pairs.write_pair(folder, {**config, "num_hidden_layers": count})
    for turn in range(turns):
      for side, command in _commands(folder, made, rank, turn).items():
        used = measure(command, {"PYTHONPATH": str(_ROOT)})
        walls.setdefault((side, count), []).append(used.wall)
        spent.setdefault((side, count), []).append(used.processor)
    errors = _errors(folder)
  for what, found in (("", walls), (" in processor time", spent)):
    middle = {key: statistics.median(times) for key, times in found.items()}
    yield from _speed_ups(what, middle, *layers)
  ratio = errors["ours"] / errors["torch"]
  yield Row("lowrank", "our error over torch's", ratio, "x", "<= 1", "")


def _speed_ups(what, middle, low, high) -> Iterator[Row]:
  """Makes the rows of one kind of seconds."""
  steps = {
    side: (middle[side, high] - middle[side, low]) / (high - low)
    for side in ("ours", "torch")
  }
  whole = {side: middle[side, high] for side in ("ours", "torch")}
  for kind, pair, goal in (
    ("each further layer", steps, ">= 2.2"),
    (f"whole, {high} layers", whole, ">= 1.8"),
  ):
    note = f"{pair['torch']:.2f} s over {pair['ours']:.2f} s"
    yield Row(
      "lowrank", f"speed-up, {kind}{what}", pair["torch"] / pair["ours"],
      "x", "" if what else goal, note,
    )  # fmt: skip


def _commands(folder, made, rank, turn) -> dict[str, list[str]]:
  """Returns the command of each side."""
  base, finetuned = made
  ours = [f"--base={base}", f"--finetuned={finetuned}", f"--rank={rank}"]
  ours += [f"--out={folder / f'ours{turn}'}", f"--cache={folder / 'cache'}"]
  program = folder / "lowrank.py"
  program.write_text(_TORCH)
  files = [str(side / "model.safetensors") for side in made]
  return {
    "ours": [sys.executable, "-m", "jlora.commands.extract", *ours],
    "torch": [sys.executable, str(program), *files, str(folder / "torch"),
              str(rank)],
  }  # fmt: skip


def _errors(folder: pathlib.Path) -> dict[str, float]:
  """Reads the norm of what both lost of all changes together."""
  report = json.loads((folder / "ours0" / "report.json").read_text())
  ours = sum(module["error"] ** 2 for module in report["modules"]) ** 0.5
  return {
    "ours": ours,
    "torch": json.loads((folder / "torch.json").read_text()),
  }


def measure_arrays(
  work: pathlib.Path, config: Any, rank: int, turns: int
) -> Iterator[Row]:
  """Times the call on arrays in memory, of two layers, beside torch's.

  Args:
    work: folder for the pair.
    config: of the Llama, without its number of layers.
    rank: of every module.
    turns: calls of each, of which the medians count.

  Yields:
    Rows of our time over torch's.
  """
  folder = work / "arrays"
  made = pairs.write_pair(folder, {**config, "num_hidden_layers": 2})
  program, out = folder / "memory.py", folder / "times.json"
  program.write_text(_IN_MEMORY)
  measure(
    [sys.executable, str(program), *map(str, made), str(out), str(rank),
     str(turns)],
    {"PYTHONPATH": str(_ROOT)},
  )  # fmt: skip
  times = json.loads(out.read_text())
  torch = statistics.median(times["torch"])
  for name, goal in (("first", 1.5), ("warm", 0.6), ("jit", 0.8)):
    own = times[name]
    own = own if name == "first" else statistics.median(own)
    note = f"{own:.2f} s over {torch:.2f} s, two layers in memory"
    yield Row("lowrank", f"{name} call over torch's", own / torch, "x",
              f"<= {goal}", note)  # fmt: skip


def main(_: list[str]) -> None:
  """Prints the table, a row as soon as it is there."""
  values = flags.FLAGS
  sizes = QUICK if values.quick else FULL
  low, high = sorted(map(int, values.layers))
  print("| part | what | value | goal | how |\n|---|---|---|---|---|")
  with tempfile.TemporaryDirectory(dir=values.work) as name:
    work, given = pathlib.Path(name), (sizes.config, sizes.rank)
    for row in measure_files(work, *given, (low, high), values.turns):
      print(as_line(row), flush=True)
    for row in measure_arrays(work, *given, values.turns):
      print(as_line(row), flush=True)


if __name__ == "__main__":
  flags.DEFINE_list("layers", ["4", "12"], "Two depths.")
  flags.DEFINE_integer("turns", 3, "Runs of each side.")
  flags.DEFINE_bool("quick", False, "Tiny sizes: does it run?")
  flags.DEFINE_string("work", None, "Existing folder for the pairs; /tmp.")
  app.run(main)
