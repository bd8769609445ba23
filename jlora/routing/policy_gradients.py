# SPDX-License-Identifier: Apache-2.0
"""ReMix trained: routers by a policy gradient, their Loras by the loss.

∇P = 1/(M-1) Σ_m (L_m - mean L) ∇ log Q_m
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epy
from jax import lax

from jlora.adapting.binding import Program, bind
from jlora.adapting.programs import Gated
from jlora.adapting.transforms import adapt
from jlora.messages import name_some
from jlora.paths import key_for
from jlora.routing.selections import Router, Selection
from jlora.routing.selections import draw as draw_selection
from jlora.routing.selections import log_prob as log_prob_of
from jlora.training.trainer import Trainer, trained_part, with_part
from jlora.views import ViewRule

with epy.lazy_imports():  # only where something is trained
  import optax

Programs = Mapping[str, Program]


def remix(
  loss: Callable[..., jax.Array],
  optimiser: "optax.GradientTransformation",
  router_optimiser: "optax.GradientTransformation",
  *,
  samples: int = 4,
  draw: Callable[..., Selection] = draw_selection,
  log_prob: Callable[..., jax.Array] = log_prob_of,
  views: Iterable[ViewRule] | None = None,
) -> Trainer:
  """Makes the init and update functions that train routed programs.

      a, b  ←  ∇ mean_m L_m
      P     ←  1/(M-1) Σ_m (L_m - mean L) ∇ log Q_m

  for M selections of all modules at once, drawn independently, whose losses of
  the same examples are each other's baseline (leave one out). Both gradients
  come of one backward pass.

  Args:
    loss: `(params, *batch) -> (B,)`, the losses of the examples, which lie on
      the first axis of each routed layer's input.
    optimiser: of all that is trained but routers: gradients as for `train`.
    router_optimiser: of {path: {"rows": P}}.
    samples: M, at least 2.
    draw: (key, logits, k) -> Selection.
    log_prob: (logits, ids) -> log Q; `functools.partial(log_prob,
      ordered=False)` takes sets, which has less variance for k <= 4.
    views: as for `bind`.

  Returns:
    Trainer. `update(programs, state, params, *batch, key=, mask=None,
    valid=None)` returns programs, state and the mean loss before the step;
    mask (B, tokens...) is False for tokens of padding, valid (B,) for examples
    that do not count. A step costs M forward and backward passes and compiles
    once. Nothing of the baseline crosses examples: with each example's M
    samples on one device it needs no communication.
    Where k = n, a router's term is zero.

  Raises:
    ValueError: fewer than two samples; from `update`, no key, no routed
      program, losses or selections that are not one for each example.

  Example:
    >>> from jlora.loras import Lora
    >>> from jlora.routing import routed
    >>> bank = Lora(jnp.ones((3, 1, 2)), jnp.ones((3, 1, 2)), jnp.ones(3))
    >>> programs = {"w": routed(bank, chosen=1)}
    >>> loss = lambda p, x: jnp.sum((x @ p["w"]) ** 2, axis=-1)
    >>> init, update = remix(loss, optax.sgd(0.1), optax.sgd(0.1))
    >>> programs, state, value = update(
    ...   programs, init(programs), {"w": jnp.zeros((2, 2))}, jnp.ones((5, 2)),
    ...   key=jax.random.key(0))
    >>> float(value)
    32.0

  References:
    ReMix, arXiv 2603.10160; Kool et al. (2019), Buy 4 REINFORCE samples, get a
    baseline for free.
  """
  if samples < 2:
    raise ValueError(
      f"samples is {samples}; with fewer than 2 there is no other sample whose "
      "loss could be the baseline."
    )

  def init(programs):
    """Returns the states of both optimisers."""
    rest, routers = _apart(programs, trained_part(programs))
    return optimiser.init(rest), router_optimiser.init(routers)

  def update(
    programs, state, params, *batch, key: Any = None, mask=None, valid=None
  ):
    """Takes a step; returns programs, state and the loss before the step."""
    _check(programs, key)

    def value_of(part):
      """Computes the surrogate of the trained part, and the mean loss."""
      own = with_part(programs, part)

      def one(key):
        """Computes losses and log Q of one selection of all modules."""
        drawn = _drawn(own, key, mask, draw, log_prob)
        bound = bind(params, drawn, views=views)
        losses, notes = adapt(loss, has_notes=True)(bound, *batch)
        return losses, _log_q(notes, routers_of(own), losses)

      # One after another: together their activations leave the cache.
      losses, log_q = jax.lax.map(one, jax.random.split(key, samples))
      return surrogate(losses, log_q, valid)

    part = trained_part(programs)
    (_, value), gradient = jax.value_and_grad(value_of, has_aux=True)(part)
    pairs = zip(_apart(programs, gradient), _apart(programs, part), strict=True)
    moved, states = [], []
    for one, old, (slope, own) in zip(
      (optimiser, router_optimiser), state, pairs, strict=True
    ):
      change, new = one.update(slope, old, own)
      moved.append(optax.apply_updates(own, change))
      states.append(new)
    return with_part(programs, _joined(*moved)), tuple(states), value

  return Trainer(init, update)


def surrogate(
  losses: jax.Array, log_q: jax.Array, valid: Any = None
) -> tuple[jax.Array, jax.Array]:
  """Computes what has ReMix's gradient, and the mean loss.

      mean_m L_m + Σ_m stop((L_m - mean L) / (M-1)) log Q_m

  Args:
    losses: (M, B).
    log_q: (M, B).
    valid: None, or (B,), which examples count.

  Returns:
    () and (), float32, averaged over the examples that count.

  Example:
    >>> surrogate(jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [0.5]]))
    (Array(2.5, dtype=float32), Array(2., dtype=float32))
  """
  losses, count = losses.astype(jnp.float32), len(losses)
  mean = losses.mean(axis=0)
  valid = jnp.ones(mean.shape, bool) if valid is None else valid
  share = valid.astype(jnp.float32)
  share = share / jnp.maximum(share.sum(), 1.0)
  # L_m - mean L as differences in pairs: zero where all losses are the same.
  above = (losses[:, None] - losses[None]).sum(axis=1)
  advantages = lax.stop_gradient(above / (count * (count - 1)))
  # What is not finite in an example that does not count does not count either.
  advantages = jnp.where(valid[None], advantages, 0.0)
  score = (advantages * log_q).sum(axis=0)
  value = jnp.sum(share * jnp.where(valid, mean, 0.0))
  return value + jnp.sum(share * score), value


def routers_of(programs: Programs) -> list[str]:
  """Lists the paths of routed programs.

  Example:
    >>> routers_of({})
    []
  """
  return [
    path
    for path, program in programs.items()
    if isinstance(program, Gated) and isinstance(program.gate, Router)
  ]


def with_mask(programs: Programs, mask: Any) -> dict[str, Program]:
  """Tells routed programs which tokens are no padding, for one batch.

  Args:
    programs: path -> program.
    mask: (B, tokens...), True for tokens that count.

  Returns:
    The programs; those that are not routed as they are. For use with `bind`;
    `remix` takes the mask itself.

  Example:
    >>> with_mask({}, jnp.ones((2, 3), bool))
    {}
  """
  return {
    path: _masked(program, mask) if path in routers_of(programs) else program
    for path, program in programs.items()
  }


def _masked(program: Any, mask: Any) -> Gated:
  """Puts a mask into a routed program, for each of its layers."""
  lead = program.bank.a.shape[1:-2]
  wide = jnp.broadcast_to(
    mask.reshape((1,) * len(lead) + mask.shape), (*lead, *mask.shape)
  )
  return dataclasses.replace(program, params={**program.params, "mask": wide})


def _drawn(programs: Programs, key, mask, draw, log_prob) -> dict[str, Any]:
  """Returns the programs with routers that draw, each with its own key."""
  own = dict(programs)
  for path in routers_of(programs):
    program: Any = programs[path]
    if mask is not None:
      program = _masked(program, mask)
    lead = program.bank.a.shape[1:-2]
    keys = key_for(key, path)
    keys = jax.random.split(keys, lead) if lead else keys
    gate = dataclasses.replace(program.gate, draw=draw, log_prob=log_prob)
    params = {**program.params, "key": keys}
    own[path] = dataclasses.replace(program, params=params, gate=gate)
  return own


def _log_q(notes, paths, losses) -> jax.Array:
  """Sums log Q over all modules, for each example."""
  if losses.ndim != 1:
    raise ValueError(
      f"The loss returned {losses.shape}; needed is (B,), one number for each "
      "example, not their mean."
    )
  unused = sorted(set(paths) - set(notes))
  if unused:
    raise ValueError(
      f"{len(unused)} routed programs are on parameters that the loss does not "
      f"multiply by: {name_some(unused)}; leave them out."
    )
  found = [(path, note.log_prob) for path in paths for note in notes[path]]
  wrong = [
    f"{path}: {x.shape[-1:]}"
    for path, x in found
    if x.shape[-1:] != losses.shape
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} layers select for other examples than the {len(losses)} "
      f"of the loss: {name_some(wrong)}; a routed layer's input must have the "
      "examples on its first axis."
    )
  return sum(
    (x.reshape(-1, len(losses)).sum(axis=0) for _, x in found),
    start=jnp.zeros(losses.shape, jnp.float32),
  )


def _check(programs, key) -> None:
  """Raises ValueError unless there is a key and something to route."""
  if key is None:
    raise ValueError(
      "remix needs key=; give each step its own, as jax.random.fold_in(key, "
      "step)."
    )
  if not routers_of(programs):
    raise ValueError(
      f"None of the programs of {name_some(programs)} is routed; make some "
      "with routed, or take train."
    )


def _apart(programs, part) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits a trained part into all but the routers' parameters, and these."""
  paths = set(routers_of(programs))
  rest = {
    path: {"bank": own["bank"]} if path in paths else own
    for path, own in part.items()
  }
  return rest, {path: part[path]["params"] for path in paths}


def _joined(rest, routers) -> dict[str, Any]:
  """Undoes `_apart`."""
  return {
    path: {**own, "params": routers[path]} if path in routers else own
    for path, own in rest.items()
  }
