# SPDX-License-Identifier: Apache-2.0
"""A decoder-only language model of the Llama family, in Flax.

Llama and its relatives differ in a few switches, all read from the folder's
`config.json`: Mistral (a window), Mixtral (a mixture of MLPs), Qwen2 (biases on
q, k, v), Qwen3 (norms on q and k). Layers are unrolled, not scanned, so that
each parameter has its own path, and transformations of the function see every
product.
"""

import flax.linen as nn
import jax

from jlora.models.attention import WHOLE, Span, attend, remember, rotate, turns
from jlora.models.config import Shape
from jlora.models.layers import Mixture, Mlp, linear_layer, rms_norm

Turns = tuple[jax.Array, jax.Array]


class Attention(nn.Module):
  """Causal attention with grouped keys and values and rotary positions."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array, turns: Turns, span: Span) -> jax.Array:
    """Mixes x (batch, time, hidden) along time."""
    s = self.shape
    q, k, v = (
      linear_layer(heads * s.head_dim, s.dtype, name, bias=s.qkv_bias)(
        x
      ).reshape(*x.shape[:2], heads, s.head_dim)
      for name, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads))
    )
    if s.qk_norm:
      q, k = rms_norm(s, "q_norm")(q), rms_norm(s, "k_norm")(k)
    k, v = remember(self, rotate(k, *turns), v, span)
    y = attend(rotate(q, *turns), k, v, s.window, span)
    y = y.reshape(*x.shape[:2], -1)
    return linear_layer(s.hidden, s.dtype, "o", bias=s.out_bias)(y)


class Layer(nn.Module):
  """A decoder layer: attention and MLP, each after a norm, with residuals."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array, turns: Turns, span: Span) -> jax.Array:
    """Maps the residual stream x (batch, time, hidden)."""
    s = self.shape
    mlp = Mixture(s, name="moe") if s.experts else Mlp(s, name="mlp")
    x = x + Attention(s, name="attn")(rms_norm(s, "attn_norm")(x), turns, span)
    return x + mlp(rms_norm(s, "mlp_norm")(x))


class Layers(nn.Module):
  """All layers in order, their parameters under '0', '1', ..."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array, turns: Turns, span: Span) -> jax.Array:
    """Maps the residual stream x (batch, time, hidden)."""
    for i in range(self.shape.layers):
      x = Layer(self.shape, name=str(i))(x, turns, span)
    return x


class Decoder(nn.Module):
  """A language model of the Llama family, tokens to next-token logits."""

  shape: Shape

  @nn.compact
  def __call__(self, tokens: jax.Array, span: Span = WHOLE) -> jax.Array:
    """Computes logits at each position; with a cache, at the last one."""
    s = self.shape
    embed = nn.Embed(
      s.vocab, s.hidden, name="embed", dtype=s.dtype, param_dtype=s.dtype
    )
    angles = turns(s.frequencies, span, tokens.shape[1], s.dtype)
    x = Layers(s, name="layers")(embed(tokens), angles, span)
    x = rms_norm(s, "norm")(x if span.length is None else x[:, -1:])
    return (
      embed.attend(x) if s.tied else linear_layer(s.vocab, s.dtype, "head")(x)
    )
