# SPDX-License-Identifier: Apache-2.0
"""What may stand for w: an array, or codes with a scale."""

from typing import NamedTuple

import jax


class Scaled(NamedTuple):
  """A quantised matrix: w = codes * scale.

  codes: (K, N) int8 or float8_e4m3fn, laid out as w would be.
  scale: float32, (1, N) for one scale a column or (K, 1) for one a row.
  """

  codes: jax.Array
  scale: jax.Array


Weight = jax.Array | Scaled


def codes_of(w: Weight) -> jax.Array:
  """The stored matrix: w itself, or its codes."""
  return w.codes if isinstance(w, Scaled) else w


def dense_weight(w: Weight, dtype) -> jax.Array:
  """The matrix in `dtype`; codes are scaled in float32 and rounded once."""
  if isinstance(w, Scaled):
    return (w.codes.astype("float32") * w.scale).astype(dtype)
  return w.astype(dtype)
