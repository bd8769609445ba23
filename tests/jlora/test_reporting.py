# SPDX-License-Identifier: Apache-2.0
"""Reports: totals of their rows, and the same when read again."""

import json
import math

import numpy as np
import pytest
from reports import LEDGER, MODULES, report, row

from jlora.reporting import (
  REPORT,
  SCHEMA_VERSION,
  Report,
  module_type,
  read_report,
  total_up,
  write_report,
)


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
  with pytest.raises(ValueError, match=f"{REPORT} is no report"):
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
