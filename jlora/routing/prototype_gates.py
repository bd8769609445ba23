# SPDX-License-Identifier: Apache-2.0
"""Arrow: a library of Loras routed by what each reacts to, without training.

g = softmax over the largest of |x · p_n| / temperature
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jlora.factoring.factorisers import recompress
from jlora.loras import Lora, check_loras
from jlora.messages import name_some
from jlora.numerics.backends import library_of
from jlora.routing.choices import softmax_of_largest
from jlora.routing.mixtures import check_chosen

_ALIKE = 0.999  # ratio of singular values above which we warn


def prototypes(bank: Mapping[str, Lora]) -> dict[str, jax.Array]:
  """Computes for each adapter of a library the input to which it reacts most.

      scale_n a_nᵀ b_n = u diag(s) vᵀ,   p_n = the first column of u

  Args:
    bank: path -> Lora with a first axis of n adapters, as from `make_bank`.

  Returns:
    {path: (..., n, in)} float32, rows of length 1 whose sign means nothing;
    between are the axes of scanned layers or experts. Zero for an adapter that
    changes nothing there; NaN where its scale is 0, as `make_bank` has it for
    an adapter without the module: `arrow` gives it no share. Exact, from the
    factors alone: O((in + out) r²) each; units of padding do not matter. The
    same whatever basis (R a, R⁻ᵀ b) an adapter is kept in. Pure.

  Raises:
    ValueError: malformed Loras, or one without an axis of adapters.

  Warns:
    UserWarning: two largest singular values that are nearly equal, where any
      direction between theirs would do; not under jit.

  Example:
    >>> b = jnp.array([[[1.0], [3.0]]])
    >>> found = prototypes({"w": Lora(jnp.eye(2)[None], b, jnp.ones(1))})["w"]
    >>> [round(abs(float(x)), 4) for x in found[0]]
    [0.3162, 0.9487]

  References:
    Ostapenko et al. (2024), Towards Modular LLMs by Building and Reusing a
    Library of LoRAs (Arrow routing).
  """
  check_loras(bank)
  flat = [f"{path} {x.a.shape}" for path, x in bank.items() if x.a.ndim < 3]
  if flat:
    raise ValueError(
      f"{len(flat)} Loras hold no axis of adapters: {name_some(flat)}; make "
      "them one bank with make_bank."
    )
  found, alike = {}, []
  for path, lora in bank.items():
    found[path], ratio = _directions(lora)
    if not isinstance(ratio, Tracer) and np.max(ratio, initial=0) > _ALIKE:
      alike.append(f"{path} ({float(np.max(ratio)):.4f})")
  if alike:
    warnings.warn(
      f"{len(alike)} modules have adapters that react alike to two directions "
      f"(second over first singular value): {name_some(alike)}; the prototype "
      "is any direction between these.",
      stacklevel=2,
    )
  return found


def _directions(lora: Lora) -> tuple[Any, Any]:
  """Returns (..., n, in) directions, and s_2 / s_1 of each, 0 for rank 1."""
  xp = library_of(lora.a)
  factors = recompress(lora.a, lora.b, 2)
  first = factors.s[..., 0]
  changes = first > 0
  rows = xp.where(changes[..., None], factors.u[..., 0], np.float32(0))
  is_there = lora.scale != 0
  rows = xp.where(is_there[..., None], rows, np.float32(np.nan))
  if factors.s.shape[-1] > 1:
    second = factors.s[..., 1]
    ratio = xp.where(
      changes & is_there, second / xp.where(changes, first, 1), 0
    )
  else:
    ratio = xp.zeros_like(first)
  return xp.moveaxis(rows, 0, -2), ratio


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("prototypes",),
  meta_fields=("temperature", "chosen", "unit"),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Arrow:
  """The gate that `arrow` returns: a function of x, and a pytree.

  Attributes:
    prototypes: (n, in); NaN in rows of adapters that are not there.
    temperature: divides the logits; static.
    chosen: how many adapters each token takes; None is all; static.
    unit: logits are cosines; static.
  """

  prototypes: jax.Array
  temperature: float = 1.0
  chosen: int | None = None
  unit: bool = False

  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes gates (..., n) for x (..., in)."""
    x = x.astype(jnp.float32)
    rows = self.prototypes.astype(jnp.float32)
    is_there = ~jnp.isnan(rows).any(axis=-1)
    rows = jnp.where(is_there[:, None], rows, 0.0)
    if self.unit:
      x, rows = _unit(x), _unit(rows)
    products = jnp.einsum(
      "...i,ni->...n", x, rows, precision=lax.Precision.HIGHEST
    )
    logits = jnp.abs(products) / self.temperature
    there = jnp.broadcast_to(is_there, logits.shape)
    return softmax_of_largest(jnp.where(there, logits, -jnp.inf), self.chosen)


def _unit(x):
  """Scales vectors to length 1; zeros stay."""
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * lax.rsqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny))


def arrow(
  prototypes: Any,
  *,
  temperature: float = 1.0,
  chosen: int | None = None,
  unit: bool = False,
) -> Callable[[jax.Array], jax.Array]:
  """Makes the gate that sends each token where it points.

      logit_n = |x · p_n| / temperature
      g = softmax over the `chosen` largest logits, zero elsewhere

  Args:
    prototypes: (..., n, in), one path of `prototypes`.
    temperature: above zero. Logits have the scale of x: the same temperature is
      soft after a norm and hard in the residual stream.
    chosen: how many adapters a token takes; None is all, as in the authors'
      code by default.
    unit: divide x and prototypes by their lengths, so that logits are cosines.

  Returns:
    x (..., in) -> (..., n) float32, a callable pytree for the `params` of a
    `Gated`. x = 0 gives equal gates; an adapter that is not there zero.

  Raises:
    ValueError: prototypes without two axes, a temperature that is not positive,
      or `chosen` out of range.

  Example:
    >>> gate = arrow(jnp.array([[0.0, 1.0, 0.0], [3**-0.5] * 3]))
    >>> [round(float(g), 4) for g in gate(jnp.array([1.0, 2.0, 3.0]))]
    [0.1878, 0.8122]
    >>> from jlora.adapting import Gated, make_bank
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(1))
    >>> bank = make_bank([{"w": lora}, {"w": lora}])
    >>> programs = {path: Gated(bank[path], arrow(rows))
    ...             for path, rows in prototypes(bank).items()}
    >>> programs["w"].params(jnp.ones(3))
    Array([0.5, 0.5], dtype=float32)

  References:
    Ostapenko et al. (2024), and microsoft/mttl, whose defaults these are.
  """
  if np.ndim(prototypes) < 2:
    raise ValueError(
      f"Prototypes are {np.shape(prototypes)}; needed are (..., n, in)."
    )
  if not temperature > 0:
    raise ValueError(f"The temperature must be above zero, got {temperature}.")
  if chosen is not None:
    check_chosen(chosen, np.shape(prototypes)[-2])
  return Arrow(jnp.asarray(prototypes), float(temperature), chosen, unit)
