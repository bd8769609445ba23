# SPDX-License-Identifier: Apache-2.0
"""The product on Hopper cards: shapes, batches and gradients round the kernel.

pallas_kernels/README.md has its times on an H100, beside XLA's product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from pallas_kernels.lora_dot.checks import check_shapes
from pallas_kernels.lora_dot.gradients import differentiable, shrink
from pallas_kernels.lora_dot.hopper.kernel import (
  UNIT,
  HopperTiling,
  hopper_matmul,
)
from pallas_kernels.lora_dot.partitioning import vary_alike
from pallas_kernels.lora_dot.tpu.call import as_rows, broadcast_gate
from pallas_kernels.lora_dot.weights import Nf4, Scaled, Weight

_DTYPES = (jnp.bfloat16, jnp.float16)
_ROWS = 8  # what rows are a multiple of


def refuse_gpu(x: jax.Array, w: Weight, a: jax.Array) -> str | None:
  """Returns why the Hopper kernel refuses these arguments, or None.

  Args:
    x: (..., K), or its ShapeDtypeStruct.
    w: the weight, likewise, stored either way.
    a: (r, K), likewise.

  Returns:
    The reason and what would be taken, or None.

  Example:
    >>> one = jnp.ones
    >>> refuse_gpu(one((2, 4)), one((4, 8)), one((1, 4)))
    'x is float32: the kernel multiplies bfloat16 or float16'
  """
  if isinstance(w, Scaled | Nf4):
    return "w is quantised: the kernel takes an array"
  if x.dtype not in _DTYPES:
    return f"x is {x.dtype}: the kernel multiplies bfloat16 or float16"
  if a.shape[0] < 1:
    return "the rank is 0: the kernel takes 1 or more"
  rows = x.size // max(x.shape[-1], 1)
  for name, size, unit in (
    ("M", rows, _ROWS),
    ("one side of w", w.shape[0], UNIT),
    ("the other side of w", w.shape[1], UNIT),
  ):
    if size == 0 or size % unit:
      return f"{name} is {size}: the kernel takes multiples of {unit}"
  return None


def gpu_dot(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
  tiling: HopperTiling | None = None,
  interpret: Any = None,
) -> jax.Array:
  """Computes the product by the Hopper kernel, (..., K) -> (..., N).

      y = x w + u b,   u = (x aᵀ) g

  XLA makes u, which is small; one kernel then adds u b in the registers that
  hold x w, so that y is written once and never read. x is read twice: on a GPU
  a block of rows has no one place in which u could wait for all its columns.

  Args:
    x: (..., K) bfloat16 or float16; the leading axes together a multiple of 8,
      K of 64.
    w: (K, N), or (N, K) with `transpose_w`, an array; N a multiple of 64.
    a: (r, K), any r from 1; it is padded to a multiple of 64.
    b: (r, N).
    gate: broadcastable to (..., r); None is one.
    transpose_w: w is stored (N, K).
    tiling: how y is cut; None is `HopperTiling()`.
    interpret: parameters of Mosaic GPU's interpreter; None compiles, for a
      Hopper card only.

  Returns:
    (..., N) in x's dtype; u is rounded to it, sums are float32. Reverse-mode
    differentiable once, in x, w, a, b, gate: dx is the same kernel. Under
    `jax.vmap` a batch of x becomes rows; batches of w, a or b go one by one.
    On a mesh call it inside shard_map.

  Raises:
    ValueError: with the reason, if the kernel does not take the arguments.
  """
  check_shapes(x, w, a, b, gate, transpose_w)
  reason = refuse_gpu(x, w, a)
  if reason is not None:
    raise ValueError(f"gpu_dot: {reason}; pass implementation=xla_dot")
  gate = broadcast_gate(gate, x, a.shape[0])
  forward = _forward_with(tiling or HopperTiling(), interpret)
  return differentiable(forward, transpose_w, *vary_alike((x, w, a, b, gate)))


@functools.cache
def _forward_with(tiling: HopperTiling, interpret: Any) -> Callable:
  """Returns the product as `differentiable` takes it; one for a setting."""

  def forward(x, w, a, b, gate, transpose_w, return_u):
    run = _batched(tiling, interpret, transpose_w, return_u)
    return run(x, w, a, b, gate)

  return forward


@functools.cache
def _batched(tiling, interpret, transpose_w, return_u) -> Callable:
  """Returns the product with a rule for vmap: a batch of x becomes rows."""
  local = functools.partial(_local, tiling, interpret, transpose_w, return_u)
  call = custom_vmap(local)

  @call.def_vmap
  def rule(axis_size, batched, x, w, a, b, gate):
    if any(batched[1:4]):
      operands = zip((x, w, a, b, gate), batched, strict=True)
      pairs = [(t, many is True) for t, many in operands]
      out = lax.map(
        lambda i: call(*(t[i] if many else t for t, many in pairs)),
        jnp.arange(axis_size),
      )
    else:
      x, gate = as_rows(axis_size, batched[0], batched[4], x, gate)
      out = call(x, w, a, b, gate)
    return out, (True, True) if return_u else True

  return call


def _local(tiling, interpret, transpose_w, return_u, x, w, a, b, gate):
  """Computes the product of one device; u is float32, (..., r)."""
  lead, r = x.shape[:-1], a.shape[0]
  padding = ((0, -r % UNIT), (0, 0))
  a, b = (jnp.pad(t.astype(x.dtype), padding) for t in (a, b))
  rows = x.reshape(-1, x.shape[-1])
  u = gated = shrink(rows, a)
  if gate is not None:
    gate = jnp.broadcast_to(gate, (*lead, r)).reshape(-1, r)
    gated = u * jnp.pad(gate, padding[::-1])
  y = hopper_matmul(
    rows,
    w.astype(x.dtype),
    gated.astype(x.dtype),
    b.T if transpose_w else b,
    transpose_w=transpose_w,
    tiling=tiling,
    interpret=interpret,
  ).reshape(*lead, -1)
  return (y, u[:, :r].reshape(*lead, r)) if return_u else y
