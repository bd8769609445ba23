# SPDX-License-Identifier: Apache-2.0
"""The TPU implementation: shapes, batches and gradients around the kernel."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from pallas_kernels.lora_dot.checks import check_shapes
from pallas_kernels.lora_dot.gradients import differentiable, shrink
from pallas_kernels.lora_dot.partitioning import (
  Place,
  is_local,
  partitioned,
  placed,
  vary_alike,
)
from pallas_kernels.lora_dot.tpu.kernel import lora_matmul
from pallas_kernels.lora_dot.tpu.tilings import (
  CHIP_OF_KIND,
  Tiling,
  cut_to,
  problem_of,
  refuse_tiling,
  tiling_for,
)
from pallas_kernels.lora_dot.weights import Nf4, Scaled, Weight, shape_of

_FLOATS = (jnp.bfloat16, jnp.float32)
_LARGEST_RANK = 1024


class Settings(NamedTuple):
  """What a call is compiled with, beside its arrays; hashable."""

  chip: str
  tiling: Tiling | None
  interpret: Any
  place: Place | None


def kind_here() -> str:
  """Returns jax's name of the device that programs are compiled for.

  The mesh of `jax.sharding.use_abstract_mesh` says so where there is no device.

  Example:
    >>> kind_here()
    'cpu'
  """
  target = jax.sharding.get_abstract_mesh().abstract_device
  return target.device_kind if target else jax.devices()[0].device_kind


def chip_here() -> str | None:
  """Returns the TPU that programs are compiled for, or None.

  Its name is one of `CHIPS`.

  Example:
    >>> chip_here()  # on a CPU
  """
  return CHIP_OF_KIND.get(kind_here())


def refuse_tpu(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  *,
  transpose_w: bool,
  chip: str | None,
  tiling: Tiling | None = None,
) -> str | None:
  """Returns why the TPU kernel refuses these arguments, or None.

  Args:
    x: (..., K), or its ShapeDtypeStruct.
    w: the weight, likewise.
    a: (r, K), likewise.
    transpose_w: w is stored (N, K).
    chip: a name of `CHIPS`, as `chip_here` gives it.
    tiling: the blocks, if not those of the table.

  Example:
    >>> x, w, a = jnp.ones((8, 4)), jnp.ones((4, 4)), jnp.ones((2, 4))
    >>> refuse_tpu(x.astype(jnp.float16), w, a, transpose_w=False, chip="v5e")
    'x is float16, and the kernel takes bfloat16 and float32'
  """
  shape, r = shape_of(w), a.shape[0]
  if chip is None:
    return "there is no TPU here; interpret=True runs the kernel anywhere"
  if x.dtype not in _FLOATS:
    return f"x is {x.dtype}, and the kernel takes bfloat16 and float32"
  if not isinstance(w, Scaled | Nf4) and w.dtype not in _FLOATS:
    return f"w is {w.dtype}: give bfloat16, float32, Scaled or Nf4"
  if not 1 <= r <= _LARGEST_RANK:
    return f"rank {r} is not in 1 to {_LARGEST_RANK}"
  if 0 in x.shape or 0 in shape:
    return f"x {x.shape}, w {shape} hold no numbers"
  if tiling is None:
    return None
  problem = problem_of(x, w, r, transpose_w)
  return refuse_tiling(cut_to(tiling, problem), chip, problem)


def tpu_dot(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
  tiling: Tiling | None = None,
  interpret: Any = False,
  place: Place | None = None,
) -> jax.Array:
  """Computes the product by one TPU kernel, (..., K) -> (..., N).

      y = x w + ((x aᵀ) g) b

  Args:
    x: (..., K) bfloat16 or float32. Products take operands in its dtype and
      are summed in float32.
    w: (K, N), or (N, K) with `transpose_w`, bfloat16 or float32, or `Scaled`,
      or `Nf4`, which is brought back inside the kernel.
    a: (r, K), r from 1 to 1024.
    b: (r, N).
    gate: broadcastable to (..., r); None is one.
    transpose_w: w is stored (N, K).
    tiling: blocks; by default from the chip's table.
    interpret: True, or pltpu.InterpretParams: runs anywhere, slowly.
    place: the mesh and where x and w lie on it, to be split by shard_map. By
      default jit is asked where they lie when it compiles; for a mesh whose
      devices are not here that is an error.

  Returns:
    (..., N) in x's dtype. Reverse-mode differentiable once, in x, a, b, gate
    and an unquantised w; under `jax.vmap`, a batch of x becomes rows. Under
    jit on a mesh each device computes with its part of w.

  Raises:
    ValueError: shapes that do not fit, or what the kernel does not cover.

  Example:
    >>> one = jnp.ones
    >>> tpu_dot(one((1, 2)), one((2, 3)), one((1, 2)), one((1, 3)),
    ...         interpret=True)
    Array([[4., 4., 4.]], dtype=float32)
  """
  check_shapes(x, w, a, b, gate, transpose_w)
  chip = chip_here() or ("v5e" if interpret else None)
  reason = refuse_tpu(
    x, w, a, transpose_w=transpose_w, chip=chip, tiling=tiling
  )
  if place is not None and isinstance(w, Nf4):
    reason = "an Nf4 w is not split: call it inside shard_map, without `place`"
  if place is None and not isinstance(w, Nf4) and _is_mesh_elsewhere():
    reason = (
      "nobody can be asked where the operands lie on a mesh whose devices are "
      "not here: call it inside shard_map, give place=Place(mesh, x, w), or "
      "take lora_dot with implementation=None"
    )
  if reason or chip is None:
    raise ValueError(f"tpu_dot: {reason}.")
  gate = broadcast_gate(gate, x, a.shape[0])
  forward = _forward_with(Settings(chip, tiling, interpret, place))
  return differentiable(forward, transpose_w, *vary_alike((x, w, a, b, gate)))


def _is_mesh_elsewhere() -> bool:
  """Returns whether programs are for several devices that are not here.

  Then the compiler has no partitioner to ask: "Custom emitter for
  CustomSPMDPartitioning not found".
  """
  target = jax.sharding.get_abstract_mesh().abstract_device
  here = jax.devices()[0].device_kind
  return target is not None and target.device_kind != here and not is_local()


def broadcast_gate(
  gate: jax.Array | None, x: jax.Array, r: int
) -> jax.Array | None:
  """Returns the gate in float32, (r,) if all rows share one, or (..., r).

  Example:
    >>> broadcast_gate(jnp.ones((4, 1)), jnp.ones((4, 8)), 2).shape
    (4, 2)
  """
  if gate is None:
    return None
  gate = gate.astype(jnp.float32)
  if all(size == 1 for size in gate.shape[:-1]):
    return jnp.broadcast_to(gate.reshape(-1), (r,))
  ones = (1,) * (x.ndim - gate.ndim)
  return jnp.broadcast_to(gate.reshape(ones + gate.shape), (*x.shape[:-1], r))


@functools.cache
def _forward_with(settings: Settings) -> Callable:
  """Returns the product as `differentiable` takes it; one for a setting."""

  def forward(x, w, a, b, gate, transpose_w, return_u):
    return _batched(settings, transpose_w, return_u)(x, w, a, b, gate)

  return forward


@functools.cache
def _batched(settings: Settings, transpose_w: bool, return_u: bool) -> Callable:
  """Returns the product with a rule for vmap: a batch of x becomes rows."""

  def local(operands, k_axes):
    return _local(settings, transpose_w, return_u, operands, k_axes)

  def on_mesh(x, w, a, b, gate):
    operands = x, w, a, b, gate
    if isinstance(w, Nf4):
      return local(operands, ())
    if settings.place is not None:
      return placed(local, operands, transpose_w, return_u, settings.place)
    return partitioned(local, operands, transpose_w, return_u)

  call = custom_vmap(on_mesh)

  @call.def_vmap
  def rule(axis_size, batched, x, w, a, b, gate):
    if any(jax.tree.leaves(batched[1:4])):
      # custom_partitioning has no such rule; shard_map has.
      each = (
        on_mesh if settings.place else lambda *operands: local(operands, ())
      )
      axes = jax.tree.map(lambda yes: 0 if yes else None, tuple(batched))
      out = jax.vmap(each, in_axes=axes)(x, w, a, b, gate)
    else:
      x, gate = as_rows(axis_size, batched[0], batched[4], x, gate)
      out = _batched(_moved(settings), transpose_w, return_u)(x, w, a, b, gate)
    return out, (True, True) if return_u else True

  return call


def _moved(settings: Settings) -> Settings:
  """Returns the settings for an x with one more axis in front."""
  if settings.place is None:
    return settings
  place = settings.place
  return settings._replace(place=place._replace(x=P(None, *place.x)))


def as_rows(size, many_x, many_gates, x, gate):
  """Returns (x, gate) with the batch as the first of x's leading axes."""
  if not many_x:
    x = jnp.broadcast_to(x, (size, *x.shape))
  if gate is not None and (many_gates or gate.ndim > 1):
    rows = (*x.shape[:-1], gate.shape[-1])
    gate = gate if many_gates else gate[None]
    ones = (1,) * (len(rows) - gate.ndim)
    gate = gate.reshape(gate.shape[0], *ones, *gate.shape[1:])
    gate = jnp.broadcast_to(gate, rows)
  return x, gate


def _local(settings, transpose_w, return_u, operands, k_axes):
  """Computes the product of one device, added up over `k_axes`."""
  x, w, a, b, gate = operands
  lead, r = x.shape[:-1], a.shape[0]
  if gate is not None:
    gate = gate.reshape(-1, r).T  # the rank axis first: nothing is padded
  rows = x.reshape(-1, x.shape[-1])
  u, y_dtype = None, x.dtype
  if k_axes:
    u = lax.psum(shrink(rows, a), k_axes).T
    share = 1 / lax.axis_size(k_axes)
    gate = jnp.full((r, 1), share) if gate is None else gate * share
    y_dtype = jnp.float32
  problem = problem_of(x, w, r, transpose_w, y_dtype)
  tiling = settings.tiling or tiling_for(settings.chip, problem)
  y, made = lora_matmul(
    rows,
    w,
    None if k_axes else a.astype(x.dtype),
    b.astype(x.dtype),
    gate,
    transpose_w=transpose_w,
    tiling=cut_to(tiling, problem),
    interpret=settings.interpret,
    u=u,
    return_u=return_u and not k_axes,
    y_dtype=y_dtype,
  )
  if k_axes:
    y = lax.psum(y, k_axes).astype(x.dtype)
  y = y.reshape(*lead, y.shape[-1])
  if not return_u:
    return y
  return y, (made if u is None else u).T.reshape(*lead, r)
