# SPDX-License-Identifier: Apache-2.0
"""Tables of a report say what is in it."""

import json
import math
import re

import pytest
from reports import MODULES, SETTINGS, report, row

from jlora.report_tables import (
  CARD,
  ledger_lines,
  rounding_line,
  type_table,
  worst_table,
  write_card,
)


def cells(table):
  """The cells of every line; two blanks or more divide them."""
  return [re.split(r"  +", line) for line in table.splitlines()]


def test_the_type_table_has_the_figures():
  found = cells(type_table(report()))
  header, q, down, total = found
  assert header[:4] == ["type", "modules", "shape", "rank"]
  # 3/13 together; 3/5 the worst; 13 of a base of √(500² + 400²).
  assert q == [
    "q_proj", "2", "64x32", "4-8", "0.2308", "0.6000", "94.7%", "2.0e-02",
    "5-7", "2.00",
  ]  # fmt: skip
  assert down == [
    "down_proj", "1", "4x128x32", "8", "0.9600", "0.9600", "7.8%", "-", "5",
    "0.50",
  ]  # fmt: skip
  relative = math.sqrt((9 + 0.96**2) / 170)
  energy = f"{1 - relative**2:.1%}"
  assert total == ["all", "3", f"{relative:.4f}", energy, "2.50"]


def test_the_change_of_weights_is_of_all_modules_as_one_vector():
  """A small module whose base is next to nothing counts by its size."""
  rows = [row(f"layers.{i}.q_proj.weight", 1.0, 0.5) for i in range(2)]
  rows[0]["relative_change"], rows[1]["relative_change"] = 0.001, 0.1
  _, q, _ = cells(type_table(report(rows)))
  assert q[7] == f"{math.sqrt(2) / math.hypot(1000, 10):.1e}" == "1.4e-03"


@pytest.mark.parametrize("table", [type_table, worst_table])
def test_columns_stay_aligned(table):
  """Names begin with the header's, figures end with it."""
  header, *lines = table(report()).splitlines()
  ends = {match.end() for match in re.finditer(r"\S+( \S+)*", header)}
  for line in lines:
    name, *figures = re.finditer(r"\S+( \S+)*", line)
    assert name.start() == 0
    assert {figure.end() for figure in figures} <= ends


def test_the_worst_come_first():
  header, *rows = cells(worst_table(report()))
  assert header[0] == "worst modules"
  assert rows == [
    [MODULES[2]["path"], "4x128x32", "8", "0.9600", "7.8%", "2.2", "-"],
    [MODULES[0]["path"], "64x32", "8", "0.6000", "64.0%", "2.2", "1.062"],
    [MODULES[1]["path"], "64x32", "4", "0.0000", "100.0%", "2.2", "1.062"],
  ]
  assert len(worst_table(report(), count=1).splitlines()) == 2


def test_losses_come_first_and_the_rest_is_counted():
  lines = ledger_lines(report(), count=3).splitlines()
  assert lines == [
    "ledger: 4 extracted, 1 unchanged, 2 kept whole, 2 not representable",
    "  not representable: lost (not selected)",
    "  not representable: new (only there)",
    "  extracted: head (tied to embed)",
    "  and 2 more in report.json",
  ]


def test_all_lines_fit_where_nothing_is_left_out():
  lines = ledger_lines(report(), count=5).splitlines()
  assert len(lines) == 6
  assert lines[-1] == "  kept whole: norm.1 (its shape differs)"
  assert "same" not in "".join(lines)  # unchanged, for whatever reason


def test_the_card_repeats_the_run(tmp_path):
  command = "jlora extract base tuned out --rank=8"
  write_card(tmp_path, report(), command)
  text = (tmp_path / CARD).read_text()
  front, body = text.removeprefix("---\n").split("\n---\n")
  assert "library_name: peft" in front.splitlines()
  # JSON is YAML: quotes and colons in a path need no other care.
  (base,) = re.findall(r"base_model: (.*)", front)
  assert json.loads(base) == SETTINGS["base"]
  assert f"\n```\n{command}\n```\n" in body
  for part in (type_table, worst_table, rounding_line, ledger_lines):
    assert part(report()) in body
  share = report().totals["relative_error"]
  assert f"{share:.2%} of their norm" in body


def test_what_rounding_did_is_told_or_said_to_be_unknown():
  known = row("q", 3.0, 3.0, learnt_norm=6.0, rounding_share=0.9, unchanged=0.8)
  unknown = known | {"norm": 4.0, "learnt_norm": None, "rounding_share": None}
  assert rounding_line(report([known, known | {"norm": 4.0}])) == (
    "rounding: learnt 8.485 (norm, estimated), stored 5; 90.0% of its energy "
    "lost or covered; 80.0% of all entries did not change"
  )
  # Of the modules that tell; the others are counted.
  both = rounding_line(report([known, unknown]))
  assert "learnt 6 (norm, estimated), stored 3;" in both
  assert "is not identifiable in 1 of 2 modules" in both
  assert rounding_line(report([unknown])).startswith(
    "rounding: what was learnt is not identifiable in 1 of 1 modules;"
  )
