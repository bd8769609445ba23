# SPDX-License-Identifier: Apache-2.0
"""How much of two checkpoints was paired, and what an extraction refuses.

Figures of an extraction are those of the pairs. Of tensors without a partner
they say nothing, so how many there are comes first.
"""

import re
from collections.abc import Mapping
from typing import Any

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.messages import name_some
from jlora.pairing.pairs import Pairing, names_of
from jlora.selection import is_floating

_MOST = 0.1  # share of a side's floating bytes that may lack a partner
_ADAPTER = re.compile(
  r".*\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\..+)?"
)
_SIDES = ("base", "finetuned")


def count_unmatched(
  base: Checkpoint, finetuned: Checkpoint, pairing: Pairing
) -> dict[str, dict[str, int]]:
  """Counts the floating bytes of both checkpoints that have no partner.

  Args:
    base: a checkpoint.
    finetuned: the finetune.
    pairing: of both.

  Returns:
    `floating_bytes` and `unmatched_bytes`, each {"base": n, "finetuned": n}, as
    stored. Tensors that are no parameters count as neither.

  Example:
    >>> from types import SimpleNamespace as Namespace
    >>> one = Namespace(dtype="float32", nbytes=4)
    >>> base = Namespace(spec={"a": one, "b": one})
    >>> finetuned, pairing = Namespace(spec={"a": one}), Pairing([], ["b"], [])
    >>> count_unmatched(base, finetuned, pairing)["unmatched_bytes"]
    {'base': 4, 'finetuned': 0}
  """
  left_out = {(side, name) for side, name, _ in pairing.buffers}
  lone = (pairing.only_base, pairing.only_finetuned)
  total, unmatched = {}, {}
  for side, checkpoint, names in zip(
    _SIDES, (base, finetuned), lone, strict=True
  ):
    sizes = {
      name: one.nbytes
      for name, one in checkpoint.spec.items()
      if is_floating(one.dtype) and (side, name) not in left_out
    }
    total[side] = sum(sizes.values())
    unmatched[side] = sum(sizes.get(name, 0) for name in names)
  return {"floating_bytes": total, "unmatched_bytes": unmatched}


def check_coverage(
  base: Checkpoint, finetuned: Checkpoint, pairing: Pairing
) -> None:
  """Raises where an adapter could not stand for what the finetune changed.

  Args:
    base: a checkpoint.
    finetuned: the finetune.
    pairing: of both.

  Raises:
    ValueError: more than a tenth of a side's floating bytes has no partner, the
      finetune holds an adapter beside its weights, or a tensor is floating on
      one side and integers on the other.
  """
  sides = ((base, pairing.only_base), (finetuned, pairing.only_finetuned))
  for checkpoint, names in sides:
    if found := [name for name in names if _ADAPTER.fullmatch(name)]:
      raise ValueError(
        f"{checkpoint.path} holds an adapter that is not merged: "
        f"{name_some(found)}. Merge it first (model.merge_and_unload() of PEFT)"
        " or allow tensors without a partner (--allow_unmatched)."
      )
  mixed = [pair.path for pair in pairing.pairs if _is_mixed(pair, *sides)]
  if mixed:
    raise ValueError(
      f"{len(mixed)} tensors are integers on one side and floating on the "
      f"other: {name_some(mixed)}. Is one side quantised? Dequantise it first."
    )
  counts = count_unmatched(base, finetuned, pairing)
  others = (finetuned, base)
  for side, (checkpoint, names), other in zip(
    _SIDES, sides, others, strict=True
  ):
    lone, total = (
      counts["unmatched_bytes"][side],
      counts["floating_bytes"][side],
    )
    if lone > _MOST * total:
      raise ValueError(
        f"{lone / total:.0%} of the floating bytes of {checkpoint.path} have "
        f"no partner in {other.path}: {name_some(names)}. There are "
        f"{name_some(other.spec)}. Give the checkpoints that belong together, "
        "or allow tensors without a partner (--allow_unmatched, "
        "allow_unmatched=True): they are not in the adapter."
      )


def _is_mixed(pair, left, right) -> bool:
  """Returns whether one side of a pair is floating and the other is not."""
  one = left[0].spec[pair.base.name].dtype
  two = right[0].spec[names_of(pair.finetuned)[0]].dtype
  return is_floating(one) != is_floating(two)


_MIB = 2**20


def unmatched_line(totals: Mapping[str, Any]) -> str:
  """Tells in one line how much has no partner.

  Args:
    totals: of a report.

  Returns:
    The line; "" where everything has one, or an old report does not tell.

  Example:
    >>> unmatched_line({"floating_bytes": {"base": 2**20, "finetuned": 2**20},
    ...                 "unmatched_bytes": {"base": 2**19, "finetuned": 0}})
    "not compared: 50.0% of the base's floating bytes (0.50 MiB) and 0.0% of the
    finetune's (0.00 MiB) have no partner; all figures leave them out"
  """
  unmatched = totals.get("unmatched_bytes") or {}
  if not any(unmatched.values()):
    return ""
  said = [
    f"{unmatched[side] / max(totals['floating_bytes'][side], 1):.1%} of the "
    f"{whose} ({unmatched[side] / _MIB:.2f} MiB)"
    for side, whose in zip(
      _SIDES, ("base's floating bytes", "finetune's"), strict=True
    )
  ]
  return (
    f"not compared: {' and '.join(said)} have no partner; all figures leave "
    "them out"
  )
