# SPDX-License-Identifier: Apache-2.0
"""Puts one compiled program into numbers, and times programs on this CPU."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.aot.chips import CHIPS, Chip, bound, memory_cycles
from pallas_kernels.aot.compiling import Compiled, compile_apart
from pallas_kernels.aot.schedules import moves
from pallas_kernels.bench.programs import (
  FORWARD,
  STEP,
  Sizes,
  arguments,
  base,
  least_bytes,
  operations,
  unfused,
)


class Row(NamedTuple):
  """The numbers of a program compiled for a chip; nothing was timed.

  moved: HBM bytes counted from the schedule; least: of every array once.
  vmem: bytes the kernel's blocks fill, 0 without a kernel.
  temporaries, code: bytes. cycles: the compiler's static estimate, or None.
  paced: the same, but no instruction faster than HBM moves its bytes.
  estimated: seconds by the roofline; by: "compute" or "memory".
  compiling: seconds the compiler took.
  refused: why there is no program, or None.
  """

  name: str
  step: bool
  chip: str
  sizes: Sizes
  moved: int
  least: int
  vmem: int
  temporaries: int
  code: int
  cycles: int | None
  paced: float | None
  estimated: float
  by: str
  compiling: float
  refused: str | None


def _paced(found: Compiled, chip: Chip) -> float | None:
  """Sums the cycles, each instruction at least as long as its bytes take.

  Asynchronous copies have no cycles of their own: they count as hidden.
  """
  if not found.cycles:
    return None
  moved = {m.name: m.read + m.written for m in _moves_of(found)}
  return sum(
    max(cycles, memory_cycles(chip, moved.get(name, 0)))
    for name, cycles in found.cycles.items()
  )


def _moves_of(found):
  """Returns what a program's instructions move; none if it was refused."""
  return [] if found.refused else moves(found.text, found.pipelines)


@functools.cache
def measure_program(
  name: str, step: bool, chip: str, sizes: Sizes, *, cycles: bool = False
) -> Row:
  """Compiles a program in a process of its own and reads its schedule.

  Args:
    name: a key of `FORWARD`, or of `STEP`.
    step: forward and backward; else forward alone.
    chip: a key of `CHIPS`.
    sizes: of the layer.
    cycles: ask for static cycles too, minutes for a large kernel.
  """
  function = (STEP if step else FORWARD)[name]
  found = compile_apart(
    function, arguments(name, step, sizes), chip, profile=cycles, limit=600
  )
  moved = sum(m.read + m.written for m in _moves_of(found))
  limit = bound(CHIPS[chip], operations(name, step, sizes), moved)
  return Row(
    name,
    step,
    chip,
    sizes,
    moved,
    least_bytes(name, step, sizes),
    max((p.vmem for p in found.pipelines), default=0),
    found.temporaries,
    found.code,
    sum(found.cycles.values()) if found.cycles else None,
    _paced(found, CHIPS[chip]),
    limit.seconds,
    limit.by,
    found.seconds,
    found.refused,
  )


class Ratio(NamedTuple):
  """A layer's time over its base product's, on this CPU in this run."""

  sizes: Sizes
  base_ms: float
  ratio: float
  share: float

  @property
  def allowed(self) -> float:
    """The most that keeps the goal: 1.1 times the share of operations."""
    return 1.1 * self.share


def _times(functions: Sequence[Callable], repeats: int) -> list[list[float]]:
  """Times each function in turns, so that a busy machine is busy for all."""
  times: list[list[float]] = [[] for _ in functions]
  for _ in range(repeats):
    for function, kept in zip(functions, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(function())
      kept.append(time.perf_counter() - start)
  return times


def measure_cpu(sizes: Sizes, repeats: int = 21) -> Ratio:
  """Times XLA's implementation and the base product in turns, float32.

  Args:
    sizes: of the layer.
    repeats: of each program, alternating; at least 2. The first is dropped.

  Returns:
    Ratio: the median of the ratios of neighbours, and the share
    operations(layer) / operations(base).
  """
  shapes = [a.shape for a in arguments("unfused", False, sizes)]
  keys = jax.random.split(jax.random.key(0), len(shapes))
  x, w, a, b = (
    jax.random.normal(key, shape, jnp.float32)
    for key, shape in zip(keys, shapes, strict=True)
  )
  plain, layer = jax.jit(base), jax.jit(unfused)
  one, other = (
    seconds[1:]
    for seconds in _times(
      (lambda: plain(x, w), lambda: layer(x, w, a, b)), repeats
    )
  )
  share = operations("unfused", False, sizes) / operations("base", False, sizes)
  ratios = [b / a for a, b in zip(one, other, strict=True)]
  return Ratio(
    sizes, 1e3 * statistics.median(one), statistics.median(ratios), share
  )
