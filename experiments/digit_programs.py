# SPDX-License-Identifier: Apache-2.0
"""A branch that obeys a class, Loras to compare it with, and their training.

The class is no part of what a layer reads, so it travels in the branch's
parameters: `with_hint` puts a row of it for each row of x there before a call.
Kept and trained is the branch without it: the loss puts the batch's own there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.digit_images import CLASSES
from experiments.digit_models import make_loop, schedule
from jlora import training


def control(params: Any, x: jax.Array) -> jax.Array:
  """What a branch writes: a function of what the layer reads and of the hint.

      silu(x A + hint B) C

  Args:
    params: "net" with "read" (in, h), "hear" (10, h), "write" (h, out), and
      "hint" (n, 10).
    x: (n, in).

  Returns:
    (n, out).
  """
  net = params["net"]
  heard = x @ net["read"] + params["hint"] @ net["hear"]
  return jax.nn.silu(heard) @ net["write"]


def init_control(params: Any, key: jax.Array, hidden: int = 48) -> Any:
  """Branches that change nothing yet, one where a block writes to the stream.

  Args:
    params: a Denoiser's.
    key: PRNG key.
    hidden: width of each.

  Returns:
    {path: Branch} without a hint; C is zero, as ControlNet's last layer.
  """
  found = {}
  for path, leaf in jlora.paths.flatten(params).items():
    if path.startswith("down_") and path.endswith("kernel"):
      key, first, second = jax.random.split(key, 3)
      n_in, n_out = leaf.shape
      net = {
        "read": jax.random.normal(first, (n_in, hidden)) / np.sqrt(n_in),
        "hear": jax.random.normal(second, (CLASSES, hidden)),
        "write": jnp.zeros((hidden, n_out)),
      }
      found[path] = jlora.Branch(control, {"net": net})
  return found


def with_hint(branches: Mapping[str, Any], hint: jax.Array) -> dict[str, Any]:
  """Branches that are told what to do in this call.

  Args:
    branches: path -> Branch whose params have a "net".
    hint: (n, 10), a row for each row of the batch.

  Returns:
    {path: Branch}.
  """
  return {
    path: dataclasses.replace(
      branch, params={"net": branch.params["net"], "hint": hint}
    )
    for path, branch in branches.items()
  }


def obeying(loss, params, programs, batch, dropout=None) -> jax.Array:
  """A loss with branches; for `jlora.training.train`'s `through`.

  Args:
    loss: `(params, *parts) -> ()`.
    params: its parameters.
    programs: {path: Branch} without a hint.
    batch: the parts, then the hint.
    dropout: as for `bind`.

  Returns:
    ().
  """
  *parts, hint = batch
  told = with_hint(programs, hint)
  return training.beside(loss, params, told, tuple(parts), dropout)


def unasked(loss, params, programs, batch, dropout=None) -> jax.Array:
  """A loss with Loras, which never see the hint; for `through` too.

  Args:
    loss: `(params, *parts) -> ()`.
    params: its parameters.
    programs: {path: Lora}.
    batch: the parts, then the hint.
    dropout: as for `bind`.

  Returns:
    ().
  """
  return training.beside(loss, params, programs, batch[:-1], dropout)


def make_program_trainer(
  loss: Callable[..., jax.Array],
  through: Callable[..., jax.Array],
  steps: int,
  rate: float,
  batch: int,
) -> Callable[..., tuple[Any, float]]:
  """Training of programs on a frozen base.

  Args:
    loss: `(params, x_t, t, x) -> ()`.
    through: `obeying` or `unasked`.
    steps: how many.
    rate: Adam's largest learning rate.
    batch: images a step.

  Returns:
    (programs, params, data, key) -> programs and the last loss; params may be
    what `jlora.bind` gave: that is frozen too.
  """
  init, update = training.train(loss, schedule(rate, steps), through=through)
  loop = make_loop(update, batch)

  def train(programs, params, data, key):
    return loop(programs, init(programs), params, data, key, steps)

  return train


def shuffle(loras: jlora.Loras, key: jax.Array) -> jlora.Loras:
  """Loras of the same entries in another order, the change's norm kept.

  Args:
    loras: path -> Lora.
    key: PRNG key.

  Returns:
    path -> Lora.
  """
  found = {}
  for path, lora in loras.items():
    key, first, second = jax.random.split(key, 3)
    a = jax.random.permutation(first, lora.a.ravel()).reshape(lora.a.shape)
    b = jax.random.permutation(second, lora.b.ravel()).reshape(lora.b.shape)
    other = jlora.Lora(a, b, lora.scale)
    size, now = (jnp.linalg.norm(jlora.loras.dense(x)) for x in (lora, other))
    found[path] = dataclasses.replace(other, scale=lora.scale * size / now)
  return found
