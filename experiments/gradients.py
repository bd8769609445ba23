# SPDX-License-Identifier: Apache-2.0
"""Second moments of the loss's gradient by what layers write.

The mate of `jlora.factoring.second_moments`, which has what they read: together
they are K-FAC's estimate of what a change of a matrix costs.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.factoring import Moment


def gradient_moments(
  apply: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  batches: Iterable[Any],
  key: jax.Array,
) -> dict[str, Moment]:
  """The second moment of the gradient by the output of every `nn.Dense`.

      total = Σ g gᵀ,   g_t = ∂/∂y_t  Σ_s -log p(label_s | tokens up to s)

  Labels are drawn from the model itself: this is the Fisher information, not
  the gradient's moment on the text.

  Args:
    apply: `(params, tokens) -> logits (batch, time, vocab)` of a linen model.
    params: its parameters, a nested dict.
    batches: (batch, time) int32 each.
    key: of the labels.

  Returns:
    {path: Moment} by the kernel's path, total (out, out) float32, and count
    the positions. Costs a forward and a backward pass by the outputs alone.

  Raises:
    ValueError: no batches, or a Dense that is called twice.

  References:
    Martens and Grosse (2015), Optimizing neural networks with
    Kronecker-factored approximate curvature.
  """
  found: dict[str, Moment] = {}
  for at, batch in enumerate(batches):
    tokens = jnp.asarray(batch)
    probes = _probes(apply, params, tokens)
    totals = _totals(apply, params, tokens, probes, jax.random.fold_in(key, at))
    for path, total in totals.items():
      before = found.get(path, Moment(jnp.zeros_like(total), 0))
      found[path] = Moment(before.total + total, before.count + tokens.size)
  if not found:
    raise ValueError("no batch was given, or no nn.Dense was called.")
  return found


def _probes(apply, params, tokens) -> dict[str, jax.Array]:
  """Zeros in the shape of what every Dense writes."""
  shapes: dict[str, Any] = {}

  def note(path, y):
    if path in shapes:
      raise ValueError(f"{path} is called twice: its gradients would mix.")
    shapes[path] = y
    return y

  jax.eval_shape(lambda p, t: _call(apply, p, t, note), params, tokens)
  return {path: jnp.zeros(y.shape, y.dtype) for path, y in shapes.items()}


@functools.partial(jax.jit, static_argnums=0)
def _totals(apply, params, tokens, probes, key):
  """{path: Σ g gᵀ} of one batch."""

  def loss(probes):
    logits = _call(apply, params, tokens, lambda path, y: y + probes[path])
    labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    # A comparison, not a gather: its gradient is not a scatter.
    chosen = jnp.arange(logits.shape[-1])[None, None] == labels[..., None]
    return -jnp.where(chosen, jax.nn.log_softmax(logits), 0.0).sum()

  def moment(g):
    rows = g.reshape(-1, g.shape[-1]).astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)

  return jax.tree.map(moment, jax.grad(loss)(probes))


def _call(apply, params, tokens, change):
  """The model with `change(path, y)` in place of what every Dense writes."""

  def note(call, arguments, options, context):
    y = call(*arguments, **options)
    module = context.module
    if isinstance(module, nn.Dense) and context.method_name == "__call__":
      return change("/".join((*module.path, "kernel")), y)
    return y

  with nn.intercept_methods(note):
    return apply(params, tokens)
