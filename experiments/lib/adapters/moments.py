# SPDX-License-Identifier: Apache-2.0
"""Computes second moments: of gradients by outputs, and of ROME's keys.

`gradient_moments` complements `jlora.factoring.second_moments`, which has the
moments of what layers read: together they are K-FAC's estimate of what a change
of a matrix costs. `key_moments` gives those that editing facts needs, on text
that the model partly writes itself.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.lib.data import texts
from jlora import models
from jlora.factoring import Moment


def gradient_moments(
  apply: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  batches: Iterable[Any],
  key: jax.Array,
) -> dict[str, Moment]:
  """Computes the gradient's second moment by the output of every `nn.Dense`.

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


#: Tokens in a row of text.
_LENGTH = 128
#: Rows written by the model that are held out.
_HELD = 4


def key_moments(
  apply: models.Model,
  params: Any,
  encode: Callable[[str], np.ndarray],
  *,
  rows: int,
  names: tuple[str, ...],
  cache: str | os.PathLike[str] | None,
  file: pathlib.Path | None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Computes C = E[k kᵀ] of all down projections, and held-out text.

  Half of the tokens are written by the model itself, the others come from the
  training parts of `texts.CORPORA`; the authors used Wikipedia instead.

  Args:
    apply: a decoder of `jlora.models`.
    params: its parameters.
    encode: text -> tokens.
    rows: of 128 tokens, written by the model; as many come from the texts.
    names: the texts, of `texts.CORPORA`.
    cache: as `texts.parts`.
    file: where both results are cached; None caches nothing.

  Returns:
    {kernel path: (in, in) float64}, and (rows, 128) int32 tokens held out, the
    model's own first.
  """
  if file is not None and file.exists():
    with np.load(file) as kept:
      found = {name: kept[name] for name in kept.files}
    held = found.pop("held")
    wide = {p.replace("|", "/"): c.astype(np.float64) for p, c in found.items()}
    return wide, held
  own = write_text(apply, params, rows + _HELD)
  halves = [texts.parts(name, cache) for name in names]
  read = [own[_HELD:]]
  held = [own[:_HELD]]
  for seen, unseen in halves:
    some = {"encode": encode, "length": _LENGTH - 1}
    read.append(texts.excerpts(seen, rows=rows // len(names), **some))
    held.append(texts.excerpts(unseen, rows=_HELD // len(names), **some))
  tokens = np.concatenate(read).reshape(-1, 4, _LENGTH)
  moments = jlora.factoring.second_moments(apply, params, tokens)
  found = {
    path: np.asarray(moment.total) / np.float32(moment.count)
    for path, moment in moments.items()
    if path.endswith("mlp/down/kernel")
  }
  held = np.concatenate(held)
  if file is not None:
    part = file.with_name(f".{file.name}.part.npz")
    flat: dict[str, Any] = {p.replace("/", "|"): c for p, c in found.items()}
    np.savez(part, held=held, **flat)
    part.rename(file)
  return {path: c.astype(np.float64) for path, c in found.items()}, held


def write_text(model: models.Model, params: Any, rows: int) -> np.ndarray:
  """Samples text from nothing: (rows, 128) int32 at temperature 1."""
  start = jnp.zeros((rows, 1), jnp.int32)  # <|endoftext|> of SmolLM2
  key = jax.random.key(1)
  said = models.generate(
    model, params, start, _LENGTH, key=key, temperature=1.0
  )
  return np.asarray(said)


#: Beginnings of prefixes: three of the five in MEMIT's code.
_BEGINNINGS = ("The", "Therefore", "Because")


def write_prefixes(
  model: models.Model,
  params: Any,
  encode: Callable[[str], np.ndarray],
  decode: Callable[[Sequence[int]], str],
) -> list[str]:
  """Samples short sentences from the model to put before prompts."""
  ids = [encode(text) for text in _BEGINNINGS]
  lengths = [len(row) for row in ids]
  tokens = np.zeros((len(ids), max(lengths)), np.int32)
  for row, its in zip(tokens, ids, strict=True):
    row[: len(its)] = its
  said = models.generate(
    model,
    params,
    jnp.asarray(tokens),
    6,
    lengths=jnp.asarray(lengths),
    key=jax.random.key(2),
    temperature=1.0,
  )
  rows = zip(_BEGINNINGS, np.asarray(said).tolist(), strict=True)
  return [f"{text}{decode(row)}. " for text, row in rows]


def _probes(apply, params, tokens) -> dict[str, jax.Array]:
  """Returns zeros in the shapes of all outputs of Dense layers."""
  shapes: dict[str, Any] = {}

  def note(path, y):
    """Notes the shape of an output; raises if its layer is called twice."""
    if path in shapes:
      raise ValueError(f"{path} is called twice: its gradients would mix.")
    shapes[path] = y
    return y

  jax.eval_shape(lambda p, t: _call(apply, p, t, note), params, tokens)
  return {path: jnp.zeros(y.shape, y.dtype) for path, y in shapes.items()}


@functools.partial(jax.jit, static_argnums=0)
def _totals(apply, params, tokens, probes, key):
  """Computes {path: Σ g gᵀ} of one batch."""

  def loss(probes):
    """Computes the loss of drawn labels as a function of the probes."""
    logits = _call(apply, params, tokens, lambda path, y: y + probes[path])
    labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    # A comparison, not a gather: its gradient is not a scatter.
    chosen = jnp.arange(logits.shape[-1])[None, None] == labels[..., None]
    return -jnp.where(chosen, jax.nn.log_softmax(logits), 0.0).sum()

  def moment(g):
    """Computes Σ g gᵀ over rows and positions."""
    rows = g.reshape(-1, g.shape[-1]).astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)

  return jax.tree.map(moment, jax.grad(loss)(probes))


def _call(apply, params, tokens, change):
  """Runs the model with `change(path, y)` for the output y of every Dense."""

  def note(call, arguments, options, context):
    y = call(*arguments, **options)
    module = context.module
    if isinstance(module, nn.Dense) and context.method_name == "__call__":
      return change("/".join((*module.path, "kernel")), y)
    return y

  with nn.intercept_methods(note):
    return apply(params, tokens)
