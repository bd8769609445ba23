# SPDX-License-Identifier: Apache-2.0
"""Rows of a walk as a page of Markdown, and what of them breaks the promise."""

import collections
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from tests.families.walk import (
  NOT_BUILT,
  PEFT_ERROR,
  REFUSED,
  RIGHT,
  VERDICTS,
  WITH_WHOLE,
  WRONG,
)

LEAST_RIGHT = 0.9

Row = Mapping[str, Any]


def faults(rows: Sequence[Row]) -> list[str]:
  """What breaks the promise, a line each; empty if it is kept."""
  found = []
  for key in ("verdict", "merged"):
    built = [row for row in rows if row["verdict"] != NOT_BUILT]
    bad = [r["type"] for r in built if r.get(key) in (WRONG, PEFT_ERROR, None)]
    if bad:
      found.append(f"{key}: {len(bad)} types are wrong: {', '.join(bad)}")
    right = sum(row.get(key) in (RIGHT, WITH_WHOLE) for row in built)
    if right < LEAST_RIGHT * len(built):
      found.append(f"{key}: {right} of {len(built)} are right, under 90%")
  return found


def line(row: Row) -> str:
  """A row in a line, for the screen."""
  parts = [f"{row['type']}: {row['verdict']}", row.get("why") or ""]
  if row.get("merged") not in (None, RIGHT):
    parts.append(f"merged {row['merged']}: {row['merged_why']}")
  return "; ".join(part for part in parts if part)[:300]


def page(rows: Sequence[Row]) -> str:
  """The whole page."""
  built = [row for row in rows if row["verdict"] != NOT_BUILT]
  commits = collections.Counter(str(row.get("jlora")) for row in rows)
  now = commits.most_common(1)[0][0] if commits else commit()
  versions = ", ".join(
    f"{name} {metadata.version(name)}"
    for name in ("transformers", "peft", "torch")
  )
  lines = [
    "# Model types",
    "",
    "Tiny random models of the types that transformers knows, each with a"
    " change of rank 2 in every matrix: extracted at rank 4 (at 8 or 16 where a"
    " tensor on disk holds several), loaded in PEFT;"
    " and merged by `save_merged`, loaded in transformers. Written by"
    " `python -m tests.families --out=docs/families.md` (`make test-families`"
    f" checks it); {versions}.",
    "",
    f"{len(rows)} types tried, {len(built)} built; jlora at "
    + ", ".join(f"{name} ({count})" for name, count in commits.items())
    + ". A verdict of another commit than most names it.",
    "",
    "| | " + " | ".join(VERDICTS) + " |",
    "|---" * (len(VERDICTS) + 1) + "|",
  ]
  for key, title in (("verdict", "in PEFT"), ("merged", "merged")):
    count = collections.Counter(row.get(key) for row in built)
    count[NOT_BUILT] = len(rows) - len(built)
    cells = [f"{count[name]}" for name in VERDICTS]
    lines.append(f"| {title} | " + " | ".join(cells) + " |")
  lines += [
    "",
    "- right: outputs and all parameters of the merged model are the"
    " finetune's, |got - finetune| / |base - finetune| at most 1e-5. Where a"
    " rounding of the weights alone changes the outputs by more, they are"
    " within three times that, and the distance reads 1e-05.",
    "- right with --whole: the first extraction is accounted for, as below; one"
    " with the `--whole` that its report names is right. PEFT replaces modules,"
    " not parameters: of those that hold a parameter beside matrices, these"
    " have no Loras then, and the adapter is larger. Counts are those of the"
    " first, then of the second.",
    "- accounted: they are those of the finetune without what the ledger calls"
    " not representable, to 1e-4.",
    "- refused: a `ValueError` before anything is written.",
    "- PEFT error: PEFT does not load the folder. WRONG: the rest. Both are"
    " faults of jlora.",
    "",
    "The distance is that of outputs, in brackets that of the worst parameter"
    " where no forward pass was arranged. Loras: matrices carried as such;"
    " whole: tensors carried whole, in `modules_to_save`.",
    "",
  ]
  kinds = sorted({row["kind"] for row in built if "kind" in row})
  for kind in kinds:
    lines += [
      f"## {kind}",
      "",
      "| type | model | in PEFT | distance | Loras | whole | not carried, and"
      " why | merged |",
      "|---|---|---|---|---|---|---|---|",
    ]
    mine = [row for row in built if row.get("kind") == kind]
    lines += [_cells(row, now) for row in sorted(mine, key=lambda r: r["type"])]
    lines.append("")
  lost = [row for row in built if "kind" not in row]
  lines += ["## No row", ""] if lost else []
  lines += [f"- {row['type']}: {row['verdict']}, {row['why']}" for row in lost]
  lines += ["", "## Not built", ""] if lost else ["## Not built", ""]
  reasons = collections.defaultdict(list)
  for row in rows:
    if row["verdict"] == NOT_BUILT:
      reasons[row["why"]].append(row["type"])
  for why, names in sorted(reasons.items(), key=lambda kv: -len(kv[1])):
    lines.append(f"- {', '.join(sorted(names))}: {_plain(why)}")
  return "\n".join(lines) + "\n"


def commit() -> str:
  """The last commit that touched jlora, and whether it was edited since."""
  said = [
    subprocess.run(
      ["git", *words, "--", "jlora"],
      capture_output=True,
      text=True,
      check=False,
    ).stdout.strip()
    for words in (["log", "-1", "--format=%h"], ["status", "--short"])
  ]
  edited = ", edited since" if said[1] else ""
  return (said[0] or "an unknown commit") + edited


def reason(why: str) -> str:
  """A reason of the ledger without the names in it."""
  return re.sub(r"; give also [^(]*", " ", why)


def _cells(row, now):
  distance = row.get("distance")
  shown = f"{distance:.0e}" if distance is not None else "-"
  if distance is None and row.get("parameter_distance") is not None:
    shown = f"({row['parameter_distance']:.0e})"
  counts = collections.Counter()
  for why, count in row.get("missing", {}).items():
    counts[reason(why)] += count
  missing = [f"{count}: {why}" for why, count in counts.items()]
  if row["verdict"] in (WRONG, PEFT_ERROR, REFUSED):
    missing.insert(0, row["why"])
  merged = row.get("merged", "-")
  if merged not in (RIGHT, "-"):
    merged += f": {row['merged_why']}"
  verdict = row["verdict"]
  if row.get("jlora") != now:
    verdict += f" ({row.get('jlora')})"
  cells = [
    row["type"], row["model"], verdict, shown,
    *_counts(row),
    "; ".join(missing), merged,
  ]  # fmt: skip
  return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _counts(row):
  """How many tensors are Loras and whole, also with `--whole`."""
  found = [str(row.get("carried", "-")), str(row.get("whole", "-"))]
  if row["verdict"] == WITH_WHOLE:
    found = [f"{a}, {b}" for a, b in zip(found, row["with_whole"], strict=True)]
  return found


def _plain(text):
  """Text that neither ends a cell nor opens a tag."""
  return text.replace("|", "\\|").replace("<", "&lt;")[:300]
