# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments, the same for every implementation."""

import jax
import jax.numpy as jnp

from pallas_kernels.lora_dot.weights import BLOCK, Nf4, Scaled, Weight, shape_of

CODES = (jnp.int8, jnp.float8_e4m3fn)


def check_shapes(
  x: jax.Array,
  w: Weight,
  a: jax.Array,
  b: jax.Array,
  gate: jax.Array | None,
  transpose_w: bool,
) -> None:
  """Raises ValueError unless the shapes make a product.

  Example:
    >>> one = jnp.ones
    >>> check_shapes(one((4, 2)), one((2, 3)), one((1, 2)), one((1, 3)), None,
    ...              False)
  """
  shapes = f"x {x.shape}, w {shape_of(w)}, a {a.shape}, b {b.shape}"
  if x.ndim < 1 or len(shape_of(w)) != 2 or a.ndim != 2 or b.ndim != 2:
    raise ValueError(
      f"{shapes}: needed are x (..., K), w (K, N) or (N, K) with transpose_w, "
      "a (r, K), b (r, N); batches of w go through jax.vmap."
    )
  k, n = shape_of(w)[::-1] if transpose_w else shape_of(w)
  if x.shape[-1] != k or a.shape[1] != k or b.shape != (a.shape[0], n):
    raise ValueError(
      f"{shapes}, transpose_w={transpose_w}: with K = {k} and N = {n} needed "
      f"are x (..., {k}), a (r, {k}), b (r, {n})."
    )
  if gate is not None:
    rows = (*x.shape[:-1], a.shape[0])
    padded = (1,) * (len(rows) - gate.ndim) + gate.shape
    if len(padded) != len(rows) or any(
      g not in (1, size) for g, size in zip(padded, rows, strict=True)
    ):
      raise ValueError(f"gate {gate.shape} does not broadcast to {rows}.")
  if isinstance(w, Scaled):
    _check_scale(w)
  if isinstance(w, Nf4):
    _check_nf4(w)


def _check_scale(w: Scaled) -> None:
  """Raises ValueError unless codes and scales fit each other."""
  rows, columns = w.codes.shape
  if w.scale.shape not in ((1, columns), (rows, 1)):
    raise ValueError(
      f"scale {w.scale.shape} for codes {w.codes.shape}: needed is "
      f"{(1, columns)} or {(rows, 1)}."
    )
  if w.codes.dtype not in CODES:
    raise ValueError(f"codes are {w.codes.dtype}, needed int8, float8_e4m3fn.")


def _check_nf4(w: Nf4) -> None:
  """Raises ValueError unless codes, magnitudes and rows fit together."""
  blocks, n = -(-w.k // BLOCK), w.codes.shape[-1]
  wanted = (BLOCK // 2 * blocks, n), (blocks, n)
  if (w.codes.shape, w.absmax.shape) != wanted or w.codes.dtype != jnp.uint8:
    raise ValueError(
      f"codes {w.codes.dtype} {w.codes.shape} and absmax {w.absmax.shape} of "
      f"{w.k} rows: needed are uint8 {wanted[0]} and {wanted[1]}."
    )
