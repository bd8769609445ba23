# SPDX-License-Identifier: Apache-2.0
"""Mixes finetunes of one base as experts, a few of them for each token.

y = Σ_e g_e expert_e(x),   g = softmax over the k largest of x rowsᵀ
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapting.binding import Programs, bind
from jlora.adapting.transforms import adapt
from jlora.messages import name_some

_MOST_ALIKE = 5.0  # condition number of the rows above which we warn


def router_rows(
  positive: Sequence[Any], negative: Sequence[Any] | None = None
) -> np.ndarray:
  """Computes a router's rows from hidden states of example prompts.

      row_e = v_e / ‖v_e‖,   v_e = mean of positive_e - mean of negative_e

  Args:
    positive: for each expert (prompts, d), the router's inputs on prompts that
      should go to the expert; collect them with `dense_inputs`.
    negative: the same on prompts that should not; None is none.

  Returns:
    (experts, d) float32. A token whose hidden state points along a row goes to
    that expert.

  Raises:
    ValueError: shapes that do not fit, states that are not finite, or two
      experts with the same row, because their prompts are alike.

  Warns:
    UserWarning: the rows are nearly dependent.

  Example:
    >>> router_rows([np.array([[3.0, 0.0]]), np.array([[0.0, 2.0]])])
    array([[1., 0.],
           [0., 1.]], dtype=float32)

  References:
    mergekit-moe's "hidden" gates, as their documentation describes them.

  Approximation: the states are the router's inputs, after the norm. Which
    states mergekit averages is not documented at first hand.
  """
  rows = _means("positive", positive, None)
  if negative is not None:
    if len(negative) != len(rows):
      raise ValueError(
        f"positive has states of {len(rows)} experts, negative of "
        f"{len(negative)}; an expert without any takes np.zeros((0, d))."
      )
    rows = rows - _means("negative", negative, rows.shape[1])
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  usable = np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)
  if not usable.all():
    wrong = [str(i) for i in np.flatnonzero(~usable)]
    raise ValueError(
      f"The mean states of experts {name_some(wrong)} are zero or not finite: "
      "no direction leads to them. Give other prompts."
    )
  rows = (rows / norms).astype(np.float32)
  alike = np.argwhere(np.triu(rows @ rows.T > 1 - 1e-6, 1)).tolist()
  if alike:
    pairs = [f"{left} and {right}" for left, right in alike]
    raise ValueError(
      f"The prompts of experts {name_some(pairs)} say the same; no router can "
      "tell them apart. Give each its own."
    )
  condition = float(np.linalg.cond(rows))
  if condition > _MOST_ALIKE:
    warnings.warn(
      f"The router's rows are nearly dependent (condition {condition:.1f}): "
      "give prompts that differ more, or negative ones.",
      stacklevel=2,
    )
  return rows


def random_rows(key: jax.Array, experts: int, d: int) -> np.ndarray:
  """Draws a router's rows at random, to be trained.

  Args:
    key: PRNG key.
    experts: number of experts.
    d: hidden size.

  Returns:
    (experts, d) float32, rows of length about 1. Zeros would give every expert
    the same score, so that with `chosen` below their number the first ones are
    always taken.

  Example:
    >>> random_rows(jax.random.key(0), 2, 3).shape
    (2, 3)
  """
  return np.asarray(jax.random.normal(key, (experts, d)) / jnp.sqrt(d * 1.0))


def mix_experts(
  block: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  experts: Sequence[Programs],
  rows: Any,
  x: jax.Array,
  *,
  chosen: int = 2,
) -> jax.Array:
  """Runs a mixture of experts that are one block with different adapters.

      y = Σ_e g_e block(params + change_e, x),
      g = softmax over the `chosen` largest of x rowsᵀ, zero elsewhere

  Args:
    block: (params, x (..., d)) -> (..., out), for example an MLP.
    params: its parameters, shared by all experts.
    experts: for each expert its programs on params, path -> Lora.
    rows: (experts, d), as from `router_rows`.
    x: (..., d).
    chosen: number of experts for each token.

  Returns:
    (..., out) in x's dtype. Every expert computes every token, with gates of
    zero for those not chosen: exact and of static shape, but it costs the
    block's operations times the number of experts. The adapters are never
    summed into weights. Pure; differentiable.

  Raises:
    ValueError: rows that do not fit, or `chosen` out of range.

  Example:
    >>> from jlora.loras import Lora
    >>> lora = Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.float32(1))
    >>> block = lambda params, x: x @ params["w"]
    >>> mix_experts(block, {"w": jnp.eye(2)}, [{"w": lora}, {}], jnp.eye(2),
    ...             jnp.array([[1.0, 0.0], [0.0, 1.0]]), chosen=1)
    Array([[2., 1.],
           [0., 1.]], dtype=float32)

  References:
    Jiang et al. (2024), Mixtral of Experts.
  """
  rows = jnp.asarray(rows)
  if rows.shape != (len(experts), x.shape[-1]):
    raise ValueError(
      f"rows are {rows.shape}; {len(experts)} experts of x {x.shape} need "
      f"{(len(experts), x.shape[-1])}."
    )
  check_chosen(chosen, len(experts))
  scores = x.astype(jnp.float32) @ rows.astype(jnp.float32).T
  largest, at = jax.lax.top_k(scores, chosen)
  places = jax.nn.one_hot(at, len(experts), dtype=jnp.float32)
  gates = (jax.nn.softmax(largest)[..., None] * places).sum(-2)
  run = adapt(block)
  outs = [run(bind(params, expert), x) for expert in experts]
  total = sum(
    gates[..., i, None] * out.astype(jnp.float32) for i, out in enumerate(outs)
  )
  return jnp.asarray(total).astype(x.dtype)


def check_chosen(chosen: int, experts: int) -> None:
  """Raises unless `chosen` is between 1 and the number of experts."""
  if not 1 <= chosen <= experts:
    raise ValueError(
      f"chosen is {chosen}; of {experts} experts take 1 to {experts}."
    )


def _means(name: str, states: Sequence[Any], d: int | None) -> np.ndarray:
  """Averages each expert's (prompts, d) in float64; no prompts give zeros.

  Without d, the first expert's is used, and each expert needs a prompt.
  """
  wide = [np.asarray(own, np.float64) for own in states]
  needs_prompts = d is None
  wanted = wide[0].shape[-1] if d is None and wide and wide[0].ndim else d
  wrong = [
    f"expert {i}: {own.shape}"
    for i, own in enumerate(wide)
    if own.ndim != 2
    or own.shape[1] != wanted
    or (needs_prompts and not len(own))
  ]
  if wrong or not wide:
    least = "at least one prompt" if needs_prompts else "prompts"
    raise ValueError(
      f"{name} states are (prompts, {wanted}) for each expert, with {least}: "
      f"{name_some(wrong) or 'there is no expert'}."
    )
  return np.stack(
    [own.mean(0) if len(own) else np.zeros(own.shape[1]) for own in wide]
  )
