# SPDX-License-Identifier: Apache-2.0
"""Quantised matrices: int8 with a scale a column, 4-bit nf4 in blocks of 64.

An int8 matrix is `Scaled`, which the TPU kernel multiplies as it is stored. An
nf4 matrix is `Nf4`; it is brought back to x's dtype before the product.

A kernel that unpacks nf4 by itself, 15 selects a weight, compiles for v4, v5e,
v5p, v6e and v7x. By v5e's static cycles it is not worth having: 64 rows times
4096 x 4096 took 154 thousand, and v5e reads that matrix in bfloat16 in 61.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lora_dot.api import lora_dot
from pallas_kernels.lora_dot.weights import Scaled, Weight, dense_weight

BLOCK = 64
_HALF = BLOCK // 2

#: The 16 values of the paper's 4-bit normal float: quantiles of N(0, 1), eight
#: of them positive and zero among them, divided by the largest.
NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
  0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4:
  """A matrix (K, N) in 4 bits, in blocks of 64 down each column.

  codes: uint8 (32 ⌈K / 64⌉, N). Row 32 c + i holds rows 64 c + i, in its low
    four bits, and 64 c + 32 + i.
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
    """What it is brought back to if nothing else is asked: float32."""
    return self.absmax.dtype


Quantised = Scaled | Nf4


def quantise_int8(w: jax.Array) -> Scaled:
  """A matrix in int8, with a float32 scale for each column.

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
  """A matrix in 4 bits a weight, with a float32 magnitude a block of 64.

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
  packed = codes[:, :_HALF] | (codes[:, _HALF:] << 4)
  return Nf4(packed.reshape(-1, n), absmax, k)


def dequantise(held: Quantised, dtype: Any = jnp.float32) -> jax.Array:
  """The matrix (K, N), computed in float32 and rounded once.

  Args:
    held: Scaled or Nf4.
    dtype: of the result.

  Example:
    >>> dequantise(quantise_int8(jnp.eye(2))).ravel()
    Array([1., 0., 0., 1.], dtype=float32)
  """
  if isinstance(held, Scaled):
    return dense_weight(held, dtype)
  n = held.codes.shape[-1]
  codes = held.codes.reshape(-1, _HALF, n)
  codes = jnp.concatenate([codes & 15, codes >> 4], axis=1)
  w = jnp.asarray(NF4, jnp.float32)[codes] * held.absmax[:, None]
  return w.reshape(-1, n)[: held.k].astype(dtype)


def quantised_dot(
  x: jax.Array,
  w: Weight | Nf4,
  a: jax.Array,
  b: jax.Array,
  gate: jax.Array | None = None,
  *,
  transpose_w: bool = False,
  implementation: Callable[..., jax.Array] | None = None,
) -> jax.Array:
  """Rows times a quantised matrix with a low-rank change, (..., K) -> (..., N).

      y = x w + ((x aᵀ) g) b

  `lora_dot` for every kind of w. An Nf4 w is brought back to x's dtype before
  the product, whatever the implementation, and takes that memory meanwhile.

  Args:
    x: (..., K).
    w: (K, N), or (N, K) with `transpose_w`: an array, Scaled or Nf4.
    a: (r, K).
    b: (r, N).
    gate: broadcastable to (..., r), or None.
    transpose_w: w is stored (N, K).
    implementation: as `lora_dot` takes it.

  Returns:
    (..., N) in x's dtype, differentiable in x, a, b and gate.

  Example:
    >>> one = jnp.ones
    >>> quantised_dot(one((1, 2)), quantise_nf4(one((2, 3))), one((1, 2)),
    ...               one((1, 3)))
    Array([[4., 4., 4.]], dtype=float32)
  """
  if isinstance(w, Nf4):
    w = dequantise(w, x.dtype)
  return lora_dot(
    x, w, a, b, gate, transpose_w=transpose_w, implementation=implementation
  )


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
  """The tree with some of its matrices quantised, and what that cost.

  Args:
    params: nested dicts of arrays; matrices (in, out).
    select: (path, array) -> whether to quantise it; a path is keys joined by
      "/". Asked of every array.
    how: `quantise_int8` or `quantise_nf4`.

  Returns:
    (the tree, all else in it as it was; {path: Cost}). Runs on the host, a
    matrix at a time.

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
    held = how(node)
    costs[name] = _cost(node, held)
    return held

  tree = walk(params, ())
  if not costs:
    raise ValueError("nothing was selected to be quantised.")
  return tree, costs


def _cost(w, held):
  w32 = jnp.asarray(w, jnp.float32)
  norm = float(jnp.linalg.norm(w32))
  off = float(jnp.linalg.norm(dequantise(held) - w32))
  stored = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
  return Cost(off / norm if norm else 0.0, stored, w.nbytes)


def _check_matrix(w):
  if w.ndim != 2 or not jnp.issubdtype(w.dtype, jnp.floating):
    raise ValueError(
      f"w is {w.dtype} {w.shape}: needed is a floating matrix (K, N)."
    )
