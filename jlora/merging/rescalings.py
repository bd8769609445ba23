# SPDX-License-Identifier: Apache-2.0
"""What makes up for the entries of a weight change that were dropped.

A rescaling is a function `(delta, kept, probability) -> kept`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jlora.merging.inputs import divided, inner

Rescaling = Callable[[Any, Any, Any], Any]


def inverse_keep(delta: Any, kept: Any, probability: Any) -> Any:
  """What was kept, divided by the probability of that: the mean is the delta.

  Args:
    delta: unused; there so that every rescaling has the same call.
    kept: (...) float32, delta with zeros.
    probability: broadcasts to it.

  Returns:
    As kept.

  Example:
    >>> inverse_keep(None, jnp.array([2.0, 0.0]), 0.5)
    Array([4., 0.], dtype=float32)

  References:
    DARE (Yu et al., 2024), and DELLA (Deep et al., 2024).
  """
  del delta
  return divided(kept, jnp.asarray(probability).astype(jnp.float32))


def match_l1(
  delta: Any, kept: Any, probability: Any = None, *, lengths: Any = None
) -> Any:
  """What was kept, scaled so that the sum of magnitudes is the delta's.

      kept · ‖delta‖₁ / ‖kept‖₁

  mergekit's way, of the whole tensor. What is left of it by chance keeps the
  strength of the whole: a tensor of few entries is not what it is on average.

  Args:
    delta: (...) float32.
    kept: (...) float32, delta with zeros.
    probability: unused.
    lengths: (2,) of `lengths_of`, for a piece of a tensor those of the whole;
      None takes delta's and kept's.

  Returns:
    As kept; zeros where nothing was kept.

  Example:
    >>> match_l1(jnp.array([2.0, 2.0]), jnp.array([2.0, 0.0]))
    Array([4., 0.], dtype=float32)
  """
  del probability
  whole, part = lengths_of(delta, kept) if lengths is None else lengths
  return kept * divided(whole, part)


def lengths_of(delta: Any, kept: Any) -> Any:
  """The sums of magnitudes that `match_l1` makes equal.

  Args:
    delta: (...) float32.
    kept: (...) float32.

  Returns:
    (2,) float32, delta's and kept's; those of pieces add up.

  Example:
    >>> lengths_of(jnp.array([2.0, -2.0]), jnp.array([2.0, 0.0]))
    Array([4., 2.], dtype=float32)
  """
  one = jnp.float32(1)
  found = [inner(jnp.abs(x), one).reshape(()) for x in (delta, kept)]
  return jnp.stack(found)


def unscaled(delta: Any, kept: Any, probability: Any = None) -> Any:
  """What was kept, as it is.

  Args:
    delta: unused.
    kept: (...).
    probability: unused.

  Returns:
    kept.

  Example:
    >>> unscaled(None, 3.0)
    3.0
  """
  del delta, probability
  return kept
