# SPDX-License-Identifier: Apache-2.0
"""Trains mixtures of LoRAs whose routers differ: ReMix, softmax, and controls.

Every method has the same adapters, the same start of them, the same batches and
the same rate; ReMix evaluates each batch under several selections.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.lib.models.loops import compile_steps, schedule
from jlora.adapting import Gated, adapt, bind, make_bank
from jlora.loras import Loras
from jlora.paths import key_for
from jlora.routing import (
  by_sequence,
  draw,
  effective,
  log_prob,
  remix,
  routed,
)
from jlora.training import init_lora, train

Reads = Callable[[jax.Array, Any], jax.Array]
Programs = Mapping[str, Any]


class Mixture(NamedTuple):
  """The adapters that every method routes.

  Attributes:
    count: n, of each module.
    rank: r, of each adapter.
    chosen: k, how many are active.
    samples: M, selections of ReMix.
    rate: largest learning rate of Adam, for adapters.
    steps: updates.
    reads: (x, mask) -> z, what routers read of a layer's input.
  """

  count: int = 8
  rank: int = 2
  chosen: int = 2
  samples: int = 4
  rate: float = 1e-2
  steps: int = 1500
  reads: Reads = by_sequence


class Method(NamedTuple):
  """How a mixture is routed.

  Attributes:
    kind: of KINDS.
    spread: standard deviation of the logits at the start.
    rate: largest learning rate of Adam, for routers.
    balance: factor of the loss that wants adapters used alike.
  """

  kind: str
  spread: float = 0.1
  rate: float = 1e-2
  balance: float = 0.0


#: Every method that is compared. Of 0.001, 0.003, 0.01 and 0.03 the first and
#: the sixth have the rate that was best on seeds 10 to 15 of `regimes`.
METHODS = {
  "ReMix": Method("remix", 0.0, 3e-2),
  "ReMix, probability of sets": Method("sets", 0.0, 3e-2),
  "ReMix, no baseline": Method("no baseline", 0.0, 3e-2),
  "ReMix, routers at 0.01": Method("remix", 0.0),
  "ReMix, frozen random router": Method("frozen", 1.0),
  "softmax top-k, logits of 0.1, routers at 0.001": Method(
    "softmax", 0.1, 1e-3
  ),
  "softmax top-k, logits of 0.1": Method("softmax", 0.1),
  "softmax top-k, logits of 1": Method("softmax", 1.0),
  "softmax top-k, logits of 6": Method("softmax", 6.0),
  "softmax top-k, logits of 0.1, balance loss": Method(
    "softmax", 0.1, balance=0.01
  ),
  "softmax over all, logits of 1": Method("dense", 1.0),
  "one LoRA of rank k r": Method("active"),
  "one LoRA of rank n r": Method("whole"),
}


class Trained(NamedTuple):
  """A trained mixture.

  Attributes:
    programs: path -> Lora or Gated.
    losses: (steps,), each before its step.
    effective: (steps,), the mean effective number of adapters, or None where it
      is a constant.
  """

  programs: Programs
  losses: np.ndarray
  effective: np.ndarray | None

  def course(self) -> list[float]:
    """Returns the effective number, averaged over tenths of the training."""
    if self.effective is None:
      return []
    return [float(x.mean()) for x in np.array_split(self.effective, 10)
            if len(x)]  # fmt: skip

  def numbers(self) -> dict[str, float]:
    """Returns the effective number at first, the least and at last."""
    if self.effective is None:
      return {}
    course = self.course()
    return {
      "effective at first": float(self.effective[0]),
      "effective, least": min(course),
      "effective at last": course[-1],
    }


class Seen(NamedTuple):
  """What a softmax router says of its rows.

  Attributes:
    logits: (..., n).
    shares: (..., n), which sum to 1.
  """

  logits: jax.Array
  shares: jax.Array


@dataclasses.dataclass(frozen=True, slots=True)
class Softmax:
  """The gate of a softmax router; equal ones are equal.

      g = weight softmax over the `chosen` largest of rows z

  Attributes:
    chosen: k.
    weight: what all gates sum to.
    reads: (x, mask) -> z.
  """

  chosen: int
  weight: float
  reads: Reads

  def __call__(self, rows: jax.Array, x: jax.Array) -> tuple[jax.Array, Seen]:
    """Returns gates (..., n), and what they are made of."""
    logits = jnp.einsum("...i,ni->...n", self.reads(x, None), rows)
    largest, at = lax.top_k(logits, self.chosen)
    places = jax.nn.one_hot(at, len(rows), dtype=logits.dtype)
    shares = jnp.einsum("...k,...kn->...n", jax.nn.softmax(largest), places)
    return self.weight * shares, Seen(logits, shares)


def init_bank(
  start: Callable[[jax.Array, int], Loras], mixture: Mixture, key: jax.Array
) -> Loras:
  """Makes new adapters of all modules, as one bank.

  Args:
    start: (key, rank) -> Loras of scale 1 that change nothing yet.
    mixture: how many, and of which rank.
    key: PRNG key.

  Returns:
    {path: Lora} with an axis of adapters first.
  """
  keys = jax.random.split(key, mixture.count)
  return make_bank([start(own, mixture.rank) for own in keys])


def init_softmax(
  bank: Loras, mixture: Mixture, chosen: int, key: jax.Array
) -> dict[str, Gated]:
  """Puts a softmax router on every module, its rows drawn from N(0, 1)."""
  gate = Softmax(chosen, 2.0 / mixture.rank, mixture.reads)
  return {
    path: Gated(
      lora,
      jax.random.normal(key_for(key, path), (len(lora.a), lora.a.shape[-1])),
      gate,
    )
    for path, lora in bank.items()
  }


def spread_of(logits: jax.Array) -> jax.Array:
  """Computes how far logits of the same row differ.

      √ mean (logits - their mean over adapters)²

  Args:
    logits: (..., n).

  Returns:
    ().

  Example:
    >>> float(spread_of(jnp.array([[1.0, 3.0], [7.0, 5.0]])))
    1.0
  """
  return jnp.sqrt(jnp.var(logits, axis=-1).mean())


def calibrate(
  programs: Mapping[str, Gated],
  spread: float,
  loss: Callable[..., jax.Array],
  params: Any,
  batch: tuple,
) -> dict[str, Gated]:
  """Scales the routers of all modules so that logits have a spread.

  Args:
    programs: as from `init_softmax`.
    spread: of `spread_of`, on the batch.
    loss: (params, *batch) -> (B,).
    params: of the base.
    batch: examples.

  Returns:
    Programs.
  """

  @jax.jit
  def see(programs, params, *batch):
    """Computes the spread of every module."""
    bound = bind(params, programs)
    _, notes = adapt(loss, has_notes=True)(bound, *batch)
    return {
      path: jnp.stack([spread_of(x.logits) for x in found]).mean()
      for path, found in notes.items()
    }

  now = see(programs, params, *batch)
  return {
    path: dataclasses.replace(x, params=x.params * (spread / now[path]))
    for path, x in programs.items()
  }


def watched(
  loss: Callable[..., jax.Array],
  params: Any,
  programs: Programs,
  batch: tuple[Any, ...],
  dropout: Any = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Computes the mean loss with softmax routers; a `through` of `train`.

  Args:
    loss: (params, *batch) -> (B,).
    params: of the base.
    programs: whose gates note a `Seen`.
    batch: a factor of the balancing loss, then the loss's own arguments.
    dropout: None.

  Returns:
    The loss with the balancing one of Switch Transformers; and the mean loss
    alone, and the mean effective number of adapters over examples and modules.
  """
  del dropout
  factor, *given = batch
  bound = bind(params, programs)
  losses, notes = adapt(loss, has_notes=True)(bound, *given)
  noted = [note for found in notes.values() for note in found]
  seen = [note for note in noted if isinstance(note, Seen)]
  value = losses.mean()
  if not seen:
    return value, (value, jnp.float32(0))
  number = jnp.stack([effective(x.shares).mean() for x in seen]).mean()
  uneven = jnp.stack([_unevenness(x) for x in seen]).sum()
  return value + factor * uneven, (value, number)


def _unevenness(seen: Seen) -> jax.Array:
  """Computes n Σ_j (mean probability of j) (share of rows that take j)."""
  rows = seen.logits.reshape(-1, seen.logits.shape[-1])
  taken = (seen.shares.reshape(rows.shape) > 0).astype(rows.dtype)
  share = taken.sum(0) / taken.sum()
  return rows.shape[-1] * (jax.nn.softmax(rows).mean(0) * share).sum()


def without_baseline(
  loss: Callable[..., jax.Array],
  params: Any,
  programs: Programs,
  batch: tuple[Any, ...],
  dropout: Any = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Computes what has ReMix's gradient without a baseline; a `through`.

      mean_m L_m + 1/M Σ_m stop(L_m) log Q_m

  Args:
    loss: (params, *batch) -> (B,).
    params: of the base.
    programs: routed.
    batch: a key for each selection, then the loss's own arguments.
    dropout: None.

  Returns:
    That mean over examples; and the mean loss, and zero.
  """
  del dropout
  keys, *given = batch

  def one(key):
    """Computes losses and log Q under one selection."""
    drawn = {
      path: dataclasses.replace(
        x,
        params={**x.params, "key": key_for(key, path)},
        gate=dataclasses.replace(x.gate, draw=draw),
      )
      for path, x in programs.items()
    }
    losses, notes = adapt(loss, has_notes=True)(bind(params, drawn), *given)
    return losses, sum(x.log_prob for found in notes.values() for x in found)

  losses, log_q = jax.vmap(one)(keys)
  score = (lax.stop_gradient(losses) * log_q).mean()
  value = losses.mean()
  return value + score - lax.stop_gradient(score), (value, jnp.float32(0))


@functools.cache
def _run(
  kind: str, loss: Callable[..., jax.Array], mixture: Mixture, rate: float
):
  """Compiles the training of a kind of router, once for each loss and rate."""
  rule = schedule(mixture.rate, mixture.steps)
  slow = schedule(rate, mixture.steps)
  if kind in ("remix", "sets"):
    score = functools.partial(log_prob, ordered=kind == "remix")
    init, update = remix(
      loss, rule, slow, samples=mixture.samples, log_prob=score
    )

    def keyed(programs, state, params, key, *batch):
      """Takes a step with its own key."""
      programs, state, value = update(programs, state, params, *batch, key=key)
      return programs, state, (value, jnp.float32(0))

    return compile_steps(init, keyed)
  through: Any = without_baseline if kind == "no baseline" else watched
  both = optax.multi_transform({"adapters": rule, "router": slow}, _label)
  init, update = train(loss, both, through=through, has_aux=True)

  def told(programs, state, *rest):
    """Takes a step, and returns only what is noted."""
    programs, state, (_, noted) = update(programs, state, *rest)
    return programs, state, noted

  return compile_steps(init, told)


def _label(part: Any) -> Any:
  """Says of each trained array whether it is a router's."""
  return jax.tree_util.tree_map_with_path(
    lambda keys, _: "router" if keys[1].key == "params" else "adapters", part
  )


def train_mixture(
  method: Method,
  mixture: Mixture,
  loss: Callable[..., jax.Array],
  params: Any,
  start: Callable[[jax.Array, int], Loras],
  batches: Sequence[np.ndarray],
  seed: int,
) -> Trained:
  """Trains adapters and their router.

  Args:
    method: of METHODS.
    mixture: the adapters.
    loss: (params, *batch) -> (B,), the same object in every call.
    params: of the base.
    start: (key, rank) -> Loras of scale 1 that change nothing yet.
    batches: arrays (steps, B, ...).
    seed: of the start and of selections.

  Returns:
    Trained.
  """
  key, other, choices = jax.random.split(jax.random.key(seed), 3)
  bank, kind = init_bank(start, mixture, key), method.kind
  first = tuple(x[0] for x in batches)
  extra: Any = np.full(mixture.steps, method.balance, np.float32)
  if kind in ("active", "whole"):
    count = mixture.chosen if kind == "active" else mixture.count
    programs: Any = _as_one(start(key, count * mixture.rank))
  elif kind in ("softmax", "dense"):
    chosen = mixture.chosen if kind == "softmax" else mixture.count
    programs = init_softmax(bank, mixture, chosen, other)
    programs = calibrate(programs, method.spread, loss, params, first)
  else:
    programs = _routed(bank, mixture, method.spread, other)
    if kind != "frozen":
      many = (mixture.steps, mixture.samples)
      shape = many if kind == "no baseline" else many[:1]
      extra = jax.random.split(choices, shape)
  name = {"dense": "softmax"}.get(kind, kind)
  run = _run(name, loss, mixture, method.rate)
  programs, (losses, numbers) = run(programs, (params,), (extra, *batches))
  seen = np.asarray(numbers) if kind in ("softmax", "dense") else None
  return Trained(programs, np.asarray(losses), seen)


def _as_one(loras: Loras) -> Loras:
  """Scales one LoRA as adapters of its rank are that are always chosen."""
  return {
    path: dataclasses.replace(x, scale=x.scale * 2.0 / x.rank)
    for path, x in loras.items()
  }


def _routed(bank: Loras, mixture: Mixture, spread: float, key: jax.Array):
  """Puts a router on every module, its rows zero or drawn."""
  found = {}
  for path, lora in bank.items():
    shape = (len(lora.a), lora.a.shape[-1])
    rows = spread * jax.random.normal(key_for(key, path), shape)
    found[path] = routed(lora, rows, chosen=mixture.chosen, reads=mixture.reads)
  return found


def start_of(
  params: Any, select: Any = None
) -> Callable[[jax.Array, int], Loras]:
  """Returns a function that makes LoRAs of scale 1 on a base.

  Args:
    params: of the base.
    select: which parameters; None is all that are linear.

  Returns:
    (key, rank) -> Loras.
  """
  more = {} if select is None else {"select": select}

  def start(key, rank):
    """Makes new Loras."""
    return init_lora(params, rank, key, alpha=float(rank), **more)

  return start
