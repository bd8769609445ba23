# SPDX-License-Identifier: Apache-2.0
"""The product on Hopper cards, in Mosaic GPU: chosen by name, never by itself.

Compiled for the H100 and interpreted on CPUs; it has not run on a card.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lora_dot.weights import Nf4, Scaled, Weight
from pallas_kernels.lora_dot.xla import xla_dot

_WARPGROUPS = 2  # that multiply; one more copies
_SWIZZLE = 128  # bytes
_DTYPES = (jnp.bfloat16, jnp.float16)


class HopperTiling(NamedTuple):
  """Rows, columns of one warpgroup, depth and rank of a block; copies ahead."""

  bm: int = 128
  bn: int = 128
  bk: int = 64
  br: int = 64
  stages: int = 3


def unsupported(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  *,
  transpose_w: bool = False,
  tiling: HopperTiling = HopperTiling(),  # noqa: B008  immutable
) -> str | None:
  """Why the Hopper kernel does not take these arguments, or None.

  Args:
    x: (..., K).
    w: (K, N).
    a: (r, K).
    b: (r, N).
    transpose_w: w is stored (N, K).
    tiling: block sizes.

  Returns:
    The reason and what would be taken, or None.

  Example:
    >>> one = jnp.ones
    >>> unsupported(one((2, 4)), one((4, 8)), one((1, 4)), one((1, 8)))
    'x is float32: the kernel multiplies bfloat16 or float16'
  """
  del a, b
  if isinstance(w, Scaled | Nf4):
    return "w is quantised: the kernel takes an array"
  if x.dtype not in _DTYPES:
    return f"x is {x.dtype}: the kernel multiplies bfloat16 or float16"
  if transpose_w:
    return "w is stored (N, K): the kernel takes (K, N)"
  rows = x.size // max(x.shape[-1], 1)
  (depth, columns), wide = w.shape, _WARPGROUPS * tiling.bn
  for name, size, block in (
    ("M", rows, tiling.bm),
    ("N", columns, wide),
    ("K", depth, tiling.bk),
  ):
    if size == 0 or size % block:
      return f"{name} is {size}: the kernel takes multiples of {block}"
  return None


def _transforms(dtype):
  lanes = _SWIZZLE // jnp.dtype(dtype).itemsize
  return (
    plgpu.TilingTransform((8, lanes)),
    plgpu.SwizzleTransform(_SWIZZLE),
  )


def _add_change(acc, u, b, u_smem, b_smem, barrier, copy):
  """Acc += u b, a chunk of the rank at a time; chunk 0 is on its way."""
  chunks = u.shape[1] // u_smem.shape[1]
  for chunk in range(chunks):
    plgpu.barrier_wait(barrier)
    plgpu.wgmma(acc, u_smem, b_smem)
    plgpu.wgmma_wait(0)
    if chunk + 1 < chunks:
      copy(chunk + 1)


def _store(block, y, staging):
  """A warpgroup's block to HBM, as many columns at a time as fit `staging`."""
  width = staging.shape[1]
  for start in range(0, block.shape[1], width):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging[...] = block[:, start : start + width]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, y.at[:, pl.ds(start, width)])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _kernel(x, w, u, b, y, *, tiling):
  """One block of y: two warpgroups side by side, a third copies for them."""
  bm, bn, bk, br, stages = tiling
  transforms = _transforms(x.dtype)
  me, wide = lax.axis_index("wg"), _WARPGROUPS * bn
  rows = pl.ds(lax.axis_index("m") * bm, bm)
  block = pl.ds(lax.axis_index("n") * wide, wide)
  half = pl.ds(me * bn, bn)

  def scope(u_smem, b_smem, barrier):
    # The memory warpgroup enters too, for allocation alone.
    def copy(chunk):
      ranks = pl.ds(chunk * br, br)
      mine = barrier.at[me]
      plgpu.copy_gmem_to_smem(u.at[rows, ranks], u_smem.at[me], mine)
      part = b.at[ranks, block].at[:, half]
      plgpu.copy_gmem_to_smem(part, b_smem.at[me], mine)

    def compute(multiply):
      def accumulate(acc):
        copy(0)  # arrives while x w is multiplied
        multiply(acc)
        _add_change(
          acc, u, b, u_smem.at[me], b_smem.at[me], barrier.at[me], copy
        )
        # u's chunk has been read: its memory carries y out.
        _store(
          acc[...].astype(y.dtype),
          y.at[rows, block].at[:, half],
          u_smem.at[me],
        )

      pl.run_scoped(
        accumulate, plgpu.WGMMAAccumulatorRef((bm, bn), jnp.float32)
      )

    def body(_, x_smem, w_smem, acc):
      plgpu.wgmma(acc, x_smem, w_smem.at[:, half])
      plgpu.wgmma_wait(0)
      return acc

    plgpu.emit_pipeline_warp_specialized(
      body,
      grid=(x.shape[1] // bk,),
      memory_registers=40,
      in_specs=[
        plgpu.BlockSpec((bm, bk), lambda k: (0, k), transforms=transforms),
        plgpu.BlockSpec((bk, wide), lambda k: (k, 0), transforms=transforms),
      ],
      wg_axis="wg",
      num_compute_wgs=_WARPGROUPS,
      max_concurrent_steps=stages,
      compute_context=compute,
    )(x.at[rows, :], w.at[:, block])

  smem = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=transforms)
  pl.run_scoped(
    scope,
    smem((_WARPGROUPS, bm, br)),
    smem((_WARPGROUPS, br, bn)),
    plgpu.Barrier(num_arrivals=2, num_barriers=_WARPGROUPS),
    collective_axes="wg",
  )


def hopper_matmul(
  x: jax.Array,
  w: jax.Array,
  u: jax.Array,
  b: jax.Array,
  *,
  tiling: HopperTiling,
  interpret=None,
) -> jax.Array:
  """One kernel call, (M, N) in x's dtype: y = x w + u b.

  Args:
    x: (M, K) bfloat16 or float16; M a multiple of `bm`, K of `bk`.
    w: (K, N) in x's dtype; N a multiple of twice `bn`.
    u: (M, r) in x's dtype, the gated x aᵀ; r a multiple of `br`.
    b: (r, N) in x's dtype.
    tiling: block sizes.
    interpret: the interpreter's parameters; None compiles.

  Returns:
    (M, N). x and w are read once for every block of columns and of rows.
  """
  m, n = x.shape[0], w.shape[1]
  return plgpu.kernel(
    functools.partial(_kernel, tiling=tiling),
    out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
    grid=(m // tiling.bm, n // (_WARPGROUPS * tiling.bn)),
    grid_names=("m", "n"),
    num_threads=_WARPGROUPS + 1,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    kernel_name="lora_dot",
    interpret=interpret,
  )(x, w, u, b)


def _low_rank(x, a, gate):
  """(x aᵀ) g in x's dtype, float32 until then."""
  u = jnp.matmul(x, a.T, preferred_element_type=jnp.float32)
  if gate is not None:
    u = u * jnp.broadcast_to(gate.astype(jnp.float32), u.shape)
  return u.astype(x.dtype)


def _forward(static, x, w, a, b, gate):
  tiling, interpret = static
  lead, short = x.shape[:-1], -a.shape[0] % tiling.br
  u = _low_rank(x, a.astype(x.dtype), gate).reshape(-1, a.shape[0])
  y = hopper_matmul(
    x.reshape(-1, x.shape[-1]),
    w.astype(x.dtype),
    jnp.pad(u, ((0, 0), (0, short))),
    jnp.pad(b.astype(x.dtype), ((0, short), (0, 0))),
    tiling=tiling,
    interpret=interpret,
  )
  return y.reshape(*lead, w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(static, x, w, a, b, gate):
  return _forward(static, x, w, a, b, gate)


def _saved(static, x, w, a, b, gate):
  return _forward(static, x, w, a, b, gate), (x, w, a, b, gate)


def _pulled(_, saved, dy):
  return jax.vjp(xla_dot, *saved)[1](dy)


_dot.defvjp(_saved, _pulled)


def gpu_dot(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
  tiling: HopperTiling | None = None,
  interpret=None,
) -> jax.Array:
  """The product by the Hopper kernel, (..., K) -> (..., N) in x's dtype.

      y = x w + u b,   u = (x aᵀ) g

  XLA makes u, which is small; one kernel then adds u b in the registers that
  hold x w, so that y is written once and never read. x is read twice: on a GPU
  a block of rows has no one place in which u could wait for all its columns.
  Derivatives are XLA's.

  Args:
    x: (..., K) bfloat16 or float16; the leading axes together a multiple of
      128, K of 64.
    w: (K, N) array; N a multiple of 256.
    a: (r, K), any r; it is padded to a multiple of 64.
    b: (r, N).
    gate: broadcastable to (..., r); None is one.
    transpose_w: not taken.
    tiling: block sizes; None is those above.
    interpret: parameters of Mosaic GPU's interpreter; None compiles, for a
      Hopper card only.

  Returns:
    (..., N); u is rounded to x's dtype, sums are float32.

  Raises:
    ValueError: with the reason, if the kernel does not take the arguments.

  Approximation: compiled for the H100 and interpreted on CPUs; it has run on
    no card and was never timed. Nothing chooses it: pass it by name.
  """
  tiling = tiling or HopperTiling()
  reason = unsupported(x, w, a, b, transpose_w=transpose_w, tiling=tiling)
  if reason is not None or isinstance(w, Scaled | Nf4):
    raise ValueError(f"gpu_dot: {reason}; pass implementation=xla_dot")
  return _dot((tiling, interpret), x, w, a, b, gate)
