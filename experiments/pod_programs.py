# SPDX-License-Identifier: Apache-2.0
"""What would a pod's devices hold and send? Compiled for it, never run.

  JAX_PLATFORMS=cpu python -m experiments.pod_programs --pod=v5e-16

Needs the compilers of the extra `aot`. Every program is `jlora.extract` of one
matrix of a Llama-3 in bfloat16, or `jlora.adapt` of one of its layers with
embedding and head, cut as by default. Bytes that a device exchanges are
those of the compiled program when the Krylov space stops after four blocks, and
after six at the most; beside them three times the thin factors,
`3 (m + n) (rank + 16) 4`. Operations are of one device by the compiler's own
count, in which a loop's body counts once.

A program takes half a minute to two minutes. One that does not fit, or sends
more than the bound, gives exit code 1.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from experiments.lib.data.llamas import MODELS, extractions
from experiments.lib.machines.collectives import (
  collective_bytes,
  largest_gathered,
)
from experiments.lib.machines.pods import PODS, Pod, memory_of, mesh_of
from jlora import models, sharding
from jlora.messages import name_some
from jlora.models import build, rules_for
from jlora.paths import flatten, unflatten
from jlora.views import FLAX_VIEWS, MatrixView, view_of

_POD = flags.DEFINE_multi_enum("pod", ["v5e-16"], list(PODS), "Compiled for.")
_MODEL = flags.DEFINE_multi_enum(
  "model", ["8B", "70B"], list(MODELS), "Whose shapes."
)
_RANK = flags.DEFINE_integer("rank", 64, "Of every adapter.", lower_bound=1)
_PROGRAMS = flags.DEFINE_multi_enum(
  "program", ["extract", "adapt"], ["extract", "adapt"], "Which programs."
)
_JSON = flags.DEFINE_bool("json", False, "Print lines of JSON, not a table.")

_OVERSAMPLE = 16
_PASSES = (4, 6)  # blocks of the Krylov space, usually and at most
_TOKENS = (16, 2048)  # texts and their length, for the adapted layer


class Figures(NamedTuple):
  """What the compiler reports for one device.

  Attributes:
    pod: compiled for it.
    program: which.
    shape: of the matrix, or of the tokens.
    memory: bytes of arguments, results, temporaries and the program itself.
    limit: bytes that the device has.
    flops: the compiler's count of operations.
    sent: bytes exchanged, usually.
    sent_most: bytes exchanged at most.
    bound: three times the thin factors; None where there are none.
    gathered: entries of the largest array that is put together from parts.
    seconds: it took to compile.
  """

  pod: str
  program: str
  shape: tuple[int, ...]
  memory: int
  limit: int
  flops: float
  sent: int
  sent_most: int
  bound: int | None
  gathered: int
  seconds: float


def compile_extraction(
  pod: Pod, shape: tuple[int, int], rank: int
) -> tuple[Any, float]:
  """Compiles `jlora.extract` of one matrix, cut as `extract(mesh=...)` cuts it.

  Args:
    pod: compiled for it.
    shape: (in, out).
    rank: of the Lora.

  Returns:
    The compiled program, and seconds.
  """
  mesh = mesh_of(pod)
  place = NamedSharding(mesh, sharding.spread(shape, mesh))
  matrix = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
  thin = sharding.of_adapter(place, MatrixView(), shape)

  def run(base, finetuned):
    """Extracts the Lora of the matrix."""
    sides = {"kernel": base}, {"kernel": finetuned}
    return jlora.extract(*sides, rank=rank)["kernel"]

  return _compile(mesh, jax.jit(run, out_shardings=thin), matrix, matrix)


def compile_adapted(
  pod: Pod, config: dict[str, Any], rank: int
) -> tuple[Any, float]:
  """Compiles an adapted layer, texts cut over x and weights over y.

  Args:
    pod: compiled for it.
    config: of config.json.
    rank: of every adapter.

  Returns:
    The compiled program, and seconds.
  """
  mesh = mesh_of(pod, ("data", "model"))
  model = build(config, dtype=jnp.bfloat16)
  made = jax.eval_shape(
    lambda key: models.init(config, key, dtype=jnp.bfloat16)[1],
    jax.random.key(0),
  )
  flat = flatten(made)
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  places = sharding.assign(shapes, mesh, rules_for(shapes))
  params = {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
    for path, leaf in flat.items()
  }
  loras = {
    path: _lora(path, leaf.shape, places[path], rank)
    for path, leaf in flat.items()
    if path.startswith("layers") and path.endswith("/kernel")
  }
  tokens = jax.ShapeDtypeStruct(
    _TOKENS, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data"))
  )

  def run(params, loras, tokens):
    """Computes the logits."""
    bound = jlora.bind(unflatten(params, made), loras)
    return jlora.adapt(model)(bound, tokens)

  return _compile(mesh, jax.jit(run), params, loras, tokens)


def _lora(path, shape, place, rank) -> jlora.Lora:
  """Returns the shapes of a Lora, with their shardings."""
  view: Any = view_of(path, shape, FLAX_VIEWS)
  *batch, m, n = view.shape(shape)
  leaves: Any = (*batch, rank, m), (*batch, rank, n), tuple(batch)
  thin = sharding.of_adapter(place, view, shape)
  return jax.tree.map(
    lambda shape, own: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=own),
    jlora.Lora(*leaves),
    thin,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def _compile(mesh: Mesh, jitted: Any, *arguments: Any) -> tuple[Any, float]:
  """Compiles a function, and times that."""
  began = time.perf_counter()
  with jax.set_mesh(mesh):
    compiled = jitted.lower(*arguments).compile()
  return compiled, time.perf_counter() - began


def read_figures(
  pod: str, program: str, shape: tuple[int, ...], compiled: Any, seconds: float
) -> Figures:
  """Reads the figures of a compiled program.

  Args:
    pod: a key of `PODS`.
    program: its name.
    shape: of its matrix or tokens.
    compiled: the program.
    seconds: it took to compile.

  Returns:
    Figures, without a bound.
  """
  stats, text = compiled.memory_analysis(), compiled.as_text()
  costs = compiled.cost_analysis() or {}
  sent, most = (
    sum(collective_bytes(text, trips=turns).values()) for turns in _PASSES
  )
  return Figures(
    pod=pod,
    program=program,
    shape=shape,
    memory=stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes,
    limit=memory_of(PODS[pod]),
    flops=costs.get("flops", float("nan")),
    sent=sent,
    sent_most=most,
    bound=None,
    gathered=largest_gathered(text),
    seconds=seconds,
  )


def measure(
  pod: str, model: str, rank: int, programs: list[str]
) -> Iterator[Figures]:
  """Yields the figures of one model's programs for a pod.

  Args:
    pod: a key of `PODS`.
    model: a key of `MODELS`.
    rank: of every adapter.
    programs: "extract", "adapt" or both.

  Yields:
    Figures, as each program is compiled.
  """
  config = MODELS[model]
  if "extract" in programs:
    for name, shape in extractions(config):
      compiled = compile_extraction(PODS[pod], shape, rank)
      figures = read_figures(pod, f"{model} {name}", shape, *compiled)
      width = min(rank, *shape) + _OVERSAMPLE
      yield figures._replace(bound=3 * sum(shape) * width * 4)
  if "adapt" in programs:
    compiled = compile_adapted(PODS[pod], config, rank)
    yield read_figures(pod, f"{model} adapted layer", _TOKENS, *compiled)


def tell_excess(figures: Figures) -> list[str]:
  """Describes what a program holds or sends too much of.

  Args:
    figures: of the program.

  Returns:
    A sentence for each.
  """
  name = f"{figures.pod} {figures.program}"
  found = []
  if figures.memory > figures.limit:
    found.append(f"{name} holds {figures.memory} of {figures.limit} bytes")
  if figures.bound is not None and figures.sent > figures.bound:
    found.append(f"{name} sends {figures.sent} bytes, not {figures.bound}")
  return found


def main(argv: list[str]) -> None:
  """Prints a table; exit code 1 if a program does not fit or sends too much."""
  del argv
  if not _JSON.value:
    print(
      "| pod | program | shape | MiB a device | of | Gflop | MiB exchanged "
      "| at most | 3 (m + n) w 4 | largest gathered | compiled in |\n"
      "|---|---|---|---|---|---|---|---|---|---|---|"
    )
  excesses = []
  try:
    for pod in _POD.value:
      for model in _MODEL.value:
        for figures in measure(pod, model, _RANK.value, _PROGRAMS.value):
          _say(figures)
          excesses += tell_excess(figures)
  except ValueError as error:
    excesses.append(str(error))
  if excesses:
    print(f"error: {name_some(excesses)}", file=sys.stderr)
    sys.exit(1)


def _say(figures: Figures) -> None:
  """Prints one program's figures."""
  if _JSON.value:
    print(json.dumps(figures._asdict()), flush=True)
    return
  bound = "" if figures.bound is None else f"{figures.bound / 2**20:.1f}"
  cells = [
    figures.pod,
    figures.program,
    " x ".join(map(str, figures.shape)),
    f"{figures.memory / 2**20:.0f}",
    f"{figures.limit / 2**20:.0f}",
    f"{figures.flops / 1e9:.1f}",
    f"{figures.sent / 2**20:.1f}",
    f"{figures.sent_most / 2**20:.1f}",
    bound,
    f"{figures.gathered:,}",
    f"{figures.seconds:.0f} s",
  ]
  print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  app.run(main)
