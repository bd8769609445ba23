# SPDX-License-Identifier: Apache-2.0
"""What a device can do at most: published, or measured on this one."""

import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import ml_dtypes
import numpy as np
from threadpoolctl import threadpool_limits

from jlora.factoring.deltas import survey
from jlora.factoring.rounding import ulp_histogram
from pallas_kernels.aot import CHIPS

GB = 10**9


class Machine(NamedTuple):
  """One device that factors, and the wires around it.

  Attributes:
    flops: float32 operations of matrix products a second, at full precision.
    bandwidth: bytes a second between the device and its memory.
    entries: pairs of numbers a second that are compared and subtracted.
    memory: its bytes.
    interconnect: bytes a second that it sends to others; 0: none are known.
    source: where the figures come from.
  """

  flops: float
  bandwidth: float
  entries: float
  memory: int
  interconnect: float
  source: str


# A float32 product at full precision is six of bfloat16 on a TPU's matrix unit.
_PRODUCTS = 6
# Bytes a second that a chip sends, half of what its pages say for both ways.
_SENT = {"v4": 150, "v5e": 200, "v5p": 600, "v6e": 400, "h100": 450}
_FLOAT32 = {"h100": 67e12}  # without tensor cores, whose float32 is rounded
# Both tensors are read twice, the delta is written, read and scaled.
_BYTES_OF_PAIR = 2 * (2 + 2) + 4 * 4

MACHINES = {
  name: Machine(
    flops=_FLOAT32.get(name, CHIPS[name].flops / _PRODUCTS),
    bandwidth=CHIPS[name].bandwidth,
    entries=CHIPS[name].bandwidth / _BYTES_OF_PAIR,
    memory=CHIPS[name].hbm,
    interconnect=sent * GB,
    source=CHIPS[name].source,
  )
  for name, sent in _SENT.items()
}

_SHAPE = (80, 2048, 4096)  # a block of rows times a delta
_BYTES = 2**27


class Here(NamedTuple):
  """This machine, measured.

  Attributes:
    machine: one thread of it, while all the others work.
    threads: how many there are.
    disk: bytes a second read from a file that was just written.
  """

  machine: Machine
  threads: int
  disk: float


def measure_here() -> Here:
  """Measures what one thread of this machine does while the others do it too.

  Returns:
    Here. Takes seconds; other jobs on the machine lower what is found.

  Example:
    >>> measure_here.__name__
    'measure_here'
  """
  threads = len(os.sched_getaffinity(0))
  k, m, n = _SHAPE
  with threadpool_limits(1, user_api="blas"):
    product = _slowest(threads, _multiply)
    compared = _slowest(threads, _compare)
  copy = _slowest(threads, _copy)
  machine = Machine(
    flops=2 * k * m * n / product,
    bandwidth=2 * _BYTES / copy,
    entries=m * n / compared,
    memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    interconnect=0.0,
    source="measured",
  )
  with tempfile.TemporaryDirectory() as folder:
    disk = _BYTES / _usual(_reader(pathlib.Path(folder, "bytes")))
  return Here(machine, threads, disk)


def _slowest(threads: int, make: Callable[[], Callable[[], object]]) -> float:
  """Seconds of one call, as many at a time as there are threads."""
  with ThreadPoolExecutor(threads) as pool:
    calls = list(pool.map(lambda _: make(), range(threads)))
    return max(pool.map(_usual, calls))


def _usual(call: Callable[[], object]) -> float:
  """Seconds of a call, the median of several."""
  found = []
  for _ in range(9):
    began = time.perf_counter()
    call()
    found.append(time.perf_counter() - began)
  return statistics.median(found)


def _multiply() -> Callable[[], object]:
  k, m, n = _SHAPE
  rows, matrix = np.ones((k, m), np.float32), np.ones((m, n), np.float32)
  out = np.empty((k, n), np.float32)
  return lambda: np.matmul(rows, matrix, out=out)


def _compare() -> Callable[[], object]:
  rng = np.random.default_rng(0)
  base = rng.standard_normal(_SHAPE[1:], np.float32).astype(ml_dtypes.bfloat16)
  finetuned, room = base.copy(), np.empty(base.size, np.float32)

  def compare():
    survey(base, finetuned, base.dtype, room)
    return ulp_histogram(base, finetuned, base.dtype)

  return compare


def _copy() -> Callable[[], object]:
  one, two = np.ones(_BYTES, np.uint8), np.ones(_BYTES, np.uint8)
  return lambda: np.copyto(one, two)


def _reader(file: pathlib.Path) -> Callable[[], object]:
  np.ones(_BYTES, np.uint8).tofile(file)
  room = np.empty(_BYTES, np.uint8)

  def read():
    with file.open("rb", buffering=0) as stream:
      return stream.readinto(room.data)

  return read
