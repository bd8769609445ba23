# SPDX-License-Identifier: Apache-2.0
"""The programs that are compiled and compared, one layer each.

All are at the top of a module, so that a child process can be told of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lora_dot.tpu.call import tpu_dot
from pallas_kernels.lora_dot.weights import BLOCK, Nf4, Scaled
from pallas_kernels.lora_dot.xla import xla_dot


def base(x, w):
  """Multiplies by the matrix alone, which merged weights cost as well."""
  return x @ w


def unfused(x, w, a, b):
  """Computes the layer by three products, as XLA compiles them."""
  return xla_dot(x, w, a, b)


def fused(x, w, a, b):
  """Computes the layer by one TPU kernel, its blocks from the table."""
  return tpu_dot(x, w, a, b)


def merging(x, w, a, b):
  """Adds the change to the matrix in the same program, for this x alone."""
  return x @ (w + a.T @ b)


def int8(x, codes, scale, a, b):
  """Runs the TPU kernel on int8 codes, one scale a column."""
  return tpu_dot(x, Scaled(codes, scale), a, b)


def int8_unfused(x, codes, scale, a, b):
  """Brings int8 codes back to floats, then computes three products."""
  return xla_dot(x, Scaled(codes, scale), a, b)


def nf4(x, codes, absmax, a, b):
  """Runs the TPU kernel on 4-bit codes, decoded piece by piece."""
  return tpu_dot(x, Nf4(codes, absmax, x.shape[-1]), a, b)


def nf4_unfused(x, codes, absmax, a, b):
  """Brings 4-bit codes back to floats, then computes three products."""
  return xla_dot(x, Nf4(codes, absmax, x.shape[-1]), a, b)


def step_of(layer, x, w, a, b, dy):
  """Computes a step (y, dx, da, db) of a layer whose matrix is frozen."""
  y, pull = jax.vjp(lambda x, a, b: layer(x, w, a, b), x, a, b)
  return y, *pull(dy)


def base_step(x, w, dy):
  """Computes (y, dx) of the frozen matrix alone."""
  y, pull = jax.vjp(lambda x: base(x, w), x)
  return y, *pull(dy)


def unfused_step(x, w, a, b, dy):
  """Runs forward and backward through the three products."""
  return step_of(unfused, x, w, a, b, dy)


def fused_step(x, w, a, b, dy):
  """Runs forward and backward through the TPU kernel."""
  return step_of(fused, x, w, a, b, dy)


FORWARD: dict[str, Callable] = {
  "base": base,
  "unfused": unfused,
  "fused": fused,
  "merging": merging,
  "int8": int8,
  "int8_unfused": int8_unfused,
  "nf4": nf4,
  "nf4_unfused": nf4_unfused,
}
STEP: dict[str, Callable] = {
  "base": base_step,
  "unfused": unfused_step,
  "fused": fused_step,
}


class Sizes(NamedTuple):
  """Rows, depth, columns and rank of a layer; its numbers have 2 bytes."""

  m: int
  k: int
  n: int
  r: int


def arguments(name: str, step: bool, sizes: Sizes) -> list:
  """Returns a program's arguments as ShapeDtypeStructs, no data in them.

  Example:
    >>> [a.shape for a in arguments("base", False, Sizes(8, 4, 2, 1))]
    [(8, 4), (4, 2)]
  """
  m, k, n, r = sizes
  wide = jnp.bfloat16
  found = [((m, k), wide), *_stored(name, k, n)]
  if name != "base":
    found += [((r, k), wide), ((r, n), wide)]
  if step:
    found.append(((m, n), wide))
  return [jax.ShapeDtypeStruct(*kind) for kind in found]


def _stored(name, k, n):
  """Lists (shape, dtype) of the arrays that are the matrix."""
  if name.startswith("int8"):
    return [((k, n), jnp.int8), ((1, n), jnp.float32)]
  if name.startswith("nf4"):
    blocks = -(-k // BLOCK)
    codes = (BLOCK // 2 * blocks, n), jnp.uint8
    return [codes, ((blocks, n), jnp.float32)]
  return [((k, n), jnp.bfloat16)]


def operations(name: str, step: bool, sizes: Sizes) -> int:
  """Counts a program's multiplications and additions by its formula.

  Example:
    >>> operations("base", False, Sizes(8, 4, 2, 1))
    128
  """
  m, k, n, r = sizes
  dense, low = 2 * m * k * n, 2 * m * r * (k + n)
  if name == "base":
    return dense * (1 + step)
  if name == "merging":
    return dense + 2 * k * n * r
  # The step repeats both for dx and multiplies once more for da and for db.
  return (dense + low) * (1 + step) + low * step


def least_bytes(name: str, step: bool, sizes: Sizes) -> int:
  """Counts the bytes of every array once: no program moves fewer.

  Of a step: forward and backward each read their operands and write their
  results once; what the forward pass keeps is x alone.

  Example:
    >>> least_bytes("base", False, Sizes(8, 4, 2, 1))
    112
  """
  m, k, n, r = sizes
  low = 0 if name == "base" else r * (k + n)
  stored = sum(
    math.prod(shape) * jnp.dtype(kind).itemsize
    for shape, kind in _stored(name, k, n)
  )
  forward = m * k + low + m * n
  backward = m * n + low + m * k
  if name != "base":
    backward += m * k + low  # x again for da, and da and db
  return stored * (1 + step) + 2 * (forward + backward * step)
