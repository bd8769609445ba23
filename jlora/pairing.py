# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a finetuned checkpoint belongs to which one of its base.

Names first, then what users really have: a wrapper's prefix, a head tied on one
side, a vocabulary grown, experts fused on one side. Whatever is not matched by
its own name says so in a note, which the ledger carries.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.loras import name_some

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
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
# Names of the expert matrices, by the fused tensor that holds them, in order.
_FUSED_ROLES = {
  "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
  "down_proj": (("down_proj", "w2"),),
}


class Part(NamedTuple):
  """A tensor on disk or a slice of it, its last two axes exchanged or not."""

  name: str
  index: tuple[Any, ...] = ()
  swap: bool = False


class Stack(NamedTuple):
  """A fused tensor put together: experts stacked, their parts concatenated."""

  experts: tuple[tuple[Part, ...], ...]
  swap: bool = False


class Pair(NamedTuple):
  """A parameter of the base and what the finetune made of it.

  Attributes:
    path: the parameter's name in the base, which is the adapter's.
    shape: its shape in the base.
    base: where the base's values lie.
    finetuned: where the finetuned values lie.
    note: why the two belong together, if the name alone does not say it.
    whole: the finetuned tensor is to be kept as it is (its shape differs).
  """

  path: str
  shape: tuple[int, ...]
  base: Part
  finetuned: Part | Stack
  note: str = ""
  whole: bool = False


class Pairing(NamedTuple):
  """All pairs, and the names on either side that found no partner."""

  pairs: list[Pair]
  only_base: list[str]
  only_finetuned: list[str]


Vocabulary = Callable[[str, tuple[int, ...], tuple[int, ...]], slice | None]


def keep_whole(
  path: str, base: tuple[int, ...], finetuned: tuple[int, ...]
) -> slice | None:
  """None: a table whose vocabulary changed is kept as the finetuned tensor.

  Args:
    path: the table's name.
    base: its shape in the base.
    finetuned: its shape in the finetune.

  Returns:
    None, which means no rows are compared.

  Example:
    >>> keep_whole("lm_head.weight", (10, 4), (12, 4)) is None
    True
  """
  del path, base, finetuned


def common_rows(
  path: str, base: tuple[int, ...], finetuned: tuple[int, ...]
) -> slice | None:
  """The rows both tables have; rows the finetune added are not represented.

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


def refuse(
  path: str, base: tuple[int, ...], finetuned: tuple[int, ...]
) -> slice | None:
  """Nothing: a changed vocabulary is an error.

  Args:
    path: the table's name.
    base: its shape in the base.
    finetuned: its shape in the finetune.

  Raises:
    ValueError: always, naming the table, both shapes and the other policies.

  Example:
    >>> refuse("lm_head.weight", (10, 4), (12, 4))
    Traceback (most recent call last):
    ...
    ValueError: lm_head.weight: vocabulary (10, 4) in the base, (12, 4) in the
    finetune. Pass keep_whole or common_rows to extract all the same.
  """
  raise ValueError(
    f"{path}: vocabulary {base} in the base, {finetuned} in the finetune. "
    "Pass keep_whole or common_rows to extract all the same."
  )


def pair_up(
  base: Mapping[str, Any],
  finetuned: Mapping[str, Any],
  *,
  vocabulary: Vocabulary = keep_whole,
) -> Pairing:
  """The pairs of two checkpoints, each tensor of both accounted for once.

  Args:
    base: name -> anything with a `.shape` (a checkpoint's `.spec`).
    finetuned: the same for the finetune.
    vocabulary: what happens to an embedding or head whose number of rows
      differs: `keep_whole`, `common_rows`, `refuse`, or a function like them.

  Returns:
    Pairing, pairs in the order of the base.

  Raises:
    ValueError: shapes that differ otherwise, up to three named with both.

  Example:
    >>> shape = np.empty((4, 4))
    >>> pairing = pair_up({"model.q.weight": shape},
    ...                   {"language_model.model.q.weight": shape})
    >>> pairing.pairs[0].note
    'prefix differs: language_model.model.q.weight'
  """
  left, right = dict.fromkeys(base), dict.fromkeys(finetuned)
  pairs = [
    *_by_name(base, left, right),
    *_by_prefix(base, left, right),
    *_fused_in_finetuned(base, finetuned, left, right),
    *_fused_in_base(base, finetuned, left, right),
    *_by_tie(base, finetuned, left, right),
  ]
  pairs = [_settle_shape(pair, finetuned, vocabulary) for pair in pairs]
  wrong = [
    f"{pair.path} {pair.shape} against {finetuned[pair.finetuned.name].shape}"
    for pair in pairs
    if isinstance(pair.finetuned, Part)
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


def read(checkpoint: Any, side: Part | Stack) -> np.ndarray:
  """The values of one side of a pair.

  Args:
    checkpoint: an open checkpoint, or any mapping from names to arrays.
    side: a Part or a Stack of it.

  Returns:
    The array, in its stored dtype (float32 for float8).

  Example:
    >>> read({"w": np.arange(6).reshape(2, 3)}, Part("w", (1,)))
    array([3, 4, 5])
  """
  if isinstance(side, Stack):
    array = np.stack(
      [
        np.concatenate([read(checkpoint, part) for part in parts])
        for parts in side.experts
      ]
    )
  elif side.index and hasattr(checkpoint, "read"):
    array = checkpoint.read(side.name, side.index)
  else:
    array = checkpoint[side.name][side.index]
  return np.swapaxes(array, -1, -2) if side.swap else array


def names_of(side: Part | Stack) -> list[str]:
  """The names of the tensors a side of a pair is read from.

  Args:
    side: a Part or a Stack.

  Returns:
    Names, each once.

  Example:
    >>> names_of(Part("w"))
    ['w']
  """
  if isinstance(side, Part):
    return [side.name]
  return [part.name for parts in side.experts for part in parts]


def _by_name(base, left, right):
  for name in [name for name in left if name in right]:
    del left[name], right[name]
    yield Pair(name, tuple(base[name].shape), Part(name), Part(name))


def _by_prefix(base, left, right):
  """Names that agree once the wrappers' prefixes are off, if only one does."""
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
        Part(name),
        Part(partner),
        f"prefix differs: {partner}",
      )


def _bare(name: str) -> str:
  for prefix in _PREFIXES:
    if name.startswith(prefix):
      return _bare(name.removeprefix(prefix))
  return name


def _stem(experts: str) -> str:
  """`...layers.0.mlp.experts` whatever the family calls the block."""
  return _bare(experts).replace(".block_sparse_moe.", ".mlp.")


def _experts_of(names) -> dict[tuple[str, int, str], str]:
  found = ((_EXPERT.fullmatch(name), name) for name in names)
  return {
    (_stem(match[1]), int(match[2]), match[3]): name
    for match, name in found
    if match
  }


def _matrices(experts, stem, fused, count):
  """Names, per expert, of a fused tensor's matrices; None if one lacks."""
  rows = []
  for expert in range(count):
    row = [
      next(
        (
          experts[stem, expert, a]
          for a in alike
          if (stem, expert, a) in experts
        ),
        None,
      )
      for alike in _FUSED_ROLES[fused]
    ]
    if None in row:
      return None
    rows.append(row)
  return rows


def _fused_groups(fused_side, fused_names, single_names):
  """(fused tensor, names of its matrices per expert) that both sides hold."""
  experts = _experts_of(single_names)
  for name in list(fused_names):
    match = _FUSED.fullmatch(name)
    if match and len(fused_side[name].shape) == 3:
      rows = _matrices(
        experts, _stem(match[1]), match[2], fused_side[name].shape[0]
      )
      if rows:
        yield name, rows


def _is_swapped(fused, singles, row) -> bool:
  """Whether a fused tensor keeps (expert, in, out)."""
  out = sum(singles[name].shape[0] for name in row)
  return tuple(fused.shape[1:]) != (out, singles[row[0]].shape[1])


def _fused_in_finetuned(base, finetuned, left, right):
  for fused, rows in _fused_groups(finetuned, right, left):
    swap = _is_swapped(finetuned[fused], base, rows[0])
    del right[fused]
    for expert, row in enumerate(rows):
      start = 0
      for name in row:
        stop = start + base[name].shape[0]
        cut = slice(start, stop)
        index = (expert, slice(None), cut) if swap else (expert, cut)
        del left[name]
        yield Pair(
          name,
          tuple(base[name].shape),
          Part(name),
          Part(fused, index, swap),
          f"fused in the finetune: {fused}",
        )
        start = stop


def _fused_in_base(base, finetuned, left, right):
  for fused, rows in _fused_groups(base, left, right):
    swap = _is_swapped(base[fused], finetuned, rows[0])
    del left[fused]
    for row in rows:
      for name in row:
        del right[name]
    parts = tuple(tuple(Part(name) for name in row) for row in rows)
    yield Pair(
      fused,
      tuple(base[fused].shape),
      Part(fused),
      Stack(parts, swap),
      f"fused in the base: {len(rows)} experts in the finetune",
    )


def _by_tie(base, finetuned, left, right):
  """A head stored on one side, tied to the embedding on the other."""
  base_head, base_table = (_only(base, rule) for rule in (_HEAD, _EMBEDDING))
  head, table = (_only(finetuned, rule) for rule in (_HEAD, _EMBEDDING))
  if base_head and base_head in left and table and not head:
    del left[base_head]
    right.pop(table, None)
    yield Pair(
      base_head,
      tuple(base[base_head].shape),
      Part(base_head),
      Part(table),
      f"tied in the finetune: compared with {table}",
    )
  elif head and head in right and base_table and not base_head:
    del right[head]
    left.pop(base_table, None)
    yield Pair(
      head,
      tuple(base[base_table].shape),
      Part(base_table),
      Part(head),
      f"tied in the base: compared with {base_table}",
    )


def _only(names, rule: str) -> str | None:
  found = [name for name in names if re.fullmatch(rule, name)]
  return found[0] if len(found) == 1 else None


def _settle_shape(pair: Pair, finetuned, vocabulary: Vocabulary) -> Pair:
  """The pair with its rows settled, where only the vocabulary differs."""
  side = pair.finetuned
  if isinstance(side, Stack) or side.index:
    return pair
  there = tuple(finetuned[side.name].shape)
  is_table = any(re.fullmatch(r, pair.path) for r in (_EMBEDDING, _HEAD))
  if not is_table or there == pair.shape or there[1:] != pair.shape[1:]:
    return pair
  rows = vocabulary(pair.path, pair.shape, there)
  said = f"vocabulary {pair.shape[0]} in the base, {there[0]} in the finetune"
  if rows is None:
    note = _and(pair.note, f"{said}: kept whole")
    return pair._replace(note=note, whole=True)
  note = _and(pair.note, f"{said}: {rows.stop} common rows compared")
  return pair._replace(finetuned=side._replace(index=(rows,)), note=note)


def _and(*notes: str) -> str:
  return "; ".join(note for note in notes if note)
