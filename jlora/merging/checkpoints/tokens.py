# SPDX-License-Identifier: Apache-2.0
"""Decides which tokens a merge has, and where each row of them comes from.

Rows of embeddings and heads are merged by token. A model that lacks a token
takes part with a row of another: the base's, else the only other's, else the
mean of all that have it, unless the recipe says which.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.documents import shortened
from jlora.checkpoints.hub import locate
from jlora.merging.checkpoints.recipes import Recipe, Tokenizer
from jlora.messages import name_some
from jlora.pairing.match import is_table
from jlora.pairing.vocabularies import Tokens, read_tokens

# Rows of no token that a vocabulary may have beside as many as its tokens.
_SPARE = 2**16
_FILES = "a tokenizer.json, or a vocab.json or vocab.txt"
# Besides embeddings and heads; the first axis is that of tokens.
_TABLES = re.compile(
  r"(.*\.)?(shared\.weight|(lm_head(\.decoder)?|cls\.predictions(\.decoder)?"
  r"|generator_lm_head|embed_out|vocab_projector)\.(weight|bias))"
)

#: Rows whose mean stands for a token: (model, row); none is a row of zeros.
Fill = tuple[tuple[str, int], ...]


class TokenPlan(NamedTuple):
  """The tokens of a merge.

  Attributes:
    tokens: number -> token.
    rows: how many each table has.
    own: model -> for each row its own row, -1 where it has none.
    fills: model -> row -> what stands there for what it lacks.
    added: tokens that the tokenizer's own files lack, in order.
    source: the model or path whose tokenizer files the result has.
    before: the reference's tokens.
    height: how many rows the reference's tables have.
    notes: what is unusual.
  """

  tokens: Tokens
  rows: int
  own: dict[str, tuple[int, ...]]
  fills: dict[str, dict[int, Fill]]
  added: tuple[str, ...]
  source: str
  before: Tokens
  height: int
  notes: list[str]

  def is_plain(self, model: str, rows: int) -> bool:
    """Returns whether a model's tables of so many rows are the result's."""
    is_same = rows == self.rows and not self.fills[model]
    return is_same and self.own[model] == tuple(range(rows))

  def reshaped(self, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model's spec with the result's number of rows."""
    return {
      name: one._replace(shape=(self.rows, *one.shape[1:]))
      if has_tokens(name)
      else one
      for name, one in spec.items()
    }


def has_tokens(name: str) -> bool:
  """Returns whether a parameter's first axis is that of tokens, by its name.

  Args:
    name: in a checkpoint.

  Example:
    >>> [has_tokens(name) for name in ("lm_head.bias", "h.0.attn.bias")]
    [True, False]
  """
  return is_table(name) or _TABLES.fullmatch(name) is not None


def plan_tokens(recipe: Recipe, models: Mapping[str, Any]) -> TokenPlan | None:
  """Plans the rows of a merge by token.

  Args:
    recipe: the merge.
    models: name -> open checkpoint, the reference first.

  Returns:
    TokenPlan; None if the recipe names no tokenizer. Padding, rows without a
    token, goes by number. Tokens that no model has get zeros and a note.

  Raises:
    ValueError: a tokenizer that cannot be read, a token or model that is not
      there, or parameters with a row for each token whose name is not known.
  """
  wanted = recipe.tokenizer
  if wanted is None:
    return None
  known = {name: _tokens_of(model.path, name) for name, model in models.items()}
  reference = recipe.models[0]
  source = reference if wanted.source in ("base", "union") else wanted.source
  there = known.get(source) or _tokens_of(locate(source), source)
  tokens, added = _result(wanted, there, known)
  heights = {name: _height(name, model.spec) for name, model in models.items()}
  rows = _count(wanted, tokens, heights.get(source, 0))
  numbers = {
    name: {token: n for n, token in own.items() if n < heights[name]}
    for name, own in known.items()
  }
  _check_sources(wanted, numbers, heights)
  own = {
    name: _own_rows(
      tokens, rows, wanted, numbers[name], known[name], heights[name]
    )
    for name in models
  }
  base, before = recipe.reference or recipe.base, known[reference]
  fills = {
    name: {
      row: _fill(row, tokens, wanted, numbers, own, base)
      for row, number in enumerate(own[name])
      if number < 0
    }
    for name in models
  }
  height = heights[reference]
  plan = TokenPlan(tokens, rows, own, fills, added, source, before, height, [])
  _check_tables(plan, models, heights)
  return plan._replace(notes=list(_notes(plan, wanted, heights)))


def _tokens_of(path: Any, name: str) -> Tokens:
  """Reads the tokens of a folder; raises if there are none."""
  found = read_tokens(path)
  if not found:
    raise ValueError(
      f"{name} has no tokenizer that can be read, {_FILES}; save one with "
      "transformers, or leave the recipe's tokenizer out."
    )
  return found


def _result(
  wanted: Tokenizer, source: Tokens, known: Mapping[str, Tokens]
) -> tuple[Tokens, tuple[str, ...]]:
  """Returns the result's tokens, and those that the source lacks."""
  tokens, have = dict(source), set(source.values())
  others = [own[n] for own in known.values() for n in sorted(own)]
  more = others if wanted.source == "union" else []
  added = [
    token
    for token in dict.fromkeys([*more, *wanted.tokens])
    if token not in have
  ]
  start = max(tokens, default=-1) + 1
  return {**tokens, **dict(enumerate(added, start))}, tuple(added)


def _count(wanted: Tokenizer, tokens: Tokens, height: int) -> int:
  """Returns the number of rows: the source's, unless there are more tokens.

  Raises:
    ValueError: numbers so large that nearly all rows would be of no token.
  """
  rows = max(height, max(tokens) + 1)
  padded = -(-rows // wanted.multiple) * wanted.multiple
  if padded > 2 * (len(tokens) + height) + _SPARE:
    raise ValueError(
      f"{len(tokens)} tokens, the last {shortened(tokens[max(tokens)])} with "
      f"number {max(tokens)}, would need {padded} rows, a multiple of "
      f"{wanted.multiple}; correct the number or the recipe's padding."
    )
  return padded


def _height(name: str, spec: Mapping[str, Any]) -> int:
  """Returns the number of rows of a model's tables."""
  heights = {one.shape[0] for key, one in spec.items() if has_tokens(key)}
  if len(heights) != 1:
    said = "no table of tokens" if not heights else f"tables of {heights} rows"
    raise ValueError(f"{name} has {said}; leave the recipe's tokenizer out.")
  return heights.pop()


def _check_sources(
  wanted: Tokenizer,
  numbers: Mapping[str, Mapping[str, int]],
  heights: Mapping[str, int],
) -> None:
  """Raises unless every named row of a token is there."""
  for token, source in wanted.tokens.items():
    if source is None:
      if not any(token in own for own in numbers.values()):
        raise ValueError(
          f"token {token} is in no model; say its `source`, or {{kind: zero}}."
        )
      continue
    if source.model is None:
      continue
    if source.model not in numbers:
      raise ValueError(
        f"token {token} comes from {source.model}, which is not merged here."
      )
    there = source.token or token
    is_there = (
      there in numbers[source.model]
      if source.number is None
      else source.number < heights[source.model]
    )
    if not is_there:
      what = there if source.number is None else f"row {source.number}"
      raise ValueError(f"token {token}: {source.model} has no {what}.")


def _own_rows(
  tokens: Tokens,
  rows: int,
  wanted: Tokenizer,
  numbers: Mapping[str, int],
  own: Tokens,
  height: int,
) -> tuple[int, ...]:
  """Returns for each row of the result a model's row of the same token."""
  forced = {t for t, source in wanted.tokens.items() if source and source.force}

  def row_of(row: int) -> int:
    if row in tokens:
      token = tokens[row]
      return -1 if token in forced else numbers.get(token, -1)
    return row if row < height and row not in own else -1

  return tuple(row_of(row) for row in range(rows))


def _fill(
  row: int,
  tokens: Tokens,
  wanted: Tokenizer,
  numbers: Mapping[str, Mapping[str, int]],
  own: Mapping[str, tuple[int, ...]],
  base: str | None,
) -> Fill:
  """Returns what stands for a row that a model lacks."""
  token = tokens.get(row)
  source = wanted.tokens.get(token) if token is not None else None
  if source is not None:
    if source.model is None:
      return ()
    number = source.number
    if number is None:
      number = numbers[source.model][source.token or token or ""]
    return ((source.model, number),)
  have = {name: at[row] for name, at in own.items() if at[row] >= 0}
  return ((base, have[base]),) if base in have else tuple(have.items())


def _check_tables(
  plan: TokenPlan, models: Mapping[str, Any], heights: Mapping[str, int]
) -> None:
  """Raises for parameters that seem to have rows of tokens, by their height."""
  for name, model in models.items():
    if plan.is_plain(name, heights[name]):
      continue
    others = [
      key
      for key, one in model.spec.items()
      if heights[name] in one.shape and not has_tokens(key)
      if not re.search(r"\.\d+\.", key)  # of a layer
      if len(one.shape) > 1
    ]
    if others:
      raise ValueError(
        f"{name}: {name_some(others)} may have a row for each token, which is "
        "not known; leave the recipe's tokenizer out."
      )


def _notes(
  plan: TokenPlan, wanted: Tokenizer, heights: Mapping[str, int]
) -> Iterator[str]:
  """Yields what a reader should know of the tokens."""
  if plan.added:
    yield (
      f"{len(plan.added)} tokens are added to the tokenizer of {plan.source}: "
      f"{name_some(plan.added)}"
    )
  for name, fills in plan.fills.items():
    lacking = [plan.tokens[row] for row in fills if row in plan.tokens]
    plain = [t for t in lacking if not wanted.tokens.get(t)]
    if plain:
      yield (
        f"{name} lacks {len(plain)} tokens, {name_some(plain)}: the base's or "
        "other models' rows stand for them"
      )
  empty = [
    plan.tokens[row]
    for row in range(plan.rows)
    if row in plan.tokens
    if all(fills.get(row) == () for fills in plan.fills.values())
    if not wanted.tokens.get(plan.tokens[row])
  ]
  if empty:
    yield f"{len(empty)} tokens are in no model, rows of zeros: " + name_some(
      empty
    )
  moved = [name for name, height in heights.items() if height != plan.rows]
  if moved:
    yield f"tables have {plan.rows} rows; " + ", ".join(
      f"{name} has {heights[name]}" for name in moved
    )


def gather_rows(
  tables: Mapping[tuple[str, str], np.ndarray],
  own: np.ndarray,
  rows: tuple[int, ...],
  fills: Mapping[int, tuple[tuple[tuple[str, str], int], ...]],
) -> np.ndarray:
  """Puts a model's table into the result's order.

  Args:
    tables: (model, name) -> the table, for all that `fills` name.
    own: the model's table.
    rows: for each row its own one, -1 where `fills` say what stands there.
    fills: row -> the rows whose mean stands there; none is zeros.

  Returns:
    (len(rows), ...) in own's dtype, float32 if anything is filled in.

  Example:
    >>> own, other = np.float32([[1], [2]]), np.float32([[5], [7]])
    >>> fills = {1: ((("b", "w"), 0), (("b", "w"), 1)), 2: ()}
    >>> gather_rows({("b", "w"): other}, own, (1, -1, -1), fills)
    array([[2.],
           [6.],
           [0.]], dtype=float32)
  """
  found = own[np.asarray(rows, int)]
  if not fills:
    return found
  found = found.astype(np.float32)
  at = np.asarray(sorted(fills), int)
  found[at] = 0
  for key, table in tables.items():
    pairs = [
      (row, number, len(fills[row]))
      for row in fills
      for place, number in fills[row]
      if place == key
    ]
    if pairs:
      to, taken, count = (np.asarray(x, int) for x in zip(*pairs, strict=True))
      added = table[taken].astype(np.float32)
      share = np.float32(1) / count.astype(np.float32)
      np.add.at(found, to, added * share.reshape(-1, *(1,) * (added.ndim - 1)))
  return found
