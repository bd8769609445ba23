# SPDX-License-Identifier: Apache-2.0
"""Computes a report's figures at any of its ranks, for figures and tables.

Ranks are nested: a report holds every module's error at each rank up to the one
it was factored at, so nothing here reads a weight.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jlora.extraction import Report, module_type, total_up

Row = Mapping[str, Any]

#: The order in which a model uses its matrices; other kinds come last.
_ORDER = (
  "embed_tokens", "embed", "wte", "wpe", "q_proj", "q", "k_proj", "k",
  "v_proj", "v", "qkv_proj", "c_attn", "o_proj", "o", "router", "gate_proj",
  "gate", "w1", "up_proj", "up", "w3", "c_fc", "down_proj", "down", "w2",
  "c_proj", "lm_head", "head",
)  # fmt: skip


def top_rank(report: Report) -> int:
  """Returns the rank that the modules of a report were factored at.

  Args:
    report: from an extraction.

  Returns:
    The largest number of singular values of any module.

  Raises:
    ValueError: the report has no module.

  Example:
    >>> top_rank(Report({}, [{"singular_values": [2.0, 1.0]}], {}, []))
    2
  """
  if not report.modules:
    raise ValueError("the report has no extracted module: nothing to draw.")
  return max(len(row["singular_values"]) for row in report.modules)


def check_ranks(report: Report, ranks: Iterable[int]) -> None:
  """Raises unless the report knows every one of these ranks.

  Args:
    report: from an extraction.
    ranks: wanted.

  Raises:
    ValueError: a rank below 1 or above what was extracted.

  Example:
    >>> check_ranks(Report({}, [{"singular_values": [2.0]}], {}, []), [4])
    Traceback (most recent call last):
    ...
    ValueError: rank 4 was asked for, but the extraction went to rank 1; extract
    again with --rank=4 or ask for less.
  """
  ranks = list(ranks)
  top = max(top_rank(report), int(report.settings.get("rank", 0)))
  if min(ranks, default=1) < 1:
    raise ValueError(f"rank {min(ranks)} was asked for; ranks begin at 1.")
  if max(ranks, default=1) > top:
    raise ValueError(
      f"rank {max(ranks)} was asked for, but the extraction went to rank "
      f"{top}; extract again with --rank={max(ranks)} or ask for less."
    )


def cut(report: Report, rank: int) -> Report:
  """Computes the report of the same extraction at a lower rank.

  Args:
    report: from an extraction.
    rank: at most what was extracted; modules that have less keep it.

  Returns:
    Report; of each module rank, errors, energy, mse, cosine distance and bytes
    are those at `rank`. `optimality` is None where the rank differs: its bound
    was made for another.

  Raises:
    ValueError: as `check_ranks`.

  Example:
    >>> cut(Report({"dtype": "float32"}, [], {}, []), 4)
    Traceback (most recent call last):
    ...
    ValueError: the report has no extracted module: nothing to draw.
  """
  check_ranks(report, [rank])
  size = itemsize(report)
  modules = [_cut_row(row, rank, size) for row in report.modules]
  return report._replace(
    settings=dict(report.settings) | {"rank": rank},
    modules=modules,
    totals=total_up(modules, report.ledger),
  )


def itemsize(report: Report) -> int:
  """Returns the bytes of one number of the stored factors.

  Args:
    report: from an extraction.

  Returns:
    2 or 4.

  Example:
    >>> itemsize(Report({"dtype": "bfloat16"}, [], {}, []))
    2
  """
  return jnp.dtype(report.settings["dtype"]).itemsize


def _cut_row(row: Row, rank: int, size: int) -> dict[str, Any]:
  """Computes a module's row at a lower rank."""
  rank = min(rank, len(row["singular_values"]))
  if rank == row["rank"]:
    return dict(row)
  both = measure([row], rank)
  return dict(row) | {
    "rank": rank,
    **both,
    "energy": 1 - both["relative_error"] ** 2,
    "error": both["relative_error"] * row["norm"],
    "mse": (both["relative_error"] * row["norm"]) ** 2
    / math.prod(row["shape"]),
    "optimality": None,
    "bytes": rank * unit_bytes(row, size),
  }


def unit_bytes(row: Row, size: int) -> int:
  """Counts the bytes of one unit of a module's rank.

  Args:
    row: of a report.
    size: bytes of a number.

  Returns:
    The bytes of a row of a and one of b, of all members of a stack.

  Example:
    >>> unit_bytes({"shape": [2, 3, 5]}, 4)
    64
  """
  *lead, fan_in, fan_out = row["shape"]
  return math.prod(lead) * (fan_in + fan_out) * size


def measure(rows: Sequence[Row], rank: int) -> dict[str, float]:
  """Computes relative error and cosine distance of modules as one vector.

      distance = (error² - (norm - change)²) / (2 norm change)

  which is 1 - cos, without the cancellation.

  Args:
    rows: of a report.
    rank: clipped to what each module has.

  Returns:
    `relative_error` and `cosine_distance`. A stored factor rounded to 16 bits
    enters the error, but not the norm of the change.

  Example:
    >>> row = {"norm": 5.0, "singular_values": [4.0, 3.0], "rank": 2,
    ...        "relative_errors": [1.0, 0.6, 0.0]}
    >>> {name: round(value, 6) for name, value in measure([row], 1).items()}
    {'relative_error': 0.6, 'cosine_distance': 0.2}
  """
  norm2 = error2 = change2 = 0.0
  for row in rows:
    k = min(rank, len(row["singular_values"]))
    norm2 += row["norm"] ** 2
    error2 += (row["relative_errors"][k] * row["norm"]) ** 2
    change2 += sum(value**2 for value in row["singular_values"][:k])
  norm, change = math.sqrt(norm2), math.sqrt(change2)
  distance = 1.0
  if norm and change:
    distance = (error2 - (norm - change) ** 2) / (2 * norm * change)
  return {
    "relative_error": math.sqrt(error2) / norm if norm else 0.0,
    "cosine_distance": max(distance, 0.0),
  }


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
  """Groups modules by what they are in a layer, as a forward pass uses them.

  Args:
    rows: of a report.

  Returns:
    Kind -> rows in the order of their layers. A kind is the shortest end of the
    path that tells it from the others, numbers aside; experts go together.

  Example:
    >>> rows = [{"path": f"layers.{i}.{name}.weight"}
    ...         for i in (1, 0) for name in ("down_proj", "q_proj")]
    >>> {kind: len(rows) for kind, rows in by_kind(rows).items()}
    {'q_proj': 2, 'down_proj': 2}
  """
  patterns: dict[str, list[Row]] = {}
  for row in rows:
    patterns.setdefault(pattern_of(row["path"]), []).append(row)
  names = _shortest(patterns)
  place = {name: i for i, name in enumerate(_ORDER)}
  ordered = sorted(
    patterns,
    key=lambda p: place.get(module_type(p), len(place)),
  )
  return {
    names[pattern]: sorted(
      patterns[pattern],
      key=lambda row: [int(n) for n in re.findall(r"\d+", row["path"])],
    )
    for pattern in ordered
  }


def pattern_of(path: str) -> str:
  """Replaces the whole numbers in a path: what the layers have in common.

  Args:
    path: a parameter's name.

  Returns:
    The pattern.

  Example:
    >>> pattern_of("model.layers.12.mlp.w1.weight")
    'model.layers.*.mlp.w1.weight'
  """
  return re.sub(r"(?<![^./])\d+(?![^./])", "*", path)


def _shortest(patterns: Iterable[str]) -> dict[str, str]:
  """Finds the shortest ends of the patterns that tell them apart."""
  patterns = list(patterns)
  ends = {p: [x for x in re.split(r"[./]", p) if x != "*"] for p in patterns}
  names = {pattern: module_type(pattern) for pattern in patterns}
  for pattern in patterns:
    same = [p for p in patterns if names[p] == names[pattern]]
    if len(same) > 1:
      names |= {p: ".".join(ends[p]) for p in same}
  return names
