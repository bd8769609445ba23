# SPDX-License-Identifier: Apache-2.0
"""Programs on a base model that are no Lora.

A program is what stands at a parameter's path in what `bind` is given: a Lora;
`Rows`, further rows of a table; `Shift`, a dense change of something small; or
a `Branch`, any function of what the layer reads.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
  """Further rows of a table: a prompt, or embeddings of words of one's own.

  Row i is found under the id `rows of the table + i`. A tied head does not see
  them: the model never says them.

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
  """A dense change of a parameter: of norms, scales and biases.

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
  """A function of what a layer reads, added to what it writes.

      y = x w + weight · function(params, x)

  ControlNet's form: with a last layer of zeros it begins as nothing.

  Attributes:
    function: (params, x (..., in)) -> (..., out); static, so one and the same
      object for every call.
    params: its own parameters, any pytree.
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
    """`weight · function(params, x)`."""
    found = self.function(self.params, x)
    return found * jnp.asarray(self.weight, found.dtype)


def prepend(tokens: jax.Array, table: Any, count: int) -> jax.Array:
  """Tokens with a prompt before them, as ids behind a table's last row.

  Args:
    tokens: (batch, time) integers.
    table: the embedding's parameter, (vocabulary, d).
    count: rows of the prompt.

  Returns:
    (batch, count + time).

  Example:
    >>> prepend(jnp.array([[5]]), jnp.zeros((9, 2)), 2)
    Array([[ 9, 10,  5]], dtype=int32)
  """
  ids = table.shape[0] + jnp.arange(count, dtype=tokens.dtype)
  ids = jnp.broadcast_to(ids, (*tokens.shape[:-1], count))
  return jnp.concatenate([ids, tokens], axis=-1)
