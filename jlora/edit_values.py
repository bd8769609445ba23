# SPDX-License-Identifier: Apache-2.0
"""Values fitted to what a model is to say: what `edit_key` then writes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy

with epy.lazy_imports():  # only where something is fitted
  import optax


def fit_value(
  loss: Callable[..., jax.Array],
  start: jax.Array,
  *context: Any,
  radius: float = 4.0,
  decay: float = 0.5,
  steps: int = 20,
  learning_rate: float = 0.5,
  until: float = 0.05,
) -> tuple[jax.Array, dict[str, list[float]]]:
  """What to add to a value so that the model says something else.

      min over ‖δ‖ ≤ radius ‖v‖ of loss(δ) + decay ‖δ‖ / ‖v‖²

  Adam from δ = 0, δ put back into the ball after each step. Defaults are
  those of ROME's code for GPT-2 XL; MEMIT takes radius 0.75 and 25 steps.

  Args:
    loss: `(delta (out,), *context) -> ()`, differentiable, in nats: as a rule
      the target's negative log-likelihood, a mean over prompts with different
      prefixes, plus 0.0625 KL(after ‖ before) of what follows the subject.
      Compiled once for each function and shapes: pass the same function, and
      parameters and tokens as context.
    start: (out,) v, what the layer answers now.
    *context: pytrees that the loss takes besides.
    radius: in units of ‖v‖.
    decay: of the norm of δ, which is not squared in the authors' code.
    steps: evaluations at the most; the last one moves nothing.
    learning_rate: Adam's.
    until: stops once the whole sum is below.

  Returns:
    δ (out,) float32, and {"loss": the whole sum, "norm": ‖δ‖} at each
    evaluation. Costs a forward and backward pass for each.

  Raises:
    ValueError: a start that is not a vector other than zero, no steps, or a
      loss that is not finite.

  Example:
    >>> far = lambda delta, target: jnp.sum((delta - target) ** 2)
    >>> start = jnp.array([3.0, 4.0])
    >>> delta, history = fit_value(far, start, jnp.array([0.0, 30.0]))
    >>> bool(jnp.linalg.norm(delta) <= 20), len(history["loss"])
    (True, 20)

  References:
    ROME (Meng et al., 2022), kmeng01/rome `compute_v`, read at 0874014.

  Approximation:
    The authors add δ to the layer's output at the subject's last token. Here
    the loss decides where it goes: `w + aᵀ δ` with `a` of `address_of` fits
    the very change that is deployed, at every token.
  """
  start = jnp.asarray(start, jnp.float32)
  size = float(jnp.linalg.norm(start))
  if start.ndim != 1 or not 0 < size < np.inf or steps < 1:
    raise ValueError(
      "start must be a vector (out,) other than zero and steps 1 or more, got "
      f"{start.shape} of norm {size} and {steps}."
    )
  delta = jnp.zeros_like(start)
  state = optax.adam(learning_rate).init(delta)
  history: dict[str, list[float]] = {"loss": [], "norm": []}
  for turn in range(steps):
    rates = learning_rate, decay / size**2, radius * size
    total, norm, moved, state = _step(loss, delta, state, rates, context)
    history["loss"].append(float(total))
    history["norm"].append(float(norm))
    if not np.isfinite(history["loss"][-1]):
      raise ValueError(
        f"the loss is {history['loss'][-1]} at step {turn}, ‖δ‖ {float(norm)}: "
        "take a smaller learning_rate or radius."
      )
    if history["loss"][-1] < until:
      break
    if turn < steps - 1:
      delta = moved
  return delta, history


@functools.partial(jax.jit, static_argnums=0)
def _step(loss, delta, state, rates, context):
  """The sum and the norm at δ, the next δ and the optimiser's state."""
  rate, decay, radius = rates

  def whole(delta):
    # Zero is where it starts, and where the norm has no gradient.
    norm = optax.safe_norm(delta, 1e-12)
    return loss(delta, *context).astype(jnp.float32) + decay * norm

  total, gradient = jax.value_and_grad(whole)(delta)
  with jax.numpy_dtype_promotion("standard"):  # Adam counts its steps in int32
    change, state = optax.adam(rate).update(gradient, state)
  moved = optax.projections.projection_l2_ball(delta + change, radius)
  return total, jnp.linalg.norm(delta), moved, state
