# SPDX-License-Identifier: Apache-2.0
"""What do adapters cost beside the base alone: one, or one for each row?

  python -m experiments.bench.adapters [--counts=1,4,16,64] [--quick]

A random float32 model of SmolLM2-135M's shape, random adapters on all matrices
of the layers. One program each, in turns in one process: the base, the adapter
merged, one adapter bound to all rows, and a bank from which every row takes its
own, as is chosen and by each of both ways. Scoring is one batch of --rows x
--length tokens; decoding is --steps tokens after a prompt of 16, with a cache.
Learning is a step of the weights of 30 adapters beside one of a LoRA of their
total rank, on a Llama of 30 million parameters. Compiling does not count.

Takes 12 minutes on two cores, most of them to compile, and learning 3. Expect
1.0 to 1.2 times the base when scoring, up to 1.3 times when decoding, and no
more than the LoRA's time when learning.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import jlora
from experiments.bench.scoring import SMOLLM2
from jlora import merging, models
from jlora.commands import keep_compilations

TINY = {**SMOLLM2, "vocab_size": 64, "hidden_size": 36, "num_hidden_layers": 2}
#: About 30 million parameters.
LEARNED = {
  **SMOLLM2,
  "vocab_size": 8192,
  "hidden_size": 512,
  "intermediate_size": 1408,
  "num_attention_heads": 8,
  "num_key_value_heads": 8,
  "num_hidden_layers": 8,
}
LORA = "LoRA of their total rank"
Programs = dict[str, Callable[[], Any]]


def draw_adapter(params: Any, rank: int, seed: int) -> jlora.Loras:
  """Draws a random adapter on all matrices of the layers.

  Args:
    params: of a decoder.
    rank: of every module.
    seed: of the numbers.

  Returns:
    Loras, float32.
  """
  loras = {}
  for path, leaf in jlora.paths.flatten(params).items():
    if path.startswith("layers/") and leaf.ndim == 2:
      key = jax.random.fold_in(jax.random.key(seed), len(loras))
      keys = jax.random.split(key)
      a, b = (
        jax.random.normal(key, (rank, side)) / side
        for key, side in zip(keys, leaf.shape, strict=True)
      )
      loras[path] = jlora.Lora(a, b, jnp.float32(1))
  return loras


def list_programs(
  run: Any, params: Any, tokens: jax.Array, adapters: Sequence[jlora.Loras],
  counts: Sequence[int],
) -> Programs:  # fmt: skip
  """Compiles the programs that are compared, by name.

  Args:
    run: `(params, tokens) -> array`.
    params: the base's.
    tokens: (rows, time).
    adapters: at least as many as the largest count.
    counts: sizes of banks.

  Returns:
    name -> a compiled program without arguments, the base first.
  """
  base, adapted = jax.jit(run), jax.jit(jlora.adapt(run))
  merged = jax.jit(jlora.apply)(params, adapters[0])
  programs = {
    "base": functools.partial(base, params, tokens),
    "one, merged": functools.partial(base, merged, tokens),
    "one, bound": functools.partial(
      adapted, jlora.bind(params, adapters[0]), tokens
    ),
  }
  for count in counts:
    bank = jlora.make_bank(adapters[:count])
    ids = jnp.arange(len(tokens)) % count
    given = params, bank, ids, tokens
    for name, forced in WAYS.items():
      programs[f"a row its own of {count}{name}"] = functools.partial(
        compile_way(run, forced, given), *given
      )
  return programs


#: Both ways to give rows adapters of their own, and the one that is chosen;
#: what they are forced by, as fields of the machine whose costs are counted.
WAYS: dict[str, dict[str, float]] = {
  "": {},
  ", masked": {"thin": 1e12},
  ", fetched": {"thin": 0.0, "cached": 0.0, "cache": 2**62},
}


def compile_way(run: Any, forced: dict[str, float], given: tuple) -> Any:
  """Compiles `adapt_rows` of a function, with what is chosen forced.

  Args:
    run: `(params, tokens) -> array`.
    forced: of WAYS.
    given: parameters, bank, ids and tokens.

  Returns:
    A compiled function of them.
  """
  backend = jax.default_backend()
  jax.clear_caches()  # of products, which are traced once for all functions
  with mock.patch.dict("jlora.adapting.banks.MACHINES") as machines:
    own = machines.get(backend, machines["tpu"])
    machines[backend] = own._replace(**forced)
    program = jax.jit(jlora.adapt_rows(run)).lower(*given).compile()
  jax.clear_caches()
  return program


def list_steps(
  run: Any, params: Any, tokens: jax.Array, adapters: Sequence[jlora.Loras]
) -> Programs:
  """Compiles a training step of a LoRA, and steps of adapters' weights.

  Args:
    run: `(params, tokens) -> logits`.
    params: the base's.
    tokens: (rows, time).
    adapters: whose weights are learned.

  Returns:
    name -> a compiled step without arguments, the LoRA first.
  """
  optimiser = optax.adam(1e-3)

  def loss(params, tokens):
    """Computes the cross entropy of the next token."""
    logs = jax.nn.log_softmax(run(params, tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(logs, tokens[:, 1:, None], -1))

  ones = merging.init_weights(adapters)
  joint = merging.mix(adapters, ones)
  init, update = jlora.training.train(loss, optimiser)
  steps = {
    LORA: functools.partial(jax.jit(update), joint, init(joint), params, tokens)
  }
  for name, granularity in (
    ("weights of each module", merging.by_module),
    ("weights of each adapter", merging.by_adapter),
  ):
    z = merging.init_weights(adapters, granularity=granularity)
    init, update = merging.learn_weights(
      loss, optimiser, granularity=granularity
    )
    steps[name] = functools.partial(
      jax.jit(update), z, init(z), params, adapters, tokens
    )
  return steps


def time_programs(programs: Programs, turns: int) -> dict[str, float]:
  """Times programs in turns; returns the median seconds of each.

  Args:
    programs: by name.
    turns: how often each runs; once more does not count.

  Returns:
    name -> seconds.
  """
  spent: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(turns + 1):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program())
      spent[name].append(time.perf_counter() - start)
  return {name: statistics.median(own[1:]) for name, own in spent.items()}


def tell_steps(is_quick: bool, turns: int) -> None:
  """Prints what it takes to learn weights of 30 adapters, beside a LoRA.

  Args:
    is_quick: tiny sizes.
    turns: timed runs of each step.
  """
  config, count = (TINY, 3) if is_quick else (LEARNED, 30)
  run, params = models.init(config, jax.random.key(0))
  adapters = [draw_adapter(params, 4, seed) for seed in range(count)]
  tokens = jax.random.randint(
    jax.random.key(1), (4, 65), 0, config["vocab_size"]
  )
  found = time_programs(list_steps(run, params, tokens, adapters), turns)
  print(f"| learning, {count} adapters of rank 4 | seconds | x LoRA |")
  print("|---|---|---|")
  for name, seconds in found.items():
    print(f"| {name} | {seconds:.3f} | {seconds / found[LORA]:.2f} |")


def main(_: list[str]) -> None:
  """Prints a table for scoring, one for decoding and one for learning."""
  values = flags.FLAGS
  if values.only_learning:
    tell_steps(values.quick, values.turns)
    return
  keep_compilations(values.cache)
  config: dict[str, Any] = TINY if values.quick else SMOLLM2
  if values.layers:
    config = {**config, "num_hidden_layers": values.layers}
  run, params = models.init(config, jax.random.key(0))
  counts = [int(count) for count in values.counts]
  adapters = [
    draw_adapter(params, values.rank, seed) for seed in range(max(counts))
  ]
  shape = (values.rows, 8 if values.quick else values.length)
  tokens = jax.random.randint(jax.random.key(1), shape, 0, config["vocab_size"])

  def decode(params, tokens):
    """Generates tokens after prompts."""
    return models.generate(run, params, tokens, values.steps)

  tables = [
    (f"scoring {shape[0]} x {shape[1]} tokens", run, tokens),
    (f"decoding {shape[0]} x {values.steps} tokens", decode, tokens[:, :16]),
  ]
  for title, function, given in tables[values.only_decoding :]:
    programs = list_programs(function, params, given, adapters, counts)
    found = time_programs(programs, values.turns)
    print(f"| {title} | seconds | x base |\n|---|---|---|")
    for name, seconds in found.items():
      print(f"| {name} | {seconds:.3f} | {seconds / found['base']:.2f} |")
    print(flush=True)
  if not values.only_decoding:
    tell_steps(values.quick, values.turns)


if __name__ == "__main__":
  flags.DEFINE_list("counts", ["1", "4", "16", "64"], "Adapters of a bank.")
  flags.DEFINE_integer("rank", 16, "Of each adapter.")
  flags.DEFINE_integer("rows", 8, "Of the batch.")
  flags.DEFINE_integer("length", 128, "Tokens of a row that are scored.")
  flags.DEFINE_integer("steps", 16, "Tokens that are decoded.")
  flags.DEFINE_integer("layers", None, "Of the model, in place of all 30.")
  flags.DEFINE_integer("turns", 5, "Timed runs of each program.")
  flags.DEFINE_string("cache", None, "Folder; ~/.cache/jlora by default.")
  flags.DEFINE_bool("only_decoding", False, "Nothing but the second table.")
  flags.DEFINE_bool("only_learning", False, "Nothing but the last table.")
  flags.DEFINE_bool("quick", False, "Tiny sizes: does it run?")
  app.run(main)
