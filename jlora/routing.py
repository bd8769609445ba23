# SPDX-License-Identifier: Apache-2.0
"""Many adapters side by side: a bank of which rows choose."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jlora.loras import Lora, Loras, check_loras
from jlora.messages import name_some


def stack(
  adapters: Sequence[Mapping[str, Lora]], *, rank: int | None = None
) -> Loras:
  """Adapters as one bank, whose Loras have a leading axis that counts them.

      a (n, ..., r, in), b (n, ..., r, out), scale (n, ...)

  Args:
    adapters: path -> Lora each. Ranks may differ, and so may the modules: units
      of zeros fill up what one lacks.
    rank: of the bank, at least the largest there is; None is that. A larger one
      leaves room for adapters to come, with no other shape.

  Returns:
    Loras for `adapt_rows` and `bind(..., ids=...)`, in the dtype that holds all
    factors of a path.

  Raises:
    ValueError: no adapters, a rank that does not hold all, or Loras of one path
      that differ in more than their rank.

  Example:
    >>> one = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(1))
    >>> two = Lora(jnp.ones((2, 3)), jnp.ones((2, 2)), jnp.float32(1))
    >>> bank = stack([{"q": one}, {"q": two, "k": one}])
    >>> bank["q"].a.shape, bank["k"].scale.tolist()
    ((2, 2, 3), [0.0, 1.0])
  """
  if not adapters:
    raise ValueError("There are no adapters to stack; give at least one.")
  for adapter in adapters:
    check_loras(adapter)
  paths = list(dict.fromkeys(path for own in adapters for path in own))
  largest = max((x.rank for own in adapters for x in own.values()), default=1)
  rank = largest if rank is None else rank
  if rank < largest:
    raise ValueError(f"A bank of rank {rank} does not hold rank {largest}.")
  return {
    path: _stacked(path, [own.get(path) for own in adapters], rank)
    for path in paths
  }


def _stacked(path: str, loras: Sequence[Lora | None], rank: int) -> Lora:
  """One path's Loras, zeros for those that are missing."""
  there = [lora for lora in loras if lora is not None]
  shapes = {_shape(lora) for lora in there}
  if len(shapes) > 1:
    raise ValueError(
      f"{path}: Loras of {name_some(sorted(shapes))} (..., in, out) do not "
      "belong to one parameter."
    )
  dtype = jnp.result_type(*(x for lora in there for x in (lora.a, lora.b)))
  fill = _zeros(there[0])
  padded = [_padded(lora or fill, rank, dtype) for lora in loras]
  return Lora(
    jnp.stack([lora.a for lora in padded]),
    jnp.stack([lora.b for lora in padded]),
    jnp.stack([lora.scale for lora in padded]),
  )


def _shape(lora: Lora) -> tuple[int, ...]:
  return (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])


def _zeros(like: Lora) -> Lora:
  return Lora(
    jnp.zeros_like(like.a), jnp.zeros_like(like.b), jnp.zeros_like(like.scale)
  )


def _padded(lora: Lora, rank: int, dtype: Any) -> Lora:
  """With units of zeros up to a rank."""

  def pad(factor):
    widths = [(0, 0)] * factor.ndim
    widths[-2] = (0, rank - lora.rank)
    return jnp.pad(factor.astype(dtype), widths)

  return Lora(pad(lora.a), pad(lora.b), lora.scale.astype(jnp.float32))
