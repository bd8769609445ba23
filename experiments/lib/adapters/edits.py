# SPDX-License-Identifier: Apache-2.0
"""Edits facts in a decoder by Loras on its down projections: ROME and MEMIT.

A fact is looked up by a key, what a down projection reads at the subject's last
token. An edit fits what is added to the value written there (`fit_*`) and turns
it into a Lora (`one_key`, `two_keys`, `many_at_once`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments.lib.data.facts import Fact, Prompts, encode_prompts
from jlora import models
from jlora.editing import address_of, edit_key, edit_layers, fit_value
from jlora.models import WHOLE, Layer, rms_norm, turns


class Model(NamedTuple):
  """A model to edit, with all that an edit needs besides the fact.

  Attributes:
    apply: a decoder of `jlora.models`.
    params: the parameters to edit.
    encode: text -> tokens.
    prefixes: texts put before a prompt; the first is empty.
    moments: path of a down projection's kernel -> C (in, in) float64.
    layers: those that may be edited.
    multiple: of the length of prompts with prefixes.
  """

  apply: models.Model
  params: Any
  encode: Callable[[str], np.ndarray]
  prefixes: Sequence[str]
  moments: Mapping[str, np.ndarray]
  layers: tuple[int, ...]
  multiple: int


class Asked(NamedTuple):
  """A fact's prompts as tokens, and what a layer reads and writes at them.

  Attributes:
    prompts: one for each prefix, the new answer behind; last "{subject} is a".
    count: tokens of the answer.
    keys: (rows, time, in) float32, what the down projection reads.
    stream: (rows, time, hidden) float32, what it or another layer writes.
  """

  prompts: Prompts
  count: int
  keys: np.ndarray
  stream: np.ndarray

  def at_subject(self, x: np.ndarray) -> np.ndarray:
    """Picks the subject's token: (rows, time, ...) to (rows - 1, ...)."""
    found = x[np.arange(len(x)), self.prompts.places]
    return found[:-1].astype(np.float64)


class Fit(NamedTuple):
  """A fact's keys at a layer, and what is to be added to its value.

  Attributes:
    key: (in,) float64, the mean over prefixes.
    single: (in,) float64, the bare prompt's key.
    delta: (out,) float64.
    history: as `jlora.editing.fit_value` returns it.
  """

  key: np.ndarray
  single: np.ndarray
  delta: np.ndarray
  history: dict[str, list[float]]


def kernel_of(layer: int) -> str:
  """Returns the path of a layer's down projection in the parameters."""
  return f"layers/{layer}/mlp/down/kernel"


def ask(model: Model, fact: Fact, layer: int, last: int | None = None) -> Asked:
  """Runs a fact's prompts; keeps a layer's keys, and its stream or `last`'s."""
  rows = [(f"{p}{fact.prompt}", fact.new, fact.subject) for p in model.prefixes]
  rows.append((f"{fact.subject} is a", "", fact.subject))
  prompts = encode_prompts(rows, model.encode, model.multiple)
  # Reads all layers at once, which takes one program.
  paths = tuple(
    path
    for i in model.layers
    for path in (f"layers/{i}/mlp/down", f"layers/{i}")
  )
  found = read_modules(model.apply, paths, model.params, prompts.tokens)
  return Asked(
    prompts,
    len(model.encode(fact.new)),
    np.asarray(found[f"layers/{layer}/mlp/down"][0]),
    np.asarray(found[f"layers/{layer if last is None else last}"][1]),
  )


def fit_through_weights(
  model: Model, fact: Fact, layer: int, *, ridge: float, **options: Any
) -> Fit:
  """Fits δ as it will act: as `w + aᵀ δ`, at every token."""
  asked = ask(model, fact, layer)
  keys = asked.at_subject(asked.keys)
  key = keys.mean(0)
  address = address_of(key, model.moments[kernel_of(layer)], ridge=ridge)
  reads = asked.keys @ address.astype(np.float32)
  start = key @ _weight(model, layer)
  return Fit(key, keys[0], *_fit(model, layer, asked, start, reads, options))


def fit_at_subject(model: Model, fact: Fact, layer: int, **options: Any) -> Fit:
  """Fits δ as the authors do: on the output, at the subject alone."""
  asked = ask(model, fact, layer)
  keys = asked.at_subject(asked.keys)
  start = keys[0] @ _weight(model, layer)
  found = _fit(model, layer, asked, start, _at_places(asked), options)
  return Fit(keys.mean(0), keys[0], *found)


def one_key(model: Model, fit: Fit, layer: int, *, ridge: float) -> jlora.Loras:
  """Makes the rank-one edit that uses the mean key everywhere."""
  weight, moment = _weight(model, layer), model.moments[kernel_of(layer)]
  value = fit.key @ weight + fit.delta
  lora = edit_key(weight, fit.key, value, moment, ridge=ridge)
  return {kernel_of(layer): _float32(lora)}


def two_keys(
  model: Model, fit: Fit, layer: int, *, ridge: float
) -> jlora.Loras:
  """Makes ROME's first edit: the mean key in C⁻¹ k, the bare one elsewhere."""
  moment = model.moments[kernel_of(layer)]
  address = address_of(fit.key, moment, ridge=ridge)
  address = address / (address @ fit.single)
  a, b = (jnp.asarray(x[None], jnp.float32) for x in (address, fit.delta))
  return {kernel_of(layer): jlora.Lora(a, b, jnp.ones(()))}


def random_like(
  loras: jlora.Loras, seed: int, fields: Sequence[str]
) -> jlora.Loras:
  """Replaces some factors by random directions of the same norms."""
  rng = np.random.default_rng(seed)

  def drawn(factor):
    """Draws a Gaussian factor of the same norm."""
    x = rng.standard_normal(factor.shape).astype(np.float32)
    return jnp.asarray(x * np.linalg.norm(factor) / np.linalg.norm(x))

  return {
    path: jlora.Lora(
      drawn(lora.a) if "a" in fields else lora.a,
      drawn(lora.b) if "b" in fields else lora.b,
      lora.scale,
    )
    for path, lora in loras.items()
  }


def fit_streams(
  model: Model, facts: Sequence[Fact], last: int, **options: Any
) -> np.ndarray:
  """Fits each fact's target stream behind a layer, (facts, hidden): MEMIT."""
  found = []
  for fact in facts:
    asked = ask(model, fact, last)
    start = asked.at_subject(asked.stream)[0]
    reads = _at_places(asked)
    found.append(start + _fit(model, last, asked, start, reads, options)[0])
  return np.stack(found)


def many_at_once(
  model: Model,
  facts: Sequence[Fact],
  streams: np.ndarray,
  layers: Sequence[int],
  *,
  balance: float,
) -> jlora.Loras:
  """Edits several facts at once, spread over several layers: MEMIT."""

  def read(loras, path):
    """Returns all facts' keys at a layer, and what their streams still lack."""
    params = jlora.apply(model.params, _float32(loras))
    layer, there = int(path.split("/")[1]), model._replace(params=params)
    keys, left = [], []
    for fact, stream in zip(facts, streams, strict=True):
      asked = ask(there, fact, layer, layers[-1])
      keys.append(asked.at_subject(asked.keys).mean(0))
      left.append(stream - asked.at_subject(asked.stream)[0])
    return np.stack(keys), np.stack(left)

  paths = [kernel_of(layer) for layer in layers]
  return _float32(edit_layers(paths, read, model.moments, balance=balance))


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_modules(
  apply: Any, paths: tuple[str, ...], params: Any, tokens: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Records what modules read and write at every token.

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
    """Calls a module, and keeps its input and output if it is asked for."""
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


def go_on(
  model: models.Model, layer: int, params: Any, stream: jax.Array
) -> Any:
  """Runs the layers behind one layer; returns the normed last stream.

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


def to_logits(model: models.Model, params: Any, normed: jax.Array) -> jax.Array:
  """Computes logits from the normed stream: (..., hidden) to (..., vocab)."""
  shape: Any = model.shape
  if shape.tied:
    return jnp.matmul(normed, params["embed"]["embedding"].T)
  return jnp.matmul(normed, params["head"]["kernel"])


def _weight(model, layer):
  """Returns a layer's down projection, (in, out) float64."""
  kernel = jlora.paths.flatten(model.params)[kernel_of(layer)]
  return np.asarray(kernel, np.float64)


def _float32(tree):
  """Converts the leaves of a tree to float32 arrays of JAX."""
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _at_places(asked):
  """Marks the subject's last token by 1: (rows, time) float32."""
  time = np.arange(asked.keys.shape[1])
  return (time == asked.prompts.places[:, None]).astype(np.float32)


def _fit(model, layer, asked, start, reads, options):
  """Fits δ, added `reads` times to the stream at each token; keeps history."""
  at = asked.prompts.ends[:, None] + np.arange(asked.count)
  at[-1] = asked.prompts.places[-1]
  targets = np.take_along_axis(asked.prompts.tokens, at + 1, axis=1)
  objective = _objective(model.apply, layer)
  shared = model.params, jnp.asarray(asked.stream), jnp.asarray(reads), at
  nothing = jnp.zeros(asked.stream.shape[-1])
  before = _speak(model.apply, layer, nothing, *shared)[-1, 0]
  delta, history = fit_value(
    objective,
    jnp.asarray(start, jnp.float32),
    *shared,
    targets,
    before,
    **options,
  )
  return np.asarray(delta, np.float64), history


@functools.partial(jax.jit, static_argnums=(0, 1))
def _speak(apply, layer, delta, params, stream, reads, at):
  """Computes log-probabilities at some positions, (rows, n, vocab)."""
  stream = stream + reads[..., None] * delta[None, None]
  normed = go_on(apply, layer, params, stream)
  picked = jnp.take_along_axis(normed, at[..., None], axis=1)
  return jax.nn.log_softmax(to_logits(apply, params, picked))


#: Weight of KL(after ‖ before) at the subject in the loss, as in ROME's code.
_KEEP = 0.0625


@functools.cache
def _objective(apply, layer):
  """Returns the loss of δ; the same function each time, to compile it once."""

  def loss(delta, params, stream, reads, at, targets, before):
    said = _speak(apply, layer, delta, params, stream, reads, at)
    gained = jnp.take_along_axis(said, targets[..., None], axis=-1)[:-1]
    now = said[-1, 0]
    kl = jnp.sum(jnp.exp(now) * (now - before))
    return _KEEP * kl - gained.mean()

  return loss
