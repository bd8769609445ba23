# SPDX-License-Identifier: Apache-2.0
"""Calls the TPU kernel: which blocks come and go, and when."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lora_dot.tpu.block import Static, lora_block
from pallas_kernels.lora_dot.tpu.nf4 import VALUES, whole_pieces
from pallas_kernels.lora_dot.tpu.tilings import Tiling
from pallas_kernels.lora_dot.weights import (
  BLOCK,
  Nf4,
  Scaled,
  Weight,
  codes_of,
)

# Mosaic takes no matrix product of one row: so many are given instead.
_ROWS = 8


def lora_matmul(
  x: jax.Array,
  w: Weight,
  a: jax.Array | None,
  b: jax.Array,
  gate: jax.Array | None,
  *,
  transpose_w: bool,
  tiling: Tiling,
  interpret: Any = False,
  u: jax.Array | None = None,
  return_u: bool = False,
  y_dtype: Any = None,
) -> tuple[jax.Array, Any]:
  """Computes the product of matrices in one kernel: (y, u).

      u = a xᵀ,   y = x w + (g u)ᵀ b

  The rank axis of u and g comes first, so that their rows are whole rows of
  128 numbers whatever the rank. x is read ceil(N / bn) times, or once if its
  depth is one block; w ceil(M / bm) times, or once if resident; y is written
  once.

  Args:
    x: (M, K) bfloat16 or float32.
    w: (K, N), or (N, K) with `transpose_w`: an array, `Scaled` or `Nf4`.
    a: (r, K) in x's dtype; None where u is given.
    b: (r, N) in x's dtype.
    gate: None, (r, 1) or (r, M) float32.
    transpose_w: w is stored (N, K).
    tiling: blocks; larger ones than the product are cut to it.
    interpret: True or pltpu.InterpretParams, to run without a TPU.
    u: (r, M) float32 before the gate, if it is known.
    return_u: also return u.
    y_dtype: dtype of y, by default x's.

  Returns:
    y (M, N), and u (r, M) float32 before the gate, or None.

  Example:
    >>> one = lambda *shape: jnp.ones(shape, jnp.float32)
    >>> tiling = Tiling(128, 128, 128, 2**20)
    >>> x, w, a, b = one(8, 4), one(4, 3), one(2, 4), one(2, 3)
    >>> lora_matmul(x, w, a, b, None, transpose_w=False, tiling=tiling,
    ...             interpret=True)[0][0]
    Array([12., 12., 12.], dtype=float32)
  """
  rows, rank, columns = x.shape[0], *b.shape
  if rank == 1:
    b = _padded(b, 0)
    a, gate, u = (None if t is None else _padded(t, 0) for t in (a, gate, u))
  if rows == 1:
    x, u = _padded(x, 0), None if u is None else _padded(u, 1)
    tiling = tiling._replace(bm=_ROWS)
  more, piece = {}, 0
  if isinstance(w, Nf4):
    x, w, a, b, tiling, piece = whole_pieces(x, w, a, b, transpose_w, tiling)
    pieces = w.absmax.reshape(-1, piece // BLOCK, w.absmax.shape[1])
    more = {"absmax": pieces, "values": jnp.asarray(VALUES)}
  elif transpose_w and codes_of(w).shape[0] == 1:  # a row is a column as well
    w, transpose_w = jax.tree.map(jnp.transpose, w), False
  scale, scaled = _scale_of(w, transpose_w)
  ins = dict(x=x, w=codes_of(w), a=a, b=b, gate=gate, scale=scale, u=u) | more
  outs = {"y": (y_dtype or x.dtype, (x.shape[0], b.shape[1]))}
  if return_u:
    outs["u"] = jnp.float32, (b.shape[0], x.shape[0])
  outs = {name: _type(ins, *out) for name, out in outs.items()}
  how = scaled, piece, transpose_w
  made = _call(ins, outs, how, tiling, interpret)
  y = made["y"][:rows, :columns]
  return y, made["u"][:rank, :rows] if return_u else None


def _padded(t, axis):
  """Pads an axis of 1 with zeros to 8."""
  pads = [(0, 0), (0, 0)]
  pads[axis] = (0, _ROWS - 1)
  return jnp.pad(t, pads)


def _scale_of(w: Weight, transpose_w: bool):
  """Returns (scales as a row or None, the product's axis they lie on)."""
  if not isinstance(w, Scaled):
    return None, ""
  by_column = w.scale.shape[0] == 1
  return w.scale.reshape(1, -1), "in" if by_column == transpose_w else "out"


def _type(ins, dtype, shape):
  """Returns a result's type: in shard_map it varies if an operand does."""

  def made(leaves):
    total = sum(leaf.sum().astype(jnp.float32) for leaf in leaves)
    return jnp.broadcast_to(total, shape).astype(dtype)

  return jax.eval_shape(made, jax.tree.leaves(ins))


def _call(ins, outs, how, tiling, interpret):
  """Runs the kernel over row, column and depth blocks, depth innermost."""
  (m, k), (r, n) = ins["x"].shape, ins["b"].shape
  bm, bn, bk = min(tiling.bm, m), min(tiling.bn, n), min(tiling.bk, k)
  grid = pl.cdiv(m, bm), pl.cdiv(n, bn), pl.cdiv(k, bk)
  scaled, piece, transpose_w = how
  s = Static(
    nj=grid[1],
    nk=grid[2],
    depth=k if k % bk else 0,
    transpose_w=transpose_w,
    resident=tiling.resident,
    scaled=scaled,
    piece=piece,
  )
  specs = _specs(bm, bn, bk, r, s)
  one_gate = ins["gate"] is not None and ins["gate"].shape[1] == 1
  if one_gate:
    specs["gate"] = pl.BlockSpec((r, 1), lambda i, j, k: (0, 0))
  of = lambda names: {  # noqa: E731
    name: None if t is None else specs[name] for name, t in names.items()
  }
  # w is fetched at the first row block for all others: one core, in order.
  rows = "arbitrary" if s.resident else "parallel"
  return pl.pallas_call(
    functools.partial(lora_block, s=s),
    grid=grid,
    in_specs=(of(ins),),
    out_specs=of(outs),
    out_shape=outs,
    scratch_shapes=(_scratch(ins, outs, bm, bn, bk, s),),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=(rows, "arbitrary", "arbitrary"),
      vmem_limit_bytes=tiling.vmem_limit_bytes,
    ),
    cost_estimate=_cost(ins, outs, grid, tiling),
    interpret=interpret,
    name="lora_dot",
  )(ins)


def _specs(bm, bn, bk, r, s):
  """Says how the block of each operand follows the grid."""
  last, absmax = s.nk - 1, None
  w = pl.BlockSpec((bk, bn), lambda i, j, k: (k, j))
  if s.transpose_w:
    w = pl.BlockSpec((bn, bk), lambda i, j, k: (j, k))
  if s.piece:
    w, absmax = _nf4_specs(w, s)
  elif s.resident:
    w = pl.BlockSpec(memory_space=pl.ANY)
  scale = pl.BlockSpec((1, bn), lambda i, j, k: (0, j))
  if s.scaled == "in":
    scale = pl.BlockSpec((1, bk), lambda i, j, k: (0, k))
  rank_by_rows = pl.BlockSpec((r, bm), lambda i, j, k: (0, i))
  return {
    "x": pl.BlockSpec((bm, bk), lambda i, j, k: (i, k)),
    "w": w,
    # Wanted only while j is 0: the index then stands still, and nothing is
    # fetched again.
    "a": pl.BlockSpec((r, bk), lambda i, j, k: (0, jnp.where(j == 0, k, last))),
    "b": pl.BlockSpec((r, bn), lambda i, j, k: (0, j)),
    "gate": rank_by_rows,
    "u": rank_by_rows,
    "scale": scale,
    "absmax": absmax,
    "values": pl.BlockSpec((1, 128), lambda i, j, k: (0, 0)),
    "y": pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
  }


def _nf4_specs(w, s):
  """Says how codes and magnitudes of an nf4 matrix follow the grid."""
  rows, columns = w.block_shape
  last = s.nj - 1

  def place(i, j, k):
    # Kept once it is decoded: the index then stands still.
    return w.index_map(i, jnp.where(i == 0, j, last) if s.resident else j, k)

  def third(i, j, k):
    row, column = place(i, j, k)
    return row, 0, column

  sides = rows // s.piece, s.piece // BLOCK, columns
  codes = pl.BlockSpec((rows // 2, columns), place)
  return codes, pl.BlockSpec(sides, third)


def _scratch(ins, outs, bm, bn, bk, s):
  """Lists the memory that lasts through the grid."""
  shapes = {}
  if s.nk > 1 or (s.piece and not s.resident):
    shapes["acc"] = pltpu.VMEM((bm, bn), jnp.float32)
  if ins["u"] is None and "u" not in outs:
    shapes["u"] = pltpu.VMEM((ins["b"].shape[0], bm), jnp.float32)
  if s.resident:
    block = (bn, bk) if s.transpose_w else (bk, bn)
    dtype = ins["x"].dtype if s.piece else ins["w"].dtype
    shapes["w"] = pltpu.VMEM((s.nj, *block), dtype)
  if s.resident and not s.piece:
    shapes["arrivals"] = pltpu.SemaphoreType.DMA((s.nj,))
  return shapes


def _cost(ins, outs, grid, tiling):
  """Counts operations, and bytes with what is read again."""
  (m, k), (r, n) = ins["x"].shape, ins["b"].shape
  times = {
    "x": 1 if grid[2] == 1 else grid[1],
    "w": 1 if tiling.resident or grid[1:] == (1, 1) else grid[0],
    "a": 1 if grid[2] == 1 else grid[0],
    "b": 1 if grid[1] == 1 else grid[0],
  }
  times["absmax"] = times["w"]
  arrays = [(name, t) for name, t in (ins | outs).items() if t is not None]
  return pl.CostEstimate(
    flops=2 * m * k * n + 2 * m * r * (k + n),
    transcendentals=0,
    bytes_accessed=sum(
      times.get(name, 1) * t.size * t.dtype.itemsize for name, t in arrays
    ),
  )
