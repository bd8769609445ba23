# SPDX-License-Identifier: Apache-2.0
"""Decodes an nf4 matrix piece by piece, inside the TPU kernel.

A 32-bit word holds eight weights, those of rows eight apart in one column. Half
of them choose their value by gathering it along the lanes of a row of 16
values, half by 15 selects on their four bits: that keeps the shuffle units and
the arithmetic units busy side by side, and by the compiler's static cycles is
ahead of either alone. Both give the float32 value itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lora_dot.tpu.tilings import Tiling
from pallas_kernels.lora_dot.weights import BLOCK, NF4, Nf4

_LANES = 128
#: The 16 values in the first of 128 lanes.
VALUES = np.zeros((1, _LANES), np.float32)
VALUES[0, : len(NF4)] = NF4
_IN_A_WORD = 8
_GATHERED = 4  # weights of a word; the others are selected
# Rows that are decoded and multiplied at once: code is unrolled over them.
_PIECES = (1024, 512, 256, 128)


def whole_pieces(
  x: jax.Array,
  w: Nf4,
  a: jax.Array | None,
  b: jax.Array,
  transpose_w: bool,
  tiling: Tiling,
) -> tuple[jax.Array, Nf4, jax.Array | None, jax.Array, Tiling, int]:
  """Pads the operands with zeros until w has whole pieces.

  Args:
    x: (M, K), or (M, N) by w's own names if `transpose_w`.
    w: (K, N); its rows are padded, codes and all, unless they are a multiple of
      128, or of 64 in one block of up to 1024.
    a: (r, K) or None.
    b: (r, N).
    transpose_w: w's rows are the product's columns.
    tiling: blocks of the product.

  Returns:
    The same, padded; of the tiling a depth that w's rows are a multiple of; and
    the rows of a piece, a divisor of the block's.
  """
  side = tiling.bn if transpose_w else tiling.bk
  one_block = w.k <= min(side, _PIECES[0])
  more = -w.k % (BLOCK if one_block else _LANES)
  rows = w.k + more
  add = lambda t, axis, n: jnp.pad(  # noqa: E731
    t, [(0, n if i == axis else 0) for i in range(2)]
  )
  if more:
    blocks = -(-rows // BLOCK) - w.absmax.shape[0]
    codes = add(w.codes, 0, BLOCK // 2 * blocks)
    w = Nf4(codes, add(w.absmax, 0, blocks), rows)
    if transpose_w:
      b = add(b, 1, more)
    else:
      x, a = add(x, 1, more), None if a is None else add(a, 1, more)
  if one_block:
    piece = side = rows
  else:
    side = min(side, rows)
    while not transpose_w and rows % side:
      side -= _LANES
    piece = next(p for p in _PIECES if not (side % p or rows % p))
  name = "bn" if transpose_w else "bk"
  return x, w, a, b, tiling._replace(**{name: side}), piece


def decode(
  codes: jax.Array, absmax: jax.Array, values: jax.Array, dtype: Any
) -> jax.Array:
  """Decodes the weights of a piece, in the kernel: (64 c, n) in `dtype`.

  Args:
    codes: (32 c, n) uint8, as `Nf4` lays them out.
    absmax: (c, n) float32.
    values: `VALUES`.
    dtype: of the weights, rounded once from float32.
  """
  words = pltpu.bitcast(codes, jnp.int32)
  (count, n), eight = absmax.shape, 8
  gathered = 0 if n % _LANES else _GATHERED
  scale = absmax[:, None, :]
  found = []
  for place in range(_IN_A_WORD):
    run = _gather if place < gathered else _select
    unit = run(words, place, values).reshape(count, eight, n)
    found.append(unit * scale)
  return jnp.stack(found, 1).reshape(count * BLOCK, n).astype(dtype)


def _gather(words, place, values):
  """Looks up the values at a place of every word, by a lane shuffle."""
  index = lax.shift_right_logical(words, 4 * place) & 15
  row = jnp.broadcast_to(values, (words.shape[0], _LANES))
  parts = [
    jnp.take_along_axis(
      row, index[:, at : at + _LANES], axis=1, mode="promise_in_bounds"
    )
    for at in range(0, words.shape[1], _LANES)
  ]
  return jnp.concatenate(parts, axis=1)


def _select(words, place, values):
  """Does the same by selects: pairs by the lowest bit, then pairs of those."""
  del values
  found: list[Any] = [jnp.float32(value) for value in NF4]
  for bit in range(4):
    mask = 1 << (4 * place + bit)
    chosen = (words & (mask - 2**32 if mask >= 2**31 else mask)) != 0
    pairs = zip(found[::2], found[1::2], strict=True)
    found = [jnp.where(chosen, high, low) for low, high in pairs]
  return found[0]
