# SPDX-License-Identifier: Apache-2.0
"""The kernel for Hopper cards, in Mosaic GPU: y = x w + u b in one pass.

A persistent grid: each multiprocessor takes block after block of y. One of its
warpgroups copies blocks of x and w into a ring of shared memory, then those of
u and b through the same ring, as if the rank were more depth; two others
multiply, and write y while the next blocks arrive. The order of blocks keeps
those that share x and w in the cache together.

Follows `jax.experimental.pallas.ops.gpu.hopper_matmul_mgpu` in its roles and
its order of blocks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_WARPGROUPS = 2  # that multiply; one more copies
_SWIZZLE = 128  # bytes
_OUT = 64  # columns of y that a warpgroup stores at once
_TILE = 8  # rows of a tile of shared memory
_REGISTERS = {"copy": 40, "multiply": 232}  # of the 504 there are
UNIT = 64  # what depth, columns and rank are multiples of


class HopperTiling(NamedTuple):
  """How y is cut into blocks, and how many are computed at once.

  bm, bn, bk: rows, columns and depth of a block; each of two warpgroups
    multiplies half of the rows.
  stages: blocks of x and w in shared memory at once.
  width: blocks of rows that are taken before the next block of columns.
  paired: two multiprocessors with neighbouring rows fetch half of w each and
    send it to both; on an H100 no faster and no slower than each its own.
  multiprocessors: that work at once; an H100 and an H200 have 132.
  """

  bm: int = 128
  bn: int = 256
  bk: int = 64
  stages: int = 4
  width: int = 8
  paired: bool = True
  multiprocessors: int = 132


def count_blocks(
  rows: int,
  columns: int,
  tiling: HopperTiling = HopperTiling(),  # noqa: B008
) -> tuple[int, float]:
  """Counts the blocks of y, and how full they keep the card.

  Full is the share of the multiprocessors' turns in which one has a block.

  Example:
    >>> blocks, filled = count_blocks(2048, 4096)
    >>> blocks, round(filled, 2)
    (256, 0.97)
  """
  together = tiling.bm * (1 + tiling.paired)
  blocks = -(-rows // together) * (1 + tiling.paired) * -(-columns // tiling.bn)
  turns = -(-blocks // tiling.multiprocessors)
  return blocks, blocks / (turns * tiling.multiprocessors)


def hopper_matmul(
  x: jax.Array,
  w: jax.Array,
  u: jax.Array,
  b: jax.Array,
  *,
  transpose_w: bool = False,
  tiling: HopperTiling,
  interpret: Any = None,
) -> jax.Array:
  """Computes y = x w + u b in one kernel call, (M, N) in x's dtype.

  Args:
    x: (M, K) bfloat16 or float16; M a multiple of 8, K of 64.
    w: (K, N) in x's dtype, N a multiple of 64; (N, K) with `transpose_w`.
    u: (M, r) in x's dtype, the gated x aᵀ; r a multiple of 64.
    b: (r, N) in x's dtype; (N, r) with `transpose_w`.
    transpose_w: w and b are stored columns first.
    tiling: of y.
    interpret: the interpreter's parameters; None compiles. The interpreter of
      jax 0.10.2 has no transposed operands, no pairs and no uneven blocks.

  Returns:
    (M, N), summed in float32 and rounded once.
  """
  pair: dict[str, Any] = (
    {"cluster": (2,), "cluster_names": ("pair",)} if tiling.paired else {}
  )
  return plgpu.kernel(
    functools.partial(_kernel, tiling=tiling, transpose_w=transpose_w),
    # Inside shard_map a type says along which axes it varies, too.
    out_type=jax.eval_shape(lambda: x @ (w.T if transpose_w else w)),
    grid=(tiling.multiprocessors // (1 + tiling.paired),),
    grid_names=("worker",),
    num_threads=_WARPGROUPS + 1,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    kernel_name="lora_dot",
    interpret=interpret,
    **pair,
  )(x, w, u, b)


def _transforms(dtype):
  """Returns how blocks are tiled and swizzled in shared memory."""
  lanes = _SWIZZLE // jnp.dtype(dtype).itemsize
  return (
    plgpu.TilingTransform((_TILE, lanes)),
    plgpu.SwizzleTransform(_SWIZZLE),
  )


def _kernel(x, w, u, b, y, *, tiling, transpose_w):
  """Allots shared memory and barriers, then gives each warpgroup its role."""
  t = tiling
  smem = functools.partial(
    plgpu.SMEM, dtype=x.dtype, transforms=_transforms(x.dtype)
  )
  emptied: Any = plgpu.Barrier
  if t.paired:
    emptied = functools.partial(plgpu.ClusterBarrier, collective_axes=("pair",))

  def scope(*memory):
    roles = (
      functools.partial(role, (x, w, u, b, y), memory, t, transpose_w)
      for role in (_multiply, _copy)
    )
    lax.cond(lax.axis_index("wg") < _WARPGROUPS, *roles)

  pl.run_scoped(
    scope,
    smem((t.stages, t.bm, t.bk)),
    smem((t.stages, *((t.bn, t.bk) if transpose_w else (t.bk, t.bn)))),
    smem((_WARPGROUPS, 2, t.bm // _WARPGROUPS, _OUT)),
    plgpu.Barrier(num_arrivals=2, num_barriers=t.stages),
    emptied(num_arrivals=_WARPGROUPS, num_barriers=t.stages),
    collective_axes="wg",
  )


def _every_block(shape, t, body):
  """Calls body(rows, columns, how many blocks this worker did before)."""
  rows = pl.cdiv(shape[0], t.bm * (1 + t.paired))
  columns = pl.cdiv(shape[1], t.bn)

  @plgpu.nd_loop((rows * columns,), collective_axes="worker")
  def _(info):
    i, j = plgpu.planar_snake(info.index[0], (rows, columns), 0, t.width)
    if t.paired:
      i = 2 * i + lax.axis_index("pair")
    body(pl.ds(i * t.bm, t.bm), pl.ds(j * t.bn, t.bn), info.local_index)

  return rows * columns


def _steps(x, u, t):
  """Counts the blocks of depth, and those of depth and rank together."""
  deep = x.shape[1] // t.bk
  return deep, deep + u.shape[1] // t.bk


def _copy(arrays, memory, t, transpose_w):
  """Fills the ring: what the copying warpgroup does."""
  x, w, u, b, y = arrays
  x_smem, w_smem, _, full, empty = memory
  plgpu.set_max_registers(_REGISTERS["copy"], action="decrease")
  deep, steps = _steps(x, u, t)

  def one(rows, columns, done):
    def fill(left, right, step, slot):
      depth = pl.ds(step * t.bk, t.bk)
      plgpu.copy_gmem_to_smem(
        left.at[rows, depth], x_smem.at[slot], full.at[slot]
      )
      plgpu.copy_gmem_to_smem(
        right.at[(columns, depth) if transpose_w else (depth, columns)],
        w_smem.at[slot],
        full.at[slot],
        collective_axes=("pair",) if t.paired else None,
      )

    @pl.loop(0, steps)
    def _(step):
      count = done * steps + step
      slot = lax.rem(count, t.stages)

      @pl.when(count >= t.stages)
      def _():
        plgpu.barrier_wait(empty.at[slot])

      lax.cond(
        step < deep,
        lambda: fill(x, w, step, slot),
        lambda: fill(u, b, step - deep, slot),
      )

  _leave_last(_every_block(y.shape, t, one), steps, empty, t.stages)


def _leave_last(blocks, steps, empty, stages):
  """Waits until all is read: a neighbour may still be sending."""
  workers, me = lax.axis_size("worker"), lax.axis_index("worker")
  first = lax.div(blocks - me + workers - 1, workers) * steps - stages

  @pl.loop(0, stages)
  def _(count):
    @pl.when(first + count >= 0)
    def _():
      plgpu.barrier_wait(empty.at[lax.rem(first + count, stages)])


def _multiply(arrays, memory, t, transpose_w):
  """Empties the ring: what the two multiplying warpgroups do.

  Each takes half of a block's rows.
  """
  x, _, u, _, y = arrays
  x_smem, w_smem, y_smem, full, empty = memory
  plgpu.set_max_registers(_REGISTERS["multiply"], action="increase")
  _, steps = _steps(x, u, t)
  me, half = lax.axis_index("wg"), t.bm // _WARPGROUPS

  def one(rows, columns, done):
    def add(step, acc):
      count = done * steps + step
      slot = lax.rem(count, t.stages)
      plgpu.barrier_wait(full.at[slot])
      right = w_smem.at[slot]
      plgpu.wgmma(
        acc,
        x_smem.at[slot].at[pl.ds(me * half, half)],
        right.transpose((1, 0)) if transpose_w else right,
      )
      plgpu.wgmma_wait(1)  # all but this one: the block before has been read

      @pl.when(step > 0)
      def _():
        plgpu.barrier_arrive(empty.at[lax.rem(count - 1, t.stages)])

      return acc

    def accumulate(acc):
      lax.fori_loop(0, steps, add, acc)
      block = acc[...].astype(y.dtype)
      plgpu.barrier_arrive(empty.at[lax.rem((done + 1) * steps - 1, t.stages)])
      mine = y.at[rows, columns].at[pl.ds(me * half, half)]
      _store(block, mine, y_smem.at[me], min(t.bn, y.shape[1]))

    pl.run_scoped(
      accumulate, plgpu.WGMMAAccumulatorRef((half, t.bn), jnp.float32)
    )

  _every_block(y.shape, t, one)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(block, y, staging, columns):
  """Writes a warpgroup's rows, some columns at a time, two on their way.

  What lies over an edge of y is cut off by the copy itself, unless y is no
  wider than what is copied at once: then the place would be ignored. So no
  more than y's columns are copied.
  """
  pieces = columns // _OUT
  for piece in range(pieces):
    part = pl.ds(piece * _OUT, _OUT)
    slot = staging.at[piece % 2]
    # After an odd number the last piece of the block before is in this slot.
    busy = 0 if piece == 0 and pieces % 2 else 1
    plgpu.wait_smem_to_gmem(busy, wait_read_only=True)
    slot[...] = block[:, piece * _OUT : (piece + 1) * _OUT]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(slot, y.at[:, part])
