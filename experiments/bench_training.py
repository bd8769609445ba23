# SPDX-License-Identifier: Apache-2.0
"""How many tokens a second is a LoRA trained on, beside PEFT on torch?

  python -m experiments.bench_training [--cache=FOLDER] [--threads=2] [--quick]
    [--rows=4] [--length=128]

Both train the same adapter, rank 16 on every linear layer, from the same start
by AdamW on the same float32 weights and tokens: SmolLM2-135M where
experiments.smollm2 has put it into the cache, else a random model of its shape.
Each has a process of its own on the same cores; they take turns, a step at a
time, and must report the same losses. Loading and compiling do not count.
--memory measures instead the peak memory of an adapter's training beside full
finetuning's, both ours.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import bench_scoring, processes, steppers
from experiments.bench_arrays import Row
from experiments.bench_extract import as_line
from experiments.steppers import QUICK, Sizes
from jlora import models
from jlora.training import init_lora

_MIB = 2**20


def measure_training(
  folder: str | os.PathLike[str], sizes: Sizes, *, label: str
) -> Iterator[Row]:
  """Tokens per second of each, and ours over PEFT's.

  Args:
    folder: a Hugging Face folder, float32.
    sizes: of the batch, and how often.
    label: what the model is called.

  Yields:
    A row for each, one for the base's products by themselves, and one for the
    median ratio of neighbouring turns; without torch, transformers and peft
    only ours and an empty one.

  Raises:
    RuntimeError: if one of them fails, or their losses differ.
  """
  has_peer = all(
    map(importlib.util.find_spec, ("torch", "transformers", "peft"))
  )
  names = ["ours", "PEFT"] if has_peer else ["ours"]
  found = _take_turns([*names, steppers.PRODUCTS], str(folder), sizes)
  losses = np.array([found[name][:, 2] for name in names])
  if np.ptp(losses, axis=0).max() > 2e-3:
    raise RuntimeError(f"the losses of {names} differ: {losses.tolist()}")
  count = sizes.rows * sizes.length
  note = (
    f"{label}, {sizes.rows} x {sizes.length} tokens, float32, rank "
    f"{sizes.rank} on every linear layer, AdamW, threads: {sizes.threads}"
  )
  for name, turns in found.items():
    seconds, processor, loss = np.median(turns, axis=0)
    used = (
      f"{note}; {processor:.2f} s of processor time a step, loss {loss:.4f}"
    )
    yield Row("training", name, count / float(seconds), "tokens/s", "", used)
  what = "ours over PEFT"
  if not has_peer:
    yield Row("training", what, None, "x", ">= 1.2", "not run")
    return
  wall, processor, _ = np.median(found["PEFT"] / found["ours"], axis=0).tolist()
  note = f"median of {sizes.turns} turns; {processor:.2f} x in processor time"
  yield Row("training", what, wall, "x", ">= 1.2", note)


def measure_memory(
  folder: str | os.PathLike[str], sizes: Sizes
) -> Iterator[Row]:
  """Peak memory of an adapter's training and of full finetuning, both ours.

  Theory: full finetuning has a gradient and two moments of every parameter,
  the adapter's training those of the adapter. What it does without is the
  difference; activations are alike.

  Args:
    folder: a Hugging Face folder, float32.
    sizes: of the batch.

  Yields:
    A row for each, for the difference, and for theory's.
  """
  config = models.read_config(folder)
  shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0))[1])
  sizes = sizes._replace(turns=0)
  peaks = {}
  for name in ("ours", "full"):
    peaks[name] = processes.measure(_command(name, str(folder), sizes)).peak
    yield Row("memory", name, peaks[name] / _MIB, "MiB", "", "peak resident")
  loras = jax.eval_shape(lambda: init_lora(shapes, sizes.rank))
  whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
  adapter = 4 * sum(lora.a.size + lora.b.size for lora in loras.values())
  saved, least = peaks["full"] - peaks["ours"], 2 * (whole - adapter)
  note = (
    f"weights {whole / _MIB:.1f} MiB, adapter {adapter / _MIB:.1f} MiB; two "
    "moments, and up to once more for gradients"
  )
  yield Row("memory", "difference", saved / _MIB, "MiB", "", "measured")
  theory = f"{least / _MIB:.0f} to {1.5 * least / _MIB:.0f} MiB"
  yield Row("memory", "over two moments", saved / least, "x", "1 to 1.5",
            f"{theory} in theory; {note}")  # fmt: skip


def _take_turns(
  names: list[str], folder: str, sizes: Sizes
) -> dict[str, np.ndarray]:
  """Name -> (turns, 3): seconds, processor's seconds, loss of each step."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(_on_cores(sizes.threads))
    workers: dict[str, Any] = {
      name: stack.enter_context(
        subprocess.Popen(
          _command(name, folder, sizes),
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=subprocess.DEVNULL,
          text=True,
        )
      )
      for name in names
    }
    for worker in workers.values():  # all are ready before any is timed
      _answer(worker)
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(sizes.turns + 1):
      for name, worker in workers.items():
        worker.stdin.write("\n")
        worker.stdin.flush()
        found[name].append(_answer(worker))
    for worker in workers.values():
      worker.stdin.close()
  return {name: np.array(turns[1:]) for name, turns in found.items()}


@contextlib.contextmanager
def _on_cores(count: int) -> Iterator[None]:
  """Processes started meanwhile have so many cores, where that can be set."""
  if not hasattr(os, "sched_setaffinity"):
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, sorted(before)[:count])
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def _command(name: str, folder: str, sizes: Sizes) -> list[str]:
  """That starts a worker, from any directory."""
  root = pathlib.Path(__file__).parents[1]
  run = (
    f"import sys; sys.path.insert(0, {str(root)!r}); "
    "from experiments import steppers; "
    f"steppers.serve({name!r}, {folder!r}, "
    f"steppers.Sizes(*{tuple(sizes)}))"
  )
  return [sys.executable, "-c", run]


def _answer(worker: Any) -> list[float]:
  """A worker's next line."""
  line = worker.stdout.readline()
  if not line:
    raise RuntimeError(
      f"{' '.join(map(str, worker.args))} ended with {worker.wait()}; start it "
      "by hand to see why"
    )
  return json.loads(line)


def main(_: list[str]) -> None:
  """Measures and prints the table."""
  values = flags.FLAGS
  sizes = QUICK if values.quick else Sizes()
  given = {name: values[name].value for name in ("rows", "length", "threads")}
  sizes = sizes._replace(**{k: v for k, v in given.items() if v is not None})
  print("| part | what | value | goal | how |\n|---|---|---|---|---|")
  choice = bench_scoring.some_model(values.cache, quick=values.quick)
  with choice as (folder, label):
    rows = (
      measure_memory(folder, sizes)
      if values.memory
      else measure_training(folder, sizes, label=label)
    )
    for row in rows:
      print(as_line(row), flush=True)


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_integer("threads", 2, "Of each.", lower_bound=1)
  flags.DEFINE_integer("rows", None, "Of a batch; 4.", lower_bound=1)
  flags.DEFINE_integer("length", None, "Tokens of a row; 128.", lower_bound=1)
  flags.DEFINE_bool("quick", False, "A tiny model: does it run?")
  flags.DEFINE_bool("memory", False, "Peak memory instead of speed.")
  app.run(main)
