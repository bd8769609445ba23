# SPDX-License-Identifier: Apache-2.0
"""The two compiled programs of a server: read a piece of a prompt, say tokens.

    read: a piece of C tokens of one row        say: K tokens of all B rows

Every shape is fixed, and a row is computed from its own numbers alone, in an
order that does not depend on the others.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapting.binding import bind
from jlora.adapting.serving import fetch_rows
from jlora.adapting.transforms import adapt
from jlora.loras import Lora
from jlora.models.attention import Span
from jlora.models.networks import Model

Bank = Mapping[str, Lora]


class Sizes(NamedTuple):
  """The shapes of a server's programs.

  Attributes:
    rows: texts that are continued at once.
    length: positions of a row's cache.
    piece: tokens of a prompt that are read at once.
    steps: tokens that all rows say in one call.
  """

  rows: int = 8
  length: int = 512
  piece: int = 32
  steps: int = 4

  def positions(self, prompt: int, limit: int) -> int:
    """Counts the positions that a prompt and its answer take in a cache."""
    return prompt + self.skip(prompt) + limit - 1

  def skip(self, prompt: int) -> int:
    """Counts the padding tokens before a prompt, up to whole pieces."""
    return -prompt % self.piece


class Choice(NamedTuple):
  """How rows choose their tokens.

  Attributes:
    temperature: (B,) float32; 0 takes the most likely token.
    chance: (B,) or (B, K) float32 from 0 to 1, which token of the others.
  """

  temperature: Any
  chance: Any


class Rows(NamedTuple):
  """Where the rows of a batch are.

  Attributes:
    ids: (B,) int32, of adapters; -1 for the base.
    tokens: (B,) int32, the last token of each.
    at: (B,) int32, its position in the cache.
    skip: (B,) int32, positions of padding before the text.
  """

  ids: Any
  tokens: Any
  at: Any
  skip: Any


class Decoder:
  """A model's programs, and the cache of keys and values they work on.

  Args:
    model: of `jlora.models`.
    params: its parameters.
    sizes: of the programs.

  Raises:
    ValueError: sizes below 1, or a cache that is longer than the model's
      positions or no longer than a piece.
  """

  def __init__(self, model: Model, params: Any, sizes: Sizes):
    most = getattr(model.shape, "positions", sizes.length)
    if min(sizes) < 1 or not sizes.piece < sizes.length <= most:
      raise ValueError(
        f"{sizes}: each must be at least 1, and length above {sizes.piece} and "
        f"at most {most}."
      )
    self.model, self.params, self.sizes = model, params, sizes
    self._cache = empty_cache(model, params, sizes)

  def read(
    self,
    bank: Bank,
    row: int,
    identity: int,
    tokens: Sequence[int],
    start: int,
    skip: int,
    choice: Choice,
  ) -> jax.Array:
    """Reads a piece of a prompt into a row's cache; chooses what comes next.

    Args:
      bank: of the adapters; may be empty.
      row: of the cache.
      identity: the adapter's id, -1 for none.
      tokens: as many as a piece has, padding before the first ones.
      start: position of the first of them in the cache.
      skip: positions of padding before the text.
      choice: of one row.

    Returns:
      () int32, the token after the last one.
    """
    found, self._cache = _read(
      self.model,
      self.sizes.length,
      self.params,
      bank,
      np.array([identity], np.int32),
      self._cache,
      np.int32(row),
      np.array([tokens], np.int32),
      np.int32(start),
      np.int32(skip),
      choice,
    )
    return found

  def say(self, bank: Bank, rows: Rows, choice: Choice) -> jax.Array:
    """Says the next tokens of all rows.

    A row that is idle says something too, into positions of its cache that are
    written again before they are read.

    Args:
      bank: as for `read`.
      rows: of all rows.
      choice: of all rows and steps.

    Returns:
      (B, K) int32.
    """
    found, self._cache = _say(
      self.model, self.sizes, self.params, bank, rows, self._cache, choice
    )
    return found


def count_compilations() -> Callable[[], int]:
  """Returns what counts the programs that are compiled from now on.

  Example:
    >>> count = count_compilations()
    >>> _ = jax.jit(lambda x: x + 1)(np.float32(1))
    >>> count()
    1
  """
  found = _compilations()
  start = len(found)
  return lambda: len(found) - start


@functools.cache
def _compilations() -> list[str]:
  """Returns a list that grows with every compiled program."""
  found: list[str] = []

  def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
    """Notes a compilation."""
    del duration_secs, kwargs
    if event.endswith("backend_compile_duration"):
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(heard)
  return found


def empty_cache(model: Model, params: Any, sizes: Sizes) -> Any:
  """Makes a cache of zeros for all rows."""
  tokens = jax.ShapeDtypeStruct((sizes.rows, 1), jnp.int32)
  first = functools.partial(model.extend, span=Span(0, sizes.length), cache={})
  _, cache = jax.eval_shape(first, params, tokens)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _read(
  model, length, params, bank, ids, cache, row, tokens, start, skip, choice
):
  """Reads a piece into one row of the cache."""
  own = jax.tree.map(lambda x: x[0], fetch_rows(bank, ids))
  part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), cache)
  # What the row held before might be NaN, which a mask does not take away.
  is_first = start == 0
  part = jax.tree.map(lambda x: jnp.where(is_first, jnp.zeros_like(x), x), part)
  logits, part = _extended(model, length)(
    bind(params, own), tokens, start, skip, part
  )
  cache = jax.tree.map(
    lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, 0),
    cache,
    part,
  )
  return choose(logits, choice)[0], cache


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _say(model, sizes, params, bank, rows, cache, choice):
  """Says the tokens of all rows, one after the other."""
  own = fetch_rows(bank, rows.ids)
  extended = _extended(model, sizes.length)

  def row(own, token, at, skip, part):
    """Says one row's next token."""
    part = jax.tree.map(lambda x: x[None], part)
    tokens = token[None, None]
    logits, part = extended(bind(params, own), tokens, at, skip, part)
    return logits[0], jax.tree.map(lambda x: x[0], part)

  def step(carry, chance):
    """Says the next token of every row."""
    cache, tokens, at = carry
    logits, cache = jax.vmap(row)(own, tokens, at, rows.skip, cache)
    tokens = choose(logits, choice._replace(chance=chance))
    return (cache, tokens, at + 1), tokens

  carry = cache, rows.tokens, rows.at
  (cache, _, _), said = jax.lax.scan(step, carry, choice.chance.T)
  return said.T, cache


def _extended(model, length: int):
  """Returns the model's step as a function of arrays alone, with adapters."""

  def extend(params, tokens, start, skip, cache):
    """Continues one text."""
    span = Span(start, length, skip[None])
    return model.extend(params, tokens, span, cache)

  return adapt(extend)


def choose(logits: jax.Array, choice: Choice) -> jax.Array:
  """Chooses each row's token by its temperature and one number of chance.

      t = min {t: Σ_(s ≤ t) p_s > chance},   p = softmax(logits / temperature)

  Args:
    logits: (B, vocabulary), any float dtype.
    choice: of (B,) each.

  Returns:
    (B,) int32; the largest logit where the temperature is 0.

  Example:
    >>> logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]] * 3))
    >>> choose(logits, Choice(jnp.array([0.0, 1.0, 1.0]),
    ...                       jnp.array([0.9, 0.1, 0.9])))
    Array([1, 0, 2], dtype=int32)
  """
  logits = logits.astype(jnp.float32)
  best = jnp.argmax(logits, -1).astype(jnp.int32)

  def by_chance():
    """Chooses by chance where there is a temperature."""
    hot = choice.temperature > 0
    divisor = jnp.where(
      hot, choice.temperature, jnp.ones_like(hot, jnp.float32)
    )
    total = jnp.cumsum(jax.nn.softmax(logits / divisor[:, None]), -1)
    is_before = total <= (choice.chance * total[:, -1])[:, None]
    drawn = jnp.minimum(is_before.sum(-1), logits.shape[-1] - 1)
    return jnp.where(hot, drawn.astype(jnp.int32), best)

  return jax.lax.cond(jnp.any(choice.temperature > 0), by_chance, lambda: best)
