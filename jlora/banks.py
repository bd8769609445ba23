# SPDX-License-Identifier: Apache-2.0
"""Changes chosen from a bank of adapters, in the form that costs less."""

import dataclasses

import jax
import jax.numpy as jnp

from jlora.adapted import Change, without_bank

# Operations that are done in the time of moving a byte: a v5e's by its data
# sheet; two x86 cores' as they were measured for products of float32.
RIDGES = {"tpu": 240, "cpu": 10}


def laned(change: Change) -> Change:
  """All adapters of a bank on one rank axis, the gate of others zero.

      g_(i, r) = gate_(i, r) Σ_s weight_s [ids_s = i]

  Args:
    change: with ids.

  Returns:
    Change without ids, of rank n r. a and b are the bank's own: under vmap over
    ids they stay one copy.

  Example:
    >>> bank = Change(jnp.ones((3, 2, 3, 1)), jnp.ones((3, 2, 1, 5)),
    ...               jnp.ones((3, 2, 1, 1)), jnp.array([1, -1]))
    >>> laned(bank).gate[:, 0, 0]
    Array([0., 0., 1., 1., 0., 0.], dtype=float32)
  """
  ids, count = change.ids, change.a.shape[0]
  if ids is None:
    return change
  on = (ids[:, None] == jnp.arange(count)[None]).astype(jnp.float32)
  if change.weights is not None:
    on = on * change.weights[:, None]
  unknown = jnp.any((ids < -1) | (ids >= count))
  on = jnp.where(unknown, jnp.nan, on.sum(axis=0))
  gate = change.gate * on.reshape(-1, *(1,) * (change.gate.ndim - 1))
  flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
  return dataclasses.replace(
    change,
    a=flat(change.a),
    b=flat(change.b),
    gate=flat(gate),
    ids=None,
    weights=None,
  )


def chosen(change: Change, tokens: int) -> Change:
  """A bank's change in the form that costs less for so many tokens a row.

      laned: n max(4, 2 batch tokens / ridge),
      fetched: s batch max(12, 2 tokens / ridge)

  in bytes moved for each number of an adapter, operations turned to bytes.

  Args:
    change: with or without ids.
    tokens: vectors that a row multiplies with its adapters.

  Returns:
    Change without ids: `laned` or `without_bank`.

  Approximation: counts, never a clock; see `RIDGES`.

  Example:
    >>> bank = Change(jnp.ones((3, 2, 3, 1)), jnp.ones((3, 2, 1, 5)),
    ...               jnp.ones((3, 2, 1, 1)), jnp.array([1]), batch=64)
    >>> chosen(bank, 1).a.shape[0], chosen(bank, 4096).a.shape[0]
    (6, 2)
  """
  if change.ids is None:
    return change
  ridge = RIDGES.get(jax.default_backend(), RIDGES["tpu"])
  work = 2 * tokens / ridge
  in_lanes = len(change.a) * max(4, change.batch * work)
  fetched = len(change.ids) * change.batch * max(12, work)
  return laned(change) if in_lanes < fetched else without_bank(change)
