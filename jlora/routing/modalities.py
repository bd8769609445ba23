# SPDX-License-Identifier: Apache-2.0
"""One adapter per modality, switched row by row by what is in the input.

id_i = table[ Σ_m 2^m present_im ]
"""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jax.core import Tracer

from jlora.adapting.banks import make_bank
from jlora.loras import Lora, Loras
from jlora.messages import name_some

with epy.lazy_imports():  # only where something is trained
  import optax

_MOST = 8  # modalities: a table of 256


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("table",),
  meta_fields=("names", "modalities"),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Routes:
  """Which adapter of a bank each set of modalities has. A pytree of its table.

  Attributes:
    names: of the adapters, in the bank's order; static.
    modalities: in the order of `present`; static.
    table: (2^m,) int32, ids of adapters; -1 is the base. Entry Σ 2^i is that of
      the set of modalities i.

  Example:
    >>> routes = Routes(("eye",), ("image",), jnp.array([-1, 0], jnp.int32))
    >>> routes.ids(jnp.array([[True], [False]]))
    Array([ 0, -1], dtype=int32)
  """

  names: tuple[str, ...]
  modalities: tuple[str, ...]
  table: jax.Array

  def ids(self, present: Any) -> jax.Array:
    """Looks up each row's adapter, for `adapt_rows`.

    Args:
      present: (B, m) truth values: which modalities a row has.

    Returns:
      (B,) int32, -1 for the base. Pure; works under jit, and another table of
      that shape does not recompile.

    Raises:
      ValueError: not one truth value for each modality.
    """
    present = jnp.asarray(present)
    count = len(self.modalities)
    if present.shape[-1:] != (count,) or present.dtype != bool:
      raise ValueError(
        f"present is {present.dtype} {present.shape}; needed are truth values "
        f"(B, {count}), for {', '.join(self.modalities)}."
      )
    powers = jnp.asarray(2 ** np.arange(count), jnp.int32)
    places = jnp.where(present, jnp.broadcast_to(powers, present.shape), 0)
    return self.table[places.sum(axis=-1)]


def routes(
  adapters: Mapping[str, Mapping[str, Lora]],
  by: Mapping[Any, str | None],
  *,
  priority: Sequence[str] | None = None,
) -> tuple[Loras, Routes]:
  """Stacks adapters and says which of them each set of modalities has.

  Args:
    adapters: name -> Loras; ranks and modules may differ.
    by: set of modalities -> name of its adapter, or None for the base. A set is
      a frozenset or tuple of names, or one name; () is text alone. Every set of
      the modalities must be there, unless there is a priority.
    priority: modalities by precedence: a set that `by` lacks has the adapter of
      the first of these that it holds, the empty one the base.

  Returns:
    The bank, as of `make_bank`, and Routes. The bank is read also for rows of
    the base, for nothing.

  Raises:
    ValueError: a set without an adapter or with two, a name without an adapter,
      a priority that is not the modalities, none or more than eight of them.

  Warns:
    UserWarning: adapters that no set has.

  Example:
    >>> eye = {"w": Lora(jnp.ones((2, 3)), jnp.ones((2, 5)), jnp.float32(1))}
    >>> ear = {"w": Lora(jnp.ones((1, 3)), jnp.ones((1, 5)), jnp.float32(1))}
    >>> bank, table = routes({"eye": eye, "ear": ear},
    ...                      {"image": "eye", "sound": "ear"},
    ...                      priority=["image", "sound"])
    >>> table.table.tolist()
    [-1, 0, 1, 0]

  References:
    Microsoft (2025), Phi-4-Mini technical report, arXiv 2503.01743.
  """
  if not adapters:
    raise ValueError("There are no adapters; give at least one.")
  said = _sets(by)
  modalities = tuple(
    priority
    if priority is not None
    else dict.fromkeys(name for key in said for name in sorted(key))
  )
  _check_modalities(modalities, said, priority)
  unknown = sorted({n for n in said.values() if n is not None} - set(adapters))
  if unknown:
    raise ValueError(
      f"{len(unknown)} adapters are named in the table and not given: "
      f"{name_some(unknown)}; there are {name_some(adapters)}."
    )
  names, found, missing = tuple(adapters), [], []
  for own in _all_sets(modalities):
    name = _adapter_of(own, said, priority)
    if isinstance(name, _Hole):
      missing.append(_written(own))
    else:
      found.append(-1 if name is None else names.index(name))
  if missing:
    raise ValueError(
      f"{len(missing)} sets of modalities have no entry: {name_some(missing)}; "
      "name an adapter or None for each, or give priority=."
    )
  unused = [name for i, name in enumerate(names) if i not in found]
  if unused:
    warnings.warn(
      f"{len(unused)} adapters belong to no set of modalities: "
      f"{name_some(unused)}.",
      stacklevel=2,
    )
  table = jnp.asarray(found, jnp.int32)
  return make_bank(list(adapters.values())), Routes(names, modalities, table)


class _Hole:
  """Stands for the adapter of a set that has none."""


def _sets(by: Mapping[Any, str | None]) -> dict[frozenset[str], str | None]:
  """Returns a table by frozensets; raises if one is said twice."""
  found: dict[frozenset[str], str | None] = {}
  twice = []
  for key, name in by.items():
    own = frozenset([key] if isinstance(key, str) else key)
    if own in found:
      twice.append(_written(own))
    found[own] = name
  if twice:
    raise ValueError(
      f"{len(twice)} sets of modalities are there twice: {name_some(twice)}; "
      "say each once."
    )
  return found


def _check_modalities(modalities, said: Iterable[Collection[str]], priority):
  """Raises ValueError unless the modalities are some, few and those named."""
  named = {name for own in said for name in own}
  if not modalities or len(modalities) > _MOST:
    raise ValueError(
      f"There are {len(modalities)} modalities; a table has 1 to {_MOST}."
    )
  twice = len(set(modalities)) != len(modalities)
  if priority is not None and (twice or named - set(modalities)):
    raise ValueError(
      f"priority is {list(priority)}; needed is each modality once, and the "
      f"table has {name_some(sorted(named))}."
    )


def _all_sets(modalities) -> list[frozenset[str]]:
  """Lists all sets, by the numbers Σ 2^i of their entries."""
  each = itertools.product((False, True), repeat=len(modalities))
  return [
    frozenset(itertools.compress(modalities, flags[::-1])) for flags in each
  ]


def _adapter_of(own, said, priority) -> Any:
  """Returns the name of a set's adapter, None for the base, or a _Hole."""
  if own in said:
    return said[own]
  if priority is None:
    return _Hole()
  first = next((name for name in priority if name in own), None)
  return None if first is None else said.get(frozenset([first]), _Hole())


def _written(own: Collection[str]) -> str:
  """Writes a set of modalities."""
  return "{" + ", ".join(sorted(own)) + "}"


def check_cache(ids: Any, ids_of_cache: Any) -> None:
  """Raises unless each row has the adapter that its cached keys were made with.

  Cached keys and values of one adapter are wrong under another: where a row's
  adapter changes, compute them again from its first token.

  Args:
    ids: (B,) integers, of what is to be run.
    ids_of_cache: (B,) those with which the cache was made.

  Raises:
    ValueError: another number of rows, traced ids, or rows whose adapter
      changed; names up to three.

  Example:
    >>> check_cache(jnp.array([0, -1]), jnp.array([0, -1]))
  """
  if isinstance(ids, Tracer) or isinstance(ids_of_cache, Tracer):
    raise ValueError(
      "ids are traced, and a traced error cannot be raised: call check_cache "
      "outside of jit."
    )
  now, then = np.asarray(ids), np.asarray(ids_of_cache)
  if now.shape != then.shape:
    raise ValueError(
      f"ids are {now.shape}, those of the cache {then.shape}; needed is one "
      "for each row of both."
    )
  wrong = [
    f"row {i}: {then[i]} in the cache, now {now[i]}"
    for i in np.flatnonzero(now != then)
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} rows changed their adapter under the cache: "
      f"{name_some(wrong)}; compute their keys and values again."
    )


def used_only(
  optimiser: "optax.GradientTransformation",
) -> "optax.GradientTransformation":
  """Wraps an optimiser so that adapters without a row in the batch stay.

  Momentum and weight decay move also what has a gradient of zero. Here an
  adapter of a bank whose a and b all have one keeps its factors and its part of
  the optimiser's state, bit by bit.

  Args:
    optimiser: whose state holds arrays of its parameters' shapes, or numbers.

  Returns:
    A transformation of {path: Lora or {"a": ..., "b": ...}}, each leaf of which
    has the bank's axis of adapters first, or is a number.

  Example:
    >>> part = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((2, 1))}}
    >>> slope = {"w": {"a": jnp.zeros((2, 1)), "b": jnp.array([[0.0], [1.0]])}}
    >>> decaying = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
    >>> optimiser = used_only(decaying)
    >>> change, _ = optimiser.update(slope, optimiser.init(part), part)
    >>> change["w"]["a"][:, 0]
    Array([ 0. , -0.5], dtype=float32)
  """
  wrapped = optax.with_extra_args_support(optimiser)

  def update(updates: Any, state, params=None, **extra):
    """Takes a step for the adapters that have a gradient."""
    change: Any
    change, new = wrapped.update(updates, state, params, **extra)
    used = {path: _used(own) for path, own in updates.items()}
    change = {
      path: jax.tree.map(functools.partial(_only, used[path]), own)
      for path, own in change.items()
    }
    return change, _kept(updates, used, new, state)

  return optax.GradientTransformationExtraArgs(wrapped.init, update)


def _used(own: Any) -> jax.Array:
  """Returns for each adapter of a bank whether a gradient is not zero."""
  each = [
    jnp.any(x != 0, axis=tuple(range(1, x.ndim)))
    for x in jax.tree.leaves(own) if x.ndim
  ]  # fmt: skip
  return functools.reduce(jnp.logical_or, each)


def _only(used, change, old=None):
  """Takes the change of used adapters, and the old value or zero of others."""
  if change.ndim == 0:
    return change
  on = used.reshape(-1, *(1,) * (change.ndim - 1))
  return jnp.where(
    on, change, jnp.zeros((), change.dtype) if old is None else old
  )


def _kept(updates, used, new, old):
  """Returns the new state, and the old one where adapters were not used."""
  tree = jax.tree.structure(updates)
  flags = {
    path: jax.tree.map(lambda _, on=used[path]: on, own)
    for path, own in updates.items()
  }
  is_like = lambda x: jax.tree.structure(x) == tree  # noqa: E731

  def keep(now, then):
    """Keeps parts of what has the parameters' structure; takes the rest."""
    return jax.tree.map(_only, flags, now, then) if is_like(now) else now

  return jax.tree.map(keep, new, old, is_leaf=is_like)
