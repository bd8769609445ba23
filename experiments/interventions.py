# SPDX-License-Identifier: Apache-2.0
"""What goes through the modules of a decoder, and what follows if it changes.

Nothing of the model is touched: its calls are intercepted while it runs, and
its upper layers are run again by themselves.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models import WHOLE, Layer, Model, rms_norm, turns


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_modules(
  apply: Any, paths: tuple[str, ...], params: Any, tokens: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """What modules read and write at every token.

  Args:
    apply: `apply(params, tokens)`, runs a Flax linen model.
    paths: of modules, such as `layers/3/mlp/down`, each called once.
    params: what apply takes.
    tokens: (rows, time) int32.

  Returns:
    {path: ((rows, time, in), (rows, time, out))}.

  Raises:
    ValueError: no call of such a module.
  """
  found = {}

  def intercept(call, arguments, options, context):
    y = call(*arguments, **options)
    path = "/".join(context.module.path)
    if path in paths and context.method_name == "__call__":
      found[path] = arguments[0], y
    return y

  with nn.intercept_methods(intercept):
    apply(params, tokens)
  if missing := sorted(set(paths) - found.keys()):
    raise ValueError(f"no module {', '.join(missing)} was called")
  return found


def go_on(model: Model, layer: int, params: Any, stream: jax.Array) -> Any:
  """The normed stream behind the last layer, from where a layer left it.

  Args:
    model: a decoder of `jlora.models`.
    layer: the one that wrote the stream.
    params: the model's.
    stream: (rows, time, hidden).

  Returns:
    (rows, time, hidden); times the head these are the logits.
  """
  shape: Any = model.shape
  angles = turns(shape.frequencies, WHOLE, stream.shape[1], shape.dtype)
  for i in range(layer + 1, shape.layers):
    variables = {"params": params["layers"][str(i)]}
    stream = Layer(shape).apply(variables, stream, angles, WHOLE)  # pyright: ignore
  return rms_norm(shape, "norm").apply({"params": params["norm"]}, stream)


def to_logits(model: Model, params: Any, normed: jax.Array) -> jax.Array:
  """The logits of what `go_on` gives: (..., hidden) to (..., vocab)."""
  shape: Any = model.shape
  if shape.tied:
    return jnp.matmul(normed, params["embed"]["embedding"].T)
  return jnp.matmul(normed, params["head"]["kernel"])
