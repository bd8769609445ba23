# SPDX-License-Identifier: Apache-2.0
"""The one door to all implementations."""

from collections.abc import Callable

import jax

from pallas_kernels.lora_dot.weights import Weight
from pallas_kernels.lora_dot.xla import xla_dot


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
  """X times a matrix with a low-rank change, (..., K) -> (..., N).

      y = x w + ((x aᵀ) g) b

  Args:
    x: (..., K) bfloat16 or float32.
    w: (K, N), or (N, K) with `transpose_w`; an array or `Scaled`.
    a: (r, K).
    b: (r, N).
    gate: broadcastable to (..., r), on the rank axis; None is one.
    transpose_w: w is stored (N, K).
    implementation: a function of the same arguments: `xla_dot`,
      `reference_dot`, `tpu_dot`; None chooses.

  Returns:
    (..., N) in x's dtype.

  Example:
    >>> import jax.numpy as jnp
    >>> one = jnp.ones
    >>> lora_dot(one((1, 2)), one((2, 3)), one((1, 2)), one((1, 3)))
    Array([[4., 4., 4.]], dtype=float32)
  """
  run = xla_dot if implementation is None else implementation
  return run(x, w, a, b, gate, transpose_w=transpose_w)
