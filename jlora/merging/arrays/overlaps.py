# SPDX-License-Identifier: Apache-2.0
"""Merges by how many models change an entry: RAM, for sparse changes."""

from typing import Any

from jlora.merging.arrays.inputs import (
  along_models,
  divided,
  over_models,
  read_inputs,
)
from jlora.numerics.backends import library_of, single


def ram(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  epsilon: Any = 1e-5,
  strength: Any = 0.0,
  bound: Any = 0.2,
) -> Any:
  """Averages entries that several models change, adds those of one (RAM).

      θ = θ_0 + Σ_{alone} l_i w_i δ_i + Σ_{share} w_i δ_i / Σ_{share} |w_i|

  A model changes an entry where |δ_i| > ε; it is alone where no other model
  does. Training by reinforcement changes few entries, and each task others: a
  mean over all models would weaken them. l_i = 1 + r clip(ρ_i, 0, α), where ρ_i
  is how many entries model i shares over how many it has alone, makes up for
  what averaging takes from the shared ones.

  Args:
    stack: (n, ...) floating.
    weights: (n,); the paper uses ones. A negative one subtracts what a model
      changes, so that shared entries are divided by Σ |w_i|.
    base: (...).
    key: unused; there so that all methods have the same arguments.
    epsilon: ε, in the parameters' own units.
    strength: r; 0 is the paper's RAM, 0.1 its RAM+.
    bound: α.

  Returns:
    (...) in the stack's dtype. ρ is that of this tensor (the paper's is the
    whole model's). Under sharding only counts move between devices.

  Raises:
    ValueError: no base, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]])
    >>> ram(stack, [1.0, 1.0], jnp.zeros(3))
    Array([1., 3., 0.], dtype=float32)

  References:
    Yuan et al. (2026), Behavior Knowledge Merge in Reinforced Agentic Models.
  """
  del key
  given = read_inputs("ram", stack, weights, base, needs_base=True)
  epsilon, strength, bound = (
    single(x, given.models) for x in (epsilon, strength, bound)
  )
  xp, deltas = library_of(epsilon, strength, bound), given.deltas
  weights = along_models(given.weights, deltas)
  acts = (xp.abs(deltas) > epsilon) | xp.isnan(deltas)
  is_shared = over_models(acts.astype(xp.float32)) > 1
  shared, alone = acts & is_shared[None], acts & ~is_shared[None]
  ratio = divided(_counts(shared), _counts(alone))
  lift = along_models(1 + strength * xp.clip(ratio, 0, bound), deltas)
  added = over_models(xp.where(alone, lift * weights * deltas, 0.0))
  total = over_models(xp.where(shared, weights * deltas, 0.0))
  share = over_models(xp.where(shared, xp.abs(weights), 0.0))
  merged = given.base + added + divided(total, share)
  return merged.astype(stack.dtype)


def _counts(where: Any) -> Any:
  """Counts the true entries of each model, (n, ...) -> (n,)."""
  xp = library_of(where)
  rows = xp.sum(xp.atleast_2d(where.astype(xp.float32)), axis=-1)
  return xp.sum(rows.reshape(len(rows), -1), axis=-1)
