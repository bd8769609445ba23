# SPDX-License-Identifier: Apache-2.0
"""The types Lora, Loras and Factors, and functions that check and convert them.

The rank axis comes first in both factors. A Lora is `r` units: unit i reads the
layer's input with row a_i and writes row b_i. To concatenate, truncate, sort or
gate units is one operation on axis -2 of both factors.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.messages import name_some
from jlora.numerics.backends import library_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Lora:
  """A low-rank change of one parameter, `scale * aᵀ b`, of shape (in, out).

  The three fields are leaves of a pytree: `jit`, `grad`, `vmap`, optax and
  orbax take a Lora as it is, and a new scale never recompiles.

  Attributes:
    a: (..., r, in). Leading axes are scanned layers, experts or adapters.
    b: (..., r, out).
    scale: (...), float32.

  Example:
    >>> lora = Lora(jnp.ones((2, 3)), jnp.ones((2, 5)), jnp.float32(0.5))
    >>> lora.rank, dense(lora).shape
    (2, (3, 5))
  """

  a: jax.Array
  b: jax.Array
  scale: jax.Array

  @property
  def rank(self) -> int:
    """Returns the length of the rank axis."""
    return self.a.shape[-2]

  @property
  def nbytes(self) -> int:
    """Returns the bytes of the stored factors; the scale is not counted."""
    return self.a.nbytes + self.b.nbytes


Loras = dict[str, Lora]


class Factors(NamedTuple):
  """A truncated singular value decomposition, `u diag(s) vt`.

  Attributes:
    u: (..., m, r) orthonormal columns.
    s: (..., r) descending, not negative.
    vt: (..., r, n) orthonormal rows.
  """

  u: jax.Array
  s: jax.Array
  vt: jax.Array


def exchange(lora: Lora) -> Lora:
  """Returns the Lora of the transposed change, with a and b swapped.

  Args:
    lora: a (..., r, in), b (..., r, out).

  Returns:
    Lora with a (..., r, out), b (..., r, in); nothing is computed.

  Example:
    >>> exchange(Lora(jnp.ones((2, 3)), jnp.ones((2, 5)), 1.0)).a.shape
    (2, 5)
  """
  return Lora(lora.b, lora.a, lora.scale)


def from_factors(factors: Factors, dtype=jnp.float32) -> Lora:
  """Turns a decomposition into a Lora: `a = √s uᵀ`, `b = √s vt`, scale 1.

  Both factors then have the same norm, and `a aᵀ = b bᵀ = diag(s)`. So rounding
  to a storage dtype hurts neither more than the other.

  Args:
    factors: u (..., m, r), s (..., r), vt (..., r, n) of a change (in, out).
    dtype: storage dtype of a and b; rounding happens here, once.

  Returns:
    Lora with a (..., r, m), b (..., r, n) of `dtype`, scale (...) float32.

  Example:
    >>> f = Factors(jnp.eye(3)[:, :1], jnp.array([4.0]), jnp.eye(2)[:1])
    >>> from_factors(f).a
    Array([[2., 0., 0.]], dtype=float32)
  """
  xp = library_of(factors.s)
  root = xp.sqrt(factors.s)[..., None]
  a = root * xp.swapaxes(factors.u, -1, -2)
  b = root * factors.vt
  scale = xp.ones(factors.s.shape[:-1], np.float32)
  return Lora(a.astype(dtype), b.astype(dtype), scale)


def dense(lora: Lora) -> jax.Array:
  """Multiplies a Lora out: the float32 matrix `scale * aᵀ b`.

  Args:
    lora: a (..., r, in), b (..., r, out), scale (...).

  Returns:
    (..., in, out) float32. Costs `2 r in out` operations and the whole matrix
    in memory; sharding follows a's last axis and b's last axis.

  Example:
    >>> dense(Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.float32(3)))
    Array([[3., 3.],
           [3., 3.]], dtype=float32)
  """
  product = jnp.einsum(
    "...ri,...ro->...io",
    lora.a.astype(jnp.float32),
    lora.b.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return lora.scale[..., None, None].astype(jnp.float32) * product


def check_loras(loras: Mapping[str, Lora]) -> None:
  """Raises unless all are Loras and well formed.

  Args:
    loras: path -> Lora.

  Raises:
    ValueError: another kind of program, a and b that differ in rank or leading
      axes, or a scale that does not have the leading axes. Names up to three
      offenders and counts the rest.

  Example:
    >>> check_loras({"w": Lora(jnp.ones((2, 3)), jnp.ones((1, 5)),
    ...                        jnp.float32(1))})
    Traceback (most recent call last):
    ...
    ValueError: 1 malformed Lora: w: a (2, 3), b (1, 5), scale (). Needed: a
    (..., r, in), b (..., r, out), scale (...).
  """
  others = [
    f"{path}: {type(lora).__name__}"
    for path, lora in loras.items()
    if not isinstance(lora, Lora)
  ]
  if others:
    raise ValueError(
      f"{len(others)} programs are no Loras: {name_some(others)}; only a Lora "
      "can be used here, so leave the others out."
    )
  wrong = [
    f"{path}: a {lora.a.shape}, b {lora.b.shape}, scale {lora.scale.shape}"
    for path, lora in loras.items()
    if lora.a.ndim < 2
    or lora.a.shape[:-1] != lora.b.shape[:-1]
    or lora.scale.shape != lora.a.shape[:-2]
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} malformed Lora{'s' * (len(wrong) > 1)}: "
      f"{name_some(wrong)}. Needed: a (..., r, in), b (..., r, out), "
      "scale (...)."
    )


def to_in_rank(lora: Lora) -> tuple[jax.Array, jax.Array]:
  """Returns the factors as nnx.LoRA, qwix and gemma keep them, the scale in b.

  Args:
    lora: a (..., r, in), b (..., r, out).

  Returns:
    (..., in, r) and (..., r, out), so that the change is `a @ b`.

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(2))
    >>> [factor.shape for factor in to_in_rank(lora)]
    [(3, 1), (1, 2)]
  """
  b = lora.scale[..., None, None] * lora.b.astype(jnp.float32)
  return jnp.swapaxes(lora.a, -1, -2), b.astype(lora.b.dtype)


def from_in_rank(a: jax.Array, b: jax.Array, scale: float = 1.0) -> Lora:
  """Makes a Lora from factors kept as (in, r) and (r, out).

  Args:
    a: (..., in, r).
    b: (..., r, out).
    scale: the factor that the other library applies, such as qwix's
      alpha / rank.

  Returns:
    Lora with a (..., r, in), b as given, scale (...) float32.

  Example:
    >>> from_in_rank(jnp.ones((3, 1)), jnp.ones((1, 2))).a.shape
    (1, 3)
  """
  return Lora(jnp.swapaxes(a, -1, -2), b, jnp.full(a.shape[:-2], scale, "f4"))
