# SPDX-License-Identifier: Apache-2.0
"""Parameters with the change of an adapter in them."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.deltas import is_floating
from jlora.loras import Lora, check_loras, dense, name_some
from jlora.paths import flatten, unflatten
from jlora.views import Rule, as_parameter, table_for, view_of


def apply(
  params: Any, loras: Mapping[str, Lora], *, views: Iterable[Rule] | None = None
) -> Any:
  """Parameters plus the changes of an adapter.

      w  ←  round(float32(w) + scale aᵀ b)

  Args:
    params: a pytree of arrays.
    loras: path -> Lora, paths as `flatten` gives them.
    views: rules that say how a parameter is read as a matrix; by default those
      for the names found.

  Returns:
    The pytree, summed in float32 and rounded once to each leaf's own dtype;
    leaves without a Lora are the same arrays. Pure and jit-able; forms each
    change. Keep the base: the sum cannot be undone exactly.

  Raises:
    ValueError: a path that is not there or is no floating matrix, or a shape
      that does not fit; up to three named with both shapes.

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(0.5))
    >>> apply({"w": jnp.zeros((3, 2), jnp.bfloat16)}, {"w": lora})["w"].sum()
    Array(3, dtype=bfloat16)
  """
  check_loras(loras)
  flat = flatten(params)
  missing = sorted(set(loras) - set(flat))
  if missing:
    raise ValueError(
      f"{len(missing)} Loras have no parameter: {name_some(missing)}; "
      f"there are {name_some(flat)}."
    )
  table = tuple(table_for(flat) if views is None else views)
  found = {path: view_of(path, flat[path].shape, table) for path in loras}
  wrong = [
    f"{path} {flat[path].dtype} {flat[path].shape} for "
    f"a {lora.a.shape}, b {lora.b.shape}"
    for path, lora in loras.items()
    if (view := found[path]) is None
    or not is_floating(flat[path].dtype)
    or view.shape(flat[path].shape)
    != (*lora.a.shape[:-2], lora.a.shape[-1], lora.b.shape[-1])
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} Loras do not fit: {name_some(wrong)}. Needed is a "
      "floating matrix (..., in, out) for a (..., r, in), b (..., r, out)."
    )
  summed = {
    path: _summed(flat[path], lora, found[path]) for path, lora in loras.items()
  }
  return unflatten({**flat, **summed}, params)


def _summed(leaf: jax.Array, lora: Lora, view: Any) -> jax.Array:
  change = as_parameter(dense(lora), view, leaf.shape)
  return (leaf.astype(jnp.float32) + change).astype(leaf.dtype)
