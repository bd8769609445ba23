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
from jax.sharding import PartitionSpec

from jlora.loras import Lora, check_loras
from jlora.messages import name_some
from jlora.numerics.backends import library_of, over_leading
from jlora.numerics.linalg import thin_svd, triangle_of
from jlora.numerics.sums import exponent_of
from jlora.routing.choices import softmax_of_largest
from jlora.routing.mixtures import check_chosen
from jlora.runs.pool import open_pool

_ALIKE = 0.999  # ratio of singular values above which we warn
_SIGNS = np.float32(-1), np.float32(1)


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
    factors alone: O((in + out) r²) each; units of padding do not matter. On a
    host, three modules at a time. The same whatever basis (R a, R⁻ᵀ b) an
    adapter is kept in. Pure.

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
  for path, (rows, ratio) in _all_directions(bank).items():
    found[path] = library_of(bank[path].a).asarray(rows)
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


def _all_directions(bank: Mapping[str, Lora]) -> dict[str, tuple[Any, Any]]:
  """Returns the directions of every path; on a host in threads of NumPy.

  LAPACK on one thread for each matrix is many times as fast there as XLA, which
  would compile a program for every shape.
  """
  if not all(map(_is_on_host, jax.tree.leaves(bank))):
    return {path: _directions(lora) for path, lora in bank.items()}
  with open_pool() as pool:
    jobs = {
      path: pool.submit(_directions, jax.tree.map(np.asarray, lora))
      for path, lora in bank.items()
    }
    return {path: job.result() for path, job in jobs.items()}


def _is_on_host(x: Any) -> bool:
  """Returns whether an array is NumPy's, or JAX's on one CPU."""
  if isinstance(x, Tracer):
    return False
  devices = x.devices() if isinstance(x, jax.Array) else ()
  return len(devices) < 2 and all(one.platform == "cpu" for one in devices)


def _directions(lora: Lora) -> tuple[Any, Any]:
  """Returns (..., n, in) directions, and s_2 / s_1 of each, 0 for rank 1."""
  xp = library_of(lora.a)
  with jax.default_matmul_precision("highest"):
    rows, first, ratio = over_leading(
      _reaction,
      lora.a.ndim - 2,
      lora.a,
      lora.b,
      places=lambda a, _: (
        PartitionSpec(*a[:-2], a[-1]),
        PartitionSpec(*a[:-2]),
        PartitionSpec(*a[:-2]),
      ),
    )
  is_there = lora.scale != 0
  rows = xp.where((first > 0)[..., None], rows, np.float32(0))
  rows = xp.where(is_there[..., None], rows, np.float32(np.nan))
  return xp.moveaxis(rows, 0, -2), xp.where(is_there, ratio, np.float32(0))


def _reaction(a: Any, b: Any) -> tuple[Any, Any, Any]:
  """Returns u_1, s_1 but for a power of two, and s_2 / s_1 of `aᵀ b`.

  With aᵀ = q_a r_a and bᵀ = q_b r_b, u_1 is along aᵀ r_bᵀ w for the first right
  singular vector w of r_a r_bᵀ: neither q is formed.
  """
  xp = library_of(a)
  a, b = (
    x * xp.ldexp(xp.float32(1), -exponent_of(x))
    for x in (
      a.astype(np.float32, copy=False),
      b.astype(np.float32, copy=False),
    )
  )
  triangle = triangle_of(b.T)
  _, s, vt = thin_svd(triangle_of(a.T) @ triangle.T)
  row = (vt[0] @ triangle) @ a
  row = row / xp.maximum(xp.linalg.norm(row), np.finfo(np.float32).tiny)
  row = row * xp.where(row[xp.argmax(xp.abs(row))] < 0, *_SIGNS)
  above = xp.maximum(s[0], np.finfo(np.float32).tiny)
  return row, s[0], s[1] / above if len(s) > 1 else xp.zeros_like(s[0])


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
