# SPDX-License-Identifier: Apache-2.0
"""A decoder-only language model of the Llama family, in Flax.

Llama and its relatives differ in a few switches, all read from the folder's
`config.json`: Mistral (a window), Qwen2 (biases on q, k, v), Qwen3 (norms on q
and k). Every layer is written out, never scanned: each parameter has a path of
its own and a transformation of the function meets every product.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.shape import Shape, read_shape

Params = dict[str, Any]
Apply = Callable[[Params, jax.Array], jax.Array]


def _dense(shape: Shape, features: int, name: str, bias: bool = False):
  """A linear layer whose kernel is (in, out)."""
  return nn.Dense(
    features,
    use_bias=bias,
    name=name,
    dtype=shape.dtype,
    param_dtype=shape.dtype,
  )


def _norm(shape: Shape, name: str) -> "Norm":
  """A root-mean-square norm over the last axis."""
  return Norm(shape.eps, shape.dtype, name=name)


class Norm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale, in float32 whatever x is."""

  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (..., features), rounded to its own dtype before `scale`."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.dtype)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * jnp.expand_dims(scale, range(x.ndim - 1))


class Attention(nn.Module):
  """Causal attention with grouped keys and values and rotary positions."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Mixes x (batch, time, hidden) along time."""
    s = self.shape
    q, k, v = (
      _dense(s, heads * s.head_dim, name, s.qkv_bias)(x).reshape(
        *x.shape[:2], heads, s.head_dim
      )
      for name, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads))
    )
    if s.qk_norm:
      q, k = _norm(s, "q_norm")(q), _norm(s, "k_norm")(k)
    q, k = rotate(q, s.frequencies), rotate(k, s.frequencies)
    y = attend(q, k, v, s.window).reshape(*x.shape[:2], -1)
    return _dense(s, s.hidden, "o", s.out_bias)(y)


class Mlp(nn.Module):
  """The gated layer down(silu(gate(x)) * up(x)), called SwiGLU."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (batch, time, hidden) position by position."""
    s = self.shape
    gate = _dense(s, s.mlp, "gate", s.mlp_bias)(x)
    up = _dense(s, s.mlp, "up", s.mlp_bias)(x)
    return _dense(s, s.hidden, "down", s.mlp_bias)(jax.nn.silu(gate) * up)


class Layer(nn.Module):
  """Attention and MLP, each behind a norm and added to the stream."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps the stream x (batch, time, hidden) to the next layer's."""
    s = self.shape
    x = x + Attention(s, name="attn")(_norm(s, "attn_norm")(x))
    return x + Mlp(s, name="mlp")(_norm(s, "mlp_norm")(x))


class Layers(nn.Module):
  """The layers in order, their parameters under '0', '1', ..."""

  shape: Shape

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps the stream x (batch, time, hidden) through every layer."""
    for i in range(self.shape.layers):
      x = Layer(self.shape, name=str(i))(x)
    return x


class Decoder(nn.Module):
  """Tokens (batch, time) int32 to next-token logits (batch, time, vocab)."""

  shape: Shape

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Logits of the token after each position; no padding, no cache."""
    s = self.shape
    embed = nn.Embed(
      s.vocab, s.hidden, name="embed", dtype=s.dtype, param_dtype=s.dtype
    )
    x = _norm(s, "norm")(Layers(s, name="layers")(embed(tokens)))
    return embed.attend(x) if s.tied else _dense(s, s.vocab, "head")(x)


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None
) -> jax.Array:
  """Values averaged over each position's past, weighted by softmax(q k / √d).

  Args:
    q: (batch, time, heads, d), any float dtype.
    k: (batch, time, kv_heads, d); each serves heads / kv_heads queries.
    v: (batch, time, kv_heads, d).
    window: positions seen, the present one included; None for all.

  Returns:
    (batch, time, heads, d) in the dtype of `q`; the softmax is float32. Holds
    heads * time^2 numbers per example.

  Example:
    >>> x = jnp.eye(2)[None, :, None]
    >>> attend(jnp.zeros((1, 2, 1, 2)), x, x)[0, :, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]

  References:
    Ainslie et al. (2023), GQA.
  """
  batch, time, heads, d = q.shape
  q = q.reshape(batch, time, k.shape[2], -1, d)
  scores = jnp.einsum(
    "btgqd,bsgd->bgqts", q, k, preferred_element_type=jnp.float32
  )
  age = np.arange(time)[:, None] - np.arange(time)[None, :]
  seen = (age >= 0) & (age < (window or time))
  weights = jax.nn.softmax(
    scores / math.sqrt(d), where=seen[None, None, None], axis=-1
  )
  y = jnp.einsum("bgqts,bsgd->btgqd", weights.astype(v.dtype), v)
  return y.reshape(batch, time, heads, d)


def rotate(x: jax.Array, frequencies: tuple[float, ...]) -> jax.Array:
  """Channels of x turned pairwise by their position's angle (RoPE).

  Channel i is paired with channel i + d/2, as Hugging Face stores them:

      y_i       = x_i cos(t f_i) - x_{i+d/2} sin(t f_i)
      y_{i+d/2} = x_{i+d/2} cos(t f_i) + x_i sin(t f_i)

  Args:
    x: (batch, time, heads, d), any float dtype.
    frequencies: d/2 angles per position, in radians.

  Returns:
    The shape and dtype of `x`.

  Example:
    >>> x = jnp.ones((1, 2, 1, 2))
    >>> rotate(x, (np.pi / 2,))[0, :, 0].round(3).tolist()
    [[1.0, 1.0], [-1.0, 1.0]]

  References:
    Su et al. (2021), RoFormer.
  """
  angles = np.outer(np.arange(x.shape[1]), frequencies)[None, :, None]
  cos, sin = (jnp.asarray(f(angles), x.dtype) for f in (np.cos, np.sin))
  low, high = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [low * cos - high * sin, high * cos + low * sin], axis=-1
  )


def build(config: Mapping, *, dtype: Any = jnp.float32) -> Apply:
  """The pure function `apply(params, tokens) -> logits` of a config.

  Args:
    config: the content of a Hugging Face `config.json`.
    dtype: of the parameters and of the computation.

  Returns:
    A function of the parameters' nested dict and tokens (batch, time) int;
    logits (batch, time, vocab) in `dtype`. Every token is attended to: pad on
    the right and ignore what follows. Equal configs give the same function.

  Raises:
    ValueError: as `read_shape`.

  Example:
    >>> config = dict(model_type="llama", vocab_size=9, hidden_size=8,
    ...               intermediate_size=8, num_hidden_layers=1,
    ...               num_attention_heads=2)
    >>> build(config) is build(dict(config))
    True
  """
  return _build(read_shape(config, dtype))


@functools.cache
def _build(shape: Shape) -> Apply:
  """One function for each shape, so that jit compiles a pair of models once."""
  decoder = Decoder(shape)

  def apply(params: Params, tokens: jax.Array) -> jax.Array:
    return decoder.apply({"params": params}, tokens)  # pyright: ignore

  return apply


def init(
  config: Mapping, key: jax.Array, *, dtype: Any = jnp.float32
) -> tuple[Apply, Params]:
  """A randomly initialised model: its function and its parameters.

  Args:
    config: the content of a Hugging Face `config.json`.
    key: PRNG key.
    dtype: of the parameters and of the computation.

  Returns:
    `apply` as `build` gives it, and the nested dict of parameters: kernels
    (in, out), `layers/0/attn/q/kernel` and so on.

  Raises:
    ValueError: as `read_shape`.

  Example:
    >>> config = dict(model_type="llama", vocab_size=9, hidden_size=8,
    ...               intermediate_size=8, num_hidden_layers=1,
    ...               num_attention_heads=2)
    >>> apply, params = init(config, jax.random.key(0))
    >>> apply(params, jnp.zeros((1, 3), jnp.int32)).shape
    (1, 3, 9)
  """
  decoder = Decoder(read_shape(config, dtype))
  # One compiled program; op by op it would take seconds.
  params = jax.jit(decoder.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
  return build(config, dtype=dtype), dict(params)
