# SPDX-License-Identifier: Apache-2.0
"""GPT-2 in Flax: learned positions, layer norms, one product for q, k and v.

Paths keep GPT-2's own names, `h/0/attn/c_attn/kernel`, because the fused
product has no counterpart in the Llama family.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.checkpoints.documents import (
  FLAG,
  NULL,
  REAL,
  check_fields,
  either,
)
from jlora.models.attention import WHOLE, Span, attend, remember
from jlora.models.config import LAYERS, WIDTH, require
from jlora.models.layers import linear_layer

#: key of config.json -> the supported values, its default first.
COVERED = {
  "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
  "add_cross_attention": (False,),
  "scale_attn_by_inverse_layer_idx": (False,),
  "scale_attn_weights": (True,),
}
#: Keys without a default.
GPT2_REQUIRED = {
  "vocab_size": WIDTH,
  "n_embd": WIDTH,
  "n_layer": LAYERS,
  "n_head": WIDTH,
  "n_positions": WIDTH,
}
_OTHERS = {
  "layer_norm_epsilon": REAL,
  "n_inner": either(WIDTH, NULL),
  "tie_word_embeddings": either(FLAG, NULL),
}


@dataclasses.dataclass(frozen=True)
class Gpt2Shape:
  """The sizes and switches of a GPT-2.

  Attributes:
    positions: the longest text, in tokens.
    tied: whether the head is the embedding, transposed.
    dtype: of the parameters and of the computation.
  """

  vocab: int
  hidden: int
  mlp: int
  layers: int
  heads: int
  positions: int
  eps: float
  tied: bool
  dtype: Any = jnp.float32


def read_gpt2(config: Mapping, dtype: Any = jnp.float32) -> Gpt2Shape:
  """Reads the network's shape from a GPT-2's `config.json`.

  Args:
    config: the file's content.
    dtype: of the parameters and of the computation.

  Returns:
    A `Gpt2Shape`, hashable.

  Raises:
    ValueError: for a value not covered here, or a missing key.

  Example:
    >>> config = dict(vocab_size=9, n_embd=8, n_layer=1, n_head=2,
    ...               n_positions=16)
    >>> read_gpt2(config).mlp
    32
  """
  for key, covered in COVERED.items():
    if config.get(key, covered[0]) not in covered:
      raise ValueError(
        f"{key} {config[key]!r} is not supported; {covered[0]!r} is"
      )
  require(config, GPT2_REQUIRED)
  check_fields(dict(config), _OTHERS, "config.json")
  if config["n_embd"] % config["n_head"]:
    raise ValueError(
      f"{config['n_head']} heads do not divide {config['n_embd']} channels"
    )
  return Gpt2Shape(
    vocab=config["vocab_size"],
    hidden=config["n_embd"],
    mlp=config.get("n_inner") or 4 * config["n_embd"],
    layers=config["n_layer"],
    heads=config["n_head"],
    positions=config["n_positions"],
    eps=config.get("layer_norm_epsilon", 1e-5),
    tied=bool(config.get("tie_word_embeddings", True)),
    dtype=dtype,
  )


class Gpt2Norm(nn.Module):
  """A layer norm, (x - mean) / sqrt(var + eps) * scale + bias, in float32."""

  shape: Gpt2Shape

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x (batch, time, hidden); rounds to its dtype at the end."""
    scale, bias = (
      self.param(name, start, x.shape[-1:], self.shape.dtype)[None, None]
      for name, start in (
        ("scale", nn.initializers.ones),
        ("bias", nn.initializers.zeros),
      )
    )
    y = x.astype(jnp.float32)
    y -= y.mean(-1, keepdims=True)
    y *= jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.shape.eps)
    y = y * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype)


class Gpt2Attention(nn.Module):
  """Causal attention that computes q, k and v in one product."""

  shape: Gpt2Shape

  @nn.compact
  def __call__(self, x: jax.Array, span: Span) -> jax.Array:
    """Mixes x (batch, time, hidden) along time."""
    s = self.shape
    fused = linear_layer(3 * s.hidden, s.dtype, "c_attn", bias=True)(x)
    q, k, v = jnp.split(fused.reshape(*x.shape[:2], 3 * s.heads, -1), 3, axis=2)
    k, v = remember(self, k, v, span)
    y = attend(q, k, v, span=span).reshape(x.shape)
    return linear_layer(s.hidden, s.dtype, "c_proj", bias=True)(y)


class Gpt2Mlp(nn.Module):
  """The MLP c_proj(gelu(c_fc(x))), with gelu's tanh approximation."""

  shape: Gpt2Shape

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (batch, time, hidden), each position independently."""
    s = self.shape
    y = jax.nn.gelu(linear_layer(s.mlp, s.dtype, "c_fc", bias=True)(x))
    return linear_layer(s.hidden, s.dtype, "c_proj", bias=True)(y)


class Gpt2Layer(nn.Module):
  """A GPT-2 layer: attention and MLP, each after a norm, with residuals."""

  shape: Gpt2Shape

  @nn.compact
  def __call__(self, x: jax.Array, span: Span) -> jax.Array:
    """Maps the residual stream x (batch, time, hidden)."""
    s = self.shape
    x = x + Gpt2Attention(s, name="attn")(Gpt2Norm(s, name="ln_1")(x), span)
    return x + Gpt2Mlp(s, name="mlp")(Gpt2Norm(s, name="ln_2")(x))


class Gpt2Layers(nn.Module):
  """All layers in order, their parameters under '0', '1', ..."""

  shape: Gpt2Shape

  @nn.compact
  def __call__(self, x: jax.Array, span: Span) -> jax.Array:
    """Maps the residual stream x (batch, time, hidden)."""
    for i in range(self.shape.layers):
      x = Gpt2Layer(self.shape, name=str(i))(x, span)
    return x


class Gpt2(nn.Module):
  """A GPT-2, from tokens (batch, time) int32 to next-token logits."""

  shape: Gpt2Shape

  @nn.compact
  def __call__(self, tokens: jax.Array, span: Span = WHOLE) -> jax.Array:
    """Computes logits at each position; with a cache, at the last one."""
    s, time = self.shape, tokens.shape[1]
    if (span.length or time) > s.positions:
      raise ValueError(
        f"{span.length or time} positions are more than the {s.positions} that "
        "this GPT-2 has learned (n_positions); shorten the text"
      )
    wte, wpe = (
      nn.Embed(rows, s.hidden, name=name, dtype=s.dtype, param_dtype=s.dtype)
      for name, rows in (("wte", s.vocab), ("wpe", s.positions))
    )
    x = wte(tokens) + wpe(span.positions(time))
    x = Gpt2Layers(s, name="h")(x, span)
    x = Gpt2Norm(s, name="ln_f")(x if span.length is None else x[:, -1:])
    return (
      wte.attend(x) if s.tied else linear_layer(s.vocab, s.dtype, "head")(x)
    )
