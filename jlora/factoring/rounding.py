# SPDX-License-Identifier: Apache-2.0
"""Estimating what a finetune learnt before its checkpoint was rounded.

An update under half an ulp (the step of the stored format at that weight)
leaves no trace. Small weights have small ulps. They show how large updates
were, and so also how large those were that left no trace in the weights beside
them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.factoring.deltas import difference
from jlora.numerics.backends import library_of

# Bins: one for each of the 31 largest exponents, and one for all below.
_BINS = 32
# Of a NumPy array this many entries are read, in runs of neighbours: to read
# one entry of a piece of memory costs as much as to read all of it.
_LOOKED_AT, _RUN = 2**18, 64
# Fewer weights than this do not tell what was learnt.
_LEAST = 50


class Learnt(NamedTuple):
  """Estimates of what was learnt, and of what rounding took or added.

  Attributes:
    norm: Frobenius norm of the change before it was rounded; None where it
      cannot be identified.
    rounding_share: squared norm of what rounding did to the change, over the
      squared norm of the change, in [0, 1]; rather too high than too low. 1
      where nearly all was lost. None where `norm` is None.
  """

  norm: float | None
  rounding_share: float | None


def ulp_histogram(base: Any, finetuned: Any, dtype: Any) -> Any:
  """Sums squared changes of weights by the ulp the weights are stored with.

      ulp(w) = 2^(⌊log2 |w|⌋ - mantissa bits),   w of the base

  Args:
    base: any shape, any floating dtype, of NumPy or of JAX.
    finetuned: the same shape.
    dtype: of the finetune's file.

  Returns:
    (3, 32) float32: ulp²; how many weights have it; the sum of their squared
    changes. There is a column for each exponent, the largest first. The last
    column, of ulp 0, is for weights that are zero or from about 2^-31 of the
    largest down. Of a NumPy array up to 2^18 entries are sampled, in evenly
    spaced runs. Of a JAX array all are read, once for each column, and not
    gathered.

  Example:
    >>> w = np.array([1.0, 1.5, 3.0], np.float32)
    >>> ulp2, count, changed = ulp_histogram(w, w + 1, np.float32)
    >>> count[:3].tolist(), changed[:3].tolist()
    ([1.0, 2.0, 0.0], [1.0, 2.0, 0.0])
    >>> float(ulp2[1]) == 2.0**-46
    True
  """
  nmant = jnp.finfo(dtype).nmant
  if library_of(base) is jnp or library_of(finetuned) is jnp:
    one, two = jnp.asarray(base), jnp.asarray(finetuned)
    return _compiled_histogram(
      one.astype(jnp.float32), jnp.square(difference(one, two)), nmant
    )
  sampled = [_sample(x) for x in (base, finetuned)]
  with np.errstate(invalid="ignore", over="ignore"):  # the caller reports them
    exponents = _exponents(sampled[0].astype(np.float32))
    changed = np.square(difference(*sampled))
  counts = np.bincount(exponents, minlength=256)
  sums = np.bincount(exponents, changed, minlength=256)
  top = np.max(np.flatnonzero(counts), initial=1)
  columns = top - np.arange(_BINS - 1)
  known = np.where(columns > 0, columns, 0)
  found = np.zeros((3, _BINS), np.float32)
  with np.errstate(over="ignore"):
    found[0, :-1] = np.where(columns > 0, _squared_ulp(known, nmant, np), 0)
  for row, values in ((1, counts), (2, sums)):
    found[row, :-1] = np.where(columns > 0, values[known], 0)
    found[row, -1] = values[: max(columns[-1], 1)].sum()
  return found


def learnt_of(histogram: np.ndarray, norm: float) -> Learnt:
  """Estimates what a finetune learnt from its changes by ulp.

      fine:    the ulps u up to which the mean squared change is at least u²
      m      = Σ_fine (Σ d² - count u² / 12) / Σ_fine count
      norm²  = Σ_fine (Σ d² - count u² / 12) + m Σ_coarse count
      lost²  = Σ count min(u² / 12, m)

  Weights with a fine ulp keep their changes d; the noise of rounding is
  subtracted from these. Weights with a coarse ulp have lost their changes; they
  are assumed to have had the same mean square.

  Args:
    histogram: from `ulp_histogram`, on the host.
    norm: Frobenius norm of the stored change; the histogram is scaled to it.

  Returns:
    Learnt. Its fields are None where fewer than 50 weights are fine: if every
    update is under half an ulp, or small and in proportion to its weight.

  Approximation: three assumptions. Updates do not depend on the size of the
  weight. There was one rounding: the finetune began at the stored base, ran in
  a finer format, and was rounded at the end. A rounding error is uniform where
  updates exceed the ulp.

  Measured on 512 x 512 weights, normal or t, with updates of 0.01 to 10 ulps,
  normal, Laplace, t with 3 degrees of freedom, of rank 1 and 4, 90% zero by
  entry and by row: the norm is 0.88 to 1.06 of the truth, 0.93 to 1.05 from
  0.05 ulps on. The share is 1.0 to 1.6 times the truth for normal updates, the
  most at half an ulp. For other updates it is too high, up to ten times where
  nine in ten weights did not change.

  For the matrices of a finetune of SmolLM2, both sides rounded to bfloat16 and
  half of the entries then unchanged, norms are 0.99 to 1.03 of the truth; those
  of the stored changes are 1.08 to 1.34. (Where the base too was rounded from
  finer weights, as there, the share is two to three times too low.)

  In training in bfloat16 without a finer copy, each step loses its update, on
  fine weights too. The norm is then 0.5 to 1.1 of that of the sum of random
  steps, and 0.1 to 0.5 of that of 100 or 1000 steps that agree.

  Example:
    >>> u2, count = np.array([1.0, 0.01]), np.array([900.0, 100.0])
    >>> changed = np.array([0.0, 4.0])  # 0.2² each, where that can be seen
    >>> found = learnt_of(np.stack([u2, count, changed]), 2.0)
    >>> round(found.norm, 2), round(found.rounding_share, 2)
    (6.26, 0.9)
    >>> learnt_of(np.stack([u2, count, 0 * changed]), 0.0).norm is None
    True
  """
  ulp2, count, changed = np.asarray(histogram, np.float64)
  total = changed.sum()
  exact = float(changed[ulp2 == 0].sum())
  ulp2, count, changed = (x[ulp2 > 0][::-1] for x in (ulp2, count, changed))
  if not count.any():  # nothing was rounded
    return Learnt(norm, 0.0)
  seen, held = np.cumsum(count), np.cumsum(changed)
  left = held - np.cumsum(count * ulp2) / 12
  fine = np.flatnonzero((held >= seen * ulp2) & (seen >= _LEAST))
  if not fine.size or not total:
    return Learnt(None, None)
  last = fine[-1]
  mean = left[last] / seen[last]
  learnt2 = exact + left[last] + mean * (seen[-1] - seen[last])
  lost2 = np.sum(count * np.minimum(ulp2 / 12, mean))
  return Learnt(
    norm * math.sqrt(learnt2 / total), min(float(lost2 / learnt2), 1.0)
  )


def _sample(x: np.ndarray) -> np.ndarray:
  """Takes up to `_LOOKED_AT` entries of an array, in evenly spaced runs."""
  flat = x.reshape(-1)
  if flat.size > _LOOKED_AT:
    step = -(-flat.size * _RUN // _LOOKED_AT)
    while math.gcd(step, flat.size) > 1:  # else runs keep to the same columns
      step += 1
    runs = flat.size // step
    flat = flat[: runs * step].reshape(runs, step)[:, :_RUN].reshape(-1)
  return flat


def _exponents(x: Any) -> Any:
  """Returns the eight exponent bits of float32 numbers; 0 for zero."""
  return (x.view(np.uint32) >> np.uint32(23)) & np.uint32(255)


def _squared_ulp(exponents: Any, nmant: int, xp: Any) -> Any:
  """Returns the squared ulp of weights with these exponent bits."""
  return xp.ldexp(xp.float32(1), 2 * (exponents - 127 - nmant))


def _total(x: Any) -> Any:
  """Sums an array, rows first."""
  return jnp.sum(jnp.sum(x, axis=-1) if x.ndim else x)


def _compiled_histogram(base: Any, changed: Any, nmant: int) -> Any:
  """Computes the histogram in JAX by masked sums; only scalars are gathered.

  Of a base in float32 and the squares of its changes.
  """
  exponents = _exponents(base).astype(jnp.int32)
  top = jnp.maximum(jnp.max(exponents), 1)
  columns = top - jnp.arange(_BINS - 1)

  def sums(column):
    """Returns how many weights a column has and the sum of squared changes."""
    # The last column holds all weights below the others.
    here = jnp.where(
      column > 0, exponents == column, exponents < jnp.maximum(columns[-1], 1)
    ).astype(jnp.float32)
    # By rows first: rounding then grows with the sides, not the area.
    return jnp.stack([_total(here), _total(here * changed)])

  found = jax.lax.map(sums, jnp.append(columns, 0))
  found = found.at[:-1].multiply((columns > 0).astype(jnp.float32)[:, None])
  ulp2 = jnp.where(columns > 0, _squared_ulp(columns, nmant, jnp), 0.0)
  return jnp.concatenate([jnp.append(ulp2, 0.0)[None], found.T])
