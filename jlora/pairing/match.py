# SPDX-License-Identifier: Apache-2.0
"""Matching each tensor of a finetuned checkpoint with one of its base.

Names come first, then what real checkpoints have: a wrapper's prefix, a head
tied on one side, a grown vocabulary, experts fused on one side. A pair that its
own name did not match has a note, which the report's ledger shows.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from jlora.messages import name_some
from jlora.pairing.fused_experts import fused_in_base, fused_in_finetuned
from jlora.pairing.pairs import Pair, Pairing, Stack, TensorPart

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
) -> Pairing:
  """Pairs the tensors of two checkpoints, each accounted for exactly once.

  Args:
    base: name -> anything with a `.shape` (a checkpoint's `.spec`).
    finetuned: the same for the finetune.
    vocabulary: decides about an embedding or head whose number of rows differs:
      `keep_whole`, `common_rows`, `same_rows`, or a function like them.

  Returns:
    Pairing: the pairs, in the order of the base, and the names on either side
    that have no partner.

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
  left, right = dict.fromkeys(base), dict.fromkeys(finetuned)
  pairs = [
    *_by_name(base, left, right),
    *_by_prefix(base, left, right),
    *fused_in_finetuned(base, finetuned, left, right, _bare),
    *fused_in_base(base, finetuned, left, right, _bare),
    *_by_tie(base, finetuned, left, right),
  ]
  pairs = [_settle_shape(pair, finetuned, vocabulary) for pair in pairs]
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
  return Pairing(pairs, list(left), list(right))


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
  return name


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


def _settle_shape(pair: Pair, finetuned, vocabulary: Vocabulary) -> Pair:
  """Applies the vocabulary policy to a table whose number of rows differs."""
  side = pair.finetuned
  if isinstance(side, Stack) or side.index:
    return pair
  there = tuple(finetuned[side.name].shape)
  if there == pair.shape or there[1:] != pair.shape[1:]:
    return pair
  if not is_table(pair.path):
    return pair
  rows = vocabulary(pair.path, pair.shape, there)
  said = f"vocabulary {pair.shape[0]} in the base, {there[0]} in the finetune"
  if rows is None:
    note = _and(pair.note, f"{said}: kept whole")
    return pair._replace(note=note, whole=True)
  note = _and(pair.note, f"{said}: {rows.stop} common rows compared")
  return pair._replace(finetuned=side._replace(index=(rows,)), note=note)


def _and(*notes: str) -> str:
  """Joins notes, leaving out empty ones."""
  return "; ".join(note for note in notes if note)
