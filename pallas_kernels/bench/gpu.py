# SPDX-License-Identifier: Apache-2.0
"""Times a low-rank change on the Hopper card that is here.

  python -m pallas_kernels.bench.gpu                    every table
  python -m pallas_kernels.bench.gpu --tables forward   one of them

Tables: forward, step (forward and backward, w frozen), decode, many (adapters
in one batch), quantised, tilings. bfloat16, random numbers. Each row's programs
run in turns; the base product runs twice, and its two medians say how far one
may trust the others. Weights merged beforehand are the base product.
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.programs import (
  Sizes,
  arguments,
  base,
  base_step,
  operations,
  step_of,
  unfused,
  unfused_step,
)
from pallas_kernels.bench.tables import print_table
from pallas_kernels.bench.timings import (
  Time,
  find_card,
  temporary_bytes,
  time_programs,
)
from pallas_kernels.lora_dot.banks.gathered import gathered_dot
from pallas_kernels.lora_dot.banks.grouped import grouped_dot
from pallas_kernels.lora_dot.banks.laned import laned_dot
from pallas_kernels.lora_dot.banks.routes import choose_route, sizes_of
from pallas_kernels.lora_dot.hopper.call import gpu_dot
from pallas_kernels.lora_dot.hopper.kernel import HopperTiling, hopper_matmul
from pallas_kernels.lora_dot.quantised import quantise_int8, quantise_nf4
from pallas_kernels.lora_dot.xla import xla_dot

LAYERS = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
FORWARD = (
  *(Sizes(m, k, n, 16) for k, n in LAYERS for m in (2048, 8192, 16384)),
  *(Sizes(8192, 4096, 4096, r) for r in (64, 128, 1024)),
  *(Sizes(512, 4096, n, 16) for n in (4096, 14336)),
  Sizes(2560, 4096, 4096, 16),
)
STEP = (
  *(Sizes(m, 4096, 4096, 16) for m in (2048, 8192, 16384)),
  *(Sizes(8192, k, n, 16) for k, n in LAYERS[1:]),
)
DECODE = tuple(
  Sizes(m, 4096, n, r)
  for n in (4096, 14336)
  for m in (1, 8, 64)
  for r in (16, 64)
)
CEILING = Sizes(8192, 8192, 8192, 1)
TILINGS = (
  HopperTiling(),
  HopperTiling(paired=False),
  HopperTiling(width=4),
  HopperTiling(bn=128, stages=6),
)
_CACHE = 300e6  # bytes: several times an H100's


def kernel_step(x, w, a, b, dy):
  """Runs forward and backward through the Hopper kernel."""
  return step_of(gpu_dot, x, w, a, b, dy)


def drawn(shapes: Sequence[jax.ShapeDtypeStruct]) -> list[tuple]:
  """Draws 2 to 12 sets of random arrays, N(0, 1 / their last axis)."""
  size = sum(s.size * s.dtype.itemsize for s in shapes)
  count = int(min(12, max(2, _CACHE // size)))

  @jax.jit
  def draw(key):
    keys = jax.random.split(key, len(shapes))
    return tuple(
      (jax.random.normal(k, s.shape) / s.shape[-1] ** 0.5).astype(s.dtype)
      for k, s in zip(keys, shapes, strict=True)
    )

  return [draw(jax.random.key(seed)) for seed in range(count)]


def _said(time: Time) -> str:
  """Writes the median, in microseconds."""
  return f"{time.median:.1f}"


def _megabytes(calls: Iterable[tuple[Callable, Sequence[Any]]]) -> str:
  """Writes the megabytes that each call keeps beside its arguments."""
  return " / ".join(f"{temporary_bytes(*call) / 1e6:.0f}" for call in calls)


def _rate(name: str, step: bool, sizes: Sizes, time: Time) -> str:
  """Writes how many TFLOP/s a program reached."""
  return f"{operations(name, step, sizes) / time.median / 1e6:.0f}"


def _compare(
  sizes: Sizes, step: bool, programs: dict[str, Callable], plain: str
) -> list[str]:
  """Times one line: base twice, the others, each over three products."""
  whole = drawn(arguments("unfused", step, sizes))
  bare = [(s[0], s[1], *s[4:]) for s in whole]
  sets = {name: bare if name.startswith("base") else whole for name in programs}
  found = time_programs(programs, sets)
  m, k, n, r = sizes
  first, again = found["base"], found["base again"]
  others = [name for name in programs if not name.startswith("base")]
  return [
    f"{m} x {k} x {n}",
    str(r),
    f"{_said(first)}, {_said(again)}",
    _rate("base", step, sizes, first),
    *(_said(found[name]) for name in others),
    *(
      f"{found[name].median / found[plain].median:.3f}"
      for name in others
      if name != plain
    ),
  ]


def show_forward() -> None:
  """Prints the times of the forward pass of a layer."""
  programs = {
    "base": base,
    "three": unfused,
    "kernel": gpu_dot,
    "base again": base,
  }
  head = ("M x K x N", "rank", "base us, twice", "TFLOP/s", "three products us")
  head += ("kernel us", "kernel / three")
  print_table(head, (_compare(s, False, programs, "three") for s in FORWARD))


def show_step() -> None:
  """Prints the times of forward and backward, the matrix frozen."""
  programs = {
    "base": base_step,
    "three": unfused_step,
    "kernel": kernel_step,
    "base again": base_step,
  }
  head = ("M x K x N", "rank", "base us, twice", "TFLOP/s", "three products us")
  head += ("kernel us", "kernel / three")
  print_table(head, (_compare(s, True, programs, "three") for s in STEP))


def show_decode() -> None:
  """Prints the times of few rows, as XLA compiles them."""
  programs = {"base": base, "three": unfused, "base again": base}
  head = ("M x K x N", "rank", "base us, twice", "TFLOP/s", "three products us")
  print_table(head, (_compare(s, False, programs, "three") for s in DECODE))


def _many_line(rows: int, adapters: int) -> list[str]:
  """Times every route for so many rows and adapters, as one line."""
  k = n = 4096
  kind = jnp.bfloat16
  shapes = [
    jax.ShapeDtypeStruct(shape, kind)
    for shape in ((rows, k), (k, n), (adapters, 16, k), (adapters, 16, n))
  ]
  key = jax.random.key(0)
  ids = jax.random.randint(key, (rows,), -1, adapters, jnp.int32)
  sets = [(*arrays, ids) for arrays in drawn(shapes)]
  programs: dict[str, Callable] = {
    "one": lambda x, w, a, b, ids: xla_dot(x, w, a[0], b[0]),
    "laned": functools.partial(laned_dot, implementation=xla_dot),
    "gathered": gathered_dot,
    "grouped": grouped_dot,
  }
  if rows >= 2048:
    programs["laned, kernel"] = functools.partial(
      laned_dot, implementation=gpu_dot
    )
  found = time_programs(programs, dict.fromkeys(programs, sets))
  chosen = choose_route(sizes_of(shapes[0], shapes[2], shapes[3], ids)).route
  names = ("one", "laned", "laned, kernel", "gathered", "grouped")
  return [
    str(rows),
    str(adapters),
    *(_said(found[name]) if name in found else "" for name in names),
    _megabytes((programs[name], sets[0]) for name in names if name in programs),
    chosen.__name__.removesuffix("_dot"),
  ]


def show_many() -> None:
  """Prints the times of many adapters in a batch, by each route."""
  head = ("rows", "adapters", "one us", "laned", "laned, kernel", "gathered")
  head += ("grouped", "temporaries MB", "chosen by counts")
  sizes = ((64, 8), (64, 64), (4096, 8), (4096, 64))
  print_table(head, (_many_line(*s) for s in sizes))


def _quantised_line(rows: int) -> list[str]:
  """Times bfloat16, int8 and nf4 matrices for so many rows, as one line."""
  sizes = Sizes(rows, 4096, 4096, 16)
  sets = drawn(arguments("unfused", False, sizes))
  held: dict[str, Any] = {"bfloat16": sets}
  for name, quantise in (("int8", quantise_int8), ("nf4", quantise_nf4)):
    to_codes = jax.jit(lambda w, f=quantise: f(w.astype(jnp.float32)))
    held[name] = [(x, to_codes(w), a, b) for x, w, a, b in sets]
  found = time_programs(dict.fromkeys(held, xla_dot), held)
  return [
    str(rows),
    *(_said(found[name]) for name in held),
    _megabytes((xla_dot, arrays[0]) for arrays in held.values()),
  ]


def show_quantised() -> None:
  """Prints the times of quantised matrices, brought back by XLA."""
  head = ("rows", "bfloat16 us", "int8 us", "nf4 us", "temporaries MB")
  print_table(head, (_quantised_line(rows) for rows in (64, 2048, 8192)))


def _tiling_lines() -> Iterator[list[str]]:
  """Times the kernel in every tiling, and yields a line for each shape."""
  for m, k, n, _ in (*FORWARD[:2], FORWARD[7], FORWARD[10]):
    shapes = [
      jax.ShapeDtypeStruct(shape, jnp.bfloat16)
      for shape in ((m, k), (k, n), (m, 64), (64, n))
    ]
    sets = drawn(shapes)
    bare = [s[:2] for s in sets]
    programs: dict[str, Callable] = {"base": base}
    for i, tiling in enumerate(TILINGS):
      programs[f"{i}"] = functools.partial(hopper_matmul, tiling=tiling)
    sets_of = {name: bare if name == "base" else sets for name in programs}
    found = time_programs(programs, sets_of)
    yield [f"{m} x {k} x {n}", *(_said(time) for time in found.values())]


def show_tilings() -> None:
  """Prints the times of the kernel alone, u given, in several tilings."""
  for i, tiling in enumerate(TILINGS):
    print(f"{i}: {tiling}")
  head = ("M x K x N", "base us", *(str(i) for i in range(len(TILINGS))))
  print_table(head, _tiling_lines())


# {name: (its title, what prints it)}
TABLES: dict[str, tuple[str, Callable[[], None]]] = {
  "forward": ("The forward pass of a layer.", show_forward),
  "step": ("Forward and backward, the matrix frozen.", show_step),
  "decode": ("Few rows, as XLA compiles them.", show_decode),
  "many": ("Many adapters of rank 16 in a batch, 4096 x 4096.", show_many),
  "quantised": (
    "Quantised matrices, brought back by XLA: 4096 x 4096, rank 16.",
    show_quantised,
  ),
  "tilings": (
    "The kernel alone, u given, rank 64, in several tilings.",
    show_tilings,
  ),
}


def main(arguments_: Sequence[str] | None = None) -> None:
  """Prints the tables asked for; stops where there is no card."""
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.bench.gpu",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--tables", nargs="+", default=[*TABLES], choices=TABLES)
  asked = parser.parse_args(arguments_)
  try:
    card = find_card()
  except ValueError as error:
    raise SystemExit(f"pallas_kernels.bench.gpu: {error}") from None
  sets = drawn(arguments("base", False, CEILING))
  ceiling = time_programs({"base": base}, {"base": sets})["base"]
  rate = _rate("base", False, CEILING, ceiling)
  print(f"{card.device_kind}, jax {jax.__version__}; 8192^3: {rate} TFLOP/s")
  for name in asked.tables:
    title, show = TABLES[name]
    print(f"\n{name}: {title}\n", flush=True)
    show()


if __name__ == "__main__":
  main()
