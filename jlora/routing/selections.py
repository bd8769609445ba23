# SPDX-License-Identifier: Apache-2.0
"""ReMix: selections of k Loras with constant weights, drawn and scored.

y = x w + ω Σ_{j in selection} (x a_jᵀ) b_j,   q = softmax(P z)
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jlora.adapting.programs import Gated
from jlora.loras import Lora
from jlora.routing.choices import by_sequence
from jlora.routing.mixtures import check_chosen
from jlora.training.inits import Scaling, by_rank

_MOST_ORDERED = 4  # adapters of a set whose orders are all summed


class Selection(NamedTuple):
  """Adapters that were selected, and how probable that was.

  Attributes:
    ids: (..., k) int32, in the order of the draw.
    log_prob: (...) float32.
  """

  ids: jax.Array
  log_prob: jax.Array


def draw(key: jax.Array, logits: jax.Array, chosen: int) -> Selection:
  """Draws adapters without replacement, one after the other.

      ids = the `chosen` largest of logits + Gumbel noise

  That is an exact sample of the ordered draw from q = softmax(logits).

  Args:
    key: PRNG key.
    logits: (..., n), of any floating dtype; -inf is never drawn.
    chosen: k, how many.

  Returns:
    Selection of ids (..., k) int32 and their `log_prob` as an ordered draw,
    which is differentiable in the logits.

  Raises:
    ValueError: k out of range, or above the number of logits that are not -inf
      (not under jit).

  Example:
    >>> logits = jnp.array([0.0, -jnp.inf, 1.0])
    >>> sorted(draw(jax.random.key(0), logits, 2).ids.tolist())
    [0, 2]

  References:
    Kool et al. (2019), Stochastic beams and where to find them.
  """
  check_chosen(chosen, logits.shape[-1])
  logits = logits.astype(jnp.float32)
  if not isinstance(logits, Tracer):
    left = int(jnp.min(jnp.sum(logits > -jnp.inf, axis=-1)))
    if left < chosen:
      raise ValueError(
        f"{chosen} adapters are to be drawn where {left} are left on; ask for "
        "fewer, or switch some on."
      )
  noise = jax.random.gumbel(key, logits.shape, jnp.float32)
  ids = lax.top_k(lax.stop_gradient(logits) + noise, chosen)[1]
  ids = ids.astype(jnp.int32)
  return Selection(ids, log_prob(logits, ids))


def log_prob(
  logits: jax.Array, ids: jax.Array, *, ordered: bool = True
) -> jax.Array:
  """Computes the log-probability of a draw without replacement.

      log Q = Σ_t [ log q_{i_t} - log Σ_{u not drawn before t} q_u ]

  Args:
    logits: (..., n), q = softmax of them.
    ids: (..., k) integers, with the same leading axes.
    ordered: of the draw in this order, as the paper has it; False sums over the
      k! orders of the set, for k <= 4.

  Returns:
    (...) float32; -inf for a draw with a logit of -inf or an adapter twice.
    Differentiable; each gradient sums to zero. The sum over what is left is
    computed by logsumexp, never as 1 - Σ.

  Raises:
    ValueError: leading axes that differ, k out of range, or a set of more than
      four.

  Example:
    >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    >>> draws = jnp.array([0, 1])
    >>> round(float(jnp.exp(log_prob(logits, draws))), 4)
    0.3
    >>> round(float(jnp.exp(log_prob(logits, draws, ordered=False))), 4)
    0.5143

  References:
    Plackett (1975); Luce (1959).
  """
  if logits.shape[:-1] != ids.shape[:-1]:
    raise ValueError(
      f"logits {logits.shape} and ids {ids.shape} need the same axes before "
      "the last."
    )
  count = ids.shape[-1]
  check_chosen(count, logits.shape[-1])
  logits = logits.astype(jnp.float32)
  if ordered:
    return _ordered(logits, ids)
  if count > _MOST_ORDERED:
    raise ValueError(
      f"A set of {count} has {math.factorial(count)} orders; up to "
      f"{_MOST_ORDERED} are summed. Take ordered=True."
    )
  orders = [
    _ordered(logits, ids[..., jnp.array(order)])
    for order in itertools.permutations(range(count))
  ]
  return _log_sum(jnp.stack(orders, axis=-1))


def _ordered(logits, ids):
  """Computes the log-probability of an ordered draw, place by place."""
  places = jax.nn.one_hot(ids, logits.shape[-1], dtype=jnp.int32)
  before = jnp.cumsum(places, axis=-2) - places
  left = jnp.where(before > 0, -jnp.inf, logits[..., None, :])
  picked = jnp.take_along_axis(left, ids[..., None], axis=-1)[..., 0]
  terms = picked - _log_sum(left, empty=0.0)
  return terms.sum(axis=-1)


def _log_sum(x, empty=-jnp.inf):
  """Computes logsumexp over the last axis, and `empty` if all are -inf.

  Its gradient there is zero, where that of logsumexp is NaN.
  """
  is_some = (x > -jnp.inf).any(axis=-1)
  safe = jnp.where(is_some[..., None], x, 0.0)
  return jnp.where(is_some, jax.nn.logsumexp(safe, axis=-1), empty)


def gate(ids: jax.Array, count: int, rank: int, weight: Any = 1.0) -> jax.Array:
  """Writes a selection as a gate on the rank axis of concatenated adapters.

      gate_(i, r) = ω for selected i, 0 elsewhere

  Args:
    ids: (..., k) integers; one outside of [0, n) selects nothing.
    count: n, how many adapters there are.
    rank: r of each.
    weight: ω, or (k,) for one at each place of the draw.

  Returns:
    (..., n r) float32, for `lora_dot` with a (n r, in) and b (n r, out).

  Example:
    >>> gate(jnp.array([2, 0]), 3, 2, 0.5)
    Array([0.5, 0.5, 0. , 0. , 0.5, 0.5], dtype=float32)
  """
  return jnp.repeat(_on(ids, count, weight), rank, axis=-1)


def _on(ids, count, weight):
  """Returns (..., n): the weight of each adapter that is selected."""
  places = jax.nn.one_hot(ids, count, dtype=jnp.float32)
  weight = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), ids.shape)
  return jnp.einsum("...kn,...k->...n", places, weight)


def effective(weights: jax.Array) -> jax.Array:
  """Counts how many adapters a mixture effectively has.

      1 / Σ π_i²,   π = weights / Σ weights

  Args:
    weights: (..., n), not negative.

  Returns:
    (...) float32: k for k equal weights, 1 for a single one, 0 for none.

  Example:
    >>> effective(jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    Array([2., 1.], dtype=float32)
  """
  weights = weights.astype(jnp.float32)
  squares = jnp.sum(weights * weights, axis=-1)
  total = jnp.sum(weights, axis=-1)
  return jnp.where(
    squares > 0, total**2 / jnp.where(squares > 0, squares, 1), 0
  )


@dataclasses.dataclass(frozen=True, slots=True)
class Router:
  """The gate of a routed program: ω on selected adapters. Equal ones are equal.

  params: {"rows": P (n, in)}, and where it is trained or masked "key", "mask".

  Attributes:
    chosen: k.
    weight: ω, or one for each place of the draw.
    reads: (x, mask) -> z, what P multiplies.
    through: whether gradients of log Q flow through z.
    draw: None takes the k largest; or as `draw`, which takes params["key"].
    log_prob: (logits, ids) -> log Q.
  """

  chosen: int
  weight: float | tuple[float, ...]
  reads: Callable[[jax.Array, Any], jax.Array] = by_sequence
  through: bool = False
  draw: Callable[[jax.Array, jax.Array, int], Selection] | None = None
  log_prob: Callable[[jax.Array, jax.Array], jax.Array] = log_prob

  def __call__(self, params: Any, x: jax.Array) -> tuple[jax.Array, Selection]:
    """Returns gates (..., n) and the Selection, its log_prob (examples,)."""
    rows, mask = params["rows"], params.get("mask")
    z = self.reads(x, mask)
    z = z if self.through else lax.stop_gradient(z)
    logits = jnp.einsum(
      "...i,ni->...n",
      z.astype(jnp.float32),
      rows.astype(jnp.float32),
      precision=lax.Precision.HIGHEST,
    )
    count = rows.shape[0]
    if self.draw is None:
      ids = lax.top_k(logits, self.chosen)[1].astype(jnp.int32)
    else:
      ids = self.draw(params["key"], logits, self.chosen).ids
    if self.chosen == count:  # whatever the order, the same are on
      score = jnp.zeros(logits.shape[:-1], jnp.float32)
    else:
      score = self.log_prob(logits, ids)
    if mask is not None and mask.shape == score.shape:
      score = jnp.where(mask, score, 0.0)
    score = score.sum(axis=tuple(range(1, score.ndim)))
    return _on(ids, count, self.weight), Selection(ids, score)


def routed(
  bank: Lora,
  rows: Any = None,
  *,
  chosen: int,
  scaling: Scaling = by_rank,
  reads: Callable[[jax.Array, Any], jax.Array] = by_sequence,
  through: bool = False,
) -> Gated:
  """Makes a program that selects k of n Loras, all with the same weight.

      q = softmax(P z),   y = x w + ω Σ_{j of the k largest q} (x a_jᵀ) b_j

  The number of adapters that are effectively active is k, whatever P is.

  Args:
    bank: a (n, ..., r, in), b (n, ..., r, out), scale (n, ...), by which ω is
      multiplied: one path of `make_bank`, or new Loras with scales of 1.
    rows: P, (..., n, in), with the axes of layers first; None is zeros, where q
      is uniform and the first k are always taken: train it, by `remix`.
    chosen: k.
    scaling: (2, k r) -> ω: `by_rank` 2/(k r) or `by_root` 2/√(k r).
    reads: (x, mask) -> z, such as `by_sequence`, one selection for an example,
      or `by_token`, one for each token.
    through: whether log Q is differentiated through z as well.

  Returns:
    Gated. Of equal logits those of the lowest index are taken. Its notes are
    Selections, with the log-probability of the tokens of each example summed.

  Raises:
    ValueError: k out of range, a bank without an axis of adapters, or rows of
      another shape.

  Example:
    >>> bank = Lora(jnp.ones((3, 1, 2)), jnp.ones((3, 1, 2)), jnp.ones(3))
    >>> program = routed(bank, jnp.eye(3)[:, :2], chosen=1)
    >>> program.gate(program.params, jnp.array([[0.0, 1.0]]))[0]
    Array([[0., 2., 0.]], dtype=float32)

  References:
    ReMix, arXiv 2603.10160.

  Approximation: what the router reads, its start and its use in inference are
    not settled by the paper's text that was at hand; `reads` and `rows` choose.
  """
  if bank.a.ndim < 3:
    raise ValueError(
      f"The bank's a is {bank.a.shape}; needed is (n, ..., r, in), with an "
      "axis of adapters first: make it with make_bank."
    )
  count, *lead = bank.a.shape[:-2]
  check_chosen(chosen, count)
  wanted = (*lead, count, bank.a.shape[-1])
  rows = jnp.zeros(wanted, jnp.float32) if rows is None else jnp.asarray(rows)
  if rows.shape != wanted:
    raise ValueError(f"The router's rows are {rows.shape}, needed is {wanted}.")
  weight = scaling(2.0, chosen * bank.rank)
  return Gated(bank, {"rows": rows}, Router(chosen, weight, reads, through))
