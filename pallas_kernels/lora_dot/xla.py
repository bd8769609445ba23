# SPDX-License-Identifier: Apache-2.0
"""The product as XLA compiles it: three matrix products, anywhere."""

import jax
import jax.numpy as jnp

from pallas_kernels.lora_dot.partitioning import is_local
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
  """Computes the product in x's dtype, differentiable to any order.

  y = x w + ((x aᵀ) g) b
  """
  u = _times(x, a.astype(x.dtype).T)
  if gate is not None:
    u = u * jnp.broadcast_to(gate.astype(x.dtype), u.shape)
  return times_base(x, w, transpose_w) + _times(u, b.astype(x.dtype))


def _times(x, thin):
  """Multiplies x by `thin`, as two matrices where no data moves for it.

  Its gradient in `thin` contracts x's rows. Where they are several axes XLA
  copies dy on CPUs first, which took seven times as long as the product.
  """
  if x.ndim == 2 or not is_local():
    return x @ thin
  return (x.reshape(-1, x.shape[-1]) @ thin).reshape(*x.shape[:-1], -1)
