# SPDX-License-Identifier: Apache-2.0
"""Trains Loras and other programs on a frozen base.

Only the programs have gradients and optimiser state. The caller writes the
loop, its batches and its schedule. Any optax transformation can be the
optimiser; `optax.MultiSteps` around one accumulates gradients.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epy

from jlora.adapting.binding import Program, bind
from jlora.adapting.programs import Branch, Gated, Rows, Shift
from jlora.adapting.transforms import adapt, apply
from jlora.loras import Lora
from jlora.views import ViewRule

with epy.lazy_imports():  # only where something is trained
  import optax

Loss = Callable[..., jax.Array]
Programs = Mapping[str, Program]
Dropout = tuple[float, jax.Array] | None

# The trained fields of each program; scales and weights are not trained.
_TRAINED = {
  Lora: ("a", "b"),
  Rows: ("rows",),
  Shift: ("delta",),
  Branch: ("params",),
  Gated: ("bank", "params"),
}


class Trainer(NamedTuple):
  """A pair of pure functions `init` and `update`, as in optax.

  Attributes:
    init: programs -> state.
    update: (programs, state, params, *batch, key=None) -> (programs, state,
      loss), with the loss before the step, or (loss, aux) if the loss has aux.
      The key is for this step's dropout.
  """

  init: Callable[[Programs], Any]
  update: Callable[..., tuple[dict[str, Any], Any, Any]]


def beside(
  loss: Loss,
  params: Any,
  programs: Programs,
  batch: tuple[Any, ...],
  dropout: Dropout = None,
  *,
  views: Iterable[ViewRule] | None = None,
) -> Any:
  """Computes a loss with the programs beside the weights, by `adapt`.

      y = x w + ((drop(x) aᵀ) g) b

  The gradient of a weight is never formed.

  Args:
    loss: `(params, *batch) -> ()`, or with anything beside its value.
    params: its parameters.
    programs: path -> program.
    batch: the loss's other arguments.
    dropout: as for `bind`.
    views: as for `bind`; give them with `functools.partial`.

  Returns:
    What the loss returns.

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(0.5))
    >>> loss = lambda params, x: (x @ params["w"]).sum()
    >>> beside(loss, {"w": jnp.zeros((3, 2))}, {"w": lora}, (jnp.ones((1, 3)),))
    Array(3., dtype=float32)
  """
  bound = bind(params, programs, dropout=dropout, views=views)
  return adapt(loss)(bound, *batch)


def summed(
  loss: Loss,
  params: Any,
  programs: Programs,
  batch: tuple[Any, ...],
  dropout: Dropout = None,
  *,
  views: Iterable[ViewRule] | None = None,
) -> Any:
  """Computes a loss with the programs summed into the weights, by `apply`.

  For functions that do more with their weights than multiply by them. Forms
  every dense change and every gradient of a weight.

  Args:
    loss: `(params, *batch) -> ()`, or with anything beside its value.
    params: its parameters.
    programs: path -> Lora or Shift.
    batch: the loss's other arguments.
    dropout: must be None, because a summed Lora has no separate input.
    views: as for `apply`; give them with `functools.partial`.

  Returns:
    What the loss returns.

  Raises:
    ValueError: with dropout.

  Example:
    >>> lora = Lora(jnp.ones((1, 3)), jnp.ones((1, 2)), jnp.float32(0.5))
    >>> loss = lambda params, x: (x @ params["w"]).sum()
    >>> summed(loss, {"w": jnp.zeros((3, 2))}, {"w": lora}, (jnp.ones((1, 3)),))
    Array(3., dtype=float32)
  """
  if dropout is not None:
    raise ValueError("summed weights have no dropout; take through=beside.")
  return loss(apply(params, programs, views=views), *batch)


def train(
  loss: Loss,
  optimiser: "optax.GradientTransformation",
  *,
  through: Callable[..., jax.Array] = beside,
  dtype: Any = None,
  dropout: float = 0.0,
  has_aux: bool = False,
) -> Trainer:
  """Makes the init and update functions that train programs on a frozen base.

      a, b  ←  optimiser(∇ loss(params with scale aᵀ b, batch))

  Args:
    loss: `(params, *batch) -> ()`, any pure function of the parameters.
    optimiser: an optax transformation; it gets gradients of the trained fields,
      {path: {"a": ..., "b": ...}}.
    through: how programs are combined with the parameters, `beside` or
      `summed`; with `functools.partial(beside, views=views)` by those views.
    dtype: dtype in which the programs compute, such as bfloat16 beside a
      bfloat16 base; None is their own. The stored programs keep their dtype,
      which should be float32.
    dropout: probability with which each number of a Lora's input is zeroed in a
      step; the base's own input is not.
    has_aux: the loss returns (loss, aux): metrics, or the state of BatchNorm,
      any pytree. `update` then returns (loss, aux) in place of the loss.

  Returns:
    Trainer. It trains a and b of a Lora, the rows of Rows, the delta of a
    Shift, the params of a Branch, the bank's a and b and the params of a Gated;
    scales and weights stay. Jit `update` and donate programs and state. Beside
    the base, a step holds one gradient of the programs and the optimiser's
    state (two copies for Adam).

  Raises:
    ValueError: a dropout outside [0, 1); from `update`, dropout without a key,
      or a loss that does not return what `has_aux` says.

  Example:
    >>> lora = Lora(jnp.ones((1, 2)), jnp.zeros((1, 1)), jnp.float32(1))
    >>> loss = lambda params, x: jnp.sum((x @ params["w"] - 1) ** 2)
    >>> init, update = train(loss, optax.sgd(0.1))
    >>> programs, params = {"w": lora}, {"w": jnp.zeros((2, 1))}
    >>> programs, state, value = update(
    ...   programs, init(programs), params, jnp.ones((1, 2)))
    >>> float(value), round(float(programs["w"].b[0, 0]), 4)
    (1.0, 0.4)
    >>> with_mean = lambda params, x: (loss(params, x), {"mean": x.mean()})
    >>> init, update = train(with_mean, optax.sgd(0.1), has_aux=True)
    >>> *_, (value, aux) = update(
    ...   programs, init(programs), params, jnp.ones((1, 2)))
    >>> aux
    {'mean': Array(1., dtype=float32)}

  References:
    Hu et al. (2021); dropout on the branch's input as in microsoft/LoRA.
  """
  if not 0 <= dropout < 1:
    raise ValueError(f"dropout is a share in [0, 1), got {dropout}.")

  def init(programs):
    """Returns the optimiser's initial state."""
    return optimiser.init(trained_part(programs))

  def update(programs, state, params, *batch, key=None):
    """Takes a step; returns programs, state and the loss before the step."""
    if dropout and key is None:
      raise ValueError(
        f"dropout {dropout} needs key=; give each step its own, as "
        "jax.random.fold_in(key, step)."
      )

    def value_of(part):
      """Computes the loss of the trained part, and what comes beside it."""
      own = with_part(programs, _cast(part, dtype))
      drop = (dropout, key) if dropout else None
      found = through(loss, params, own, batch, drop)
      value, aux = _checked(found, has_aux)
      return value.astype(jnp.float32), aux

    part = trained_part(programs)
    (value, aux), gradient = jax.value_and_grad(value_of, has_aux=True)(part)
    change, state = optimiser.update(gradient, state, part)
    moved: Any = optax.apply_updates(part, change)
    return with_part(programs, moved), state, (value, aux) if has_aux else value

  return Trainer(init, update)


def _checked(found: Any, has_aux: bool) -> tuple[jax.Array, Any]:
  """Returns what a loss returned as (loss, aux); raises if it is neither."""
  pair = found if has_aux else (found, None)
  is_pair = isinstance(pair, tuple) and len(pair) == 2
  if not is_pair or jax.tree.map(jnp.shape, pair[0]) != ():
    raise ValueError(
      f"The loss returned {jax.tree.map(jnp.shape, found)}; with "
      f"has_aux={has_aux} needed is {'(loss, aux)' if has_aux else 'a loss'}, "
      "the loss a number without axes."
    )
  return jnp.asarray(pair[0]), pair[1]


def trained_part(programs: Programs) -> dict[str, dict[str, Any]]:
  """Returns the trained fields of programs, as a pytree for an optimiser.

  Args:
    programs: path -> program.

  Returns:
    {path: {field: arrays}}, of a Gated {path: {"bank": {field: arrays},
    "params": ...}}; the arrays are not copied.

  Example:
    >>> lora = Lora(jnp.ones((1, 2)), jnp.zeros((1, 1)), jnp.float32(1))
    >>> [*trained_part({"w": lora})["w"]]
    ['a', 'b']
  """
  return {path: _part_of(program) for path, program in programs.items()}


def _part_of(program: Any) -> Any:
  """Returns the trained fields of a program, and what is none as it is."""
  fields = _TRAINED.get(type(program))
  if fields is None:
    return program
  return {name: _part_of(getattr(program, name)) for name in fields}


def with_part(
  programs: Programs, part: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
  """Replaces fields of programs, given as by `trained_part`.

  Example:
    >>> lora = Lora(jnp.ones((1, 2)), jnp.zeros((1, 1)), jnp.float32(1))
    >>> with_part({"w": lora}, {"w": {"b": jnp.ones((1, 1))}})["w"].b
    Array([[1.]], dtype=float32)
  """
  return {
    path: _with(program, part[path]) for path, program in programs.items()
  }


def _with(program: Any, part: Any) -> Any:
  """Replaces the trained fields of a program, and what is none as a whole."""
  fields = _TRAINED.get(type(program))
  if fields is None:
    return part
  own = {
    name: _with(getattr(program, name), part[name])
    for name in fields
    if name in part
  }
  return dataclasses.replace(program, **own)


def lora_plus(ratio: float) -> "optax.GradientTransformation":
  """Makes an optax transformation that lets b learn faster than a (LoRA+).

      update of b  ←  ratio · update of b

  Put it last. After an optimiser whose step is proportional to its learning
  rate, as all of optax's are, b's learning rate is `ratio` times that of a.
  Weight decay is scaled too, as in the paper's code.

  Args:
    ratio: of b's learning rate to a's, at least 1. No value is right
      everywhere.

  Returns:
    A transformation without state, for `optax.chain(optax.adam(1e-4),
    lora_plus(16))`. Updates of fields other than b are unchanged.

  Raises:
    ValueError: a ratio below 1.

  Example:
    >>> part = {"w": {"a": jnp.ones(1), "b": jnp.ones(1)}}
    >>> optimiser = optax.chain(optax.sgd(0.1), lora_plus(4))
    >>> change, _ = optimiser.update(part, optimiser.init(part), part)
    >>> float(change["w"]["b"][0] / change["w"]["a"][0])
    4.0

  References:
    Hayou et al. (2024), LoRA+; PEFT's code.
  """
  if ratio < 1:
    raise ValueError(f"LoRA+ needs a ratio of at least 1, got {ratio}.")

  def scaled(keys, update):
    """Scales the update of a leaf named b."""
    name = jax.tree_util.keystr(keys[-1:], simple=True)
    return update * jnp.asarray(ratio, update.dtype) if name == "b" else update

  return optax.stateless(
    lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates)
  )


def _cast(part: Any, dtype: Any) -> Any:
  """Casts all arrays to a dtype, unless it is None."""
  if dtype is None:
    return part
  return jax.tree.map(lambda x: x.astype(dtype), part)
