# SPDX-License-Identifier: Apache-2.0
"""Adapters that begin as a part of the weights: PiSSA and OLoRA."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.application import apply
from jlora.factoring import Factoriser, krylov
from jlora.initialisation import Scaling, by_rank, matrices_of
from jlora.loras import Lora, Loras, from_factors
from jlora.messages import name_some
from jlora.paths import check_same, key_for
from jlora.selection import Select, is_linear, ranks_of
from jlora.views import Rule, as_matrix

# ((..., in, out), rank, scale, key) -> a (..., rank, in), b (..., rank, out).
Start = Callable[[Any, int, float, jax.Array], tuple[Any, Any]]


def principal(
  weight: Any,
  rank: int,
  scale: float,
  key: jax.Array,
  *,
  factor: Factoriser = krylov,
):
  """The start of PiSSA: the largest singular triplets of the weight.

      weight ≈ u diag(s) vt,   a = √(s/scale) uᵀ,   b = √(s/scale) vt

  Args:
    weight: (..., in, out).
    rank: units.
    scale: of the adapter.
    key: PRNG key of the factoriser.
    factor: a factoriser.

  Returns:
    a (..., rank, in), b (..., rank, out), float32.

  Example:
    >>> weight = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    >>> a, b = principal(weight, 1, 1.0, jax.random.key(0))
    >>> (a * b).round(4)
    Array([[3., 0., 0.]], dtype=float32)

  References:
    Meng et al. (2024), PiSSA.
  """
  lora = from_factors(factor(weight, rank, key))
  return lora.a / math.sqrt(scale), lora.b / math.sqrt(scale)


def orthogonal(weight: Any, rank: int, scale: float, key: jax.Array):
  """The start of OLoRA: the first units of the weight's QR decomposition.

      weightᵀ = Q R,   b = (the first columns of Q)ᵀ,   a = the first rows of R

  Args:
    weight: (..., in, out).
    rank: units.
    scale: not looked at: the adapter is taken off the base with its scale.
    key: not looked at.

  Returns:
    a (..., rank, in), b (..., rank, out), float32. Decomposes the whole weight.

  Example:
    >>> a, b = orthogonal(jnp.eye(3)[:, :2], 1, 1.0, jax.random.key(0))
    >>> jnp.abs(a), jnp.abs(b)
    (Array([[1., 0., 0.]], dtype=float32), Array([[1., 0.]], dtype=float32))

  References:
    Büyükakyüz (2024), OLoRA; PEFT's code.
  """
  del scale, key
  q, r = jnp.linalg.qr(jnp.swapaxes(weight.astype(jnp.float32), -1, -2))
  return r[..., :rank, :], jnp.swapaxes(q[..., :rank], -1, -2)


def split_base(
  params: Any,
  rank: int | Mapping[str, int],
  key: jax.Array | None = None,
  *,
  start: Start = principal,
  select: Select = is_linear,
  alpha: float = 16.0,
  scaling: Scaling = by_rank,
  views: Iterable[Rule] | None = None,
) -> tuple[Loras, Any]:
  """An adapter made of parts of the weights, and the rest of the weights.

      rest = w - scale aᵀ b

  Train the adapter on the rest, then call `relative_to_base`: on the base as
  it was the adapter means nothing.

  Args:
    params: a pytree of arrays.
    rank: as for `init_lora`; at most what the matrix allows.
    key: as for `init_lora`.
    start: `principal` (PiSSA) or `orthogonal` (OLoRA).
    select: as for `init_lora`.
    alpha: as for `init_lora`.
    scaling: as for `init_lora`.
    views: as for `init_lora`.

  Returns:
    Loras in float32, and a pytree like params in its dtypes. Adapter and rest
    sum to params but for one rounding to the leaf's dtype; in bfloat16 that is
    no small error.

  Raises:
    ValueError: as `init_lora`, or a rank above what the matrix allows.

  Example:
    >>> params = {"q": {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}}
    >>> loras, rest = split_base(params, rank=1)
    >>> jnp.diagonal(rest["q"]["kernel"]).round(4)
    Array([0., 2., 1.], dtype=float32)
  """
  modules = matrices_of(params, select, views)
  ranks = ranks_of(rank, modules)
  loras, high = {}, []
  for path, r in ranks.items():
    leaf, view = modules[path]
    matrix, scale = as_matrix(leaf, view), scaling(alpha, r)
    if r > min(matrix.shape[-2:]):
      high.append(f"{path}: {r} for {matrix.shape}")
      continue
    a, b = start(matrix, r, scale, key_for(key, path))
    full = jnp.full(matrix.shape[:-2], scale, jnp.float32)
    loras[path] = Lora(a, b, full)
  if high:
    raise ValueError(
      f"rank above what the matrix has: {name_some(high)}; ask for less there."
    )
  negative = {
    path: dataclasses.replace(lora, scale=-lora.scale)
    for path, lora in loras.items()
  }
  return loras, apply(params, negative, views=views)


def relative_to_base(
  trained: Mapping[str, Lora], start: Mapping[str, Lora]
) -> Loras:
  """A plain adapter of the base as it was, from one that began as a part of it.

      scale' a'ᵀ b' - scale aᵀ b,   one adapter of twice the rank, exactly

  Args:
    trained: path -> Lora, after training on the rest.
    start: the same paths, as `split_base` gave them.

  Returns:
    Loras with a (..., 2r, in), b (..., 2r, out) and the scale of `trained`;
    only concatenation.

  Raises:
    ValueError: paths that differ.

  Example:
    >>> one = Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.float32(1))
    >>> relative_to_base({"w": one}, {"w": one})["w"].rank
    2

  References:
    Meng et al. (2024), appendix on conversion.
  """
  check_same(trained, start, "trained", "start")
  found = {}
  for path, lora in trained.items():
    first = start[path]
    ratio = (first.scale / lora.scale)[..., None, None]
    a = jnp.concatenate([lora.a, first.a.astype(lora.a.dtype)], axis=-2)
    minus = (-ratio * first.b).astype(lora.b.dtype)
    b = jnp.concatenate([lora.b, minus], axis=-2)
    found[path] = Lora(a, b, lora.scale)
  return found
