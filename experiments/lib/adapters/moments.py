# SPDX-License-Identifier: Apache-2.0
"""Second moments of the loss's gradient by what layers write.

The mate of `jlora.factoring.second_moments`, which has what they read: together
they are K-FAC's estimate of what a change of a matrix costs.
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


#: What prefixes begin with: three of the five of MEMIT's code.
_BEGINNINGS = ("The", "Therefore", "Because")
#: Tokens in a row of text.
_LENGTH = 128
#: Rows the model writes itself that are held out.
_HELD = 4


def write_text(model: models.Model, params: Any, rows: int) -> np.ndarray:
  """What the model writes from nothing: (rows, 128) int32, temperature 1."""
  start = jnp.zeros((rows, 1), jnp.int32)  # <|endoftext|> of SmolLM2
  key = jax.random.key(1)
  said = models.generate(
    model, params, start, _LENGTH, key=key, temperature=1.0
  )
  return np.asarray(said)


def write_prefixes(
  model: models.Model,
  params: Any,
  encode: Callable[[str], np.ndarray],
  decode: Callable[[Sequence[int]], str],
) -> list[str]:
  """Short sentences of the model's own to put before prompts."""
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
  """C = E[k kᵀ] of every down projection, and held-out text of four kinds.

  Half of the tokens are written by the model itself, the rest are training
  parts of the texts of `corpora`: there is no Wikipedia here.

  Args:
    apply: a decoder of `jlora.models`.
    params: its parameters.
    encode: text -> tokens.
    rows: of 128 tokens, own ones; as many again from the texts together.
    names: the texts, of `corpora`.
    cache: as `corpora.parts`.
    file: where both are kept, None to keep nothing.

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
