# SPDX-License-Identifier: Apache-2.0
"""Factors trained on: an adapter nearer to the finetune in what the model says.

The best low-rank change in weights is not the best in outputs. A few steps on
unlabelled text, the finetune being the teacher, close a part of the gap.
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
  """An `init` and an `update`, pure, in the manner of optax.

  Attributes:
    init: loras -> state.
    update: (loras, state, base, finetuned, tokens) -> (loras, state, kl), the
      divergence being that before the step, in nats per token.
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
  """How far base and adapter are from the finetune, differentiable.

      mean over positions of KL(p_finetuned ‖ p_base+adapter)

  Args:
    model: `(params, tokens) -> logits`.
    base: its parameters.
    finetuned: the same structure.
    loras: path -> Lora, paths of `base`.
    tokens: (batch, time) int32; every position counts.

  Returns:
    () float32, nats per token. Holds both models' logits and forms the summed
    weights; for measuring without gradients take `mean_kl`.

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
  """The refiner of a model: factors in, factors that say the same more nearly.

      a, b  ←  optimiser(∇ KL(p_finetuned ‖ p_base + scale aᵀ b))

  Args:
    model: `(params, tokens) -> logits`.
    optimiser: an optax transformation of the factors' gradient. Factors from
      `extract` have entries about `√(σ/in)` and `√(σ/out)`: a hundredth of that
      is a fitting step for Adam.

  Returns:
    Refiner. Scales stay; ranks and dtypes stay; gradients are of a and b in
    float32 if they are. Jit `update`, donate loras and state. A step costs a
    forward of the teacher, a forward and backward of the student, and the dense
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
    return optimiser.init(_factors(loras))

  def update(loras, state, base, finetuned, tokens):
    def loss(factors):
      return distance(model, base, finetuned, _with(loras, factors), tokens)

    factors = _factors(loras)
    value, gradient = jax.value_and_grad(loss)(factors)
    change, state = optimiser.update(gradient, state, factors)
    return _with(loras, optax.apply_updates(factors, change)), state, value

  return Refiner(init, update)


def _factors(loras):
  """What is trained: the scales are not."""
  return {path: (lora.a, lora.b) for path, lora in loras.items()}


def _with(loras, factors):
  return {
    path: Lora(a, b, loras[path].scale) for path, (a, b) in factors.items()
  }
