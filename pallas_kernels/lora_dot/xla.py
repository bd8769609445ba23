# SPDX-License-Identifier: Apache-2.0
"""The product as XLA compiles it: three matrix products, anywhere."""

import math

import jax
import jax.numpy as jnp
from jax import lax

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

  Rows of several axes are laid into one for the thin products, where no data
  moves for it: their gradients in a and b contract the rows, and of several
  axes XLA copies dy on CPUs first, which took seven times as long. Written in
  operations of lax, since a model has hundreds of these to trace.
  """
  lead, dtype = x.shape[:-1], x.dtype
  joins = x.ndim > 2 and is_local() and (gate is None or gate.ndim == 1)
  rows = lax.reshape(x, (math.prod(lead), x.shape[-1])) if joins else x
  u = _times(rows, _cast(a, dtype), 1)
  if gate is not None:
    places = range(u.ndim - gate.ndim, u.ndim)
    # A scale may be over float16's range where what it scales is not.
    wide = jnp.float32 if dtype == jnp.float16 else dtype
    gate = lax.broadcast_in_dim(_cast(gate, wide), u.shape, [*places])
    u = _cast(lax.mul(_cast(u, wide), gate), dtype)
  more = _times(u, _cast(b, dtype), 0)
  more = lax.reshape(more, (*lead, b.shape[1])) if joins else more
  return lax.add(times_base(x, w, transpose_w), more)


def _times(x, matrix, axis):
  """Contracts the last axis of x with one of a matrix."""
  numbers = (((x.ndim - 1,), (axis,)), ((), ()))
  return lax.dot_general(x, matrix, numbers, preferred_element_type=x.dtype)


def _cast(x, dtype):
  """Casts an array, unless it has that dtype."""
  return x if x.dtype == dtype else lax.convert_element_type(x, dtype)
