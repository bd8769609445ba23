# SPDX-License-Identifier: Apache-2.0
"""Many adapters, copied for each row: for few rows of a large bank."""

import jax
import jax.numpy as jnp

from pallas_kernels.lora_dot.banks.bank import check_many, slots_of
from pallas_kernels.lora_dot.partitioning import vary_alike
from pallas_kernels.lora_dot.weights import Weight, times_base


def gathered_dot(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  ids: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
) -> jax.Array:
  """Computes `lora_dot_many` by copying every row's adapters for it.

      y_i = x_i w + ((x_i a_cᵀ) g_i) b_c,    c = ids_i

  Copies s r (K + N) numbers a row for s adapters a row, whatever n.

  Args:
    x: as `lora_dot_many` takes it.
    w: likewise.
    a: likewise.
    b: likewise.
    ids: likewise.
    gate: likewise.
    transpose_w: likewise.

  Returns:
    (..., N) in x's dtype, reverse-mode differentiable.

  Example:
    >>> one = jnp.ones
    >>> gathered_dot(one((2, 2)), one((2, 1)), one((3, 1, 2)), one((3, 1, 1)),
    ...              jnp.array([2, -1]))
    Array([[4.], [2.]], dtype=float32)
  """
  check_many(x, w, a, b, ids, gate, transpose_w)
  ids, weights = slots_of(ids, gate, x.shape[:-1], a.shape[0])
  f32 = jnp.float32
  u = jnp.einsum(
    "...k,...srk->...sr",
    x,
    _take(*vary_alike((a, ids))).astype(x.dtype),
    preferred_element_type=f32,
  )
  gated = jnp.where(weights == 0, 0.0, u * weights).astype(x.dtype)
  change = jnp.einsum(
    "...sr,...srn->...n",
    gated,
    _take(*vary_alike((b, ids))).astype(x.dtype),
    preferred_element_type=f32,
  )
  return times_base(x, w, transpose_w) + change.astype(x.dtype)


@jax.custom_vjp
def _take(bank, ids):
  """Copies the adapters of the ids; gradients are added up in float32."""
  return bank[ids]


def _keep(bank, ids):
  """Runs `_take` forward and keeps what its gradient needs."""
  return bank[ids], (bank, ids)


def _add_up(kept, dy):
  """Adds up the gradients of all copies of an adapter."""
  bank, ids = kept
  total = jnp.zeros_like(bank, jnp.float32).at[ids].add(dy.astype("float32"))
  return total.astype(bank.dtype), None


_take.defvjp(_keep, _add_up)
