# SPDX-License-Identifier: Apache-2.0
"""The product in one Mosaic kernel."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lora_dot.tilings import TILINGS, Tiling
from pallas_kernels.lora_dot.weights import Weight, codes_of

_NN = (((1,), (0,)), ((), ()))
_NT = (((1,), (1,)), ((), ()))


def _dot(left, right, dims):
  return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _kernel(x, w, a, b, g, y, acc, u, *, nk, dims):
  j, k = pl.program_id(1), pl.program_id(2)

  @pl.when((j == 0) & (k == 0))
  def _():
    u[...] = jnp.zeros_like(u)

  @pl.when(j == 0)
  def _():
    u[...] += _dot(x[...], a[...], _NT)

  @pl.when(k == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)

  acc[...] += _dot(x[...], w[...], dims)

  @pl.when(k == nk - 1)
  def _():
    gated = (u[...] * g[...]).astype(b.dtype)
    y[...] = (acc[...] + _dot(gated, b[...], _NN)).astype(y.dtype)


def lora_matmul(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  gate: jax.Array | None,
  *,
  transpose_w: bool,
  tiling: Tiling,
  interpret=False,
) -> jax.Array:
  """One kernel call: x (M, K), gate None, (1, r) or (M, r) -> (M, N)."""
  (m, k), r, n = x.shape, a.shape[0], b.shape[1]
  bm, bn, bk = min(tiling.bm, m), min(tiling.bn, n), min(tiling.bk, k)
  nk = pl.cdiv(k, bk)
  if gate is None:
    gate = jnp.ones((1, r), jnp.float32)
  per_row = gate.shape[0] != 1
  return pl.pallas_call(
    functools.partial(_kernel, nk=nk, dims=_NT if transpose_w else _NN),
    grid=(pl.cdiv(m, bm), pl.cdiv(n, bn), nk),
    in_specs=[
      pl.BlockSpec((bm, bk), lambda i, j, k: (i, k)),
      pl.BlockSpec((bn, bk), lambda i, j, k: (j, k))
      if transpose_w
      else pl.BlockSpec((bk, bn), lambda i, j, k: (k, j)),
      pl.BlockSpec((r, bk), lambda i, j, k: (0, jnp.where(j == 0, k, nk - 1))),
      pl.BlockSpec((r, bn), lambda i, j, k: (0, j)),
      pl.BlockSpec(
        (bm if per_row else 1, r),
        (lambda i, j, k: (i, 0)) if per_row else (lambda i, j, k: (0, 0)),
      ),
    ],
    out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
    scratch_shapes=[
      pltpu.VMEM((bm, bn), jnp.float32),
      pltpu.VMEM((bm, r), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tiling.vmem_limit_bytes,
    ),
    interpret=interpret,
    name="lora_dot",
  )(x, codes_of(w), a, b, gate)


def tpu_dot(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
  tiling: Tiling | None = None,
  interpret=False,
) -> jax.Array:
  """The product by the TPU kernel; leading axes of x are folded into rows."""
  lead, r = x.shape[:-1], a.shape[0]
  tiling = tiling or TILINGS["v5e"]["rows"]
  if gate is not None:
    gate = gate.astype(jnp.float32)
    gate = (
      gate.reshape(1, r)
      if gate.size == r
      else jnp.broadcast_to(gate, (*lead, r)).reshape(-1, r)
    )
  y = lora_matmul(
    x.reshape(-1, x.shape[-1]),
    w,
    a.astype(x.dtype),
    b.astype(x.dtype),
    gate,
    transpose_w=transpose_w,
    tiling=tiling,
    interpret=interpret,
  )
  return y.reshape(*lead, -1)
