# SPDX-License-Identifier: Apache-2.0
"""Measures on data what adapters of one base do to each other, by rank."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.adapting.binding import bind
from jlora.adapting.transforms import adapt
from jlora.factoring.factorisers import recompress
from jlora.loras import Lora, Loras, check_loras, from_factors
from jlora.messages import name_some
from jlora.views import ViewRule


class Interference(NamedTuple):
  """What adapters of one rank do to each other.

  Attributes:
    rank: of every module, or less where it has less.
    alone: batch -> {adapter: loss with this one alone}.
    none: batch -> loss of the base.
    together: batch -> loss with all of them added.
    nonlinearity: batch -> |f(all) - Σ_i f(i) + (n-1) f(0)| / |f(all) - f(0)|,
      0 where outputs add up; NaN where nothing changes.
  """

  rank: int
  alone: dict[str, dict[str, float]]
  none: dict[str, float]
  together: dict[str, float]
  nonlinearity: dict[str, float]


def interference(
  outputs: Callable[..., jax.Array],
  loss: Callable[..., jax.Array],
  params: Any,
  adapters: Mapping[str, Mapping[str, Lora]],
  batches: Mapping[str, tuple[tuple[Any, ...], Any]],
  ranks: Sequence[int],
  *,
  views: Iterable[ViewRule] | None = None,
) -> list[Interference]:
  """Measures losses of adapters alone and added up, at several ranks.

      f(S) = outputs(params + Σ_{i in S} truncated_r(Δ_i), inputs)

  Args:
    outputs: `(params, *inputs) -> array`, such as logits.
    loss: `(outputs, targets) -> ()`.
    params: of the base.
    adapters: name -> (path -> Lora), at least two.
    batches: name -> (inputs, targets): those of the adapters' own tasks, and
      others that nobody should disturb.
    ranks: at each of which all modules are truncated to their leading singular
      directions; one above a module's rank leaves it whole.
    views: as for `bind`.

  Returns:
    One Interference for each rank, in float32. Every module is factored once,
    and the model compiled once: what is cut off is zero. Each rank and batch
    costs n + 2 forward passes for n adapters.

  Raises:
    ValueError: fewer than two adapters, a rank below 1, or as `bind`.

  Example:
    >>> one, two = (Lora(jnp.eye(2)[i:i + 1], jnp.ones((1, 2)),
    ...                  jnp.float32(1)) for i in range(2))
    >>> batch = ((jnp.ones((3, 2)),), jnp.zeros((3, 2)))
    >>> (row,) = interference(
    ...   lambda params, x: x @ params["w"],
    ...   lambda y, targets: jnp.mean((y - targets) ** 2),
    ...   {"w": jnp.zeros((2, 2))}, {"one": {"w": one}, "two": {"w": two}},
    ...   {"all": batch}, [1])
    >>> round(row.alone["all"]["one"], 3), round(row.together["all"], 3)
    (1.0, 4.0)
    >>> row.nonlinearity
    {'all': 0.0}
  """
  _check(adapters, ranks)
  whole = {name: _balanced(loras) for name, loras in adapters.items()}

  @jax.jit
  def measure(params, whole, on, rank, inputs, targets):
    """Computes outputs and loss with the adapters that are on."""
    cut = [
      {path: _cut(lora, rank) for path, lora in own.items()} for own in whole
    ]
    bound = bind(params, cut, on, views=views)
    found = adapt(outputs)(bound, *inputs)
    return found.astype(jnp.float32), loss(found, targets)

  rows, listed = [], list(whole.values())
  for rank in ranks:
    row = Interference(rank, {}, {}, {}, {})
    for name, (inputs, targets) in batches.items():
      count = len(whole)
      sets = [*jnp.eye(count), jnp.zeros(count), jnp.ones(count)]
      each = [
        # A list: jit would sort the names of a dict, not what is on.
        measure(params, listed, on, jnp.int32(rank), inputs, targets)
        for on in sets
      ]
      (*alone, none, together) = (float(value) for _, value in each)
      row.alone[name] = dict(zip(whole, alone, strict=True))
      row.none[name], row.together[name] = none, together
      row.nonlinearity[name] = _nonlinearity([found for found, _ in each])
    rows.append(row)
  return rows


def _check(adapters, ranks) -> None:
  """Raises ValueError unless there are adapters and ranks to compare."""
  if len(adapters) < 2:
    raise ValueError(
      f"{len(adapters)} adapters are given; one interferes with another, so "
      "give two or more."
    )
  for loras in adapters.values():
    check_loras(loras)
  low = [str(rank) for rank in ranks if rank < 1]
  if low:
    raise ValueError(f"Ranks must be at least 1, got {name_some(low)}.")


def _balanced(loras: Mapping[str, Lora]) -> Loras:
  """Returns Loras whose units are their singular directions, largest first."""
  found = {}
  for path, lora in loras.items():
    scale = lora.scale[..., None, None].astype(lora.b.dtype)
    factors = recompress(lora.a, lora.b * scale, lora.rank)
    found[path] = from_factors(factors)
  return found


def _cut(lora: Lora, rank: jax.Array) -> Lora:
  """Sets the units beyond a rank to zero."""
  is_kept = jnp.arange(lora.rank) < rank
  return Lora(lora.a, jnp.where(is_kept[:, None], lora.b, 0.0), lora.scale)


def _nonlinearity(found: Sequence[jax.Array]) -> float:
  """Computes how far outputs are from adding up, over how far they moved."""
  *alone, none, together = found
  rest = together - none - sum(one - none for one in alone)
  moved = jnp.linalg.norm((together - none).reshape(-1))
  return float(
    jnp.linalg.norm(rest.reshape(-1)) / jnp.where(moved > 0, moved, jnp.nan)
  )
