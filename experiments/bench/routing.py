# SPDX-License-Identifier: Apache-2.0
"""What does a step of ReMix take, and a basis that is folded?

  python -m experiments.bench.routing [--turns=5] [--samples=4] [--quick]

A Llama of 30 million parameters, 4 x 64 tokens, adapters on all matrices of the
layers. A pass is a training step of the same routed adapters with the k largest
logits, whose loss is evaluated once. A basis of 8 LoRAs of rank 2 is mixed at
each call, or folded once into a LoRA of rank 16, beside a LoRA of that rank. In
turns in one process; compiling does not count, and how often a step was traced
is printed. Expect 4 passes, and the LoRA's time. Last, the prototypes of 64
adapters of rank 16 of a Llama of a billion parameters, once, all adapters in
memory (3 GB).
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import jlora
from experiments.bench.adapters import (
  LEARNED,
  TINY,
  Programs,
  draw_adapter,
  time_programs,
)
from jlora import models, routing, training

PASS = "a pass: the k largest"
PLAIN = "LoRA of rank 16"
COUNT, RANK = 8, 2
#: A layer of Llama-3.2-1B, of which it has 16: module -> in, out.
LAYER = {
  "q": (2048, 2048), "k": (2048, 512), "v": (2048, 512), "o": (2048, 2048),
  "gate": (2048, 8192), "up": (2048, 8192), "down": (8192, 2048),
}  # fmt: skip


def make_loss(run: Any) -> Callable[..., jax.Array]:
  """Returns (params, tokens) -> (B,), the cross entropy of each text."""

  def loss(params, tokens):
    """Computes it."""
    logs = jax.nn.log_softmax(run(params, tokens[:, :-1]))
    found = jnp.take_along_axis(logs, tokens[:, 1:, None], -1)
    return -found[..., 0].mean(-1)

  return loss


def list_steps(
  run: Any, params: Any, tokens: jax.Array, samples: int, traces: list[str]
) -> Programs:
  """Makes a training step of one pass, and ReMix's.

  Args:
    run: `(params, tokens) -> logits`.
    params: the base's.
    tokens: (rows, time).
    samples: selections of ReMix.
    traces: to which a name is added whenever a step is traced.

  Returns:
    name -> a step without arguments.
  """
  adapters = [draw_adapter(params, RANK, seed) for seed in range(COUNT)]
  bank = jlora.make_bank(adapters)
  programs = {path: routing.routed(x, chosen=2) for path, x in bank.items()}
  loss, adam = make_loss(run), optax.adam(1e-3)
  once = training.train(lambda *given: loss(*given).mean(), adam)
  several = routing.remix(loss, adam, adam, samples=samples)
  key = {"key": jax.random.key(0)}
  steps: Programs = {}
  for name, (init, update), more in (
    (PASS, once, {}), (f"ReMix, M = {samples}", several, key),
  ):  # fmt: skip

    def traced(*given, name=name, update=update, **more):
      """Takes a step, and tells that it was traced."""
      traces.append(name)
      return update(*given, **more)

    steps[name] = functools.partial(
      jax.jit(traced), programs, init(programs), params, tokens, **more
    )
  return steps


def list_forwards(run: Any, params: Any, tokens: jax.Array) -> Programs:
  """Makes calls with a LoRA, with a basis folded, and with it mixed.

  Args:
    run: `(params, tokens) -> logits`.
    params: the base's.
    tokens: (rows, time).

  Returns:
    name -> a call without arguments.
  """
  plain = draw_adapter(params, COUNT * RANK, 0)
  basis = routing.init_basis(
    params, n=COUNT, rank=RANK, d_query=64, paths=lambda path, _: path in plain
  )
  query = jax.random.normal(jax.random.key(2), (64,))
  folded = routing.fold(basis, query)
  bound = jax.jit(jlora.adapt(run))
  mixed = jax.jit(routing.adapt_basis(run))
  many = jnp.broadcast_to(query[None], (len(tokens), 64))
  return {
    PLAIN: functools.partial(bound, jlora.bind(params, plain), tokens),
    "basis, folded": functools.partial(
      bound, jlora.bind(params, folded), tokens
    ),
    "basis, mixed at each call": functools.partial(
      mixed, params, basis, many, tokens
    ),
  }


def draw_library(layers: int, count: int, rank: int) -> jlora.Loras:
  """Draws a bank of adapters of all matrices of Llama-3.2-1B's layers.

  Args:
    layers: how many; 16 is all.
    count: adapters.
    rank: of each.

  Returns:
    {path: Lora of a (count, rank, in) and b (count, rank, out)}, float32.
  """
  draw = np.random.default_rng(0).standard_normal
  return {
    f"{at}/{name}": jlora.Lora(
      jnp.asarray(draw((count, rank, size_in), np.float32)),
      jnp.asarray(draw((count, rank, size_out), np.float32)),
      jnp.ones(count),
    )
    for at in range(layers)
    for name, (size_in, size_out) in LAYER.items()
  }


def time_prototypes(bank: jlora.Loras) -> tuple[float, float]:
  """Measures `prototypes` of a bank, compiling included: wall, processor."""
  began, spent = time.perf_counter(), time.process_time()
  jax.block_until_ready(routing.prototypes(bank))
  return time.perf_counter() - began, time.process_time() - spent


def tell(title: str, programs: Programs, turns: int) -> None:
  """Times programs, and prints them beside the first."""
  found = time_programs(programs, turns)
  first = next(iter(found.values()))
  print(f"| {title} | seconds | x the first |\n|---|---|---|")
  for name, seconds in found.items():
    print(f"| {name} | {seconds:.3f} | {seconds / first:.2f} |")
  print(flush=True)


def main(_: list[str]) -> None:
  """Prints both tables."""
  values = flags.FLAGS
  config: dict[str, Any] = TINY if values.quick else LEARNED
  if values.layers:
    config = {**config, "num_hidden_layers": values.layers}
  run, params = models.init(config, jax.random.key(0))
  tokens = jax.random.randint(
    jax.random.key(1), (4, 65), 0, config["vocab_size"]
  )
  traces: list[str] = []
  steps = list_steps(run, params, tokens, values.samples, traces)
  tell("a training step", steps, values.turns)
  print(f"traced: {traces}\n")
  tell("a call", list_forwards(run, params, tokens[:, :-1]), values.turns)
  sizes = (1, 2, 2) if values.quick else (16, 64, 16)
  wall, spent = time_prototypes(draw_library(*sizes))
  print(
    f"prototypes, {sizes[1]} adapters: {wall:.1f} s, {spent:.1f} s of "
    "processor time"
  )


if __name__ == "__main__":
  flags.DEFINE_integer("samples", 4, "Selections of ReMix.")
  flags.DEFINE_integer("layers", None, "Of the model, in place of all 8.")
  flags.DEFINE_integer("turns", 5, "Timed runs of each program.")
  flags.DEFINE_bool("quick", False, "Tiny sizes: does it run?")
  app.run(main)
