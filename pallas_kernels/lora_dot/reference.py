# SPDX-License-Identifier: Apache-2.0
"""The product by its definition, in float32 throughout."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lora_dot.weights import Weight, dense_weight


def reference_dot(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
) -> jax.Array:
  """Computes the product in float32 at highest precision, rounded once.

  y = x w + ((x aᵀ) g) b
  """
  x32, a32, b32 = (t.astype(jnp.float32) for t in (x, a, b))
  w32 = dense_weight(w, jnp.float32)
  u = jnp.matmul(x32, a32.T, precision=lax.Precision.HIGHEST)
  if gate is not None:
    u = u * jnp.broadcast_to(gate.astype(jnp.float32), u.shape)
  y = jnp.matmul(
    x32, w32.T if transpose_w else w32, precision=lax.Precision.HIGHEST
  )
  y = y + jnp.matmul(u, b32, precision=lax.Precision.HIGHEST)
  return y.astype(x.dtype)
