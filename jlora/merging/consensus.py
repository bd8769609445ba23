# SPDX-License-Identifier: Apache-2.0
"""Sign consensus: which changes of an entry count, and their sum or mean.

An election is a function of weighted changes (n, ...) that gives the sign (...)
which the entries of all models must have to count.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jlora.merging.inputs import divided, over_models

Election = Callable[[Any], Any]


def by_mass(weighted: Any) -> Any:
  """The sign of each entry's sum; where that is 0 the sign of the majority.

  The paper's election. Its majority is that of the whole model, here of the
  tensor: it decides only where changes cancel exactly.

  Args:
    weighted: (n, ...) float32.

  Returns:
    (...) float32, +1 or -1, NaN where the sum is.

  Example:
    >>> by_mass(jnp.array([[2.0, -1.0, 1.0], [-1.0, -1.0, -1.0]]))
    Array([ 1., -1.,  1.], dtype=float32)

  References:
    TIES (Yadav et al., 2023).
  """
  sign = jnp.sign(over_models(weighted))
  majority = jnp.where(jnp.nansum(sign) >= 0, 1.0, -1.0)
  return jnp.where(sign == 0, majority, sign)


def by_mass_or_plus(weighted: Any) -> Any:
  """The sign of each entry's sum; + where that is 0, as in mergekit.

  Args:
    weighted: (n, ...) float32.

  Returns:
    (...) float32, +1 or -1.

  Example:
    >>> by_mass_or_plus(jnp.array([[2.0, -1.0], [-2.0, -1.0]]))
    Array([ 1., -1.], dtype=float32)
  """
  return jnp.where(over_models(weighted) >= 0, jnp.float32(1), -1)


def by_count(weighted: Any) -> Any:
  """The sign that more models have, whatever their strength; + if as many.

  mergekit's "count".

  Args:
    weighted: (n, ...) float32.

  Returns:
    (...) float32, +1 or -1.

  Example:
    >>> by_count(jnp.array([[9.0], [-1.0], [-1.0]]))
    Array([-1.], dtype=float32)
  """
  return by_mass_or_plus(jnp.sign(weighted))


def combine(
  deltas: Any,
  weights: Any,
  *,
  elect: Election | None = None,
  normalize: bool = False,
) -> Any:
  """The weighted sum of changes, or mean, over those of the elected sign.

      δ = Σ_{i agrees} w_i δ_i   ( / Σ_{i agrees} |w_i| )

  A model agrees where w_i δ_i has the elected sign, so where it is 0 it does
  not: the mean is over those that say something.

  Args:
    deltas: (n, ...) float32, or n of (...), which are then held once.
    weights: (n,) float32.
    elect: which sign; None: all count.
    normalize: divides, where that is not by 0. Moduli, as a negative weight
      turns its change about and counts for it none the less; mergekit divides
      by Σ w_i, which then may vanish.

  Returns:
    (...) float32. What is NaN always agrees.

  Example:
    >>> deltas = jnp.array([[2.0, -1.0], [1.0, 3.0]])
    >>> combine(deltas, jnp.ones(2), elect=by_mass, normalize=True)
    Array([1.5, 3. ], dtype=float32)
  """
  weighted = [weights[i] * deltas[i] for i in range(len(deltas))]
  sign = None if elect is None else elect(jnp.stack(weighted))
  kept, counted = [], []
  for at, one in enumerate(weighted):
    agrees = (
      jnp.ones(one.shape, bool) if sign is None else jnp.sign(one) == sign
    )
    kept.append(jnp.where(agrees | jnp.isnan(one), one, 0.0))
    counted.append(jnp.where(agrees, jnp.abs(weights[at]), 0.0))
  total = over_models(kept)
  return divided(total, over_models(counted)) if normalize else total
