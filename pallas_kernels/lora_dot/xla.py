# SPDX-License-Identifier: Apache-2.0
"""The product as XLA compiles it: three matrix products, runs everywhere."""

import jax
import jax.numpy as jnp

from pallas_kernels.lora_dot.weights import Weight, dense_weight


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
  dense = dense_weight(w, x.dtype)
  u = x @ a.astype(x.dtype).T
  if gate is not None:
    u = u * jnp.broadcast_to(gate.astype(x.dtype), u.shape)
  return x @ (dense.T if transpose_w else dense) + u @ b.astype(x.dtype)
