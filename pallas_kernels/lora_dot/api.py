# SPDX-License-Identifier: Apache-2.0
"""`lora_dot`, the door to all implementations, and how it chooses one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.lora_dot.checks import check_shapes
from pallas_kernels.lora_dot.hopper.call import gpu_dot, refuse_gpu
from pallas_kernels.lora_dot.hopper.kernel import count_blocks
from pallas_kernels.lora_dot.partitioning import is_local, plan
from pallas_kernels.lora_dot.tpu.call import (
  chip_here,
  kind_here,
  refuse_tpu,
  tpu_dot,
)
from pallas_kernels.lora_dot.tpu.tilings import problem_of, tiling_for
from pallas_kernels.lora_dot.weights import Nf4, Scaled, Weight, codes_of
from pallas_kernels.lora_dot.xla import xla_dot


class Ahead(NamedTuple):
  """The sizes from which on the Hopper kernel is ahead of XLA.

  rows: of x. longer: the longer side of w.
  blocks: of y and of dx, of how many multiprocessors each take one at once;
    filled: the share of them that has one, until the last is done.
  rank: up to which that was measured.
  """

  rows: int
  longer: int
  blocks: int
  filled: float
  rank: int


# Where the compiler's static cycles and the counted bytes put the TPU kernel
# ahead of XLA, no clock: chip -> (rows, depth, columns) at least, bfloat16 and
# with a w that stays in vector memory. Elsewhere it has not been shown.
AHEAD = {"v5e": (8192, 4096, 4096), "v6e": (8192, 4096, 4096)}
_RANK = 64  # up to which that was counted

# Where the Hopper kernel was measured ahead of XLA on the card itself, forward
# and backward, in bfloat16; pallas_kernels/README.md has the times.
AHEAD_ON_CARDS = {
  "NVIDIA H100 80GB HBM3": Ahead(
    rows=2048, longer=4096, blocks=256, filled=0.9, rank=1024
  )
}


def lora_dot(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
  implementation: Callable[..., jax.Array] | None = None,
) -> jax.Array:
  """Multiplies rows by a matrix with a low-rank change added to it.

      y = x w + ((x aᵀ) g) b

  Args:
    x: (..., K), floating. Products take their operands in x's dtype.
    w: (K, N), or (N, K) with `transpose_w`; an array,
      `Scaled` or `Nf4`.
    a: (r, K), the rows with which the change reads x.
    b: (r, N), the rows that it writes.
    gate: broadcastable to (..., r), on the rank axis; None is one.
    transpose_w: w is stored (N, K).
    implementation: a function of the same arguments, `xla_dot`, `tpu_dot`,
      `gpu_dot`, `reference_dot`, or a partial of one; it runs or raises. None
      is `tpu_dot` or `gpu_dot` where `AHEAD` or `AHEAD_ON_CARDS` shows it
      ahead, on one device or inside shard_map, and `xla_dot` everywhere else.

  Returns:
    (..., N) in x's dtype. Differentiable in all that is floating; forward mode
    and second derivatives need `xla_dot`. Costs 2 M (K N + r (K + N))
    operations. On a mesh, axes automatic or explicit, y lies along the axes of
    x's rows and of w's columns.

  Raises:
    ValueError: for shapes that make no product, and for what the named
      implementation does not cover, with the reason.

  Example:
    >>> import jax.numpy as jnp
    >>> one = jnp.ones
    >>> lora_dot(one((1, 2)), one((2, 3)), one((1, 2)), one((1, 3)))
    Array([[4., 4., 4.]], dtype=float32)
  """
  check_shapes(x, w, a, b, gate, transpose_w)
  run = implementation or choose(x, w, a, transpose_w=transpose_w)
  run = functools.partial(run, transpose_w=transpose_w)
  mesh = jax.sharding.get_abstract_mesh()
  if AxisType.Explicit in mesh.axis_types:
    types = jax.typeof(x), jax.typeof(codes_of(w))
    lead, _, n = plan(mesh, *types, transpose_w)
    automatic = cast(Any, jax.sharding.auto_axes)
    run = automatic(run, out_sharding=P(*lead, n or None))
  return run(x, w, a, b, gate)


def choose(
  x: jax.Array, w: Weight, a: jax.Array, *, transpose_w: bool
) -> Callable[..., jax.Array]:
  """Returns the implementation that `lora_dot` takes if none is named.

  Args:
    x: (..., K), or its ShapeDtypeStruct.
    w: the weight, likewise.
    a: (r, K), likewise.
    transpose_w: w is stored (N, K).

  Returns:
    `tpu_dot`, `gpu_dot` or `xla_dot`, from shapes, dtypes and the chip alone.

  Example:
    >>> import jax.numpy as jnp
    >>> one = jnp.ones
    >>> x, w, a = one((1, 2)), one((2, 3)), one((1, 2))
    >>> choose(x, w, a, transpose_w=False).__name__
    'xla_dot'
  """
  if not is_local() or isinstance(w, Scaled | Nf4):
    return xla_dot
  if x.dtype != "bfloat16" or w.dtype != "bfloat16":
    return xla_dot
  problem = problem_of(x, w, a.shape[0], transpose_w)
  if (kind := kind_here()) in AHEAD_ON_CARDS:
    return _choose_on_card(kind, problem, x, w, a)
  chip = chip_here()
  if chip not in AHEAD or refuse_tpu(
    x, w, a, transpose_w=transpose_w, chip=chip
  ):
    return xla_dot
  large = all(
    size >= least for size, least in zip(problem[:3], AHEAD[chip], strict=True)
  )
  ahead = large and problem.r <= _RANK and tiling_for(chip, problem).resident
  return tpu_dot if ahead else xla_dot


def _choose_on_card(kind, problem, x, w, a):
  """Returns `gpu_dot` where the card's table has it ahead, or `xla_dot`."""
  ahead, longer = AHEAD_ON_CARDS[kind], max(problem.k, problem.n)
  large = problem.m >= ahead.rows and longer >= ahead.longer
  fits = problem.r <= ahead.rank and refuse_gpu(x, w, a) is None
  full = all(
    blocks >= ahead.blocks and filled >= ahead.filled
    for blocks, filled in (
      count_blocks(problem.m, columns) for columns in (problem.k, problem.n)
    )
  )
  return gpu_dot if large and fits and full else xla_dot
