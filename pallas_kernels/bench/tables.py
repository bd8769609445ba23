# SPDX-License-Identifier: Apache-2.0
"""Prints the benches' tables."""

from collections.abc import Iterable, Sequence


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
  """Prints a Markdown table, each row as soon as it is known."""
  print("| " + " | ".join(head) + " |", flush=True)
  print("|" + " --- |" * len(head), flush=True)
  for row in rows:
    print("| " + " | ".join(row) + " |", flush=True)
