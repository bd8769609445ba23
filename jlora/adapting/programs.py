# SPDX-License-Identifier: Apache-2.0
"""The programs on a base model other than Loras.

A program is what `bind` puts on one parameter: a Lora; `Rows`, further rows of
a table; `Shift`, a dense change of a small parameter; `Gated`, a bank of Loras
weighed by what the layer reads; or `Branch`, any function of the layer's input.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.loras import Lora


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
  """Further rows of an embedding table: a soft prompt, or new words.

  Row i has the id `rows of the table + i`. A tied head does not use them: the
  model never predicts them. A program that reads the table otherwise than by
  number (by a product with one-hot rows, or as a whole) is an error.

  Attributes:
    rows: (p, d).

  Example:
    >>> Rows(jnp.zeros((20, 64))).rows.shape
    (20, 64)
  """

  rows: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Shift:
  """A dense change of a small parameter: a norm, a scale or a bias.

  Attributes:
    delta: the parameter's shape.

  Example:
    >>> Shift(jnp.zeros(64)).delta.shape
    (64,)
  """

  delta: jax.Array


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("params", "weight"),
  meta_fields=("function",),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Branch:
  """A function of a layer's input whose value is added to the layer's output.

      y = x w + weight · function(params, x)

  This is ControlNet's form: with a last layer of zeros it starts as nothing.

  Attributes:
    function: (params, x (..., in)) -> (..., out); static, so pass the same
      object in every call.
    params: the function's own parameters, any pytree.
    weight: scalar.

  Example:
    >>> branch = Branch(lambda p, x: x @ p, jnp.zeros((3, 5)))
    >>> branch(jnp.ones((2, 3))).shape
    (2, 5)
  """

  function: Callable[[Any, jax.Array], jax.Array]
  params: Any
  weight: Any = 1.0

  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes `weight · function(params, x)`."""
    found = self.function(self.params, x)
    return found * jnp.asarray(self.weight, found.dtype)


def call(params: Callable[[jax.Array], Any], x: jax.Array) -> Any:
  """Calls parameters that are themselves a function, such as a module.

  Args:
    params: a callable pytree.
    x: (..., in).

  Returns:
    `params(x)`.

  Example:
    >>> call(jax.tree_util.Partial(jnp.dot, jnp.eye(2)), jnp.ones(2))
    Array([1., 1.], dtype=float32)
  """
  return params(x)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("bank", "params"),
  meta_fields=("gate",),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Gated:
  """A bank of Loras whose weights are computed from what the layer reads.

      y = x w + Σ_i g_i scale_i (x a_iᵀ) b_i,   g = gate(params, x)

  That is one Lora of rank n r with a gate on its rank axis for every row of x.

  `adapt` finds x where the parameter is multiplied. Between the parameter and
  its product it may be transposed, reshaped, cast and sliced along axes that
  are not summed over; scan, remat, jit, vmap and cond are passed through.
  Anything else (a convolution, a look-up, `ragged_dot`, a product with a part
  of the inputs or from the other side) is an error that names the operation.

  Attributes:
    bank: a (n, ..., r, in), b (n, ..., r, out), scale (n, ...): one path of
      `make_bank`; axes between are those of scanned layers or experts.
    params: the gate's parameters, any pytree of arrays. For a parameter with
      layers or experts, each leaf begins with the same axes.
    gate: (params, x) -> g, static: pass the same object, or one that compares
      equal, in every call. x is (..., in) in the order in which the model has
      its rows, all axes that are summed over joined into the last; g
      broadcasts to (..., n). It may return (g, note), of which `adapt` hands
      on the notes if asked. By default params are called with x.

  Example:
    >>> bank = Lora(jnp.ones((2, 1, 3)), jnp.ones((2, 1, 1)), jnp.ones(2))
    >>> by_sign = lambda params, x: jnp.stack([x[..., 0] > 0, x[..., 0] < 0],
    ...                                       -1).astype(x.dtype)
    >>> Gated(bank, (), by_sign).gate((), jnp.array([[2.0, 0.0, 0.0]]))
    Array([[1., 0.]], dtype=float32)
  """

  bank: Lora
  params: Any
  gate: Callable[[Any, jax.Array], Any] = call


def prepend(tokens: jax.Array, table: Any, count: int) -> jax.Array:
  """Puts the ids of a soft prompt, given as `Rows`, before every text.

  Args:
    tokens: (batch, time) integers.
    table: the embedding's parameter, (vocabulary, d).
    count: number of rows of the prompt.

  Returns:
    (batch, count + time) in the dtype of tokens. The prompt's ids are
    vocabulary, vocabulary + 1, ...

  Example:
    >>> prepend(jnp.array([[5]]), jnp.zeros((9, 2)), 2)
    Array([[ 9, 10,  5]], dtype=int32)
  """
  ids = table.shape[0] + jnp.arange(count, dtype=tokens.dtype)
  ids = jnp.broadcast_to(ids, (*tokens.shape[:-1], count))
  return jnp.concatenate([ids, tokens], axis=-1)
