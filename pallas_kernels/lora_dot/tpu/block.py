# SPDX-License-Identifier: Apache-2.0
"""The body of the TPU kernel: one block of the product, in Mosaic.

The grid is (row blocks, column blocks, depth blocks), depth innermost. At the
first column block u = a xᵀ is summed over the depth; it stays in vector memory,
rank axis first so that no number is padded, for all other column blocks. The
last depth block adds (u g)ᵀ b to the accumulator and writes y.

There is one main product in the program, whatever the depth block: a copy for
the first, the middle and the last would be unrolled each, and take code and
compile time several times over.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lora_dot.tpu.nf4 import decode

_NN = (((1,), (0,)), ((), ()))
_NT = (((1,), (1,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))


class Static(NamedTuple):
  """What the kernel's program depends on, beside its arrays."""

  nj: int  # column blocks
  nk: int  # depth blocks
  depth: int  # the depth where its last block is ragged, else 0
  transpose_w: bool
  resident: bool
  scaled: str  # the axis of w that has scales: "", "in" or "out"
  piece: int = 0  # rows of an nf4 matrix that are decoded at once, else 0


def _dot(left, right, dims):
  """Multiplies two blocks, summed in float32."""
  return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _within(block, axis, k, s):
  """Returns the block with zeros where it passes the end of the depth."""
  if not s.depth:
    return block
  left = s.depth - k * block.shape[axis]
  inside = lax.broadcasted_iota(jnp.int32, block.shape, axis) < left
  return jnp.where(inside, block, jnp.zeros_like(block))


def _arrived(w, held, arrivals, s):
  """Returns the column block of a resident w, fetched at the first step."""
  i, j = pl.program_id(0), pl.program_id(1)
  bn = held.shape[1 if s.transpose_w else 2]

  def fetch(c):
    columns = pl.ds(pl.multiple_of(c * bn, bn), bn)
    source = w.at[columns, :] if s.transpose_w else w.at[:, columns]
    return pltpu.make_async_copy(source, held.at[c], arrivals.at[c])

  @pl.when((i == 0) & (j == 0))
  def _():
    lax.fori_loop(0, s.nj, lambda c, _: fetch(c).start(), None)

  @pl.when(i == 0)
  def _():
    fetch(j).wait()

  return held.at[j]


def _in_pieces(ins, x, s, use):
  """Decodes the block of an nf4 matrix, and uses it piece by piece."""
  half = s.piece // 2
  codes, absmax = ins["w"], ins["absmax"]

  def each(c, _):
    rows = pl.ds(pl.multiple_of(c * half, half), half)
    piece = decode(codes[rows, :], absmax[c], ins["values"][...], x.dtype)
    use(pl.ds(pl.multiple_of(c * s.piece, s.piece), s.piece), piece)

  lax.fori_loop(0, codes.shape[0] // half, each, None)


def _decoded(ins, x, held, s):
  """Returns a column block of a resident nf4 w, decoded at the first row."""
  i, j = pl.program_id(0), pl.program_id(1)

  def keep(rows, piece):
    held[j, rows, :] = piece

  pl.when(i == 0)(lambda: _in_pieces(ins, x, s, keep))
  return held.at[j]


def _add_pieces(ins, x, acc, k, s):
  """Adds the block's product to the accumulator, as its pieces come."""

  @pl.when(k == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)

  def add(rows, piece):
    if s.transpose_w:
      left, right = _within(x[...], 1, k, s), _within(piece, 1, k, s)
      acc[:, rows] += _dot(left, right, _NT)
    else:
      acc[...] += _dot(x[:, rows], piece, _NN)

  _in_pieces(ins, x, s, add)


def _product(ins, x, w, k, s):
  """Multiplies the block of x by the block of w."""
  left = x[...]
  if s.scaled == "in":
    left = left.astype(jnp.float32) * ins["scale"][...]
  right = w[...].astype(x.dtype)
  return _dot(
    _within(left.astype(x.dtype), 1, k, s),
    _within(right, 1 if s.transpose_w else 0, k, s),
    _NT if s.transpose_w else _NN,
  )


def lora_block(ins, outs, scratch, *, s: Static):
  """Computes one block of the grid; the references are in dicts by name."""
  j, k = pl.program_id(1), pl.program_id(2)
  x, a, b, y = ins["x"], ins["a"], ins["b"], outs["y"]
  u = outs.get("u", scratch.get("u", ins.get("u")))
  w = ins["w"]
  if s.resident and s.piece:
    w = _decoded(ins, x, scratch["w"], s)
  elif s.resident:
    w = _arrived(w, scratch["w"], scratch["arrivals"], s)

  if a is not None:

    @pl.when(j == 0)
    def _():
      sofar = jnp.where(k == 0, 0.0, u[...])
      rows = _within(x[...], 1, k, s)
      u[...] = sofar + _dot(_within(a[...], 1, k, s), rows, _NT)

  def finish(total):
    if s.scaled == "out":
      total = total * ins["scale"][...]
    gated = u[...] if ins["gate"] is None else u[...] * ins["gate"][...]
    total = total + _dot(gated.astype(b.dtype), b[...], _TN)
    y[...] = total.astype(y.dtype)

  if s.piece and not s.resident:
    acc = scratch["acc"]
    _add_pieces(ins, x, acc, k, s)
    pl.when(k == s.nk - 1)(lambda: finish(acc[...]))
    return

  product = _product(ins, x, w, k, s)
  if s.nk == 1:
    finish(product)
  else:
    acc = scratch["acc"]
    acc[...] = jnp.where(k == 0, 0.0, acc[...]) + product
    pl.when(k == s.nk - 1)(lambda: finish(acc[...]))
