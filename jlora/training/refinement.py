# SPDX-License-Identifier: Apache-2.0
"""Trains an extracted adapter further, to match the finetune's outputs.

The low-rank change nearest in weights is not the nearest in outputs. A few
steps of distillation on unlabelled text, with the finetune as the teacher,
close a part of the gap.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epy

from jlora.adapting.transforms import apply
from jlora.loras import Lora, Loras

with epy.lazy_imports():  # only where something is trained
  import optax

Apply = Callable[[Any, jax.Array], jax.Array]


class Refiner(NamedTuple):
  """A pair of pure functions `init` and `update`, as in optax.

  Attributes:
    init: loras -> state.
    update: (loras, state, base, finetuned, tokens) -> (loras, state, kl), with
      the divergence before the step, in nats per token.
  """

  init: Callable[[Loras], Any]
  update: Callable[..., tuple[Loras, Any, jax.Array]]


def distance(
  model: Apply,
  base: Any,
  finetuned: Any,
  loras: Mapping[str, Lora],
  tokens: jax.Array,
) -> jax.Array:
  """Computes the mean KL divergence of base and adapter from the finetune.

      mean over positions of KL(p_finetuned ‖ p_base+adapter)

  Differentiable in the Loras. Holds both models' logits and forms the summed
  weights; to measure without gradients use `mean_kl`.

  Args:
    model: `(params, tokens) -> logits`.
    base: its parameters.
    finetuned: the same structure.
    loras: path -> Lora, paths of `base`.
    tokens: (batch, time) int32; every position counts.

  Returns:
    () float32, nats per token.

  Example:
    >>> model = lambda params, tokens: params["w"][tokens]
    >>> base, tuned = ({"w": jnp.eye(4) * k} for k in (1.0, 3.0))
    >>> tokens = jnp.arange(4)[None]
    >>> distance(model, base, tuned, {}, tokens).round(4)
    Array(0.3446, dtype=float32)
  """
  teacher = model(finetuned, tokens).astype(jnp.float32)
  student = model(apply(base, loras), tokens).astype(jnp.float32)
  teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher))
  gap = teacher - jax.nn.log_softmax(student)
  return jnp.sum(jnp.exp(teacher) * gap, axis=-1).mean()


def refine(model: Apply, optimiser: "optax.GradientTransformation") -> Refiner:
  """Makes the init and update functions that distil a finetune into an adapter.

      a, b  ←  optimiser(∇ KL(p_finetuned ‖ p_base + scale aᵀ b))

  Args:
    model: `(params, tokens) -> logits`.
    optimiser: an optax transformation of the factors' gradient. Factors from
      `extract` have entries of about `√(σ/in)` and `√(σ/out)`; a hundredth of
      that is a fitting learning rate for Adam.

  Returns:
    Refiner. Scales, ranks and dtypes stay; gradients have the dtypes of a and
    b. Jit `update` and donate loras and state. A step costs a forward pass of
    the teacher, a forward and backward pass of the student, and the dense
    change and gradient of every adapted weight.

  Example:
    >>> model = lambda params, tokens: params["w"][tokens]
    >>> base, tuned = ({"w": jnp.eye(4) * k} for k in (1.0, 3.0))
    >>> ones = jnp.ones((1, 4)) / 10
    >>> loras = {"w": Lora(ones, ones, jnp.float32(1))}
    >>> init, update = refine(model, optax.sgd(0.1))
    >>> state, tokens = init(loras), jnp.arange(4)[None]
    >>> loras, state, first = update(loras, state, base, tuned, tokens)
    >>> _, _, second = update(loras, state, base, tuned, tokens)
    >>> bool(second <= first)
    True

  References:
    Hinton et al. (2015), distillation; started from the truncated SVD.
  """

  def init(loras):
    """Returns the optimiser's initial state."""
    return optimiser.init(_factors(loras))

  def update(loras, state, base, finetuned, tokens):
    """Takes a step; returns Loras, state and divergence before the step."""

    def loss(factors):
      """Computes the divergence for given factors."""
      return distance(model, base, finetuned, _with(loras, factors), tokens)

    factors = _factors(loras)
    value, gradient = jax.value_and_grad(loss)(factors)
    change, state = optimiser.update(gradient, state, factors)
    return _with(loras, optax.apply_updates(factors, change)), state, value

  return Refiner(init, update)


def _factors(loras):
  """Returns the factors of Loras, without the scales."""
  return {path: (lora.a, lora.b) for path, lora in loras.items()}


def _with(loras, factors):
  """Replaces the factors of Loras."""
  return {
    path: Lora(a, b, loras[path].scale) for path, (a, b) in factors.items()
  }
