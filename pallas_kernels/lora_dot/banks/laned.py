# SPDX-License-Identifier: Apache-2.0
"""Many adapters on one rank axis, those of other rows masked; no sorting.

    y = x w + ((x Aᵀ) m) B        A (n r, K), B (n r, N), m (..., n r)

This is `lora_dot` with a gate, so its TPU kernel is the kernel here as well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.lora_dot.api import lora_dot
from pallas_kernels.lora_dot.banks.bank import Slots, check_many, slots_of
from pallas_kernels.lora_dot.weights import Weight


def laned_dot(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  ids: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
  implementation: Callable[..., jax.Array] | None = None,
) -> jax.Array:
  """Computes `lora_dot_many` by applying every adapter, masked by row.

      y = x w + ((x Aᵀ) m) B

  For few rows or few adapters: every row is multiplied with every adapter,
  2 M n r (K + N) operations, and each adapter is read once.

  Args:
    x: as `lora_dot_many` takes it.
    w: likewise.
    a: likewise.
    b: likewise.
    ids: likewise.
    gate: likewise.
    transpose_w: likewise.
    implementation: as `lora_dot` takes it. The TPU kernel takes n r up to 1024
      and reads a mask of 4 n r bytes a row; XLA makes it from the ids where it
      is used. A row of another adapter takes 0 times it: all must be finite.

  Returns:
    (..., N) in x's dtype, differentiable in x, a, b, gate.

  Example:
    >>> one = jnp.ones
    >>> laned_dot(one((2, 2)), one((2, 1)), one((3, 1, 2)), one((3, 1, 1)),
    ...           jnp.array([2, -1]))
    Array([[4.], [2.]], dtype=float32)
  """
  check_many(x, w, a, b, ids, gate, transpose_w)
  n, r, _ = a.shape
  return lora_dot(
    x,
    w,
    a.reshape(n * r, -1),
    b.reshape(n * r, -1),
    mask_lanes(slots_of(ids, gate, x.shape[:-1], n), n, r),
    transpose_w=transpose_w,
    implementation=implementation,
  )


def mask_lanes(slots: Slots, n: int, r: int) -> jax.Array:
  """Builds each row's gate on all n r ranks, zero off its own adapters.

      m[i r + j] = Σ_s weights[s, j] [ids[s] = i]

  Args:
    slots: what every row takes.
    n: how many adapters there are.
    r: their rank.

  Returns:
    (..., n r) float32.

  Example:
    >>> slots = Slots(jnp.array([[1]]), jnp.array([[[2.0, 3.0]]]))
    >>> mask_lanes(slots, 2, 2)
    Array([[0., 0., 2., 3.]], dtype=float32)
  """
  ids, weights = slots
  owner = jnp.arange(n * r, dtype=jnp.int32) // r
  repeats = (1,) * (weights.ndim - 1) + (n * r // weights.shape[-1],)
  owner = owner.reshape((1,) * ids.ndim + (-1,))
  own = ids[..., None] == owner
  return jnp.sum(jnp.where(own, jnp.tile(weights, repeats), 0.0), axis=-2)
