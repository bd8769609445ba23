# SPDX-License-Identifier: Apache-2.0
"""Trains programs to answer as a teacher does, on inputs without labels.

    a, b  ←  optimiser(∇ KL(p_teacher ‖ p_student with programs))

With the finetune as the teacher that is what a truncated adapter lost: the
low-rank change nearest in weights is not the nearest in outputs. With the old
base and its adapter as the teacher it carries the adapter to another base.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epy

from jlora.adapting.binding import Program, bind
from jlora.adapting.transforms import adapt
from jlora.training.trainer import Trainer, beside, train

with epy.lazy_imports():  # only where something is trained
  import optax

Apply = Callable[..., jax.Array]


def distil(
  model: Apply,
  optimiser: "optax.GradientTransformation",
  *,
  through: Callable[..., jax.Array] = beside,
  dtype: Any = None,
) -> Trainer:
  """Makes the init and update functions that train programs on a teacher.

      a, b  ←  optimiser(∇ mean KL(p(source + adapter) ‖ p(target + programs)))

  Args:
    model: `(params, *inputs) -> logits (..., classes)`; every position counts.
    optimiser: an optax transformation. Factors from `extract` have entries of
      about `√(σ/in)` and `√(σ/out)`; a hundredth of that is a fitting learning
      rate for Adam.
    through: as for `train`.
    dtype: as for `train`.

  Returns:
    Trainer. `update(programs, state, target, source, adapter, *inputs)` returns
    programs, state and the divergence before the step, in nats per position.
    The teacher is `source` with `adapter`, path -> program; {} is the source
    alone, as a finetune. Source and target may have different structures, and
    other functions than softmax are left to `train`. A step costs a forward
    pass of the teacher and one of the student with its backward pass; holds
    both models and both logits. Jit it, and donate programs and state.

  Example:
    >>> model = lambda params, tokens: params["w"][tokens]
    >>> base, tuned = ({"w": jnp.eye(4) * k} for k in (1.0, 3.0))
    >>> ones = jnp.ones((1, 4)) / 10
    >>> from jlora.loras import Lora
    >>> programs = {"w": Lora(ones, ones, jnp.float32(1))}
    >>> init, update = distil(model, optax.sgd(0.1))
    >>> state, tokens = init(programs), jnp.arange(4)[None]
    >>> programs, state, first = update(
    ...   programs, state, base, tuned, {}, tokens)
    >>> *_, second = update(programs, state, base, tuned, {}, tokens)
    >>> bool(second <= first)
    True

  References:
    Hinton et al. (2015), distillation. Trans-LoRA (arXiv 2405.17258) carries
    adapters to other bases so.
  """
  loss = functools.partial(_divergence, model)
  init, step = train(loss, optimiser, through=through, dtype=dtype)

  def update(
    programs: Mapping[str, Program],
    state: Any,
    target: Any,
    source: Any,
    adapter: Mapping[str, Program],
    *inputs: Any,
  ):
    """Takes a step; returns programs, state and divergence before the step."""
    teacher = adapt(model)(bind(source, adapter), *inputs)
    teacher = jax.lax.stop_gradient(teacher)
    return step(programs, state, target, teacher, *inputs)

  return Trainer(init, update)


def _divergence(model: Apply, params: Any, teacher: jax.Array, *inputs: Any):
  """Computes the mean KL divergence of a model from a teacher's logits."""
  student = model(params, *inputs).astype(jnp.float32)
  teacher = jax.nn.log_softmax(teacher.astype(jnp.float32))
  gap = teacher - jax.nn.log_softmax(student)
  return jnp.sum(jnp.exp(teacher) * gap, axis=-1).mean()
