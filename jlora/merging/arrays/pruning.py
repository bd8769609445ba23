# SPDX-License-Identifier: Apache-2.0
"""Merging methods that drop entries of changes: DARE, DELLA, Breadcrumbs.

The papers' rescaling is the default; mergekit's is `rescale=match_l1`. Each
method has a form that adds what is left, `elect=None`, and one that first
elects a sign for each entry, `elect=by_mass`; mergekit calls them `x_linear`
and `x_ties`.
"""

import functools
from typing import Any

from jlora.merging.arrays.inputs import numbers, read_inputs
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
from jlora.numerics.backends import library_of


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
  """Adds changes to the base after dropping most entries at random (DARE).

      θ = θ_0 + λ Σ w_i m_i δ_i / density,   m_i ~ Bernoulli(density)

  This is mergekit's `dare_linear`; with `elect=by_mass` its `dare_ties`.

  Args:
    stack: (n, ...) floating.
    weights: (n,).
    base: (...).
    key: PRNG key; None is `key(0)`. Entry j of model i is drawn from
      `fold_in(key, i)` and j alone, so the models' order matters.
    density: probability to keep an entry, one for all or (n,); 0.1 is the
      paper's p = 0.9.
    rescale: `inverse_keep` as in the paper, `match_l1` as in mergekit, or
      `unscaled`.
    elect: a function of the weighted changes that elects each entry's sign,
      such as `by_mass`; changes of the other sign are left out. None adds all.
    normalize: as for `merge_task_vectors`.
    scale: λ.
    start: if the stack is a piece of a larger tensor, the index there of its
      first entry, (2,) uint32 from `draws.place_of`. The piece then keeps the
      same entries as the whole tensor would.
    lengths: (n, 2) for `match_l1` on a piece: the sum of `dare_lengths` over
      all pieces of the tensor. None takes the stack's.

  Returns:
    (...) in the stack's dtype; the same on any mesh.

  Raises:
    ValueError: no base, a density outside [0, 1], or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
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
  """Sums magnitudes of a piece of a tensor, for `dare`'s argument `lengths`.

  Args:
    stack: (n, ...) floating, a piece.
    weights: (n,), unused but checked.
    base: (...).
    key: as for `dare`, of the whole tensor.
    density: as for `dare`.
    start: as for `dare`, of the piece.
    **others: the other arguments of `dare`, ignored.

  Returns:
    (n, 2) float32, Σ |δ_i| and Σ |m_i δ_i| of each model.

  Raises:
    ValueError: as `dare`.

  Example:
    >>> import jax.numpy as jnp
    >>> dare_lengths(jnp.full((1, 2), 3.0), [1.0], jnp.ones(2), density=1.0)
    Array([[4., 4.]], dtype=float32)
  """
  del others
  given = read_inputs("dare", stack, weights, base, needs_base=True)
  keep = functools.partial(at_random, rescale=unscaled, start=start)
  found = thin_out(given, keep, density, key)
  lengths = [lengths_of(*pair) for pair in found]
  return library_of(*lengths).stack(lengths)


def della(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  density: Any,
  epsilon: Any = 0.15,
  axis: int = -1,
  rescale: Rescaling = inverse_keep,
  elect: Election | None = by_mass,
  normalize: bool = True,
  scale: Any = 1.0,
  ranks: Any = None,
) -> Any:
  """Averages changes by sign after dropping small entries at random (DELLA).

      τ_i = m_i δ_i / p_i,   m_i ~ Bernoulli(p_i)

  p_i grows from density - ε to density + ε with the entry's rank by magnitude
  in its row. With `elect=None, normalize=False` this is mergekit's
  `della_linear`, a sum.

  Args:
    stack: (n, ...) floating.
    weights: (n,).
    base: (...).
    key: as for `dare`.
    density: mean probability to keep an entry, one for all or (n,); 1 keeps
      all.
    epsilon: ε, one for all or (n,); density ± ε must lie within 0 and 1.
    axis: of a single model, along which entries are ranked.
    rescale: as for `dare`.
    elect: as for `dare`.
    normalize: as for `merge_task_vectors`.
    scale: λ.
    ranks: (n, ...) integers, each entry's rank by magnitude among those of its
      row, if it is known; None sorts.

  Returns:
    (...) in the stack's dtype. Sorts along `axis`, which is gathered if it is
    sharded.

  Raises:
    ValueError: no base, a density within ε of 0 or 1, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
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
    sparsify=[
      functools.partial(
        by_magnitude_rank, epsilon=own, axis=axis, rescale=rescale, ranks=rank
      )
      for own, rank in zip(
        numbers("epsilon", epsilon, len(stack)),
        [None] * len(stack) if ranks is None else ranks,
        strict=True,
      )
    ],
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
  gamma: Any = 0.01,
  rescale: Rescaling = unscaled,
  elect: Election | None = None,
  normalize: bool = False,
  scale: Any = 1.0,
) -> Any:
  """Adds changes to the base without their largest and smallest entries.

      θ = θ_0 + λ Σ w_i m_i δ_i,   m_i: neither outliers nor the smallest

  With `elect=by_mass` this is mergekit's `breadcrumbs_ties`.

  Args:
    stack: (n, ...) floating.
    weights: (n,).
    base: (...).
    key: unused.
    density: share of the entries kept, one for all or (n,); 1 keeps all.
    gamma: share of the largest entries, which are dropped as outliers, one for
      all or (n,); no more are dropped than `density` leaves.
    rescale: `unscaled` as in the paper, or `match_l1`.
    elect: as for `dare`.
    normalize: as for `merge_task_vectors`.
    scale: λ.

  Returns:
    (...) in the stack's dtype. Under sharding only counts move between devices.

  Raises:
    ValueError: no base, a density or γ outside [0, 1], or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[5.0, -4.0, 3.0, 2.0, 1.0]])
    >>> breadcrumbs(stack, [1.0], jnp.zeros(5), density=0.6, gamma=0.2)
    Array([ 0., -4.,  3.,  2.,  0.], dtype=float32)

  References:
    Davari and Belilovsky (2023).
  """
  given = read_inputs("breadcrumbs", stack, weights, base, needs_base=True)
  check_range(density)
  check_range(gamma, name="gamma")
  merged = merge_task_vectors(
    given,
    sparsify=[
      functools.partial(keep_middle, gamma=own, rescale=rescale)
      for own in numbers("gamma", gamma, len(stack))
    ],
    amounts=density,
    elect=elect,
    normalize=normalize,
    scale=scale,
    key=key,
  )
  return merged.astype(stack.dtype)
