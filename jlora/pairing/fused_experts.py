# SPDX-License-Identifier: Apache-2.0
"""Pairing experts that one checkpoint keeps apart and the other keeps fused."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jlora.pairing.pairs import Pair, Stack, TensorPart

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
# Names of the expert matrices, by the fused tensor that holds them, in order.
_FUSED_ROLES = {
  "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
  "down_proj": (("down_proj", "w2"),),
}


def _stem(experts: str, bare: Callable[[str], str]) -> str:
  """Returns `...layers.0.mlp.experts`, whatever the family calls the block."""
  return bare(experts).replace(".block_sparse_moe.", ".mlp.")


def _experts_of(names, bare) -> dict[tuple[str, int, str], str]:
  """Finds the experts' matrices: (stem, expert, matrix) -> name."""
  found = ((_EXPERT.fullmatch(name), name) for name in names)
  return {
    (_stem(match[1], bare), int(match[2]), match[3]): name
    for match, name in found
    if match
  }


def _matrices(experts, stem, fused, count):
  """Lists the tensors that make up each expert; None if one is missing."""
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


def _fused_groups(fused_side, fused_names, single_names, bare):
  """Yields each fused tensor and the single tensors that form each expert."""
  experts = _experts_of(single_names, bare)
  for name in list(fused_names):
    match = _FUSED.fullmatch(name)
    if match and len(fused_side[name].shape) == 3:
      rows = _matrices(
        experts, _stem(match[1], bare), match[2], fused_side[name].shape[0]
      )
      if rows:
        yield name, rows


def _is_swapped(side, fused, singles, row) -> bool:
  """Returns whether a fused tensor is stored as (expert, in, out)."""
  out = sum(singles[name].shape[0] for name in row)
  shape = tuple(side[fused].shape[1:])
  sibling = fused.replace("down_proj", "gate_up_proj")
  if shape[0] == shape[1] and sibling in side:
    # A square matrix does not tell, but gate and up together are not square.
    shape, out = tuple(side[sibling].shape[1:]), 2 * out
  return shape != (out, singles[row[0]].shape[1])


def fused_in_finetuned(
  base: Mapping[str, Any],
  finetuned: Mapping[str, Any],
  left: dict[str, Any],
  right: dict[str, Any],
  bare: Callable[[str], str],
) -> Iterator[Pair]:
  """Yields pairs of experts kept apart in the base and fused in the finetune.

  Args:
    base: name -> anything with a `.shape`.
    finetuned: the same for the finetune.
    left: names of the base without a partner; paired names are removed.
    right: the same for the finetune.
    bare: takes wrappers' prefixes off a name.

  Yields:
    One pair for each expert's matrix; the finetuned side is a slice.

  Example:
    >>> import numpy as np
    >>> base = {f"m.experts.0.{n}_proj.weight": np.empty((2, 3))
    ...         for n in ("gate", "up")}
    >>> fused = {"m.experts.gate_up_proj": np.empty((1, 4, 3))}
    >>> pairs = fused_in_finetuned(base, fused, dict(base), dict(fused), str)
    >>> [pair.finetuned.index for pair in pairs]
    [(0, slice(0, 2, None)), (0, slice(2, 4, None))]
  """
  for fused, rows in _fused_groups(finetuned, right, left, bare):
    swap = _is_swapped(finetuned, fused, base, rows[0])
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
          TensorPart(name),
          TensorPart(fused, index, swap),
          f"fused in the finetune: {fused}",
        )
        start = stop


def fused_in_base(
  base: Mapping[str, Any],
  finetuned: Mapping[str, Any],
  left: dict[str, Any],
  right: dict[str, Any],
  bare: Callable[[str], str],
) -> Iterator[Pair]:
  """Yields pairs of experts fused in the base and kept apart in the finetune.

  Args:
    base: name -> anything with a `.shape`.
    finetuned: the same for the finetune.
    left: names of the base without a partner; paired names are removed.
    right: the same for the finetune.
    bare: takes wrappers' prefixes off a name.

  Yields:
    One pair for each fused tensor; the finetuned side is a Stack.

  Example:
    >>> import numpy as np
    >>> base = {f"m.experts.0.{n}_proj.weight": np.empty((2, 3))
    ...         for n in ("gate", "up")}
    >>> fused = {"m.experts.gate_up_proj": np.empty((1, 4, 3))}
    >>> pairs = fused_in_base(fused, base, dict(fused), dict(base), str)
    >>> [len(pair.finetuned.experts) for pair in pairs]
    [1]
  """
  for fused, rows in _fused_groups(base, left, right, bare):
    swap = _is_swapped(base, fused, finetuned, rows[0])
    del left[fused]
    for row in rows:
      for name in row:
        del right[name]
    parts = tuple(tuple(TensorPart(name) for name in row) for row in rows)
    yield Pair(
      fused,
      tuple(base[fused].shape),
      TensorPart(fused),
      Stack(parts, swap),
      f"fused in the base: {len(rows)} experts in the finetune",
    )
