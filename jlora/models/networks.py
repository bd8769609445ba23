# SPDX-License-Identifier: Apache-2.0
"""Builds networks from configs, as pure functions of their parameters."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.attention import Span
from jlora.models.config import FAMILIES, Shape, read_shape
from jlora.models.decoder import Decoder
from jlora.models.gpt2 import Gpt2, Gpt2Shape, read_gpt2

#: model_type -> (function that reads its config, Flax module).
NETWORKS = {
  **dict.fromkeys(FAMILIES, (read_shape, Decoder)),
  "gpt2": (read_gpt2, Gpt2),
}

Params = dict[str, Any]
Cache = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
  """A network as a pure, hashable function, `model(params, tokens) -> logits`.

  Attributes:
    shape: its sizes and switches; `shape.tied` tells whether its head is its
      embedding.
    network: its Flax module.

  Example:
    >>> config = dict(model_type="llama", vocab_size=9, hidden_size=8,
    ...               intermediate_size=8, num_hidden_layers=1,
    ...               num_attention_heads=2)
    >>> model, params = init(config, jax.random.key(0))
    >>> model(params, jnp.zeros((1, 3), jnp.int32)).shape
    (1, 3, 9)
  """

  shape: Shape | Gpt2Shape
  network: nn.Module

  def __call__(self, params: Params, tokens: jax.Array) -> jax.Array:
    """Computes logits of the token after each position.

    Args:
      params: nested dict.
      tokens: (batch, time) int32. There is no mask of padding: pad on the right
        and ignore the logits there.

    Returns:
      (batch, time, vocab) in the parameters' dtype.

    Raises:
      ValueError: the text is longer than a GPT-2's learned positions.
    """
    return self.network.apply({"params": params}, tokens)  # pyright: ignore

  def extend(
    self, params: Params, tokens: jax.Array, span: Span, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Computes logits after the last token, and adds the tokens to the cache.

    Args:
      params: nested dict.
      tokens: (batch, time) int32, the next ones of each text.
      span: position of the first of them, and the length of the cache.
      cache: as returned by the call before; {} where `span.start` is 0.

    Returns:
      logits (batch, vocab), and the cache, a nested dict of keys and values
      (batch, length, kv_heads, d).

    Raises:
      ValueError: as the call without a cache.
    """
    logits, kept = self.network.apply(
      {"params": params, "cache": cache}, tokens, span, mutable="cache"
    )
    return logits[:, 0], kept["cache"]  # pyright: ignore


def build(config: Mapping, *, dtype: Any = jnp.float32) -> Model:
  """Builds the pure function `apply(params, tokens) -> logits` of a config.

  Args:
    config: the content of a Hugging Face `config.json`.
    dtype: of the parameters and of the computation.

  Returns:
    A `Model`. Equal configs give the same object, so that `jit` compiles once
    for a base and its finetune.

  Raises:
    ValueError: a family, activation or other setting that is not covered, or a
      missing key.

  Example:
    >>> config = dict(model_type="gpt2", vocab_size=9, n_embd=8, n_layer=1,
    ...               n_head=2, n_positions=16)
    >>> build(config) is build(dict(config))
    True
  """
  family = config.get("model_type")
  if not isinstance(family, str) or family not in NETWORKS:
    raise ValueError(
      f"model_type {family!r} is not one of {', '.join(NETWORKS)}"
    )
  read, network = NETWORKS[family]
  return _build(read(config, dtype), network)


@functools.cache
def _build(shape: Any, network: Any) -> Model:
  """Returns one Model for each shape."""
  return Model(shape, network(shape))


def init(
  config: Mapping, key: jax.Array, *, dtype: Any = jnp.float32
) -> tuple[Model, Params]:
  """Initialises a model at random; returns its function and its parameters.

  Args:
    config: the content of a Hugging Face `config.json`.
    key: PRNG key.
    dtype: of the parameters and of the computation.

  Returns:
    A `Model`, as from `build`, and the nested dict of parameters: kernels
    (in, out), `layers/0/attn/q/kernel` and so on.

  Raises:
    ValueError: as `build`.

  Example:
    >>> config = dict(model_type="gpt2", vocab_size=9, n_embd=8, n_layer=1,
    ...               n_head=2, n_positions=16)
    >>> apply, params = init(config, jax.random.key(0))
    >>> params["h"]["0"]["attn"]["c_attn"]["kernel"].shape
    (8, 24)
  """
  model = build(config, dtype=dtype)
  # Compiled as one program, because op by op it would take seconds.
  variables = jax.jit(model.network.init)(key, jnp.zeros((1, 1), jnp.int32))
  return model, dict(variables["params"])
