# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the TPU kernel for each chip, and the memory they fill."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.lora_dot.weights import Weight, bytes_of, shape_of

MIB = 2**20
_LANES = 128


class Tiling(NamedTuple):
  """A block of the product and the memory the compiler may fill.

  bm, bn, bk: rows, columns and depth. Where a block does not end with its
    axis, bm, bn and bk are multiples of 128.
  vmem_limit_bytes: what the kernel may use of the chip's vector memory.
  resident: all of w is kept in vector memory, so it is read once; needs the
    whole depth in a block.
  """

  bm: int
  bn: int
  bk: int
  vmem_limit_bytes: int
  resident: bool = False


class Chip(NamedTuple):
  """A chip's limits: vector memory of a core, cores, matrix unit's side."""

  vmem_bytes: int
  cores: int
  mxu: int


class Problem(NamedTuple):
  """The sizes of a product, and bytes of a number of x, w and y."""

  m: int
  k: int
  n: int
  r: int
  x_bytes: int = 2
  w_bytes: float = 2
  y_bytes: int = 2


CHIPS = {
  "v4": Chip(16 * MIB, 2, 128),
  "v5e": Chip(128 * MIB, 1, 128),
  "v5p": Chip(64 * MIB, 2, 128),
  "v6e": Chip(128 * MIB, 1, 256),
  "v7x": Chip(64 * MIB, 1, 256),
}

CHIP_OF_KIND = {
  "TPU v4": "v4",
  "TPU v5e": "v5e",
  "TPU v5 lite": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6e": "v6e",
  "TPU v6 lite": "v6e",
  "TPU7x": "v7x",
}

# chip -> regime -> tiling. "resident" where w fits beside the blocks; for other
# products of many rows (training, prefill) "whole", the whole depth in a block
# so that x is read once, or "rows", whichever moves fewer bytes; "few" for
# decode, with the whole depth and w in columns as many as fit.
TILINGS = {
  "v4": {
    "rows": Tiling(512, 512, 1024, 15 * MIB),
    "few": Tiling(128, 512, 32768, 15 * MIB),
  },
  "v5e": {
    "resident": Tiling(1024, 512, 4096, 100 * MIB, True),
    "whole": Tiling(1024, 256, 32768, 100 * MIB),
    "rows": Tiling(1024, 512, 2048, 48 * MIB),
    "few": Tiling(128, 512, 32768, 48 * MIB),
  },
  "v5p": {
    "rows": Tiling(1024, 512, 2048, 48 * MIB),
    "few": Tiling(128, 512, 32768, 48 * MIB),
  },
  "v6e": {
    "resident": Tiling(1024, 1024, 4096, 100 * MIB, True),
    "whole": Tiling(2048, 512, 32768, 100 * MIB),
    "rows": Tiling(2048, 1024, 1024, 64 * MIB),
    "few": Tiling(128, 512, 32768, 64 * MIB),
  },
  "v7x": {
    "rows": Tiling(1024, 512, 2048, 48 * MIB),
    "few": Tiling(128, 512, 32768, 48 * MIB),
  },
}
_FEW = 128  # rows up to which a product is bound by reading w
# Multiplications of a block that the compiler unrolls in a minute or two.
_UNROLLED = 2**32
_ORDERS = {
  "few": ("bn", "bn", *("bk",) * 8),
  "whole": ("bn", "bm", "bm"),
  "rows": ("bk", "bn", "bm", "bk", "bn", "bm", "bk", "bk"),
}


def tiling_for(chip: str, problem: Problem) -> Tiling:
  """Returns the tiling of the chip's table that moves fewest bytes.

  One that does not fit the vector memory is halved, depth first, then columns
  and rows, down to 128; of few rows columns first; a whole depth is kept.

  Args:
    chip: a name of `CHIPS`.
    problem: the product's sizes.

  Returns:
    A Tiling, cut to the product and counted to fit.

  Raises:
    ValueError: for a chip that is not in the table, or if nothing fits.

  Example:
    >>> tiling_for("v6e", Problem(64, 4096, 4096, 16))[:3]
    (64, 512, 4096)
  """
  if chip not in TILINGS:
    raise ValueError(f"no tilings for chip {chip!r}; there are {[*TILINGS]}")
  table = TILINGS[chip]
  whole = table.get("resident") if problem.m > _FEW else None
  if whole and (cut := _resident(whole, problem)):
    return cut
  regimes = ("few",) if problem.m <= _FEW else ("whole", "rows")
  fitting = [
    tiling
    for regime in regimes
    if regime in table
    for tiling in _first_that_fits(chip, regime, problem)
  ]
  if not fitting:
    raise ValueError(f"no blocks of {problem} fit the memory of {chip}")
  return min(fitting, key=lambda tiling: moved_bytes(tiling, problem))


def moved_bytes(tiling: Tiling, problem: Problem) -> float:
  """Counts the bytes of x, w and y that blocks move to and from HBM.

  x is read once where its depth is one block, else for every column block; w
  once where it stays or is one block, else for every row block.

  Example:
    >>> moved_bytes(Tiling(128, 128, 128, 0), Problem(128, 128, 256, 8))
    163840
  """
  p = problem
  rows, columns, depths = (
    -(-size // block)
    for size, block in zip((p.m, p.n, p.k), tiling[:3], strict=True)
  )
  x = p.m * p.k * p.x_bytes * (columns if depths > 1 else 1)
  stays = tiling.resident or columns * depths == 1
  w = p.k * p.n * p.w_bytes * (1 if stays else rows)
  return x + w + p.m * p.n * p.y_bytes


def _first_that_fits(chip, regime, problem) -> list[Tiling]:
  """Lists the largest of ever smaller tilings that fits, or nothing."""
  tiling = cut_to(TILINGS[chip][regime], problem)
  for cut in _smaller(tiling, _ORDERS[regime]):
    small = cut.bm * cut.bn * cut.bk <= _UNROLLED
    # v5e's compiler took 100.8 MiB for (1024, 256, 14336), 74.2 by our count.
    deep = (chip, regime) == ("v5e", "whole")
    copied = deep * _tile(cut.bm, cut.bk, problem.x_bytes)
    if small and vmem_bytes(cut, problem) + copied <= cut.vmem_limit_bytes:
      return [cut]
  return []


def _resident(tiling: Tiling, problem: Problem) -> Tiling | None:
  """Returns the tiling that keeps all of w in memory, or None.

  None where w cannot be cut evenly or does not fit.
  """
  if problem.k % _LANES or problem.n % _LANES:
    return None
  columns = (tiling.bn, 512, 384, 256, 128)
  bn = next(size for size in columns if problem.n % size == 0)
  for bm in (tiling.bm, 512, 256):
    cut = tiling._replace(bm=min(bm, problem.m), bn=bn, bk=problem.k)
    if vmem_bytes(cut, problem) <= cut.vmem_limit_bytes:
      return cut
  return None


def cut_to(tiling: Tiling, problem: Problem) -> Tiling:
  """Cuts blocks to the product's size, the depth evenly where possible."""
  bk = min(tiling.bk, problem.k)
  if problem.k % _LANES == 0:
    while problem.k % bk:
      bk -= _LANES
  return tiling._replace(
    bm=min(tiling.bm, problem.m), bn=min(tiling.bn, problem.n), bk=bk
  )


def _smaller(tiling: Tiling, order: tuple[str, ...]) -> Iterator[Tiling]:
  """Yields the tiling, then ever smaller ones, a side halved at a time."""
  yield tiling
  for name in order:
    size = getattr(tiling, name)
    if size > _LANES:
      half = max(_LANES, size // 2 // _LANES * _LANES)
      tiling = tiling._replace(**{name: half})
      yield tiling


def vmem_bytes(tiling: Tiling, problem: Problem) -> int:
  """Counts the bytes of vector memory that the kernel fills.

  Blocks that come and go are held twice; rows are padded to 128 numbers and
  columns to a tile's height, as the chip stores them. What the compiler keeps
  for itself is counted as a copy of each block that is not used as it is
  stored: it reports no number, only that it has run out.

  Example:
    >>> vmem_bytes(Tiling(128, 128, 128, 0), Problem(128, 128, 128, 8))
    368640
  """
  bm, bn, bk, _, resident = tiling
  p = problem
  r = p.r + (p.r == 1) * 7
  w = _tile(p.k, p.n, p.w_bytes) if resident else 2 * _tile(bk, bn, p.w_bytes)
  if p.w_bytes < 1:  # nf4, decoded if it stays; its magnitudes
    w = _tile(p.k, p.n, p.x_bytes) * resident + 2 * _tile(bk, bn, p.w_bytes)
    w += 2 * bk * bn // 16
  blocks = 2 * (
    _tile(bm, bk, p.x_bytes)
    + _tile(r, bk, p.x_bytes)
    + _tile(r, bn, p.x_bytes)
    + _tile(bm, bn, p.y_bytes)
    + 2 * _tile(r, bm, 4)  # the gate and u
  )
  values = 2 * _tile(bm, bn, 4)  # the accumulator, and the product
  values += _tile(r, bm, 4) + _tile(r, bm, p.x_bytes)  # u g
  ragged = p.k % bk != 0
  if ragged:
    values += _tile(bm, bk, p.x_bytes)
  if ragged or p.w_bytes != p.x_bytes:
    values += _tile(bk, bn, p.x_bytes)
  if p.w_bytes == 1:  # x times scales
    values += _tile(bm, bk, 4)
  return w + blocks + values


def _tile(rows: int, columns: int, itemsize: float) -> int:
  """Counts the bytes of a block as the chip stores it, padded to tiles."""
  height = int(32 / itemsize)
  up = lambda size, unit: -(-size // unit) * unit  # noqa: E731
  return int(up(rows, height) * up(columns, _LANES) * itemsize)


def refuse_tiling(tiling: Tiling, chip: str, problem: Problem) -> str | None:
  """Returns why a tiling cannot run on a chip, or None.

  The compiler takes a limit above the chip's memory without a word, and blocks
  that overflow a lower one only fail after minutes: both are counted here.

  Example:
    >>> refuse_tiling(Tiling(128, 128, 128, 2**30), "v5e", Problem(9, 9, 9, 9))
    'vmem_limit_bytes 1073741824 is over the 134217728 of v5e'
  """
  sizes = (problem.m, problem.n, problem.k)
  for name, block, size in zip(
    ("bm", "bn", "bk"), tiling[:3], sizes, strict=True
  ):
    if block < 1 or (block < size and block % _LANES):
      return f"{name} {block} is neither a multiple of 128 nor all of {size}"
  if tiling.resident and (problem.n % tiling.bn or tiling.bk < problem.k):
    return f"resident w {sizes[2]} x {sizes[1]} is not cut evenly by {tiling}"
  if tiling.vmem_limit_bytes > CHIPS[chip].vmem_bytes:
    return (
      f"vmem_limit_bytes {tiling.vmem_limit_bytes} is over the "
      f"{CHIPS[chip].vmem_bytes} of {chip}"
    )
  if (need := vmem_bytes(tiling, problem)) > tiling.vmem_limit_bytes:
    return f"blocks fill {need} bytes of {tiling.vmem_limit_bytes}"
  return None


def problem_of(
  x: Any, w: Weight, r: int, transpose_w: bool, y_dtype: Any = None
) -> Problem:
  """Reads the Problem of a call; arrays may be ShapeDtypeStructs."""
  k, n = shape_of(w)[::-1] if transpose_w else shape_of(w)
  m = 1
  for size in x.shape[:-1]:
    m *= size
  y_bytes = jnp.dtype(y_dtype or x.dtype).itemsize
  return Problem(m, k, n, r, x.dtype.itemsize, bytes_of(w), y_bytes)
