# SPDX-License-Identifier: Apache-2.0
"""The forms of w: an array, codes with a scale, or 4 bits a weight."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 64

#: The 16 values of the paper's 4-bit normal float: quantiles of N(0, 1), eight
#: of them positive and zero among them, divided by the largest.
NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
  0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
)  # fmt: skip


class Scaled(NamedTuple):
  """A quantised matrix: w = codes * scale.

  codes: (K, N) int8 or float8_e4m3fn, laid out as w would be.
  scale: float32, (1, N) for one scale a column or (K, 1) for one a row.
  """

  codes: jax.Array
  scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4:
  """A matrix (K, N) in 4 bits, in blocks of 64 down each column.

  codes: uint8 (32 ⌈K / 64⌉, N). Row 32 c + 4 i + q holds row 64 c + 16 q + i in
    its low four bits, for i up to 8 and q up to 4, and the eighth row after it
    in the others: four rows of a TPU's memory are one row of 32-bit words, and
    the same four bits of eight rows of words are eight rows of w.
  absmax: float32 (⌈K / 64⌉, N), the largest magnitude of each block.
  k: K, static.
  """

  codes: jax.Array
  absmax: jax.Array
  k: int = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, int]:
    """The matrix's shape (K, N)."""
    return self.k, self.codes.shape[-1]

  @property
  def dtype(self) -> Any:
    """The dtype it is brought back to if none is asked for: float32."""
    return self.absmax.dtype


Quantised = Scaled | Nf4
Weight = jax.Array | Scaled | Nf4


def codes_of(w: Weight) -> jax.Array:
  """Returns the stored matrix: w itself, or its codes."""
  return w.codes if isinstance(w, Scaled | Nf4) else w


def shape_of(w: Weight) -> tuple[int, ...]:
  """Returns the matrix's shape as stored, whatever its codes' shape."""
  return w.codes.shape if isinstance(w, Scaled) else w.shape


def bytes_of(w: Weight) -> float:
  """Returns the bytes of one weight, without scales."""
  return 0.5 if isinstance(w, Nf4) else codes_of(w).dtype.itemsize


def dense_weight(w: Weight, dtype: Any) -> jax.Array:
  """Returns the matrix in `dtype`; codes are scaled, then rounded once."""
  if isinstance(w, Scaled):
    return (w.codes.astype("float32") * w.scale).astype(dtype)
  if isinstance(w, Nf4):
    return _dense_nf4(w).astype(dtype)
  return w if w.dtype == dtype else w.astype(dtype)


def _dense_nf4(w):
  """Decodes an nf4 matrix to (K, N) float32."""
  n = w.codes.shape[-1]
  codes = w.codes.reshape(-1, 8, 4, n).swapaxes(1, 2)
  codes = jnp.stack([codes & 15, codes >> 4], axis=2).reshape(-1, BLOCK, n)
  dense = jnp.asarray(NF4, jnp.float32)[codes] * w.absmax[:, None]
  return dense.reshape(-1, n)[: w.k]


def times_base(x: jax.Array, w: Weight, transpose_w: bool) -> jax.Array:
  """Computes x w, its operands in x's dtype, as XLA compiles it."""
  dense = dense_weight(w, x.dtype)
  numbers = (((x.ndim - 1,), (1 if transpose_w else 0,)), ((), ()))
  return lax.dot_general(x, dense, numbers, preferred_element_type=x.dtype)
