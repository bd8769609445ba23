# SPDX-License-Identifier: Apache-2.0
"""Generates text token by token, with a cache of keys and values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jlora.messages import name_some
from jlora.models.attention import Span
from jlora.models.networks import Model, Params


def generate(
  apply: Model,
  params: Params,
  tokens: jax.Array,
  steps: int,
  *,
  lengths: jax.Array | None = None,
  key: jax.Array | None = None,
  temperature: float = 0.0,
) -> jax.Array:
  """Generates the next tokens of prompts, by sampling or greedily.

      t_n ~ softmax(logits(t_0, ..., t_{n-1}) / temperature),

  or the largest logit if the temperature is 0. One compiled program runs the
  prompts at once and then a scan over the steps. It is compiled once for each
  shape of prompts and number of steps, and not again for other parameters of
  the same model, as from `jlora.apply`, or another positive temperature.

  Args:
    apply: a Model, from `load` or `init`.
    params: its parameters; may be sharded.
    tokens: (batch, time) int, prompts; pad shorter ones at their ends.
    steps: how many tokens follow each prompt. It does not stop at the end of a
      text; cut there.
    lengths: (batch,) int, number of tokens of each prompt, from 1 to time; None
      is time for all. Padding does not affect a row's continuation, up to float
      rounding.
    key: PRNG key of the samples; None means `jax.random.key(0)`. The samples
      of a row depend on the other rows of the batch.
    temperature: not negative; 1 samples from the model's own distribution.

  Returns:
    (batch, steps) int32, without the prompts. Beside the parameters it holds
    2 layers (time + steps) kv_heads head_dim numbers per row.

  Raises:
    ValueError: prompts without a token, lengths that do not fit, no steps, a
      negative temperature, or more positions than a GPT-2 has.

  Example:
    >>> from jlora import models
    >>> config = dict(model_type="llama", vocab_size=9, hidden_size=8,
    ...               intermediate_size=8, num_hidden_layers=1,
    ...               num_attention_heads=2)
    >>> apply, params = models.init(config, jax.random.key(0))
    >>> generate(apply, params, jnp.array([[1, 2, 3]]), 4).shape
    (1, 4)
  """
  if jnp.ndim(tokens) != 2 or not jnp.size(tokens):
    raise ValueError(
      f"prompts are (batch, time) with at least a token, got shape "
      f"{jnp.shape(tokens)}"
    )
  if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
    raise ValueError(f"prompts are integers, got {jnp.result_type(tokens)}")
  if steps < 1 or not temperature >= 0.0:
    raise ValueError(
      f"steps must be at least 1, temperature at least 0; got {steps} and "
      f"{temperature}"
    )
  if lengths is not None:
    _check_lengths(np.asarray(lengths), *jnp.shape(tokens))
    lengths = jnp.asarray(lengths, jnp.int32)
  return _generate(
    apply,
    params,
    jnp.asarray(tokens, jnp.int32),
    steps,
    lengths,
    jax.random.key(0) if key is None else key,
    jnp.float32(temperature),
    is_greedy=temperature == 0.0,
  )


def _check_lengths(lengths: np.ndarray, batch: int, time: int) -> None:
  """Raises unless every prompt has a length from 1 to time."""
  if lengths.shape != (batch,) or not np.issubdtype(lengths.dtype, np.integer):
    raise ValueError(
      f"lengths are ({batch},) integers, one a prompt, got {lengths.dtype} "
      f"{lengths.shape}"
    )
  wrong = [
    f"{length} of prompt {row}"
    for row, length in enumerate(lengths)
    if not 1 <= length <= time
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} lengths are not from 1 to {time}: {name_some(wrong)}"
    )


@functools.partial(
  jax.jit, static_argnums=(0, 3), static_argnames=("is_greedy",)
)
def _generate(
  apply, params, tokens, steps, lengths, key, temperature, *, is_greedy
):
  """Runs the prompts at once, then one token a step."""
  time, skip = tokens.shape[1], None
  if lengths is not None:
    # Move padding before the prompts, so that all of them end at one position.
    skip = time - lengths
    places = (jnp.arange(time)[None] - skip[:, None]) % time
    tokens = jnp.take_along_axis(tokens, places, axis=1)
  # The last token is returned, but never an input.
  length = time + steps - 1

  def choose(logits, key):
    """Chooses the next token (batch, 1) from logits (batch, vocab)."""
    logits = logits.astype(jnp.float32)
    if is_greedy:
      return jnp.argmax(logits, -1)[:, None]
    return jax.random.categorical(key, logits / temperature)[:, None]

  def step(carry, key):
    """Computes the next token; puts out the one before."""
    cache, token, position = carry
    span = Span(position, length, skip)
    logits, cache = apply.extend(params, token, span, cache)
    return (cache, choose(logits, key), position + 1), token

  keys = jax.random.split(key, steps)
  logits, cache = apply.extend(params, tokens, Span(0, length, skip), {})
  carry = cache, choose(logits, keys[0]), jnp.int32(time)
  (_, last, _), said = jax.lax.scan(step, carry, keys[1:])
  return jnp.concatenate([said[..., 0].T, last], axis=1)
