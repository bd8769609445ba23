# SPDX-License-Identifier: Apache-2.0
"""One parameter's step: its change, factored, rounded and certified.

Arrays in, arrays out: of NumPy, compiled, or sharded over a mesh.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from jlora.arrays import library_of
from jlora.certificates import certificate
from jlora.deltas import survey
from jlora.factoring import Factoriser
from jlora.loras import Factors, exchange, from_factors
from jlora.measurements import Measured
from jlora.rounding import ulp_histogram
from jlora.views import MatrixView, in_stored_order


def measure_parameter(
  base: Any,
  finetuned: Any,
  key: Any,
  *,
  view: MatrixView,
  rank: int,
  factor: Factoriser,
  dtype: Any,
  stored: Any,
  room: np.ndarray | None = None,
) -> Measured:
  """One parameter's change, factored, rounded to storage and certified.

  Args:
    base: the parameter, any floating dtype, its own layout; of NumPy or of
      JAX, as its result.
    finetuned: the same shape.
    key: PRNG key of the module; for NumPy, words of one.
    view: how the layout is read as a matrix; static, as all below.
    rank: triplets to keep.
    factor: the factoriser; given the `sums` of the delta if it takes them.
    dtype: storage dtype of the factors.
    stored: dtype of the finetune's file, for its rounding noise.
    room: as for `survey`, for NumPy alone.

  Returns:
    Measured, its norm NaN if the change is not finite. Pure; costs the
    factoriser and a certificate.

  Example:
    >>> from jlora.factoring import svd
    >>> w = np.zeros((3, 5), np.float32)
    >>> m = measure_parameter(w, w + 1, None, view=MatrixView(), rank=1,
    ...   factor=svd, dtype=np.float32, stored=np.float32)
    >>> m.certificate.errors.shape
    (2,)
  """
  delta, found = survey(base, finetuned, stored, room)
  delta, is_exchanged = in_stored_order(delta, view)
  xp = library_of(delta)
  # Of a batch the sums are of all matrices together, and of no use.
  known = {"sums": found.sums} if delta.ndim == 2 else {}
  given = known if _takes(factor, "sums") else {}
  factors = Factors(*map(xp.asarray, factor(delta, rank, key, **given)))
  lora = from_factors(factors, dtype)
  certified = certificate(delta, lora, key, **known)
  norm = xp.where(found.is_finite, certified.norm, np.nan)
  return Measured(
    lora=exchange(lora) if is_exchanged else lora,
    sigma=factors.s,
    certificate=certified._replace(norm=norm),
    base_norm=found.base_norm,
    noise_std=found.noise_std,
    unchanged=found.unchanged,
    ulps=ulp_histogram(base, finetuned, stored),
  )


def _takes(function: Callable[..., Any], name: str) -> bool:
  """Whether a function has a parameter of that name."""
  try:
    return name in inspect.signature(function).parameters
  except (TypeError, ValueError):  # some of C have no signature
    return False
