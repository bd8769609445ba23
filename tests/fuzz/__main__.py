# SPDX-License-Identifier: Apache-2.0
"""Sends damaged files through every door; `make fuzz ARGS=--count=10000`.

python -m tests.fuzz --count=1000 --only=load_peft --seed=3
"""

import argparse
import collections
import os
import re
import sys
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"
warnings.simplefilter("ignore")

from tests.fuzz.doors import DOORS  # noqa: E402
from tests.fuzz.tries import GOOD, try_all  # noqa: E402


def main(words: list[str] | None = None) -> int:
  """Prints outcomes by door; 1 if any is not allowed."""
  parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
  parser.add_argument("--count", type=int, default=1000, help="Tries.")
  parser.add_argument("--seed", type=int, default=0, help="Of the damage.")
  parser.add_argument("--only", default=".*", help="A regex of whole names.")
  parser.add_argument("--case", help="DOOR/NUMBER, one try with its traceback.")
  asked = parser.parse_args(words)
  doors = {n: door for n, door in DOORS.items() if re.fullmatch(asked.only, n)}
  table = collections.defaultdict(collections.Counter)
  faults = []
  for one in try_all(doors, asked.count, asked.seed, asked.case):
    table[one.door][one.outcome] += 1
    if one.outcome not in GOOD or asked.case:
      faults.append(f"{one.door}/{one.number}: {one.outcome}: {one.said}")
      print(faults[-1], flush=True)
  outcomes = sorted({x for row in table.values() for x in row})
  print("\n| door | tries |", " | ".join(outcomes), "|")
  print("|---|", "---|" * (len(outcomes) + 1), sep="")
  for name, row in table.items():
    counts = " | ".join(str(row[x]) for x in outcomes)
    print(f"| {name} | {row.total()} | {counts} |")
  print(f"{len(faults)} outcomes that are not allowed")
  return int(bool(faults))


if __name__ == "__main__":
  sys.exit(main())
