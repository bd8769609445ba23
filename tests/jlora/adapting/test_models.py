# SPDX-License-Identifier: Apache-2.0
"""Whole models of every kind, adapted against merged: values and gradients.

Ours and foreign ones; linen, NNX, equinox. None is written for adapters.
"""

import functools
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jlora import models
from jlora.adapting.binding import bind
from jlora.adapting.transforms import adapt, apply
from jlora.loras import Lora
from jlora.paths import flatten
from jlora.selection import is_matrix
from jlora.views import CONV1D, FLAX_VIEWS, view_of

TINY = {
  "vocab_size": 23,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 32,
}
CONFIGS = {
  "llama, tied": {"model_type": "llama", **TINY, "tie_word_embeddings": True},
  "mixtral": {
    "model_type": "mixtral",
    **TINY,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
  },
  "gpt2": {
    "model_type": "gpt2",
    "vocab_size": 23,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
  },
}
KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, 23)
IMAGES = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
STREAM = jax.random.normal(jax.random.key(3), (2, 5, 16))


def ours(name):
  apply_model, params = models.init(CONFIGS[name], KEY)
  return apply_model, params, TOKENS


class Cnn(nn.Module):
  """The convolutional network of Flax's MNIST example, smaller."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), name="conv_1")(x))
    x = nn.avg_pool(x, (2, 2), strides=(2, 2))
    x = nn.relu(nn.Conv(6, (3, 3), strides=(2, 2), name="conv_2")(x))
    return nn.Dense(5)(x.reshape(x.shape[0], -1))


class Block(nn.Module):
  """A transformer's block as scanned over layers."""

  @nn.compact
  def __call__(self, x, _):
    mixed = nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
    x = x + mixed
    return x + nn.Dense(16)(nn.gelu(nn.Dense(24)(nn.RMSNorm()(x)))), None


class Stacked(nn.Module):
  """Blocks under nn.scan and nn.remat."""

  @nn.compact
  def __call__(self, x):
    blocks = nn.scan(
      nn.remat(Block), variable_axes={"params": 0},
      split_rngs={"params": True}, length=3,
    )  # fmt: skip
    return blocks()(x, None)[0]


def linen(module, x):
  return module.apply, jax.jit(module.init)(KEY, x), x


class NnxModel(nnx.Module):
  """Attention, an embedding and an MLP of NNX."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(23, 16, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
    self.up = nnx.Linear(16, 24, rngs=rngs)
    self.down = nnx.Linear(24, 16, use_bias=False, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    x = x + self.attention(x)
    return self.embed.attend(x + self.down(nnx.relu(self.up(x))))


def of_nnx():
  graph, state = nnx.split(NnxModel(nnx.Rngs(0)))
  return (lambda state, x: nnx.merge(graph, state)(x)), state, TOKENS


class EqxModel(eqx.Module):
  """Attention and an MLP of equinox, written for one example."""

  attention: eqx.nn.MultiheadAttention
  mlp: eqx.nn.MLP
  conv: eqx.nn.Conv1d

  def __call__(self, x):
    x = x + self.attention(x, x, x)
    return self.conv(jax.vmap(self.mlp)(x).T)


def of_equinox():
  keys = jax.random.split(KEY, 3)
  model = EqxModel(
    eqx.nn.MultiheadAttention(4, 16, key=keys[0]),
    eqx.nn.MLP(16, 16, 24, 1, key=keys[1]),
    eqx.nn.Conv1d(16, 8, 3, key=keys[2]),
  )
  params, static = eqx.partition(model, eqx.is_array)
  run = lambda params, x: jax.vmap(eqx.combine(params, static))(x)  # noqa: E731
  return run, params, STREAM


MODELS = {
  **{name: functools.partial(ours, name) for name in CONFIGS},
  "linen, convolutions": lambda: linen(Cnn(), IMAGES),
  "linen, scan and remat": lambda: linen(Stacked(), STREAM),
  "linen, attention": lambda: linen(nn.MultiHeadDotProductAttention(4), STREAM),
  "nnx": of_nnx,
  "equinox": of_equinox,
}


# Equinox keeps a convolution's weight as PyTorch does.
VIEWS = ((r".*conv/weight", 3, CONV1D), *FLAX_VIEWS)


def loras_for(params, seed=0, rank=2):
  """A Lora on every matrix."""
  flat, loras = flatten(params), {}
  for i, (path, leaf) in enumerate(flat.items()):
    view = view_of(path, leaf.shape, VIEWS)
    if view is None or not is_matrix(path, leaf):
      continue
    *batch, inputs, outputs = view.shape(leaf.shape)
    a, b = (
      jax.random.normal(jax.random.key(seed + 2 * i + side), (*batch, rank, n))
      for side, n in enumerate((inputs, outputs))
    )
    scale = jnp.full(batch, 0.5 / np.sqrt(inputs), jnp.float32)
    loras[path] = Lora(a, b, scale)
  return loras


@pytest.fixture(autouse=True)
def flax_promotes():
  """Flax's pooling divides by an integer."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_merged(name):
  fn, params, x = MODELS[name]()
  loras = loras_for(params)

  def by(combine, run):
    def loss(loras):
      out = run(combine(params, loras, views=VIEWS), x)
      return jnp.mean(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(loras)

  with warnings.catch_warnings():
    warnings.simplefilter("error")
    (_, found), grads = by(bind, adapt(fn, strict=True))
  (_, wanted), wanted_grads = by(apply, fn)
  base = jax.jit(fn)(params, x)
  assert np.abs(found - base).max() > 1e-2  # the adapter does something
  np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-5)
  for path, grad in wanted_grads.items():
    for part in ("a", "b", "scale"):
      one, other = getattr(grads[path], part), getattr(grad, part)
      size = np.abs(other).max() + 1e-6
      np.testing.assert_allclose(one / size, other / size, atol=2e-3)
