# SPDX-License-Identifier: Apache-2.0
"""Times programs on the card that is here, in turns, by the clock."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

_TURNS = 9
_SECONDS = 0.01  # of each program in a turn, about


class Time(NamedTuple):
  """Microseconds of one call: the median of the turns, least and most."""

  median: float
  least: float
  most: float


def find_card() -> Any:
  """Returns the CUDA card of this process.

  Raises:
    ValueError: there is none, or it is not the default device.

  Example:
    >>> find_card()
    Traceback (most recent call last):
    ...
    ValueError: no CUDA card here, jax sees cpu: these figures need one.
  """
  device = jax.devices()[0]
  if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
    raise ValueError(
      f"no CUDA card here, jax sees {device.device_kind}: these figures need "
      "one."
    )
  return device


def time_programs(
  programs: Mapping[str, Callable], arguments: Mapping[str, Sequence[Any]]
) -> dict[str, Time]:
  """Times each program, all in turns, so that a hot card is hot for all.

  A program is compiled for all of its argument sets at once and runs on one
  after the other: together they are to be larger than the card's cache. Calls
  are queued, so the host's part is hidden as long as a call of all sets takes
  the card longer than the host.

  Args:
    programs: {name: function}. One function under two names is compiled once
      and timed twice: the difference is the noise.
    arguments: {name: argument sets}, each a tuple of arrays.

  Returns:
    {name: Time}.
  """
  compiled: dict[tuple, Any] = {}
  runs: dict[str, tuple[Any, Sequence[Any]]] = {}
  for name, function in programs.items():
    sets = arguments[name]
    key = function, id(sets)
    if key not in compiled:
      compiled[key] = _compile(function, sets)
    runs[name] = compiled[key], sets
  loops = {name: _loops(run[0], run[1]) for name, run in runs.items()}
  taken: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(_TURNS):
    for name, run in runs.items():
      taken[name].append(1e6 * _seconds(run[0], run[1], loops[name]))
  return {
    name: Time(
      statistics.median(times),
      min(times),
      max(times),
    )
    for name, times in taken.items()
  }


def _compile(function, sets):
  """Compiles one program that runs the function on every set."""
  one = jax.jit(function)  # so that it is lowered once for all sets
  return (
    jax.jit(lambda sets: [one(*arrays) for arrays in sets])
    .lower(sets)
    .compile()
  )


def temporary_bytes(function: Callable, arrays: Sequence[Any]) -> int:
  """Counts the bytes one call keeps beside its arguments and results."""
  memory = jax.jit(function).lower(*arrays).compile().memory_analysis()
  return memory.temp_size_in_bytes if memory else 0


def _seconds(program, sets, loops):
  """Times one call on one set, while `loops` calls on all are queued."""
  start = time.perf_counter()
  for _ in range(loops):
    out = program(sets)
  jax.block_until_ready(out)  # pyright: ignore[reportPossiblyUnbound]
  return (time.perf_counter() - start) / loops / len(sets)


def _loops(program, sets):
  """Counts how many calls of all sets fill a turn; warms up."""
  _seconds(program, sets, 2)
  once = _seconds(program, sets, 2) * len(sets)
  return max(2, min(100, round(_SECONDS / once)))
