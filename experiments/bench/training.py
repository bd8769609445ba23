# SPDX-License-Identifier: Apache-2.0
"""How many tokens a second is a LoRA trained on, beside PEFT on torch?

  python -m experiments.bench.training [--cache=FOLDER] [--threads=2] [--quick]
    [--rows=4] [--length=128]
  python -m experiments.bench.training --memory

Both train the same adapter, rank 16 on every linear layer, from the same start
by AdamW on the same float32 weights and tokens: SmolLM2-135M where
`lib.data.smollm2` has put it into the cache, else a random model of its shape.
Each has a process of its own on the same cores; they take turns, a step at a
time, and must report the same losses. Loading and compiling do not count.
--memory measures instead the peak memory of an adapter's training beside full
finetuning's, both ours.

Takes about 2 minutes on two cores. Expect about PEFT's speed on a CPU, and to
save roughly Adam's two moments of every parameter.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from experiments.bench import scoring
from experiments.bench.arrays import Row
from experiments.bench.extract import as_line
from experiments.bench.workers import answer, on_cores
from experiments.lib.machines import processes
from experiments.lib.models import finetunes
from jlora import models
from jlora.loras import Lora
from jlora.paths import flatten
from jlora.training import init_lora, train

# Takes a step on (rows, length + 1) tokens; returns the loss before it.
Stepper = Callable[[np.ndarray], float]
PRODUCTS = "the base's bare products"


class Sizes(NamedTuple):
  """The sizes that are timed.

  Attributes:
    rows: of a batch.
    length: tokens predicted in a row.
    turns: timed steps of each; one more is not counted.
    threads: cores that either may use.
    rank: of every module.
  """

  rows: int = 4
  length: int = 128
  turns: int = 5
  threads: int = 2
  rank: int = 16


QUICK = Sizes(rows=2, length=32, turns=3, rank=4)


def measure_training(
  folder: str | os.PathLike[str], sizes: Sizes, *, label: str
) -> Iterator[Row]:
  """Measures tokens per second of both, and ours over PEFT's.

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
  found = _take_turns([*names, PRODUCTS], str(folder), sizes)
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


_MIB = 2**20


def measure_memory(
  folder: str | os.PathLike[str], sizes: Sizes
) -> Iterator[Row]:
  """Measures peak memory of adapter training and of full finetuning.

  Theory: full finetuning has a gradient and two moments of every parameter,
  the adapter's training those of the adapter alone. The difference is what it
  saves; activations are alike.

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
  """Times workers in turns: name -> (turns, 3), wall, processor, loss."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(on_cores(sizes.threads))
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
      answer(worker)
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(sizes.turns + 1):
      for name, worker in workers.items():
        worker.stdin.write("\n")
        worker.stdin.flush()
        found[name].append(answer(worker))
    for worker in workers.values():
      worker.stdin.close()
  return {name: np.array(turns[1:]) for name, turns in found.items()}


def _command(name: str, folder: str, sizes: Sizes) -> list[str]:
  """Returns the command that starts a worker, from any directory."""
  root = pathlib.Path(__file__).parents[2]
  run = (
    f"import sys; sys.path.insert(0, {str(root)!r}); "
    "from experiments.bench.training import Sizes, serve; "
    f"serve({name!r}, {folder!r}, "
    f"Sizes(*{tuple(sizes)}))"
  )
  return [sys.executable, "-c", run]


def serve(name: str, folder: str, sizes: Sizes) -> None:
  """Takes a step for every line of input and prints how long it took.

  Two steps are taken before any line is read; with no turns, none is read.

  Args:
    name: a key of STEPPERS.
    folder: the model.
    sizes: of the batch.
  """
  step = STEPPERS[name](folder, sizes)
  vocabulary = models.read_config(folder)["vocab_size"]
  shape = (sizes.rows, sizes.length + 1)
  tokens = np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
  step(tokens)
  print(json.dumps([0.0, 0.0, step(tokens)]), flush=True)
  for _ in sys.stdin if sizes.turns else ():
    began, used = time.perf_counter(), time.process_time()
    loss = step(tokens)
    seconds = time.perf_counter() - began
    processor = time.process_time() - used
    print(json.dumps([seconds, processor, loss]), flush=True)


_RATE = 1e-3


def _ours(folder: str, sizes: Sizes) -> Stepper:
  """Returns our LoRA training, compiled; it uses the cores it started on."""
  model, params = models.load(folder)
  leaves = flatten(params)

  def loss(params, tokens):
    """Computes the loss."""
    return finetunes.nll(model, params, tokens)

  loras: Any = {
    path: Lora(
      jnp.asarray(a),
      jnp.zeros((sizes.rank, leaves[path].shape[-1])),
      jnp.float32(1),
    )
    for path, a in _start_of(folder, sizes.rank).items()
  }
  init, update = train(loss, optax.adamw(_RATE, weight_decay=0.0))
  compiled = jax.jit(update, donate_argnums=(0, 1))
  kept = [loras, init(loras)]

  def step(tokens: np.ndarray) -> float:
    """Takes a step."""
    *kept[:], value = compiled(*kept, params, jnp.asarray(tokens))
    return float(value)

  return step


def _full(folder: str, sizes: Sizes) -> Stepper:
  """Returns our full finetuning of every parameter."""
  del sizes
  model, params = models.load(folder)
  optimiser = optax.adamw(_RATE, weight_decay=0.0)

  def update(params, state, tokens):
    """Updates all parameters."""
    value, gradient = jax.value_and_grad(
      lambda params: finetunes.nll(model, params, tokens)
    )(params)
    change, state = optimiser.update(gradient, state, params)
    return optax.apply_updates(params, change), state, value

  compiled = jax.jit(update, donate_argnums=(0, 1))
  kept = [params, optimiser.init(params)]
  del params

  def step(tokens: np.ndarray) -> float:
    """Takes a step."""
    *kept[:], value = compiled(*kept, jnp.asarray(tokens))
    return float(value)

  return step


def _products(folder: str, sizes: Sizes) -> Stepper:
  """Returns the base's own products of a step, one by one: a lower bound.

  They are x w of every matrix, and dy wᵀ for the gradient of x; of an embedding
  those of a tied head. The loss returned is 0.
  """
  _, params = models.load(folder)
  count = sizes.rows * sizes.length
  matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
  times = jax.jit(jnp.matmul)
  back = jax.jit(lambda dy, w: dy @ w.T)
  sides = {side for w in matrices for side in w.shape}
  rows = {
    side: jax.random.normal(jax.random.key(side), (count, side))
    for side in sides
  }

  def step(_: np.ndarray) -> float:
    """Computes all products."""
    for w in matrices:
      jax.block_until_ready(times(rows[w.shape[0]], w))
      jax.block_until_ready(back(rows[w.shape[1]], w))
    return 0.0

  return step


def _peft(folder: str, sizes: Sizes) -> Stepper:
  """Returns PEFT's training as it comes, with torch's fused AdamW."""
  import peft  # peers, not dependencies
  import torch
  import transformers

  torch.set_num_threads(sizes.threads)
  base = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  config = peft.LoraConfig(
    r=sizes.rank, lora_alpha=sizes.rank, target_modules="all-linear"
  )
  model = peft.get_peft_model(base, config).train()
  modules = dict(model.named_modules())
  start = _start_of(folder, sizes.rank)
  for path, a in start.items():
    name = models.hf_name(path).removesuffix(".weight")
    layer: Any = modules[f"base_model.model.{name}"]
    layer.lora_A.default.weight.data = torch.from_numpy(a)
  moving = [p for p in model.parameters() if p.requires_grad]
  if len(moving) != 2 * len(start):
    raise RuntimeError(f"{len(moving)} of PEFT's, {len(start)} modules of ours")
  optimiser = torch.optim.AdamW(moving, _RATE, weight_decay=0.0, fused=True)

  def step(tokens: np.ndarray) -> float:
    """Takes a step."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    logits = model(ids[:, :-1], use_cache=False).logits
    targets = ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return float(loss.detach())

  return step


STEPPERS = {
  "ours": _ours,
  "PEFT": _peft,
  "full": _full,
  PRODUCTS: _products,
}


def _start_of(folder: str, rank: int) -> dict[str, np.ndarray]:
  """Draws the start of every a, the same in every process; b is zero."""
  config = models.read_config(folder)
  shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0))[1])
  rng = np.random.default_rng(0)
  shapes = {
    path: lora.a.shape
    for path, lora in jax.eval_shape(lambda: init_lora(shapes, rank)).items()
  }
  return {
    path: rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
    for path, shape in sorted(shapes.items())
  }


def main(_: list[str]) -> None:
  """Measures and prints the table."""
  values = flags.FLAGS
  sizes = QUICK if values.quick else Sizes()
  given = {name: values[name].value for name in ("rows", "length", "threads")}
  sizes = sizes._replace(**{k: v for k, v in given.items() if v is not None})
  print("| part | what | value | goal | how |\n|---|---|---|---|---|")
  choice = scoring.some_model(values.cache, quick=values.quick)
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
