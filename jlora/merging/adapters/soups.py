# SPDX-License-Identifier: Apache-2.0
"""Learns how much of each frozen adapter acts in which module.

    y = x w + Σ_i h(z)_i s_i (x a_iᵀ) b_i          z (n,) of a module, trained

One formula with different activations h, starts and losses: LoRA Soups (CAT),
Recycling, AdaMerging. The result is an exact sum, a Lora of the ranks' sum.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy

from jlora.loras import Lora, Loras
from jlora.merging.adapters.concatenation import (
  by_path,
  concat,
  leading_of,
)
from jlora.messages import name_some
from jlora.paths import key_for
from jlora.training.trainer import Loss, beside

with epy.lazy_imports():  # only where something is trained
  import optax

Adapters = Sequence[Mapping[str, Lora]]
Weights = Mapping[str, Any]
Granularity = Callable[[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]

# Numbers with separators around them are layers; the first one is.
_NUMBERED = re.compile(r"(?:.*?[./_])??\d+(?=[./])")


def free(z: Any) -> Any:
  """Takes the weights as they are: h(z) = z. Start at 1, the plain sum.

  Args:
    z: (..., n).

  Returns:
    The same. Weight decay pulls the result to the base.

  Example:
    >>> free(np.ones(2))
    array([1., 1.])
  """
  return z


def softmax(z: Any) -> Any:
  """Shares 1 among the adapters: h(z)_i = exp z_i / Σ_j exp z_j. Start at 0.

  Two skills that are both needed get half of each.

  Args:
    z: (..., n).

  Returns:
    (..., n) positive, of sum 1. Weight decay pulls it to equal shares.

  Example:
    >>> softmax(np.float32([0, np.log(3)])).round(4)
    Array([0.25, 0.75], dtype=float32)

  References:
    LoRA Soups (Prabhakar et al., 2024), arXiv 2410.13025.
  """
  return jax.nn.softmax(z)


def leaky(z: Any) -> Any:
  """Lets weights be positive, hardly negative: max(z, 0.01 z). Start at 0.

  Args:
    z: (..., n).

  Returns:
    (..., n). At 0 the derivative is 1 (in torch .01; Adam does not mind).

  Example:
    >>> leaky(np.float32([-1, 2]))
    Array([-0.01,  2.  ], dtype=float32)

  References:
    Recycling LoRAs with adaptive merging, arXiv 2602.12323.
  """
  return jax.nn.leaky_relu(z)


def sigmoid(z: Any) -> Any:
  """Keeps each weight between 0 and 1: 1 / (1 + exp -z). Start at 0, a half.

  Args:
    z: (..., n).

  Returns:
    (..., n).

  Example:
    >>> sigmoid(np.float32([0]))
    Array([0.5], dtype=float32)
  """
  return jax.nn.sigmoid(z)


def unit(z: Any) -> Any:
  """Cuts each weight to [0, 1]; what is outside has no gradient. Start at .3.

  Args:
    z: (..., n).

  Returns:
    (..., n).

  Example:
    >>> unit(np.float32([-1, 0.3]))
    Array([0. , 0.3], dtype=float32)

  References:
    AdaMerging (Yang et al., 2024), arXiv 2310.02575.
  """
  return jnp.clip(z, 0, 1)


def by_module(
  path: str, leading: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
  """Gives every module weights of its own, and every layer of a stack.

  Args:
    path: of a parameter.
    leading: its Loras' leading axes.

  Returns:
    What its weights are called, and their axes before that of the adapters.

  Example:
    >>> by_module("layers/q", (2,))
    ('layers/q', (2,))
  """
  return path, leading


def by_layer(
  path: str, leading: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
  """Gives every layer weights of its own; outside of layers all share theirs.

  A layer is the first number in a path, or the first leading axis of a
  parameter without number.

  Args:
    path: as for `by_module`.
    leading: as for `by_module`.

  Returns:
    As `by_module`.

  Example:
    >>> by_layer("layers.3.mlp.up.weight", ()), by_layer("layers/q", (2,))
    (('layers.3', ()), ('2 layers', (2,)))
  """
  if found := _NUMBERED.match(path):
    return found[0], ()
  if leading:
    return f"{leading[0]} layers", leading[:1]
  return "rest", ()


def by_adapter(
  path: str, leading: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
  """Gives every adapter one weight.

  Args:
    path: as for `by_module`.
    leading: as for `by_module`.

  Returns:
    As `by_module`.

  Example:
    >>> by_adapter("layers/q", (2,))
    ('all', ())
  """
  del path, leading
  return "all", ()


def init_weights(
  adapters: Adapters,
  start: Any = 1.0,
  *,
  granularity: Granularity = by_module,
  key: Any = None,
) -> dict[str, jax.Array]:
  """Makes the weights that training starts from.

  Args:
    adapters: n adapters of one base; each may lack modules.
    start: a number, or n of them; each activation says which one suits it.
    granularity: what has weights of its own: `by_module`, `by_layer`,
      `by_adapter`, or a function of that form.
    key: PRNG key; normal numbers of standard deviation 1 are added, as in the
      code of LoRA Soups. None adds nothing.

  Returns:
    {name: (..., n)} float32.

  Raises:
    ValueError: no adapters, malformed Loras, or a granularity that gives one
      name to modules whose leading axes differ.

  Example:
    >>> one = {"q": Lora(np.ones((1, 2)), np.ones((1, 3)), np.float32(1))}
    >>> init_weights([one, one])
    {'q': Array([1., 1.], dtype=float32)}
  """
  own: dict[str, tuple[int, ...]] = {}
  wrong = []
  for path, loras in _checked(adapters).items():
    name, leading = granularity(path, leading_of(loras))
    if own.setdefault(name, leading) != leading:
      wrong.append(f"{name}: {own[name]} and {leading}")
  if wrong:
    raise ValueError(
      f"Weights of one name need one shape: {name_some(wrong)}. Let "
      "granularity= give other names."
    )
  start = jnp.asarray(start, jnp.float32)
  found = {}
  for name, leading in own.items():
    z = jnp.broadcast_to(start, (*leading, len(adapters)))
    if key is not None:
      z = z + jax.random.normal(key_for(key, name), z.shape)
    found[name] = z
  return found


def mix(
  adapters: Adapters,
  z: Weights,
  *,
  activation: Callable[[Any], Any] = free,
  granularity: Granularity = by_module,
) -> Loras:
  """Adds adapters exactly, with weights of every module.

      Δ = Σ_i h(z)_i s_i a_iᵀ b_i

  Args:
    adapters: n adapters of one base. Where some lack a module, those that have
      it take part alone, a softmax is over them.
    z: {name: (..., n)}, as `init_weights` makes them; (n,) serves all layers of
      a stack alike.
    activation: h of the weights of those that take part: `free`, `softmax`,
      `leaky`, `sigmoid`, `unit`, or any function (..., k) -> (..., k).
    granularity: which weights a module has, as for `init_weights`.

  Returns:
    Loras of all modules, as by `concat`: rank Σ r_i, scale 1, which `truncate`
    can reduce. Moves no more data than the factors; keeps shardings. Gradients
    reach the weights and the factors.

  Raises:
    ValueError: no adapters, a softmax of one, weights that lack, are left over,
      or have another shape; or as `concat`.

  Example:
    >>> one = Lora(np.ones((1, 2)), np.ones((1, 1)), np.float32(1))
    >>> mix([{"q": one}, {"q": one}], {"q": np.float32([1, 2])})["q"].b
    array([[1.],
           [2.]])

  References:
    LoRA Soups (Prabhakar et al., 2024), arXiv 2410.13025.
  """
  whole = _checked(adapters)
  count = len(adapters)
  if activation is softmax and count == 1:
    raise ValueError(
      "The softmax of one adapter is 1 whatever its weight: nothing can be "
      "learned. Give another adapter, or activation=free."
    )
  names = {
    path: granularity(path, leading_of(loras))[0]
    for path, loras in whole.items()
  }
  _check_weights(z, names, whole, count)
  return {
    path: _mixed(loras, z[names[path]], activation)
    for path, loras in whole.items()
  }


def _mixed(loras: Mapping[int, Lora], z: Any, activation) -> Lora:
  """Adds the Loras of one module, by the adapters' places."""
  there = [*loras]
  h = activation(z[..., np.asarray(there)])
  parts = []
  for at, lora in enumerate(loras.values()):
    own = h[..., at]
    own = own.reshape(own.shape + (1,) * (lora.a.ndim - 2 - own.ndim))
    parts.append(Lora(lora.a, lora.b, lora.scale * own))
  return concat(parts, np.ones(len(parts), np.float32))


def _checked(adapters: Adapters) -> dict[str, dict[int, Lora]]:
  """Returns the Loras by path and place; raises if there are none."""
  if not adapters:
    raise ValueError("There are no adapters to mix; give at least one.")
  return by_path(adapters)


def _check_weights(z, names, whole, count) -> None:
  """Raises unless there are weights for all modules, of their shapes."""
  lacking = sorted({*names.values()} - z.keys())
  more = sorted(z.keys() - {*names.values()})
  if lacking or more:
    said = [f"no weights for {name_some(lacking)}"] if lacking else []
    said += [f"weights of nothing: {name_some(more)}"] if more else []
    raise ValueError(
      f"{'; '.join(said)}. Make them by init_weights with the same adapters "
      "and granularity."
    )
  wrong = []
  for path, name in names.items():
    shape, leading = np.shape(z[name]), leading_of(whole[path])
    if shape[-1:] != (count,) or shape[:-1] != leading[: len(shape) - 1]:
      wrong.append(f"{name}: {shape} for {path} of leading axes {leading}")
  if wrong:
    raise ValueError(
      f"Weights must be (..., {count}), one for each adapter: "
      f"{name_some(wrong)}."
    )


class Learner(NamedTuple):
  """A pair of pure functions `init` and `update`, as in optax.

  Attributes:
    init: what is trained -> state.
    update: (what is trained, state, params, adapters, *batch) -> (what is
      trained, state, loss before the step).
  """

  init: Callable[[Mapping[str, Any]], Any]
  update: Callable[..., tuple[dict[str, Any], Any, Any]]


def learn_weights(
  loss: Loss,
  optimiser: "optax.GradientTransformation",
  *,
  activation: Callable[[Any], Any] = free,
  granularity: Granularity = by_module,
  through: Callable[..., Any] = beside,
) -> Learner:
  """Makes the functions that train the weights of frozen adapters.

      z  ←  optimiser(∇_z loss(params with mix(adapters, z), batch))

  Args:
    loss: `(params, *batch) -> ()`: of the skills' data for LoRA Soups, of few
      target examples for Recycling, `entropy` of unlabelled ones' logits for
      AdaMerging.
    optimiser: an optax transformation of {name: (..., n)}.
    activation: as for `mix`.
    granularity: as for `mix`.
    through: how programs are combined with the parameters, `training.beside` or
      `training.summed`.

  Returns:
    Learner; `update(z, state, params, adapters, *batch)`. Only z has a gradient
    and optimiser state. Jit `update`; the adapters are arguments, so that
    others of the same shapes compile nothing. A step costs one of LoRA training
    of rank Σ r_i without the gradients of a.

  Raises:
    ValueError: from `update`, as `mix`.

  Example:
    >>> one = Lora(jnp.ones((1, 2)), jnp.ones((1, 1)), jnp.float32(1))
    >>> loss = lambda params, x: jnp.sum((x @ params["w"] - 1) ** 2)
    >>> init, update = learn_weights(loss, optax.sgd(0.1))
    >>> adapters, params = [{"w": one}, {"w": one}], {"w": jnp.zeros((2, 1))}
    >>> z = init_weights(adapters, 0.0)
    >>> z, _, value = update(z, init(z), params, adapters, jnp.ones((1, 2)))
    >>> value, z["w"].round(1)
    (Array(1., dtype=float32), Array([0.4, 0.4], dtype=float32))

  References:
    LoRA Soups, arXiv 2410.13025; Recycling, arXiv 2602.12323; AdaMerging, arXiv
    2310.02575.

  Approximation: LoRA Soups draws its start at random and its learning rate of
    1e-4 hardly moves it; here the start is `init_weights`'s, the rate yours.
  """

  def update(z, state, params, adapters, *batch):
    """Takes a step; returns weights, state and the loss before the step."""
    z = dict(z)

    def value_of(z):
      """Computes the loss of weights."""
      own = mix(adapters, z, activation=activation, granularity=granularity)
      return through(loss, params, own, batch).astype(jnp.float32)

    value, gradient = jax.value_and_grad(value_of)(z)
    change, state = optimiser.update(gradient, state, z)
    moved: Any = optax.apply_updates(z, change)
    return moved, state, value

  return Learner(lambda z: optimiser.init(dict(z)), update)


def entropy(logits: Any, where: Any = None) -> jax.Array:
  """Computes the mean entropy of predictions, for learning without labels.

      -Σ_v p_v log p_v,   p = softmax(logits), mean over all positions

  Args:
    logits: (..., v); -inf stands for what cannot be.
    where: (...) of the positions that count; None is all.

  Returns:
    () float32, in nats.

  Example:
    >>> round(float(entropy(jnp.zeros((3, 4)))), 4)
    1.3863

  References:
    AdaMerging (Yang et al., 2024), arXiv 2310.02575.
  """
  logs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
  shares = jnp.exp(logs)
  logs = jnp.where(jnp.isneginf(logs), jnp.float32(0), logs)
  return jnp.mean(-jnp.sum(shares * logs, axis=-1), where=where)
