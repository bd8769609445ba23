# SPDX-License-Identifier: Apache-2.0
"""What the extraction of a module costs: operations and bytes, counted."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jlora.commands.machines import Machine
from jlora.extraction.workers import deal
from jlora.factoring.factorisers import cheapest, gram, krylov, svd

_OVERSAMPLE = 16  # rows of a block beyond the rank, `krylov`'s default
_PROBES = 16  # further rows of the certificate's products
_FLOAT = 4


class Module(NamedTuple):
  """A parameter as a matrix.

  Attributes:
    path: its name.
    shape: (..., in, out).
    itemsize: bytes of a stored number.
    is_changed: whether it is factored; otherwise it is only compared.
  """

  path: str
  shape: tuple[int, ...]
  itemsize: int
  is_changed: bool = True


class Cost(NamedTuple):
  """What a module costs on each of the devices that share it.

  Attributes:
    flops: operations of a device.
    moved: bytes between it and its memory, of products.
    entries: pairs of numbers compared and subtracted.
    sent: bytes it sends to the others.
    held: bytes of its memory that are taken.
  """

  flops: float
  moved: float
  entries: float
  sent: float
  held: float


def bytes_read(module: Module) -> int:
  """Bytes of both tensors on disk.

  Args:
    module: which.

  Returns:
    Bytes.

  Example:
    >>> bytes_read(Module("w", (4, 6), 2))
    96
  """
  return 2 * math.prod(module.shape) * module.itemsize


def cost_of(module: Module, rank: int, passes: int, devices: int = 1) -> Cost:
  """Estimates what a device does for a module that several devices share.

      flops = [2 m n w (2 p - 1) + certificate + small problems] / devices

  Args:
    module: which; leading axes count as so many matrices.
    rank: of its Lora.
    passes: p, blocks of the Krylov space; it stops at 3 or 4 where the spectrum
      decays, at 6 at the latest.
    devices: over which its long side is cut; 1: it stays whole.

  Returns:
    Cost. Small problems (of the width of the basis) are done by every device.

  Approximation: an operation of an eigenvalue problem takes as long as 15 of a
  product, as on CPUs; orthonormalising counts at full length.

  Example:
    >>> cost = cost_of(Module("w", (2048, 2048), 2), 64, 4)
    >>> cost.sent, round(cost.flops / 1e9)
    (0.0, 8)
  """
  size, stored = math.prod(module.shape), bytes_read(module)
  if not module.is_changed:
    return Cost(0.0, stored / devices, 0.0, 0.0, stored / devices)
  *batch, m, n = module.shape
  count, short, long = math.prod(batch), min(m, n), max(m, n)
  rank = min(rank, short)
  width = rank + _OVERSAMPLE
  large, small, products = _FACTORISERS[
    cheapest((m, n), rank, oversample=_OVERSAMPLE, passes=6)
  ](short, long, width, passes)
  large += _certificate(short, long, rank)
  flops = count * (large / devices + small)
  moved = size * _FLOAT * (products + 4) / devices
  # Partial sums of every other product travel, as rings send them.
  row = _FLOAT * (width * passes + 2 * (rank + _PROBES)) * short
  sent = count * 2 * (devices - 1) / devices * row
  basis = _FLOAT * (passes + 3) * width * (short + long)
  held = (stored + _FLOAT * size + count * basis) / devices
  sent = sent if devices > 1 else 0.0
  return Cost(flops, moved, size / devices, sent, held)


def _krylov(short: int, long: int, width: int, passes: int):
  """Operations with the delta's sides, those without; reads of the delta."""
  span, products = width * passes, 2 * passes - 1
  basis = span**2 * (4 * short + long) + 6 * passes * width**2 * short
  return 2 * short * long * width * products + basis, 15 * span**3, products


def _gram(short: int, long: int, width: int, passes: int):
  del passes
  return 2 * short * long * (short + width), 15 * short**3, 2


def _svd(short: int, long: int, width: int, passes: int):
  del width, passes
  return 0, 20 * short**2 * (long + short), 1


_FACTORISERS = {krylov: _krylov, gram: _gram, svd: _svd}


def _certificate(short: int, long: int, rank: int) -> float:
  """Operations of the four products and the QR that certify a module."""
  rows = 2 * (rank + _PROBES) + 2 * _PROBES
  return 2 * short * long * rows + 4 * rank**2 * (short + long)


class _Seconds(NamedTuple):
  products: float
  moved: float
  compared: float
  sent: float

  @property
  def alone(self) -> float:
    """Without what is sent."""
    return max(self.products, self.moved) + self.compared


class Bound(NamedTuple):
  """The least seconds of a run, and what they are made of.

  Attributes:
    compute: of the busiest device, at its rate of operations.
    memory: of the busiest device, at its bandwidth, comparing included.
    interconnect: of what is cut over all devices.
    disk: of reading both checkpoints.
    factoring: of the busiest device: of every module's products the slower of
      compute and memory, then the comparing and the interconnect.
    seconds: of the run, in which reading and factoring go side by side.
    by: which of the four the run would be shorter without.
  """

  compute: float
  memory: float
  interconnect: float
  disk: float
  factoring: float
  seconds: float
  by: str


def bound_of(
  whole: Sequence[Cost],
  cut: Sequence[Cost],
  machine: Machine,
  devices: int,
  disk: float,
) -> Bound:
  """Computes the roofline of a run.

  Args:
    whole: modules that one device does alone, dealt longest first.
    cut: modules that all devices share.
    machine: each of the devices.
    devices: how many.
    disk: seconds of reading.

  Returns:
    Bound.

  Example:
    >>> machine = Machine(1e9, 1e9, 1e9, 1, 1e9, "")
    >>> bound_of([Cost(2e9, 1e9, 0, 0, 0)] * 3, [], machine, 2, 1.0).seconds
    4.0
  """

  def dealt(seconds: Iterable[float]) -> float:
    seconds = list(seconds)
    hands = deal([round(one * 1e9) for one in seconds], devices)
    return max(sum(seconds[item] for item in hand) for hand in hands)

  def times(costs: Sequence[Cost]) -> list[_Seconds]:
    return [
      _Seconds(
        cost.flops / machine.flops,
        cost.moved / machine.bandwidth,
        cost.entries / machine.entries,
        cost.sent / machine.interconnect if cost.sent else 0.0,
      )
      for cost in costs
    ]

  own, shared = times(whole), times(cut)
  compute = dealt(t.products for t in own) + sum(t.products for t in shared)
  memory = dealt(t.moved + t.compared for t in own)
  memory += sum(t.moved + t.compared for t in shared)
  interconnect = sum(t.sent for t in shared)
  factoring = dealt(t.alone for t in own)
  factoring += sum(t.alone + t.sent for t in shared)
  parts = {"compute": compute, "memory": memory, "interconnect": interconnect}
  by = "disk" if disk > factoring else max(parts, key=lambda name: parts[name])
  return Bound(
    compute, memory, interconnect, disk, factoring, max(factoring, disk), by
  )
