# SPDX-License-Identifier: Apache-2.0
"""Quantised matrices: int8 with a scale a column, 4-bit nf4 in blocks of 64."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lora_dot.weights import (
  BLOCK,
  NF4,
  Nf4,
  Quantised,
  Scaled,
  dense_weight,
)

_HALVES = 4, 2, 8  # of a block: a byte's row, its half, the eight rows


def quantise_int8(w: jax.Array) -> Scaled:
  """Quantises a matrix to int8, with a float32 scale for each column.

      codes = round(w / s),  s_j = max_i |w_ij| / 127

  Args:
    w: (K, N), floating and finite.

  Returns:
    Scaled: K N + 4 N bytes. No weight is off by more than s_j / 2.

  Raises:
    ValueError: w is not a matrix of floating numbers.

  Example:
    >>> quantise_int8(jnp.array([[127.0, 0.0], [-63.6, 0.0]])).codes
    Array([[127,   0],
           [-64,   0]], dtype=int8)
  """
  _check_matrix(w)
  w = w.astype(jnp.float32)
  scale = jnp.max(jnp.abs(w), axis=0, keepdims=True) / 127
  codes = jnp.round(w / jnp.where(scale == 0, 1, scale))
  return Scaled(codes.astype(jnp.int8), scale)


def quantise_nf4(w: jax.Array) -> Nf4:
  """Quantises a matrix to 4 bits a weight, with a scale for each 64.

      code = argmin_c |w / absmax - NF4_c|

  Args:
    w: (K, N), floating and finite; blocks go down its columns, the last of
      them may be shorter. For a matrix (out, in) give its transpose.

  Returns:
    Nf4: K N / 2 + K N / 16 bytes.

  Raises:
    ValueError: w is not a matrix of floating numbers.

  Approximation: the paper lays blocks along the flattened matrix, and stores
  their magnitudes in 8 bits ("double quantisation"): 4.13 bits a weight for
  these 4.5. Files of bitsandbytes have another layout.

  Example:
    >>> held = quantise_nf4(jnp.array([[2.0], [-1.4]]))
    >>> dequantise(held).ravel()
    Array([ 2.       , -1.3923856], dtype=float32)

  References:
    Dettmers, Pagnoni, Holtzman, Zettlemoyer (2023), QLoRA, section 3, appendix
    E.
  """
  _check_matrix(w)
  k, n = w.shape
  blocks = -(-k // BLOCK)
  w = jnp.pad(w.astype(jnp.float32), ((0, blocks * BLOCK - k), (0, 0)))
  w = w.reshape(blocks, BLOCK, n)
  absmax = jnp.max(jnp.abs(w), axis=1)
  unit = w / jnp.where(absmax == 0, 1, absmax)[:, None]
  values = jnp.asarray(NF4, jnp.float32)
  codes = jnp.searchsorted((values[1:] + values[:-1]) / 2, unit)
  codes = codes.astype(jnp.uint8)
  codes = codes.reshape(blocks, *_HALVES, n)
  packed = codes[:, :, 0] | (codes[:, :, 1] << 4)
  return Nf4(packed.swapaxes(1, 2).reshape(-1, n), absmax, k)


def dequantise(held: Quantised, dtype: Any = jnp.float32) -> jax.Array:
  """Brings a quantised matrix back, rounded once from float32: (K, N).

  Args:
    held: Scaled or Nf4.
    dtype: of the result.

  Example:
    >>> dequantise(quantise_int8(jnp.eye(2))).ravel()
    Array([1., 0., 0., 1.], dtype=float32)
  """
  return dense_weight(held, dtype)


class Cost(NamedTuple):
  """What quantising a matrix cost and saved.

  error: ||dequantised - w|| / ||w|| in the Frobenius norm; 0 if w is zero.
  stored: bytes of the quantised matrix, scales included.
  before: bytes of w.
  """

  error: float
  stored: int
  before: int


def quantise_tree(
  params: Mapping[str, Any],
  select: Callable[[str, jax.Array], bool],
  how: Callable[[jax.Array], Quantised],
) -> tuple[dict[str, Any], dict[str, Cost]]:
  """Quantises some matrices of a tree, and says what that cost.

  Args:
    params: nested dicts of arrays; matrices (in, out).
    select: (path, array) -> whether to quantise it; a path is keys joined by
      "/". Asked of every array.
    how: `quantise_int8` or `quantise_nf4`.

  Returns:
    (the tree, all else in it as it was; {path: Cost}). One program for every
    shape, a matrix at a time.

  Raises:
    ValueError: nothing was selected, or what is not a matrix.

  Example:
    >>> tree, costs = quantise_tree(
    ...   {"layer": {"kernel": jnp.eye(64), "bias": jnp.ones(64)}},
    ...   lambda path, t: t.ndim == 2, quantise_nf4)
    >>> costs
    {'layer/kernel': Cost(error=0.0, stored=2304, before=16384)}
  """
  costs: dict[str, Cost] = {}
  at_once = jax.jit(how)

  def walk(node: Any, path: tuple[str, ...]) -> Any:
    if isinstance(node, Mapping):
      return {key: walk(node[key], (*path, str(key))) for key in node}
    name = "/".join(path)
    if not select(name, node):
      return node
    if node.ndim != 2:
      raise ValueError(
        f"{name} {node.shape} is not a matrix: select what has two axes."
      )
    held = at_once(node)
    costs[name] = _cost(node, held)
    return held

  tree = walk(params, ())
  if not costs:
    raise ValueError("nothing was selected to be quantised.")
  return tree, costs


@jax.jit
def _norms(w, held):
  """Computes the norm of w and that of the error, in float32."""
  w = w.astype(jnp.float32)
  return jnp.linalg.norm(w), jnp.linalg.norm(dequantise(held) - w)


def _cost(w, held):
  """Measures what quantising one matrix cost and saved."""
  norm, off = map(float, _norms(w, held))
  stored = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
  return Cost(off / norm if norm else 0.0, stored, w.nbytes)


def _check_matrix(w):
  """Raises ValueError unless w is a matrix of floating numbers."""
  if w.ndim != 2 or not jnp.issubdtype(w.dtype, jnp.floating):
    raise ValueError(
      f"w is {w.dtype} {w.shape}: needed is a floating matrix (K, N)."
    )
