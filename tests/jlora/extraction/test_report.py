# SPDX-License-Identifier: Apache-2.0
"""Reports: totals of their rows, and the same when read again."""

import json
import math
import re

import numpy as np
import pytest

from jlora.extraction.report import (
  REPORT,
  SCHEMA_VERSION,
  Report,
  ledger_lines,
  module_type,
  read_report,
  rounding_line,
  total_up,
  type_table,
  worst_table,
  write_report,
)
from tests.helpers.reports import LEDGER, MODULES, report, row


def test_totals_are_of_all_deltas_as_one_vector():
  totals = total_up(MODULES, LEDGER)
  error2, norm2 = 3.0**2 + 0.96**2, 5.0**2 + 12.0**2 + 1.0
  assert totals["modules"] == 3
  assert totals["relative_error"] == pytest.approx(math.sqrt(error2 / norm2))
  assert totals["energy"] == pytest.approx(1 - error2 / norm2)
  assert totals["adapter_bytes"] == 2 * 2**20 + 2**19
  assert totals["parameter_bytes"] == 3 * 2**22
  assert totals["ledger"] == {
    "extracted": 4, "unchanged": 1, "kept whole": 2, "not representable": 2
  }  # fmt: skip


def test_totals_tell_what_was_learnt_from_what_was_rounded():
  """Energies add up; entries count by the size of their matrix."""
  told = [
    row("q", 5.0, 3.0, learnt_norm=4.0, rounding_share=0.5, unchanged=0.5),
    row("k", 13.0, 0.0, learnt_norm=12.0, rounding_share=1 / 9,
        unchanged=0.0, shape=[3, 64, 32]),
  ]  # fmt: skip
  totals = total_up(told, [])
  assert totals["learnt_norm"] == pytest.approx(math.sqrt(160))
  assert totals["rounding_share"] == pytest.approx((8 + 16) / 160)
  assert totals["unchanged"] == pytest.approx(0.5 / 4)
  assert totals["not_identifiable"] == 0
  assert total_up([*told, MODULES[0]], [])["unchanged"] is None


def test_modules_that_do_not_tell_what_they_learnt_are_counted():
  known = row("q", 5.0, 3.0, learnt_norm=4.0, rounding_share=0.5, unchanged=0.5)
  unknown = known | {"learnt_norm": None, "rounding_share": None}
  totals = total_up([unknown, known, unknown], [])
  assert (totals["learnt_norm"], totals["rounding_share"]) == (4, 0.5)
  assert totals["not_identifiable"] == 2
  totals = total_up([unknown], [])
  assert (totals["learnt_norm"], totals["rounding_share"]) == (None, None)
  assert totals["unchanged"] == 0.5


def test_totals_of_nothing():
  totals = total_up([], [])
  assert (totals["relative_error"], totals["energy"]) == (0, 1)
  assert not any(totals["ledger"].values())


def test_a_report_read_again_is_the_same(tmp_path):
  write_report(tmp_path, report())
  assert read_report(tmp_path) == report()
  before = (tmp_path / REPORT).read_bytes()
  write_report(tmp_path, read_report(tmp_path))
  assert (tmp_path / REPORT).read_bytes() == before
  assert [file.name for file in tmp_path.iterdir()] == [REPORT]


def test_what_json_lacks_replaces_no_report(tmp_path):
  write_report(tmp_path, report())
  with pytest.raises(TypeError):
    write_report(tmp_path, Report({"rank": np.int64(3)}, [], {}, []))
  assert read_report(tmp_path) == report()


@pytest.mark.parametrize("version", [None, 0, SCHEMA_VERSION + 1])
def test_another_schema_is_refused(tmp_path, version):
  write_report(tmp_path, report())
  data = json.loads((tmp_path / REPORT).read_text())
  assert data["schema_version"] == SCHEMA_VERSION
  (tmp_path / REPORT).write_text(json.dumps(data | {"schema_version": version}))
  expected = f"schema version {version}, this jlora reads {SCHEMA_VERSION}"
  with pytest.raises(ValueError, match=expected):
    read_report(tmp_path)


@pytest.mark.parametrize("text", ["", '{"schema_version": 1, "setti', "[1]"])
def test_a_broken_report_is_named(tmp_path, text):
  (tmp_path / REPORT).write_text(text)
  with pytest.raises(ValueError, match=f"{REPORT} (is no JSON|holds no obj)"):
    read_report(tmp_path)


ODD = {
  "settings": [],
  "modules": {},
  "totals": None,
  "ledger": [3],
  "verified": {"by": "PEFT"},
  "more": 1,
}
ODD_ROWS = {
  "path": 3,
  "shape": [4],
  "norm": 1e200,
  "energy": float("nan"),
  "rank": -1,
  "singular_values": ["1"],
  "learnt_norm": "much",
  "bytes": 0.5,
}


@pytest.mark.parametrize("name", ODD)
def test_a_report_of_other_fields_is_named(name, tmp_path):
  write_report(tmp_path, report())
  data = json.loads((tmp_path / REPORT).read_text()) | {name: ODD[name]}
  (tmp_path / REPORT).write_text(json.dumps(data))
  with pytest.raises(ValueError, match=f"{REPORT}: .*{name}"):
    read_report(tmp_path)


@pytest.mark.parametrize("name", ODD_ROWS)
def test_a_row_of_other_fields_is_named(name, tmp_path):
  write_report(tmp_path, report())
  data = json.loads((tmp_path / REPORT).read_text())
  data["modules"][1][name] = ODD_ROWS[name]
  (tmp_path / REPORT).write_text(json.dumps(data))
  with pytest.raises(ValueError, match=f"{REPORT}: modules, 1: {name} is"):
    read_report(tmp_path)
  if name in ("learnt_norm",):
    return  # older reports have none
  del data["modules"][1][name]
  (tmp_path / REPORT).write_text(json.dumps(data))
  with pytest.raises(ValueError, match=f"modules, 1: {name} is missing"):
    read_report(tmp_path)


@pytest.mark.parametrize(
  ("path", "kind"),
  [
    ("model.layers.3.self_attn.q_proj.weight", "q_proj"),
    ("model.layers.3.mlp.experts.3.gate_proj.weight", "gate_proj"),
    ("experts.3.gate_proj.weight", "gate_proj"),
    ("model.layers.3.mlp.experts.gate_up_proj", "gate_up_proj"),
    ("model.layers.0.experts.3.weight", "experts"),
    ("model.embed_tokens.weight", "embed_tokens"),
    ("model.embedding.weight", "embedding"),
    ("encoder.w.weight", "w"),
    ("lm_head.weight", "lm_head"),
    ("classifier.0.weight", "classifier"),
    ("layers/0/attn/q/kernel", "q"),
    ("params/layers_0/mlp/gate_proj/kernel", "gate_proj"),
    ("layer_0/attn/q_einsum/w", "q_einsum"),
    ("params/embed/embedding", "embed"),
    ("embedder/input_embedding", "input_embedding"),
    ("w", "w"),
    ("weight", "weight"),
    ("0", "0"),
    ("layers/0", "layers"),
  ],
)
def test_types_of_modules(path, kind):
  assert module_type(path) == kind


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


def test_ranks_above_noise_are_clipped_at_the_rank():
  """Of 8 values found all above noise, the ninth may be as well."""
  known = row("model.layers.0.q_proj.weight", 5.0, 3.0, noise_floor_rank=8)
  one, whole = known, known | {"shape": [64, 8]}
  above = lambda *rows: cells(type_table(report(rows)))[1][8]  # noqa: E731
  assert above(one) == "≥ 8"
  assert above(whole) == "8"  # there is no ninth
  assert above(one, known | {"noise_floor_rank": 3}) == "3 to ≥ 8"


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
