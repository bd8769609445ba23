# SPDX-License-Identifier: Apache-2.0
"""Finetunes of one base as experts, each token sent through a few of them.

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

_MOST_ALIKE = 5.0  # condition number of the rows from which we warn


def router_rows(
  positive: Sequence[Any], negative: Sequence[Any] | None = None
) -> np.ndarray:
  """A router from hidden states of example prompts, (experts, d) float32.

      row_e = v_e / ‖v_e‖,   v_e = mean of positive_e - mean of negative_e

  Args:
    positive: of each expert (prompts, d), what the router will read for prompts
      that are the expert's: take them with `dense_inputs`.
    negative: likewise of prompts that are not; None is none.

  Returns:
    (experts, d). A token whose hidden state lies along a row goes there.

  Raises:
    ValueError: shapes that do not fit, states that are not finite, or two
      experts with the same row: their prompts say the same.

  Example:
    >>> router_rows([np.array([[3.0, 0.0]]), np.array([[0.0, 2.0]])])
    array([[1., 0.],
           [0., 1.]], dtype=float32)

  References:
    mergekit-moe's "hidden" gates, as their documentation describes them.

  Approximation: the states here are those that the router reads, behind the
    norm; which ones mergekit averages is known to us at second hand.
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
  """A router of random directions, to be trained: (experts, d) float32.

  Args:
    key: PRNG key.
    experts: how many.
    d: hidden size.

  Returns:
    Rows of length 1 in the mean. For a uniform router take zeros: every expert
    then has the same score, and with `chosen` below their number the first
    ones are taken always.

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
  """A mixture whose experts stay adapters of one block, never summed.

      y = Σ_e g_e block(params + change_e, x),
      g = softmax over the `chosen` largest of x rowsᵀ, zero elsewhere

  Args:
    block: (params, x (..., d)) -> (..., out), an MLP say.
    params: its parameters, shared by all experts.
    experts: of each the programs on params, path -> Lora.
    rows: (experts, d), as `router_rows` gives them.
    x: (..., d).
    chosen: experts that a token goes through.

  Returns:
    (..., out) in x's dtype. Every expert computes every token and the gates of
    those not chosen are zero: exact, of static shape, for experts times the
    block's operations and none of its memory. Pure; differentiable.

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
  """Nothing, if so many of the experts can be chosen.

  Args:
    chosen: experts that a token goes through.
    experts: how many there are.

  Raises:
    ValueError: if chosen is out of range.

  Example:
    >>> check_chosen(2, 3)
  """
  if not 1 <= chosen <= experts:
    raise ValueError(
      f"chosen is {chosen}; of {experts} experts take 1 to {experts}."
    )


def _means(name: str, states: Sequence[Any], d: int | None) -> np.ndarray:
  """The mean of each expert's (prompts, d), in float64; of none, zeros.

  Without d the first expert's counts, and each needs a prompt.
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
