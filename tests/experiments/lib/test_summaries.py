# SPDX-License-Identifier: Apache-2.0
"""Cells say what the rows hold, to the figures that are known."""

import pytest

from experiments.lib.figures import summaries, tables
from tests.helpers import comparisons


@pytest.mark.parametrize(
  ("value", "error", "expected"),
  [
    (0.25, 0.03125, "0.250 ± 0.031"),
    (0.02, 0.0025, "0.0200 ± 0.0025"),
    (2.5, None, "2.5"),
    (-0.0031, 0.0162, "-0.003 ± 0.016"),
    (4.16e-5, 7.7e-6, "(4.16 ± 0.77)e-5"),
    (9.86e-7, 1.2e-7, "(9.9 ± 1.2)e-7"),
    (0.0, 2e-9, "(0.0 ± 2.0)e-9"),
    (120.4, 31.0, "120 ± 31"),
  ],
)
def test_values_end_at_the_second_figure_of_their_error(value, error, expected):
  assert summaries.write_with_error(value, error) == expected


def _column(table, name):
  header, rows = table
  return [row[list(header).index(name)] for row in rows]


def test_kinds_and_all_together():
  report = tables.cut(comparisons.report(), 4)
  table = summaries.type_rows(report)
  assert _column(table, "kind") == [
    "embed_tokens", "q_proj", "down_proj", "all",
  ]  # fmt: skip
  assert _column(table, "modules") == ["1", "2", "3", "6"]
  assert float(_column(table, "relative error")[-1]) == pytest.approx(
    report.totals["relative_error"], abs=1e-4
  )
  worst = max(row["relative_error"] for row in report.modules)
  assert float(_column(table, "worst")[-1]) == pytest.approx(worst, abs=1e-4)


def test_modules_are_sorted_and_unknown_ranks_told():
  report = comparisons.report()
  rows = [row | {"noise_floor_rank": 8} for row in report.modules]
  rows[0] |= {"shape": [16, 8], "relative_error": 2.0}  # nothing is unknown
  rows[1] |= {"noise_floor_rank": 3, "relative_error": 1.5}
  table = summaries.module_rows(report._replace(modules=rows), 3)
  assert _column(table, "ranks above it") == ["8", "3", "≥ 8"]
  assert len(table[1]) == 3


def test_base_and_finetune_frame_the_ranks():
  found = comparisons.results()["kl"]["kjv"]
  table = summaries.kl_rows(found, {4: 2**20, 8: 2**21})
  assert _column(table, "rank") == ["0 (base)", "4", "8", "finetuned"]
  assert _column(table, "MiB") == ["0.0", "1.0", "2.0", "–"]
  assert _column(table, "recovered") == ["0.00%", "92.00%", "99.60%", "100%"]
  assert _column(table, "loss")[-1] == "2.5000"


def test_the_ledger_is_counted_where_it_is_cut():
  report = comparisons.report()
  lost = [
    comparisons.entry(f"n.{i}", "not representable", "no") for i in range(5)
  ]
  kept = comparisons.entry("norm", "kept whole")
  report = report._replace(ledger=[kept, *lost])
  _, rows = summaries.ledger_rows(report, 3)
  assert [row[0] for row in rows] == [
    "n.0", "n.1", "n.2", "and 3 more in report.json",
  ]  # fmt: skip
  assert summaries.ledger_rows(report)[1][-1] == ("norm", "kept whole", "")


def test_a_small_error_is_not_called_none():
  report = tables.cut(comparisons.report(), 4)
  totals = report.totals | {"relative_error": 1.4e-5}
  (said,) = summaries.headline(report._replace(totals=totals), {})
  assert "It misses 1.4e-03% of the norm" in said
