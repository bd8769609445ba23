# SPDX-License-Identifier: Apache-2.0
"""What the accelerators can do at most, as their makers publish it."""

from typing import NamedTuple

MIB = 2**20
GIB = 2**30


class Chip(NamedTuple):
  """One accelerator and the name under which a compiler knows it.

  topology: the name `jax.experimental.topologies` takes.
  devices: JAX devices that share the chip in that topology.
  flops: bfloat16 multiplications and additions a second, the whole chip.
  bandwidth: bytes a second between HBM and the chip, the whole chip.
  hbm: bytes of HBM, the whole chip.
  vmem: bytes of on-chip memory a kernel may fill: VMEM of one TPU core,
    shared memory of one GPU multiprocessor.
  fp8: the kernels may multiply float8 matrices there.
  per_cycle: operations of all its matrix units in a cycle, None if unknown;
    peak over this is the clock at which the compiler's cycles pass.
  source: where the figures come from.
  """

  topology: str
  devices: int
  flops: float
  bandwidth: float
  hbm: int
  vmem: int
  fp8: bool
  per_cycle: int | None
  source: str


# Operations of a square matrix unit in a cycle.
_OF_128, _OF_256 = 2 * 128**2, 2 * 256**2
_PAGES = "docs.cloud.google.com/tpu/docs/"

# VMEM is on no data sheet: those figures are `pltpu.get_tpu_info`'s.
CHIPS = {
  "v4": Chip(
    *("v4:2x2x1", 2, 275e12, 1228e9, 32 * GIB, 16 * MIB, False, 8 * _OF_128),
    _PAGES + "v4",
  ),
  "v5e": Chip(
    *("v5e:2x2", 1, 197e12, 819e9, 16 * GIB, 128 * MIB, False, 4 * _OF_128),
    _PAGES + "v5e",
  ),
  "v5p": Chip(
    *("v5p:2x2x1", 1, 459e12, 2765e9, 95 * GIB, 64 * MIB, False, 8 * _OF_128),
    _PAGES + "v5p",
  ),
  "v6e": Chip(
    *("v6e:2x2", 1, 918e12, 1640e9, 32 * GIB, 128 * MIB, True, 4 * _OF_256),
    _PAGES + "v6e",
  ),
  "v7x": Chip(
    *("tpu7x:2x2x1", 2, 2307e12, 7370e9, 192 * GIB, 64 * MIB, True, None),
    _PAGES + "tpu7x",
  ),
  "h100": Chip(
    *("h100", 1, 989e12, 3350e9, 80 * GIB, 227 * 1024, True, None),
    "NVIDIA H100 SXM data sheet, without sparsity",
  ),
}
TPUS = ("v4", "v5e", "v5p", "v6e", "v7x")


class Bound(NamedTuple):
  """The least time a program can take, and which limit sets it."""

  seconds: float
  by: str


def bound(chip: Chip, flops: float, bytes_moved: float) -> Bound:
  """Computes the roofline: the least time a program takes on one device.

      max(flops / peak, bytes / bandwidth)

  Args:
    chip: a row of `CHIPS`.
    flops: multiplications and additions of the program.
    bytes_moved: bytes between HBM and the device.

  Returns:
    Bound: seconds, and "compute" or "memory".

  Approximation: latencies and everything that is not a matrix product cost
  nothing here. The share of one JAX device is the chip's over its devices.

  Example:
    >>> bound(CHIPS["v5e"], 197e12, 819e9 / 2)
    Bound(seconds=1.0, by='compute')
  """
  compute = flops * chip.devices / chip.flops
  memory = bytes_moved * chip.devices / chip.bandwidth
  return max(Bound(compute, "compute"), Bound(memory, "memory"))


def excess_vmem(chip: Chip, limit: int | None) -> str | None:
  """Returns why a kernel may not claim so much on-chip memory, or None.

  The TPU compiler takes any `vmem_limit_bytes` in silence, five times the
  chip's memory too, so this has to be asked before.

  Args:
    chip: a row of `CHIPS`.
    limit: bytes; None is the compiler's own limit.

  Returns:
    The reason with both figures, or None.

  Example:
    >>> excess_vmem(CHIPS["v4"], 48 * MIB)
    'claims 48.0 MiB of on-chip memory, the chip has 16.0 MiB'
  """
  if limit is None or limit <= chip.vmem:
    return None
  return (
    f"claims {limit / MIB:.1f} MiB of on-chip memory, "
    f"the chip has {chip.vmem / MIB:.1f} MiB"
  )


def memory_cycles(chip: Chip, bytes_moved: float) -> float:
  """Computes in how many cycles of the chip HBM moves so many bytes.

  Example:
    >>> round(memory_cycles(CHIPS["v5e"], 819e9) / 1e9, 2)
    1.5
  """
  if chip.per_cycle is None:
    raise ValueError(f"the clock of {chip.topology} is not known")
  return bytes_moved / chip.bandwidth * chip.flops / chip.per_cycle
