# SPDX-License-Identifier: Apache-2.0
"""Merges task vectors: task arithmetic, TIES, SCE, and what they are made of.

A task vector is a model's change of the base, δ_i = θ_i - θ_0, computed in
float32 for any dtype of the models. An election returns the sign of each entry
of the merge, from the weighted changes of all models.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from jlora.merging.arrays.inputs import (
  Inputs,
  along_models,
  divided,
  inner,
  numbers,
  over_models,
  read_inputs,
)
from jlora.merging.arrays.sparsifiers import (
  Rescaling,
  Sparsifier,
  by_magnitude,
  check_range,
  from_threshold,
  unscaled,
)
from jlora.numerics.backends import batched, library_of, single
from jlora.numerics.kth_largest import count_of, kth_magnitude
from jlora.numerics.meshes import run_automatic
from jlora.numerics.threefry import fold_in, seed_words

Election = Callable[[Any], Any]


def by_mass(weighted: Any) -> Any:
  """Elects the sign of each entry's sum over models, as TIES does.

  Where the sum is 0, takes the sign that most entries of the tensor have. (The
  paper counts the entries of the whole model.)

  Args:
    weighted: (n, ...) float32.

  Returns:
    (...) float32, +1 or -1, NaN where the sum is NaN.

  Example:
    >>> import jax.numpy as jnp
    >>> by_mass(jnp.array([[2.0, -1.0, 1.0], [-1.0, -1.0, -1.0]]))
    Array([ 1., -1.,  1.], dtype=float32)

  References:
    TIES (Yadav et al., 2023).
  """
  xp = library_of(weighted)
  sign = xp.sign(over_models(weighted))
  majority = xp.where(xp.nansum(sign) >= 0, xp.float32(1), -1)
  return xp.where(sign == 0, majority, sign)


def by_mass_or_plus(weighted: Any) -> Any:
  """Elects the sign of each entry's sum over models, + for 0, as mergekit does.

  Example:
    >>> import jax.numpy as jnp
    >>> by_mass_or_plus(jnp.array([[2.0, -1.0], [-2.0, -1.0]]))
    Array([ 1., -1.], dtype=float32)
  """
  xp = library_of(weighted)
  return xp.where(over_models(weighted) >= 0, xp.float32(1), -1)


def by_count(weighted: Any) -> Any:
  """Elects the sign that most models have, + on a tie; mergekit's "count".

  Example:
    >>> import jax.numpy as jnp
    >>> by_count(jnp.array([[9.0], [-1.0], [-1.0]]))
    Array([-1.], dtype=float32)
  """
  return by_mass_or_plus(library_of(weighted).sign(weighted))


def combine(
  deltas: Any,
  weights: Any,
  *,
  elect: Election | None = None,
  normalize: bool = False,
) -> Any:
  """Adds or averages the changes that have each entry's elected sign.

      δ = Σ w_i δ_i   ( / Σ w_i )                         without an election
      δ = Σ_{i agrees} w_i δ_i   ( / Σ_{i agrees} |w_i| )   with one

  A model agrees at entries where w_i δ_i has the elected sign. It does not
  agree where that is 0, so a mean leaves out models that do not change an
  entry.

  Args:
    deltas: (n, ...) float32, or a list of n arrays, to save a copy.
    weights: (n,) float32.
    elect: elects the signs; with None all models agree.
    normalize: divide, unless by 0. Without an election this is the weighted
      mean. With one the mean of the changes w_i δ_i that agree has their sign,
      which a divisor Σ w_i (mergekit's) would turn around where it is negative.

  Returns:
    (...) float32. NaN always agrees.

  Example:
    >>> import jax.numpy as jnp
    >>> deltas = jnp.array([[2.0, -1.0], [1.0, 3.0]])
    >>> combine(deltas, jnp.ones(2), elect=by_mass, normalize=True)
    Array([1.5, 3. ], dtype=float32)
  """
  weighted = [weights[i] * deltas[i] for i in range(len(deltas))]
  xp = library_of(*weighted)
  sign = None if elect is None else elect(xp.stack(weighted))
  kept, counted = [], []
  for at, one in enumerate(weighted):
    agrees = xp.ones(one.shape, bool) if sign is None else xp.sign(one) == sign
    kept.append(xp.where(agrees | xp.isnan(one), one, 0.0))
    size = weights[at] if sign is None else xp.abs(weights[at])
    counted.append(xp.where(agrees, size, 0.0))
  total = over_models(kept)
  return divided(total, over_models(counted)) if normalize else total


def merge_task_vectors(
  given: Inputs,
  *,
  sparsify: Sparsifier | Sequence[Sparsifier] | None = None,
  amounts: Any = 1.0,
  elect: Election | None = None,
  normalize: bool = False,
  scale: Any = 1.0,
  key: Any = None,
) -> Any:
  """Sparsifies changes, combines them by sign, and adds them to the base.

      θ = θ_0 + λ combine(τ_1 ... τ_n),   τ_i = sparsify(θ_i - θ_0)

  Task arithmetic, TIES, DARE, DELLA and Breadcrumbs are settings of this.

  Args:
    given: from `read_inputs`.
    sparsify: `(delta, amount, key) -> delta`, one for all models or one each;
      None keeps all entries.
    amounts: the sparsifier's second argument, one for all models or (n,).
    elect: `(n, ...) -> (...)`, elects each entry's sign from the weighted
      changes; models of the other sign, or 0, are left out. None takes all.
    normalize: divide, unless by 0: by Σ w_i, or with an election by Σ |w_i| of
      the models that agree with the sign.
    scale: λ.
    key: PRNG key; None is `key(0)`. Model i uses `fold_in(key, i)`, so adding a
      model does not change the masks of the others.

  Returns:
    (...) float32.

  Example:
    >>> import jax.numpy as jnp
    >>> from jlora.merging import read_inputs
    >>> stack, base = jnp.array([[3.0, 1.0]]), jnp.ones(2)
    >>> given = read_inputs("mine", stack, [1.0], base)
    >>> merge_task_vectors(given, scale=2.0)
    Array([5., 1.], dtype=float32)
  """
  if sparsify is None:
    deltas = given.deltas
  else:
    thinned = thin_out(given, sparsify, amounts, key)
    deltas = [kept for _, kept in thinned]
  change = combine(deltas, given.weights, elect=elect, normalize=normalize)
  return given.base + single(scale, change) * change


def thin_out(
  given: Inputs,
  sparsify: Sparsifier | Sequence[Sparsifier],
  amounts: Any,
  key: Any = None,
) -> list[tuple[Any, Any]]:
  """Returns each model's change, and what the sparsifier keeps of it.

  Runs model by model, because `vmap` would need all models' memory at once. The
  arguments are those of `merge_task_vectors`.

  Returns:
    n pairs (...) and (...) float32.

  Raises:
    ValueError: not one amount per model, or one that is not finite (unless
      traced).

  Example:
    >>> import jax.numpy as jnp
    >>> stack, base = jnp.array([[3.0, 1.0]]), jnp.ones(2)
    >>> given = read_inputs("mine", stack, [1.0], base)
    >>> thin_out(given, from_threshold, 1.0)
    [(Array([2., 0.], dtype=float32), Array([2., 0.], dtype=float32))]
  """
  count = len(given.models)
  key = seed_words(0) if key is None else key
  amounts = numbers("density", amounts, count)
  each = [sparsify] * count if callable(sparsify) else sparsify
  found = []
  for at, sparsify_one in enumerate(each):
    delta = given.models[at] - given.base
    kept = run_automatic(
      sparsify_one,
      (delta, amounts[at], fold_in(key, at)),
      lambda x, *_: PartitionSpec(*x),
    )
    found.append((delta, kept))
  return found


def task_arithmetic(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  normalize: bool = False,
  scale: Any = 1.0,
) -> Any:
  """Adds the weighted sum of changes to the base.

      θ = θ_0 + λ Σ w_i (θ_i - θ_0)

  Args:
    stack: (n, ...) floating.
    weights: (n,); a negative one subtracts what a model learnt.
    base: (...).
    key: unused.
    normalize: divide by Σ w_i, unless that is 0.
    scale: λ.

  Returns:
    (...) in the stack's dtype. Elementwise: keeps the sharding.

  Raises:
    ValueError: no base, or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[3.0], [0.0]])
    >>> task_arithmetic(stack, jnp.ones(2), jnp.ones(1))
    Array([2.], dtype=float32)

  References:
    Ilharco et al. (2023).
  """
  given = read_inputs("task_arithmetic", stack, weights, base, needs_base=True)
  merged = merge_task_vectors(given, normalize=normalize, scale=scale, key=key)
  return merged.astype(stack.dtype)


def ties(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  density: Any = 0.2,
  threshold: Any = None,
  elect: Election = by_mass,
  normalize: bool = True,
  rescale: Rescaling = unscaled,
  scale: Any = 1.0,
) -> Any:
  """Averages the large changes that agree in sign (TIES: trim, elect, merge).

      θ = θ_0 + λ Σ_{i agrees} w_i τ_i / Σ_{i agrees} |w_i|

  τ_i keeps the largest entries of δ_i. A model agrees where w_i τ_i has the
  elected sign, that of Σ w_i τ_i.

  Args:
    stack: (n, ...) floating.
    weights: (n,); the paper uses ones.
    base: (...).
    key: unused.
    density: share of the entries kept, one for all or (n,); 0.2 is the paper's.
    threshold: magnitudes from which entries are kept, one for all or (n,),
      instead of the density. The paper trims a model as a whole, mergekit and
      PEFT each tensor; for the paper's way use `magnitude_thresholds`, or
      `trim_models` for checkpoints on disk.
    elect: `by_mass` as in the paper, `by_mass_or_plus` or `by_count` as in
      mergekit.
    normalize: False gives the sum.
    rescale: of what the trim keeps: `unscaled` as in the paper, or `match_l1`.
    scale: λ; 1 in the paper, which also searches 0.8 to 2.5.

  Returns:
    (...) in the stack's dtype. Under sharding only counts move between devices.

  Raises:
    ValueError: no base, a density outside [0, 1], or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[2.0, -1, 0.5, 0], [1.0, 3, -0.2, 0.4]])
    >>> ties(stack, jnp.ones(2), jnp.zeros(4), density=0.5)
    Array([1.5, 3. , 0. , 0. ], dtype=float32)

  References:
    Yadav et al. (2023), prateeky2806/ties-merging.
  """
  given = read_inputs("ties", stack, weights, base, needs_base=True)
  check_range(density)
  sparsify = by_magnitude if threshold is None else from_threshold
  merged = merge_task_vectors(
    given,
    sparsify=functools.partial(sparsify, rescale=rescale),
    amounts=density if threshold is None else threshold,
    elect=elect,
    normalize=normalize,
    scale=scale,
    key=key,
  )
  return merged.astype(stack.dtype)


def sce(
  stack: Any,
  weights: Any,
  base: Any = None,
  *,
  key: Any = None,
  density: Any = 1.0,
  scale: Any = 1.0,
) -> Any:
  """Averages changes at the entries where models differ most (SCE).

      θ = θ_0 + λ Σ_{i agrees} s_i τ_i / Σ_{i agrees} |s_i|,   s_i = w_i ‖τ_i‖²

  Select: τ_i keeps the entries whose variance over the models is largest.
  Calculate: s_i weighs the models. Erase: models do not count where τ_i lacks
  the sign of Σ w_i τ_i.

  Args:
    stack: (n, ...) floating.
    weights: (n,), multiply the strengths; the paper uses ones.
    base: (...).
    key: unused.
    density: share of the entries selected, mergekit's `select_topk`.
    scale: λ.

  Returns:
    (...) in the stack's dtype; the base where no model changes anything. Under
    sharding only counts and sums move between devices.

  Raises:
    ValueError: no base, a density outside [0, 1], or as `read_inputs`.

  Example:
    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[2.0, -1, 0.5, 0], [1.0, 3, -0.2, 0.4]])
    >>> sce(stack, jnp.ones(2), jnp.zeros(4), density=0.5).round(4)
    Array([1.3333, 3.    , 0.    , 0.    ], dtype=float32)

  References:
    FuseChat (Wan et al., 2024).
  """
  del key
  given = read_inputs("sce", stack, weights, base, needs_base=True)
  check_range(density)
  deltas = given.deltas
  mean = over_models(deltas) / len(deltas)
  spread = over_models((deltas - mean[None]) ** 2) / len(deltas)
  # Compilers compute it anew to compare it, and may round it otherwise.
  least = kth_magnitude(spread, count_of(single(density, spread), spread.size))
  xp = library_of(spread, least)
  least = least * xp.float32(1 - 2**-21)
  selected = (spread >= least) | xp.isnan(spread)
  taken = xp.where(selected[None], deltas, 0.0)
  strengths = batched(inner)(taken, taken).reshape(-1) / spread.size
  votes = along_models(given.weights, taken) * taken
  change = combine(
    taken,
    given.weights * strengths,
    elect=lambda _: by_mass(votes),
    normalize=True,
  )
  return (given.base + single(scale, change) * change).astype(stack.dtype)
