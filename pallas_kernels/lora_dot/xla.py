# SPDX-License-Identifier: Apache-2.0
"""The product as XLA compiles it: three matrix products, runs everywhere."""

import jax
import jax.numpy as jnp

from pallas_kernels.lora_dot.weights import Weight, times_base


def xla_dot(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
) -> jax.Array:
  """The product with operands in x.dtype, differentiable to any order.

  y = x w + ((x aᵀ) g) b
  """
  u = x @ a.astype(x.dtype).T
  if gate is not None:
    u = u * jnp.broadcast_to(gate.astype(x.dtype), u.shape)
  return times_base(x, w, transpose_w) + u @ b.astype(x.dtype)
