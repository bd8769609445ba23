# SPDX-License-Identifier: Apache-2.0
"""The ledger: what became of every tensor of both checkpoints, each once."""

from collections.abc import Iterable, Mapping
from typing import Any

from jlora.pairs import Pair, Pairing, names_of

# The status of a row of several pairs is the first that any of them has.
_ORDER = ("extracted", "kept whole", "not representable", "unchanged")


def keep_ledger(
  pairing: Pairing,
  outcomes: Mapping[str, tuple[str, str]],
  scales: Iterable[tuple[str, str]] = (),
) -> list[dict[str, Any]]:
  """The ledger's rows; each tensor of either checkpoint is in exactly one.

  Pairs that share a tensor (a tied head, fused experts) make one row.

  Args:
    pairing: all pairs and the names without partner.
    outcomes: path -> (status, why) of every pair.
    scales: (side, name) of float8 scales, which are folded in their weights.

  Returns:
    Rows {base: [names], finetuned: [names], status, why}.

  Example:
    >>> from jlora.pairs import Part
    >>> pair = Pair("w", (2,), Part("w"), Part("w"))
    >>> keep_ledger(Pairing([pair], [], ["x"]), {"w": ("unchanged", "")})[1]
    {'base': [], 'finetuned': ['x'], 'status': 'not representable', 'why': 'only
    in the finetuned checkpoint'}
  """
  rows = [_row(group, outcomes) for group in _groups(pairing.pairs)]
  for side, names in (
    ("base", pairing.only_base),
    ("finetuned", pairing.only_finetuned),
  ):
    why = f"only in the {side} checkpoint"
    rows += [_single(side, name, "not representable", why) for name in names]
  rows += [
    _single(side, name, "unchanged", "scale, multiplied into its weight")
    for side, name in scales
  ]
  return rows


def _single(side: str, name: str, status: str, why: str) -> dict[str, Any]:
  empty = {"base": [], "finetuned": []}
  return {**empty, side: [name], "status": status, "why": why}


def _groups(pairs: Iterable[Pair]) -> list[list[Pair]]:
  """Pairs that share a tensor of either side, together."""
  groups: dict[int, list[Pair]] = {}
  owner: dict[tuple[str, str], int] = {}
  for place, pair in enumerate(pairs):
    names = [("base", name) for name in names_of(pair.base)]
    names += [("finetuned", name) for name in names_of(pair.finetuned)]
    groups[place] = [pair]
    for other in {owner[name] for name in names if name in owner}:
      groups[place] = groups.pop(other) + groups[place]
    for member in groups[place]:
      owner |= {("base", name): place for name in names_of(member.base)}
      owner |= {
        ("finetuned", name): place for name in names_of(member.finetuned)
      }
  return list(groups.values())


def _row(
  group: list[Pair], outcomes: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
  statuses = [outcomes[pair.path][0] for pair in group]
  status = min(statuses, key=_ORDER.index)
  whys = [
    "; ".join(part for part in (outcomes[pair.path][1], pair.note) if part)
    for pair in group
  ]
  if len(set(statuses)) > 1:
    counts = (f"{statuses.count(s)} {s}" for s in _ORDER if s in statuses)
    whys.insert(0, f"of {len(group)} parts {', '.join(counts)}")
  once = dict.fromkeys
  return {
    "base": list(once(n for pair in group for n in names_of(pair.base))),
    "finetuned": list(
      once(n for pair in group for n in names_of(pair.finetuned))
    ),
    "status": status,
    "why": "; ".join(once(why for why in whys if why)),
  }
