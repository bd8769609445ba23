# SPDX-License-Identifier: Apache-2.0
"""Small matrices, exactly and on the host: compiling would take longer.

The same figures as `measure_parameter` gives, from LAPACK's full decomposition
and sums in float64.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.certificates import Certificate
from jlora.loras import Lora
from jlora.measurements import Measured
from jlora.views import MatrixView, as_matrix

# A full decomposition takes about 20 operations per m² (m + n); under this many
# it is done in a tenth of a second, where a compilation takes seconds.
_OPERATIONS = 6 * 10**9


def is_small(shape: tuple[int, ...]) -> bool:
  """Whether a full decomposition on the host beats compiling anything.

  Args:
    shape: (..., in, out).

  Returns:
    bool; a function of the shape alone, so that which modules there are besides
    never changes a result.

  Example:
    >>> is_small((512, 512)), is_small((576, 1536))
    (True, False)
  """
  short, long = sorted(shape[-2:])
  return 20 * math.prod(shape[:-2]) * short**2 * (short + long) < _OPERATIONS


def measure_small(
  base: np.ndarray,
  finetuned: np.ndarray,
  *,
  view: MatrixView,
  rank: int,
  dtype: Any,
  stored: Any,
) -> Measured:
  """One parameter's change, factored exactly, rounded to storage and certified.

  Args:
    base: the parameter, any floating dtype, its own layout.
    finetuned: the same shape.
    view: how the layout is read as a matrix.
    rank: triplets to keep, at most min(in, out).
    dtype: storage dtype of the factors.
    stored: dtype of the finetune's file, for its rounding noise.

  Returns:
    Measured, of NumPy arrays, its norm NaN if the change is not finite. The
    certificate's floors are the best errors themselves.

  Example:
    >>> w = np.zeros((3, 5), np.float32)
    >>> m = measure_small(w, w + 1, view=MatrixView(), rank=1,
    ...                   dtype=np.float32, stored=np.float32)
    >>> m.sigma.round(4), m.certificate.errors.shape
    (array([3.873], dtype=float32), (2,))
  """
  left, right = base.astype(np.float32), finetuned.astype(np.float32)
  with np.errstate(invalid="ignore", over="ignore"):
    delta = as_matrix(right - left, view)
  is_finite = bool(np.isfinite(delta).all())
  delta = delta if is_finite else np.zeros_like(delta)
  u, s, vt = np.linalg.svd(delta, full_matrices=False)
  top = np.take_along_axis(u, np.abs(u).argmax(-2)[..., None, :], axis=-2)
  sign = np.where(top < 0, np.float32(-1), np.float32(1))
  root = np.sqrt(s[..., :rank, None])
  a = root * np.swapaxes(u * sign, -1, -2)[..., :rank, :]
  b = root * (vt * np.swapaxes(sign, -1, -2))[..., :rank, :]
  a, b = a.astype(dtype), b.astype(dtype)
  found = _certify(delta, a, b, s)
  return Measured(
    lora=Lora(a, b, np.ones(s.shape[:-1], np.float32)),  # type: ignore
    sigma=s[..., :rank],
    certificate=found
    if is_finite
    else found._replace(norm=found.norm * np.nan),
    base_norm=np.sqrt(np.sum(np.square(left.astype(np.float64)))),
    noise_std=_rounding_noise(right, stored),
  )


def _certify(delta, a, b, s) -> Certificate:
  """The certificate of stored factors, all singular values being known."""
  rank = a.shape[-2]
  delta, a, b, s = (x.astype(np.float64) for x in (delta, a, b, s))
  norm2 = np.sum(np.square(delta), axis=(-2, -1))
  inner = np.sum((b @ np.swapaxes(delta, -1, -2)) * a, axis=-1)
  overlaps = (a @ np.swapaxes(a, -1, -2)) * (b @ np.swapaxes(b, -1, -2))
  diagonal = np.diagonal(overlaps, axis1=-2, axis2=-1)
  added = 2 * np.tril(overlaps).sum(-1) - diagonal
  errors2 = norm2[..., None] + _from_zero(added - 2 * inner)
  best2 = np.cumsum(np.square(s)[..., ::-1], axis=-1)[..., ::-1]
  best2 = np.concatenate([best2, np.zeros_like(best2[..., :1])], axis=-1)
  norm = np.sqrt(norm2)
  # The values are float32's: a millionth of the norm lies between them and it.
  slack = 1e-6 * norm[..., None]
  floors = np.maximum(np.sqrt(best2[..., : rank + 1]) - slack, 0.0)
  projections = _from_zero(inner) / np.where(norm > 0, norm, 1.0)[..., None]
  return Certificate(
    norm=norm,
    mean_abs=np.mean(np.abs(delta), axis=(-2, -1)),
    errors=np.sqrt(np.maximum(errors2, 0.0)),
    changes=np.sqrt(np.maximum(_from_zero(added), 0.0)),  # pyright: ignore
    projections=projections,  # pyright: ignore
    floors=floors,
  )


def _from_zero(x):
  """Sums of the first 0..r entries of the last axis."""
  sums = np.cumsum(x, axis=-1)
  return np.concatenate([np.zeros_like(sums[..., :1]), sums], axis=-1)


def _rounding_noise(stored: np.ndarray, dtype: Any) -> float:
  """As `deltas.rounding_noise`, on the host."""
  bits = stored.view(np.uint32) & np.uint32(0x7F800000)
  ulp = (
    bits.view(np.float32).astype(np.float64) * 2.0 ** -jnp.finfo(dtype).nmant
  )
  return math.sqrt(float(np.mean(np.square(ulp))) / 12)
