# SPDX-License-Identifier: Apache-2.0
"""How much the subspaces of two adapters have in common."""

from typing import Any

import numpy as np

from jlora.arrays import library_of
from jlora.factoring import recompress
from jlora.loras import Lora


def overlap(left: Lora, right: Lora) -> Any:
  """How much of one adapter's leading input directions lies in another's.

      φ(i, j) = ‖U_iᵀ U'_j‖² / min(i, j),   U_i the first i singular vectors

  1 where the smaller span lies within the larger, about max(i, j) / in for
  random ones. `overlap(exchange(left), exchange(right))` is that of what the
  adapters write.

  Approximation: the paper takes singular vectors of the factor A alone, which
  change when A and B are multiplied by a matrix and its inverse. These are of
  the change aᵀ b, which does not; at full rank the spans are the same.

  Args:
    left: a (..., r, in), b (..., r, out).
    right: a (..., r', in), b (..., r', out').

  Returns:
    (..., r, r') float32, entry [i-1, j-1] is φ(i, j). Costs a QR of each
    factor; nothing of the weight's size is formed. Units of no strength have
    arbitrary directions. NumPy's arrays are worked on by the host.

  Raises:
    ValueError: inputs of different size.

  Example:
    >>> a, b = np.eye(4)[:2] * np.array([[2.0], [1.0]]), np.eye(2)
    >>> lora = Lora(a, b, np.float32(1))
    >>> overlap(lora, lora).round(3)
    array([[1., 1.],
           [1., 1.]], dtype=float32)

  References:
    Hu et al. (2021), equation 4 and figure 3.
  """
  if left.a.shape[-1] != right.a.shape[-1]:
    raise ValueError(
      f"inputs differ: a {left.a.shape} and a {right.a.shape}; give adapters "
      "of one parameter."
    )
  u, v = (recompress(lora.a, lora.b, lora.rank).u for lora in (left, right))
  xp = library_of(u)
  squares = xp.square(xp.matmul(xp.swapaxes(u, -1, -2), v))
  sums = xp.cumsum(xp.cumsum(squares, axis=-2), axis=-1)
  i, j = (np.arange(1, x.shape[-1] + 1, dtype=np.float32) for x in (u, v))
  lower = np.minimum(i[:, None], j[None, :])
  return sums / xp.broadcast_to(lower, sums.shape)
