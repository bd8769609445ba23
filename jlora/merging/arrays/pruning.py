# SPDX-License-Identifier: Apache-2.0
"""Task vectors thinned out before they are added: DARE, DELLA, Breadcrumbs.

The papers' rescaling is the default, mergekit's is `rescale=match_l1`. Of each
there is a form that adds what is left, `elect=None`, and one that lets signs be
elected first, `elect=by_mass`; mergekit names them `x_linear` and `x_ties`.
"""

import functools
from typing import Any

import jax.numpy as jnp

from jlora.merging.arrays.inputs import read_inputs
from jlora.merging.arrays.sparsifiers import (
  Rescaling,
  at_random,
  by_magnitude_rank,
  check_range,
  inverse_keep,
  keep_middle,
  lengths_of,
  match_l1,
  unscaled,
)
from jlora.merging.arrays.task_vectors import (
  Election,
  by_mass,
  merge_task_vectors,
  thin_out,
)


def dare(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  density: Any = 0.1,
  rescale: Rescaling = inverse_keep,
  elect: Election | None = None,
  normalize: bool = False,
  scale: Any = 1.0,
  start: Any = None,
  lengths: Any = None,
) -> Any:
  """The base plus the sum of changes of which most entries were dropped.

      θ = θ_0 + λ Σ w_i m_i δ_i / density,   m_i ~ Bernoulli(density)

  mergekit's `dare_linear`; with `elect=by_mass` its `dare_ties`.

  Args:
    stack: (n, ...) floating.
    weights: (n,).
    base: (...).
    key: PRNG key; None is `key(0)`. Every entry of every model is drawn for
      itself, so models are not interchangeable. Model i's entry j is known by
      `fold_in(key, i)` and j alone.
    density: probability of an entry to stay, one for all or (n,); 0.1 is the
      paper's p = 0.9.
    rescale: `inverse_keep` as in the paper, `match_l1` as in mergekit,
      `unscaled`.
    elect: as for `combine`.
    normalize: divides by Σ |w_i| of those that agree.
    scale: λ.
    start: of a piece, the place of its first entry in the tensor: (2,) uint32
      of `draws.place_of`. What is kept is then what the whole keeps there.
    lengths: (n, 2) for `match_l1`, of the whole tensor: the sum over its pieces
      of `dare_lengths`. None takes the stack's.

  Returns:
    (...) in the stack's dtype; the same on any mesh.

  Raises:
    ValueError: no base, a density outside [0, 1], or as `read_inputs`.

  Example:
    >>> dare(jnp.full((1, 2), 3.0), [1.0], jnp.ones(2), density=1.0)
    Array([3., 3.], dtype=float32)

  References:
    Yu et al. (2024), yule-BUAA/MergeLM.
  """
  given = read_inputs("dare", stack, weights, base, needs_base=True)
  check_range(density)
  rescales = [rescale] * len(stack)
  if lengths is not None:
    rescales = [functools.partial(match_l1, lengths=own) for own in lengths]
  merged = merge_task_vectors(
    given,
    sparsify=[
      functools.partial(at_random, rescale=own, start=start) for own in rescales
    ],
    amounts=density,
    elect=elect,
    normalize=normalize,
    scale=scale,
    key=key,
  )
  return merged.astype(stack.dtype)


def dare_lengths(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  density: Any = 0.1,
  start: Any = None,
  **others: Any,
) -> Any:
  """What `dare` with `rescale=match_l1` is told of a tensor that is cut.

  Args:
    stack: (n, ...) floating, a piece.
    weights: (n,), unused but checked.
    base: (...).
    key: as for `dare`, of the whole tensor.
    density: likewise.
    start: the piece's, likewise.
    **others: the rest of `dare`'s, which has no part in it.

  Returns:
    (n, 2) float32, Σ |δ_i| and Σ |m_i δ_i| of each model.

  Raises:
    ValueError: as `dare`.

  Example:
    >>> dare_lengths(jnp.full((1, 2), 3.0), [1.0], jnp.ones(2), density=1.0)
    Array([[4., 4.]], dtype=float32)
  """
  del others
  given = read_inputs("dare", stack, weights, base, needs_base=True)
  keep = functools.partial(at_random, rescale=unscaled, start=start)
  found = thin_out(given, keep, density, key)
  return jnp.stack([lengths_of(*pair) for pair in found])


def della(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  density: Any,
  epsilon: float = 0.15,
  axis: int = -1,
  rescale: Rescaling = inverse_keep,
  elect: Election | None = by_mass,
  normalize: bool = True,
  scale: Any = 1.0,
) -> Any:
  """The mean by sign of changes whose small entries were mostly dropped.

      τ_i = m_i δ_i / p_i,   m_i ~ Bernoulli(p_i)

  with p_i growing from density - ε to density + ε by rank in the row
  (`by_magnitude_rank`). With `elect=None, normalize=False` it is mergekit's
  `della_linear`, a sum.

  Args:
    stack: (n, ...) floating.
    weights: (n,).
    base: (...).
    key: as for `dare`.
    density: mean probability to stay, one for all or (n,); 1 keeps all.
    epsilon: ε; density ± ε must lie within 0 and 1.
    axis: that of a single model along which entries are ranked.
    rescale: as for `dare`.
    elect: as for `combine`.
    normalize: divides by Σ |w_i| of those that agree.
    scale: λ.

  Returns:
    (...) in the stack's dtype. Sorts along `axis`, which is gathered if it is
    sharded.

  Raises:
    ValueError: no base, a density too near to 0 or 1, or as `read_inputs`.

  Example:
    >>> stack = jnp.array([[3.0, 1.0], [-1.0, 1.0]])
    >>> della(stack, [1.0, 1.0], jnp.zeros(2), density=1.0)
    Array([3., 1.], dtype=float32)

  References:
    Deep et al. (2024).
  """
  given = read_inputs("della", stack, weights, base, needs_base=True)
  check_range(density, epsilon)
  merged = merge_task_vectors(
    given,
    sparsify=functools.partial(
      by_magnitude_rank, epsilon=epsilon, axis=axis, rescale=rescale
    ),
    amounts=density,
    elect=elect,
    normalize=normalize,
    scale=scale,
    key=key,
  )
  return merged.astype(stack.dtype)


def breadcrumbs(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  density: Any,
  gamma: float = 0.01,
  erases_small: bool = False,
  elect: Election | None = None,
  normalize: bool = False,
  scale: Any = 1.0,
) -> Any:
  """The base plus the sum of changes without their extremes.

      θ = θ_0 + λ Σ w_i m_i δ_i,   m_i: neither outliers nor the smallest

  With `elect=by_mass` it is mergekit's `breadcrumbs_ties`.

  Args:
    stack: (n, ...) floating.
    weights: (n,).
    base: (...).
    key: unused.
    density: share of the entries kept, one for all or (n,); 1 keeps all.
    gamma: share of the largest that are dropped.
    erases_small: mergekit's slip with tensors of few entries (`keep_middle`).
    elect: as for `combine`.
    normalize: divides by Σ |w_i| of those that agree.
    scale: λ.

  Returns:
    (...) in the stack's dtype. Only counts travel under sharding.

  Raises:
    ValueError: no base, a density outside [0, 1], or as `read_inputs`.

  Example:
    >>> stack = jnp.array([[5.0, -4.0, 3.0, 2.0, 1.0]])
    >>> breadcrumbs(stack, [1.0], jnp.zeros(5), density=0.6, gamma=0.2)
    Array([ 0., -4.,  3.,  2.,  0.], dtype=float32)

  References:
    Davari and Belilovsky (2023).
  """
  given = read_inputs("breadcrumbs", stack, weights, base, needs_base=True)
  check_range(density)
  merged = merge_task_vectors(
    given,
    sparsify=functools.partial(
      keep_middle, gamma=gamma, erases_small=erases_small
    ),
    amounts=density,
    elect=elect,
    normalize=normalize,
    scale=scale,
    key=key,
  )
  return merged.astype(stack.dtype)
