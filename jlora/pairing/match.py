# SPDX-License-Identifier: Apache-2.0
"""Matching each tensor of a finetuned checkpoint with one of its base.

Names come first, then what real checkpoints have: wrappers' names in names, a
head tied on one side, a vocabulary that grew or changed its order, experts
fused on one side. Tensors that are no parameters are left out. A pair that its
own name did not match has a note, which the report's ledger shows.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from jlora.messages import name_some
from jlora.pairing.buffers import why_no_parameter
from jlora.pairing.fused_experts import fused_in_base, fused_in_finetuned
from jlora.pairing.pairs import (
  Pair,
  Pairing,
  Rows,
  Side,
  Stack,
  TensorPart,
  names_of,
)
from jlora.pairing.vocabularies import Tokens, rows_by_token
from jlora.pairing.wrappers import see_through

# Wrappers around a language model, longest first.
_PREFIXES = (
  "base_model.model.",
  "model.language_model.model.",
  "language_model.model.",
  "model.language_model.",
  "language_model.",
  "_orig_mod.",
  "module.",
  "transformer.",
  "model.",
)
_EMBEDDING = (
  r"(.*\.)?(embed_tokens|wte|embed_in|tok_embeddings|word_embeddings)\.weight"
)
# CLIP's text encoders have `text_model.` in transformers 4 and not in 5.
_CLIP = re.compile(r"((?:text_encoder\w*\.)?)text_model\.")
_HEAD = r"(lm_head|embed_out|output|(.*\.)lm_head)\.weight"

Vocabulary = Callable[[str, tuple[int, ...], tuple[int, ...]], slice | None]


def keep_whole(
  path: str, base: tuple[int, ...], finetuned: tuple[int, ...]
) -> slice | None:
  """Keeps the whole finetuned table where the vocabulary changed.

  Args:
    path: the table's name.
    base: its shape in the base.
    finetuned: its shape in the finetune.

  Returns:
    None: no rows are compared.

  Example:
    >>> keep_whole("lm_head.weight", (10, 4), (12, 4)) is None
    True
  """
  del path, base, finetuned


def common_rows(
  path: str, base: tuple[int, ...], finetuned: tuple[int, ...]
) -> slice | None:
  """Returns the rows that both tables have; only these are compared.

  Rows that the finetune added are not represented.

  Args:
    path: the table's name.
    base: its shape in the base.
    finetuned: its shape in the finetune.

  Returns:
    The slice of rows to compare.

  Example:
    >>> common_rows("lm_head.weight", (10, 4), (12, 4))
    slice(0, 10, None)
  """
  del path
  return slice(0, min(base[0], finetuned[0]))


def same_rows(
  path: str, base: tuple[int, ...], finetuned: tuple[int, ...]
) -> slice | None:
  """Raises an error: the vocabulary may not change.

  Args:
    path: the table's name.
    base: its shape in the base.
    finetuned: its shape in the finetune.

  Raises:
    ValueError: always; names the table, both shapes and the other policies.

  Example:
    >>> same_rows("lm_head.weight", (10, 4), (12, 4))
    Traceback (most recent call last):
    ...
    ValueError: lm_head.weight: vocabulary (10, 4) in the base, (12, 4) in the
    finetune. Pass keep_whole or common_rows to extract all the same.
  """
  raise ValueError(
    f"{path}: vocabulary {base} in the base, {finetuned} in the finetune. "
    "Pass keep_whole or common_rows to extract all the same."
  )


def is_table(path: str) -> bool:
  """Returns whether a parameter has a row for each token: embedding or head.

  Args:
    path: its name in a checkpoint.

  Returns:
    bool.

  Example:
    >>> is_table("model.embed_tokens.weight"), is_table("wpe.weight")
    (True, False)
  """
  return any(re.fullmatch(rule, path) for rule in (_EMBEDDING, _HEAD))


def pair_up(
  base: Mapping[str, Any],
  finetuned: Mapping[str, Any],
  *,
  vocabulary: Vocabulary = keep_whole,
  tokens: tuple[Tokens, Tokens] | None = None,
) -> Pairing:
  """Pairs the tensors of two checkpoints, each accounted for exactly once.

  Args:
    base: name -> anything with a `.shape` (a checkpoint's `.spec`).
    finetuned: the same for the finetune.
    vocabulary: decides about an embedding or head whose number of rows differs:
      `keep_whole`, `common_rows`, `same_rows`, or a function like them.
    tokens: of both, from `read_both_tokens`; rows that are compared are then
      those of the same tokens. None compares rows of the same number.

  Returns:
    Pairing: the pairs, in the order of the base, the names on either side that
    have no partner, and those of tensors that are no parameters.

  Raises:
    ValueError: shapes that differ in another way; names up to three with both.

  Example:
    >>> import numpy as np
    >>> w = np.empty((4, 4))
    >>> pairing = pair_up({"model.q.weight": w},
    ...                   {"language_model.model.q.weight": w})
    >>> pairing.pairs[0].note
    'prefix differs: language_model.model.q.weight'
  """
  buffers = tuple(
    (side, name, why)
    for side, spec in (("base", base), ("finetuned", finetuned))
    for name, one in spec.items()
    if (why := why_no_parameter(name, one.shape))
  )
  if buffers:
    base, finetuned = (
      _except(spec, {name for own, name, _ in buffers if own == side})
      for side, spec in (("base", base), ("finetuned", finetuned))
    )
  one, two = see_through(base, finetuned, _bare)
  base = {name: base[own] for name, own in one.items()}
  finetuned = {name: finetuned[own] for name, own in two.items()}
  left, right = dict.fromkeys(base), dict.fromkeys(finetuned)
  pairs = [
    *_by_name(base, left, right),
    *_by_prefix(base, left, right),
    *fused_in_finetuned(base, finetuned, left, right, _bare),
    *fused_in_base(base, finetuned, left, right, _bare),
    *_by_tie(base, finetuned, left, right),
  ]
  pairs = [_settle_shape(pair, finetuned, vocabulary, tokens) for pair in pairs]
  wrong = [
    f"{pair.path} {pair.shape} against {finetuned[pair.finetuned.name].shape}"
    for pair in pairs
    if isinstance(pair.finetuned, TensorPart)
    and not pair.whole
    and not pair.finetuned.index
    and pair.shape != tuple(finetuned[pair.finetuned.name].shape)
  ]
  if wrong:
    raise ValueError(
      f"{len(wrong)} tensors differ in shape: {name_some(wrong)}. "
      "Give the base this finetune was made from."
    )
  order = {name: place for place, name in enumerate(base)}
  pairs.sort(key=lambda pair: order[pair.base.name])
  pairs = [_as_stored(pair, one, two) for pair in pairs]
  return Pairing(
    pairs, [one[name] for name in left], [two[name] for name in right], buffers
  )


def _except(spec: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
  """Returns a mapping without some names."""
  return {name: one for name, one in spec.items() if name not in names}


def _as_stored(
  pair: Pair, base: Mapping[str, str], finetuned: Mapping[str, str]
) -> Pair:
  """Gives a pair the names that its tensors have in the files."""
  path = base.get(pair.path, pair.path)
  side = pair.finetuned
  names = [part.name for part in _parts_of(side)]
  is_same = path == pair.path and all(finetuned[n] == n for n in names)
  if is_same and base[pair.base.name] == pair.base.name:
    return pair
  pair = pair._replace(
    path=path,
    base=pair.base._replace(name=base[pair.base.name]),
    finetuned=_renamed(side, finetuned),
  )
  if len(names) > 1 or "differs" in pair.note:
    return pair
  own, there = pair.base.name, finetuned[names[0]]
  is_prefix = own.endswith(f".{there}") or there.endswith(f".{own}")
  said = "prefix differs" if is_prefix else "a wrapper's name in the name"
  return pair._replace(note=_and(f"{said}: {there}", pair.note))


def _parts_of(side: Side) -> list[Any]:
  """Lists the parts with a name that a side is made of."""
  if isinstance(side, Stack):
    return [part for parts in side.experts for part in parts]
  return [side]


def _renamed(side: Side, names: Mapping[str, str]) -> Side:
  """Returns a side with other names."""
  if isinstance(side, Stack):
    return side._replace(
      experts=tuple(
        tuple(part._replace(name=names[part.name]) for part in parts)
        for parts in side.experts
      )
    )
  return side._replace(name=names[side.name])


def _by_name(base, left, right):
  """Yields pairs of tensors that have the same name."""
  for name in [name for name in left if name in right]:
    del left[name], right[name]
    yield Pair(
      name, tuple(base[name].shape), TensorPart(name), TensorPart(name)
    )


def _by_prefix(base, left, right):
  """Yields pairs whose names agree without prefixes, if each is unique."""
  partners: dict[str, list[str]] = {}
  for name in right:
    partners.setdefault(_bare(name), []).append(name)
  own = [_bare(name) for name in left]
  for name in list(left):
    bare = _bare(name)
    if len(partners.get(bare, [])) == 1 and own.count(bare) == 1:
      partner = partners[bare][0]
      del left[name], right[partner]
      yield Pair(
        name,
        tuple(base[name].shape),
        TensorPart(name),
        TensorPart(partner),
        f"prefix differs: {partner}",
      )


def _bare(name: str) -> str:
  """Takes all wrappers' prefixes off a name."""
  for prefix in _PREFIXES:
    if name.startswith(prefix):
      return _bare(name.removeprefix(prefix))
  clip = _CLIP.match(name)
  return clip[1] + name[clip.end() :] if clip else name


def _by_tie(base, finetuned, left, right):
  """Yields the pair of a head on one side that is tied on the other."""
  base_head, base_table = (_only(base, rule) for rule in (_HEAD, _EMBEDDING))
  head, table = (_only(finetuned, rule) for rule in (_HEAD, _EMBEDDING))
  if base_head and base_head in left and table and not head:
    del left[base_head]
    right.pop(table, None)
    yield Pair(
      base_head,
      tuple(base[base_head].shape),
      TensorPart(base_head),
      TensorPart(table),
      f"tied in the finetune: compared with {table}",
    )
  elif head and head in right and base_table and not base_head:
    del right[head]
    left.pop(base_table, None)
    yield Pair(
      _bare(head),
      tuple(base[base_table].shape),
      TensorPart(base_table),
      TensorPart(head),
      f"tied in the base: compared with {base_table}",
    )


def _only(names, rule: str) -> str | None:
  """Returns the name that matches a rule; None unless exactly one does."""
  found = [name for name in names if re.fullmatch(rule, name)]
  return found[0] if len(found) == 1 else None


def _settle_shape(
  pair: Pair,
  finetuned,
  vocabulary: Vocabulary,
  tokens: tuple[Tokens, Tokens] | None,
) -> Pair:
  """Settles which rows of a table belong together, by policy and by token."""
  side = pair.finetuned
  if not isinstance(side, TensorPart) or side.index or not is_table(pair.path):
    return pair
  there = tuple(finetuned[side.name].shape)
  if there[1:] != pair.shape[1:]:
    return pair
  if there == pair.shape:
    return _by_token(pair, tokens, there, pair.shape[0])
  rows = vocabulary(pair.path, pair.shape, there)
  said = f"vocabulary {pair.shape[0]} in the base, {there[0]} in the finetune"
  if rows is None:
    note = _and(pair.note, f"{said}: kept whole")
    return pair._replace(note=note, whole=True)
  note = _and(pair.note, f"{said}: {rows.stop} common rows compared")
  found = _by_token(pair._replace(note=note), tokens, there, rows.stop)
  if isinstance(found.finetuned, Rows):
    return found._replace(note=_and(said, found.note.removeprefix(note)[2:]))
  return found._replace(finetuned=side._replace(index=(rows,)))


def _by_token(pair: Pair, tokens, there: tuple[int, ...], count: int) -> Pair:
  """Pairs rows of the same tokens, if these have other numbers."""
  side = pair.finetuned
  is_plain = isinstance(side, TensorPart) and not side.swap
  if tokens is None or not is_plain or len(pair.shape) != 2:
    return pair
  rows = rows_by_token(tokens[0], tokens[1], (pair.shape[0], there[0]))
  if rows is None:
    return pair
  if count < min(pair.shape[0], there[0]):  # a policy of the caller's
    rows = (*rows[:count], *[-1] * (pair.shape[0] - count))
  moved = sum(row not in (number, -1) for number, row in enumerate(rows))
  lacking = sum(row < 0 for row in rows)
  said = (
    f"rows compared by token: {moved} of {len(rows)} have another number in "
    f"the finetune, {lacking} are not there; the adapter has the base's order"
  )
  return pair._replace(
    finetuned=Rows(names_of(side)[0], rows), note=_and(pair.note, said)
  )


def _and(*notes: str) -> str:
  """Joins notes, leaving out empty ones."""
  return "; ".join(note for note in notes if note)
