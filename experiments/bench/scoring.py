# SPDX-License-Identifier: Apache-2.0
"""How many tokens a second are scored, beside transformers on torch?

  python -m experiments.bench.scoring [--cache=FOLDER] [--threads=2] [--quick]

Both give the mean negative log-likelihood of the same text under the same
float32 weights: SmolLM2-135M where `lib.data.smollm2` put it into the
cache, else a random model of its shape. Each has a process of its own on the
same cores; they take turns, one batch at a time. Compiling and loading do not
count. Where others use the machine, --threads=1 compares processor times that
no thread's waiting is part of. Takes a minute or two on two cores. The goal is
at least transformers' speed.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.bench.arrays import Row
from experiments.bench.extract import as_line
from experiments.bench.workers import answer, on_cores
from experiments.lib.data import smollm2
from experiments.lib.models import finetunes
from jlora import models

#: SmolLM2-135M's config.json, for a random model of its shape.
SMOLLM2 = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": 49152,
  "hidden_size": 576,
  "intermediate_size": 1536,
  "num_hidden_layers": 30,
  "num_attention_heads": 9,
  "num_key_value_heads": 3,
  "max_position_embeddings": 8192,
  "rms_norm_eps": 1e-5,
  "rope_theta": 100000.0,
  "tie_word_embeddings": True,
}

# (rows, length + 1) tokens -> their mean negative log-likelihood.
Scorer = Callable[[np.ndarray], float]


class Sizes(NamedTuple):
  """The sizes that are timed.

  Attributes:
    rows: of a batch.
    length: tokens scored in a row.
    turns: timed batches of each; one more is not counted.
    threads: cores that either may use.
  """

  rows: int = 4
  length: int = 256
  turns: int = 7
  threads: int = 2


QUICK = Sizes(rows=2, length=32, turns=3)


def _ours(folder: str, threads: int) -> Scorer:
  """Returns our scorer, compiled; it uses the cores it was started on."""
  del threads
  apply, params = models.load(folder)

  @jax.jit
  def score(params: Any, tokens: jax.Array) -> jax.Array:
    """Computes the mean negative log-likelihood."""
    logits, targets = apply(params, tokens[:, :-1]), tokens[:, 1:, None]
    said = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - said).mean()

  return lambda tokens: float(score(params, tokens))


def _transformers(folder: str, threads: int) -> Scorer:
  """Returns transformers' model as a scorer, as it comes, without gradients."""
  import torch  # a peer, not a dependency
  import transformers

  torch.set_num_threads(threads)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()

  @torch.inference_mode()
  def score(tokens: np.ndarray) -> float:
    """Computes the mean negative log-likelihood."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    logits = model(ids[:, :-1], use_cache=False).logits
    targets = ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    return float(loss)

  return score


SCORERS = {"ours": _ours, "transformers": _transformers}


def serve(name: str, folder: str, sizes: Sizes) -> None:
  """Scores a batch for every line of input and prints how long it took.

  The first batch is scored before any line is read.

  Args:
    name: a key of SCORERS.
    folder: the model.
    sizes: of the batch.
  """
  score = SCORERS[name](folder, sizes.threads)
  vocabulary = models.read_config(folder)["vocab_size"]
  shape = (sizes.rows, sizes.length + 1)
  tokens = np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
  score(tokens)
  print(json.dumps([0.0, 0.0, score(tokens)]), flush=True)
  for _ in sys.stdin:
    began, used = time.perf_counter(), time.process_time()
    loss = score(tokens)
    seconds = time.perf_counter() - began
    processor = time.process_time() - used
    print(json.dumps([seconds, processor, loss]), flush=True)


def measure_scoring(
  folder: str | os.PathLike[str], sizes: Sizes, *, label: str
) -> Iterator[Row]:
  """Measures tokens per second of both, and ours over transformers'.

  Args:
    folder: a Hugging Face folder, float32.
    sizes: of the batch, and how often.
    label: what the model is called.

  Yields:
    A row for each, and one for the median ratio of neighbouring turns; without
    torch and transformers only ours and an empty one.

  Raises:
    RuntimeError: if one of them fails, or their losses differ.
  """
  peers = ("torch", "transformers")
  has_peer = all(map(importlib.util.find_spec, peers))
  names = list(SCORERS) if has_peer else ["ours"]
  found = _take_turns(names, str(folder), sizes)
  losses = {name: float(turns[0, 2]) for name, turns in found.items()}
  if np.ptp(list(losses.values())) > 1e-3:
    raise RuntimeError(f"the scorers disagree about the same text: {losses}")
  count = sizes.rows * sizes.length
  note = (
    f"{label}, {sizes.rows} x {sizes.length} tokens, float32, "
    f"threads: {sizes.threads}"
  )
  for name, turns in found.items():
    seconds, processor, _ = np.median(turns, axis=0)
    used = f"{note}; {processor:.2f} s of processor time a batch"
    yield Row("scoring", name, count / float(seconds), "tokens/s", "", used)
  what = "ours over transformers"
  if not has_peer:
    yield Row("scoring", what, None, "x", ">= 1", "not run")
    return
  wall, processor, _ = np.median(
    found["transformers"] / found["ours"], axis=0
  ).tolist()
  note = f"median of {sizes.turns} turns; {processor:.2f} x in processor time"
  yield Row("scoring", what, wall, "x", ">= 1", note)


def _take_turns(
  names: list[str], folder: str, sizes: Sizes
) -> dict[str, np.ndarray]:
  """Times workers in turns: name -> (turns, 3), wall, processor, loss."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(on_cores(sizes.threads))
    # One after the other: loading a model would disturb timed turns.
    workers = {}
    for name in names:
      workers[name] = stack.enter_context(_start(name, folder, sizes))
      answer(workers[name])
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(sizes.turns + 1):
      for name, worker in workers.items():
        worker.stdin.write("\n")
        worker.stdin.flush()
        found[name].append(answer(worker))
    for worker in workers.values():
      worker.stdin.close()
  return {name: np.array(turns[1:]) for name, turns in found.items()}


def _start(name: str, folder: str, sizes: Sizes) -> subprocess.Popen:
  """Starts a worker that serves one of SCORERS."""
  command = [sys.executable, "-m", "experiments.bench.scoring"]
  command += [f"--worker={name}", f"--folder={folder}"]
  command += [f"--sizes={','.join(map(str, sizes))}"]
  return subprocess.Popen(
    command,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    cwd=pathlib.Path(__file__).parents[2],
    text=True,
  )


@contextlib.contextmanager
def some_model(cache: str | None, *, quick: bool) -> Iterator[tuple[str, str]]:
  """Provides a folder to score with, and its name; removes what it made.

  Args:
    cache: folder for downloads and models; None is ~/.cache/jlora.
    quick: a tiny random model whatever is cached.

  Yields:
    The folder and what it is called.
  """
  folder = smollm2.cache_folder(cache) / "smollm2-135m-instruct"
  if folder.exists() and not quick:
    yield str(folder), "SmolLM2-135M"
    return
  config = finetunes.TINY if quick else SMOLLM2
  label = "a tiny model" if quick else "random model of SmolLM2-135M's shape"
  with tempfile.TemporaryDirectory() as work:
    _, params = models.init(config, jax.random.key(0))
    yield str(models.save(f"{work}/model", params, config)), label


def main(_: list[str]) -> None:
  """Measures and prints the table; in a worker's process, serves instead."""
  values = flags.FLAGS
  if values.worker:
    sizes = Sizes(*map(int, values.sizes))
    serve(values.worker, values.folder, sizes)
    return
  sizes = QUICK if values.quick else Sizes()
  sizes = sizes._replace(threads=values.threads)
  print("| part | what | value | goal | how |\n|---|---|---|---|---|")
  with some_model(values.cache, quick=values.quick) as (folder, label):
    for row in measure_scoring(folder, sizes, label=label):
      print(as_line(row), flush=True)


if __name__ == "__main__":
  # Here, not above: importing this module must not claim a flag's name.
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_integer("threads", 2, "Of each.", lower_bound=1)
  flags.DEFINE_bool("quick", False, "A tiny model: does it run?")
  flags.DEFINE_enum("worker", None, list(SCORERS), "For this script's own use.")
  flags.DEFINE_string("folder", None, "The worker's model.")
  flags.DEFINE_list("sizes", None, "The worker's Sizes.")
  app.run(main)
