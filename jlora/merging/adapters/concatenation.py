# SPDX-License-Identifier: Apache-2.0
"""Sums Loras exactly, by concatenating their rank axes, and reduces ranks.

No dense change is formed. Results depend on the changes alone, not on which of
the equal factorisations (R a, R⁻ᵀ b) describes them. Sums of the factors
themselves, as in PEFT's `linear`, do depend on it, by cross terms a_iᵀ b_j.
NumPy Loras are processed on the host, without compiling anything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jlora.factoring.factorisers import recompress
from jlora.loras import Lora, Loras, check_loras, from_factors
from jlora.merging.arrays.inputs import numbers
from jlora.messages import name_some
from jlora.numerics.backends import library_of


def concat(
  loras: Sequence[Lora], weights: Any, base: Any = None, *, key: Any = None
) -> Lora:
  """Adds Loras exactly, with weights, by concatenating their factors.

      Σ w_i s_i a_iᵀ b_i = aᵀ b,   a = [a_1; ...],   b = [w_1 s_1 b_1; ...]

  Weights (1, -1) subtract, (-1,) negates.

  Args:
    loras: n Loras of one parameter; ranks may differ.
    weights: (n,), may be negative or zero.
    base: unused; there so that all methods have the same arguments.
    key: unused, likewise.

  Returns:
    Lora whose rank is the ranks' sum, scale 1, in the first's dtype: exact in
    float32, b rounded once in a narrower dtype. NaN and infinity are kept.
    Moves no more data than the factors; keeps the sharding of in and out.

  Raises:
    ValueError: the Loras do not belong to one parameter, or not one weight per
      Lora.

  Example:
    >>> one = np.ones((1, 2), np.float32)
    >>> both = concat([Lora(one, one, np.float32(2))] * 2, [1.0, -0.5])
    >>> both.rank, both.b
    (2, array([[ 2.,  2.],
               [-1., -1.]], dtype=float32))
  """
  del base, key
  whole, dtype = _joined(loras, weights), loras[0].a.dtype
  return Lora(whole.a.astype(dtype), whole.b.astype(dtype), whole.scale)


def svd_merge(
  loras: Sequence[Lora],
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  rank: int,
) -> Lora:
  """Computes the best approximation of given rank to a weighted sum of Loras.

      error² = Σ_{k > rank} σ_k²,   σ the singular values of Σ w_i s_i a_iᵀ b_i

  Args:
    loras: n Loras of one parameter; ranks may differ.
    weights: (n,), may be negative or zero.
    base: unused.
    key: unused.
    rank: at least 1; clipped to min(Σ r_i, in, out).

  Returns:
    Lora of scale 1 in the first's dtype, balanced, its units in descending
    order of strength: the first k are the best Lora of rank k. Two thin QRs and
    the svd of a Σ r_i square matrix: O((in + out) (Σ r_i)²), where PEFT's `svd`
    decomposes the dense change. The scale is NaN where a factor is not finite.

  Raises:
    ValueError: a rank below 1, or as `concat`.

  Example:
    >>> one = np.ones((1, 2), np.float32)
    >>> lora = Lora(one, one, np.float32(2))
    >>> svd_merge([lora, lora], [0.5, 0.5], rank=1).b.shape
    (1, 2)
  """
  del base, key
  whole = _joined(loras, weights)
  (a, b), scale = finite(whole.a, whole.b)
  kept = from_factors(recompress(a, b, rank), loras[0].a.dtype)
  return Lora(kept.a, kept.b, scale)


def truncate(lora: Lora, rank: int) -> Lora:
  """Reduces a Lora to the nearest one of a smaller rank.

  Args:
    lora: a (..., r, in), b (..., r, out), scale (...).
    rank: at least 1; clipped to min(r, in, out).

  Returns:
    Lora of scale 1 in the same dtype, balanced, its units in descending order
    of strength: `svd_merge` of a single Lora.

  Raises:
    ValueError: a rank below 1, or a malformed Lora.

  Example:
    >>> eye = np.eye(3, dtype=np.float32)
    >>> cut = truncate(Lora(eye, eye * np.float32([1, 3, 2]), np.float32(1)), 1)
    >>> (cut.a.T @ cut.b).round(4)[1]
    array([0., 3., 0.], dtype=float32)
  """
  return svd_merge([lora], [1.0], rank=rank)


def fill_missing(adapters: Sequence[Mapping[str, Lora]]) -> list[Loras]:
  """Adds Loras of zeros so that all adapters have the same modules.

  `merge` needs equal names; use this if a missing module means no change.

  Args:
    adapters: path -> Lora each.

  Returns:
    The same number of adapters, each with all paths, in the order of first
    occurrence; the added zeros have rank 1.

  Example:
    >>> one = Lora(jnp.ones((2, 3)), jnp.ones((2, 5)), jnp.float32(2))
    >>> fill_missing([{"q": one}, {"k": one}])[0]["k"].b.shape
    (1, 5)
  """
  there = {path: x for own in reversed(adapters) for path, x in own.items()}
  paths = list(dict.fromkeys(path for own in adapters for path in own))

  def none(like):
    """Returns a Lora of zeros of rank 1."""
    unit = Lora(like.a[..., :1, :], like.b[..., :1, :], like.scale)
    return jax.tree.map(lambda x: library_of(x).zeros_like(x), unit)

  return [
    {path: own[path] if path in own else none(there[path]) for path in paths}
    for own in adapters
  ]


def by_path(
  adapters: Sequence[Mapping[str, Lora]],
) -> dict[str, dict[int, Lora]]:
  """Turns adapters into the Loras of each module, by the adapters' places.

  Args:
    adapters: path -> Lora each; each may lack modules.

  Returns:
    path -> {place of the adapter: Lora}, in the order of first occurrence.

  Raises:
    ValueError: malformed Loras.

  Example:
    >>> one = Lora(np.ones((1, 2)), np.ones((1, 3)), np.float32(1))
    >>> [[*own] for own in by_path([{"q": one}, {"k": one, "q": one}]).values()]
    [[0, 1], [1]]
  """
  whole: dict[str, dict[int, Lora]] = {}
  for at, own in enumerate(adapters):
    check_loras(own)
    for path, lora in own.items():
      whole.setdefault(path, {})[at] = lora
  return whole


def leading_of(loras: Mapping[int, Lora]) -> tuple[int, ...]:
  """Returns the leading axes of one module's Loras, as `by_path` groups them.

  Example:
    >>> one = Lora(np.ones((4, 1, 2)), np.ones((4, 1, 3)), np.ones(4))
    >>> leading_of({0: one})
    (4,)
  """
  return tuple(next(iter(loras.values())).a.shape[:-2])


def weighted(loras: Sequence[Lora], weights: Any) -> list[tuple[Any, Any]]:
  """Returns the factors of Loras, with weights and scales multiplied into b.

  Returns:
    n pairs a (..., r_i, in) and w_i scale_i b (..., r_i, out), float32; NumPy
    arrays if all arguments are.

  Raises:
    ValueError: as `concat`.

  Example:
    >>> one = Lora(np.ones((1, 2)), np.ones((1, 1)), np.float32(2))
    >>> weighted([one], [3.0])[0][1]
    array([[6.]], dtype=float32)
  """
  _check(loras)
  weights = numbers("weights", weights, len(loras))
  leaves = [weights, *jax.tree.leaves(list(loras))]
  xp = np if all(library_of(leaf) is np for leaf in leaves) else jnp
  pairs = []
  for i, lora in enumerate(loras):
    a, b, scale = (
      xp.asarray(x).astype(np.float32) for x in (lora.a, lora.b, lora.scale)
    )
    pairs.append((a, (weights[i] * scale)[..., None, None] * b))
  return pairs


def finite(a: Any, b: Any) -> tuple[tuple[Any, Any], Any]:
  """Replaces factors that are not finite by zeros, with a scale of NaN.

  On NaN, LAPACK may not return.

  Args:
    a: (..., r, in) float32.
    b: (..., r, out) float32.

  Returns:
    a and b, zeros where either has NaN or infinity, and (...) of 1 or NaN.

  Example:
    >>> one = np.ones((1, 2), np.float32)
    >>> finite(one, one * np.float32(np.nan))[1]
    array(nan, dtype=float32)
  """
  xp = library_of(a)
  both = xp.isfinite(a).all(axis=(-2, -1)) & xp.isfinite(b).all(axis=(-2, -1))
  zero, one, nan = np.float32(0), np.float32(1), np.float32(np.nan)
  a, b = (xp.where(both[..., None, None], x, zero) for x in (a, b))
  return (a, b), xp.where(both, one, nan)


def as_factors(_: Any, a: Any, b: Any, *rest: Any) -> tuple[Any, Any]:
  """Returns how factors made of others lie on a mesh: as the first ones do.

  For `over_leading`, of a key, a and b.

  Example:
    >>> [tuple(spec) for spec in as_factors(None, (None, "x"), (None, "y"))]
    [(None, 'x'), (None, 'y')]
  """
  left, right = (PartitionSpec(*x[:-2], None, x[-1]) for x in (a, b))
  return left, right


def _joined(loras: Sequence[Lora], weights: Any) -> Lora:
  """Concatenates Loras to their weighted sum, in float32."""
  pairs = weighted(loras, weights)
  xp = library_of(pairs[0][0])
  a, b = (xp.concatenate(x, axis=-2) for x in zip(*pairs, strict=True))
  # Computed from the scale, as `ones_like` loses the sharding in newer JAX.
  scale = loras[0].scale
  ones = xp.logical_or(scale == scale, True).astype(np.float32)
  return Lora(a, b, ones)


def _check(loras: Sequence[Lora]) -> None:
  """Raises unless these are Loras of one parameter."""
  if not isinstance(loras, list | tuple) or not all(
    isinstance(lora, Lora) for lora in loras
  ):
    raise ValueError(
      "This merges a sequence of Loras of one parameter. For arrays use linear,"
      " ties and others, for models and adapters merge."
    )
  if not loras:
    raise ValueError("There are no Loras to merge; give at least one.")
  check_loras({f"Lora {i}": lora for i, lora in enumerate(loras)})
  shapes = {
    (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1]) for lora in loras
  }
  if len(shapes) > 1:
    raise ValueError(
      f"Loras of {name_some(sorted(shapes))} (..., in, out) do not belong to "
      "one parameter."
    )
