# SPDX-License-Identifier: Apache-2.0
"""What no figure covers is said first, or stops the run; quantised bases."""

import functools
import io
import json

import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.extraction import run as runs
from jlora.extraction.card import write_card
from jlora.extraction.coverage import unmatched_line
from jlora.extraction.report import read_report
from jlora.pairing.match import common_rows
from tests.helpers.small_pairs import (
  change_of,
  draw,
  shared_extractor,
  write_pair,
)
from tests.jlora.checkpoints.test_quantised import mxfp4, quantise

Q = "model.layers.0.self_attn.q_proj"
HEAD = "lm_head.weight"
BASE = {
  f"{Q}.weight": draw(8, 16),
  "model.layers.0.mlp.up_proj.weight": draw(8, 16, seed=1),
  "model.norm.weight": np.ones(16, np.float32),
}
TUNED = BASE | {f"{Q}.weight": BASE[f"{Q}.weight"] + draw(8, 16, seed=2)}


@pytest.fixture(autouse=True)
def _compile_once(monkeypatch):
  monkeypatch.setattr(runs, "Extractor", shared_extractor)


def extract(folder, base, finetuned, config=None, **options):
  sides = write_pair(folder, base, finetuned, config)
  return functools.partial(
    runs.extract_checkpoint,
    *sides,
    folder / "out",
    rank=8,
    log=io.StringIO(),
    **options,
  )


def statuses(report):
  return {
    name: (row["status"], row["why"])
    for row in report.ledger
    for name in row["base"] + row["finetuned"]
  }


def test_where_all_is_paired_nothing_is_said(tmp_path):
  report = extract(tmp_path, BASE, TUNED)()
  total = sum(x.nbytes for x in BASE.values())
  both = {"base": total, "finetuned": total}
  assert report.totals["floating_bytes"] == both
  assert report.totals["unmatched_bytes"] == {"base": 0, "finetuned": 0}
  assert unmatched_line(report.totals) == ""
  write_card(tmp_path / "out", report, "jlora extract")
  card = (tmp_path / "out" / "README.md").read_text()
  assert "`\n\nThe low-rank part of what a finetune" in card
  assert read_report(tmp_path / "out") == report


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_a_little_without_partner_leads_the_card(side, tmp_path):
  lone = {"vision.proj.weight": draw(2, 2), "step": np.zeros(99, np.int32)}
  base = BASE | (lone if side == "base" else {})
  tuned = TUNED | (lone if side == "finetuned" else {})
  report = extract(tmp_path, base, tuned)()
  expected = {"base": 0, "finetuned": 0} | {side: 16}
  assert report.totals["unmatched_bytes"] == expected
  line = unmatched_line(report.totals)
  share = 16 / report.totals["floating_bytes"][side]
  whose = {"base": "base's floating bytes", "finetuned": "finetune's"}[side]
  assert f"{share:.1%} of the {whose} (0.00 MiB)" in line
  write_card(tmp_path / "out", report, "jlora extract")
  card = (tmp_path / "out" / "README.md").read_text()
  assert card.index("**Not compared: ") < card.index("All deltas")


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_much_without_partner_is_an_error_unless_allowed(side, tmp_path):
  lone = {f"tower.{i}.weight": draw(8, 8, seed=i) for i in range(5)}
  base = BASE | (lone if side == "base" else {})
  tuned = TUNED | (lone if side == "finetuned" else {})
  run = extract(tmp_path, base, tuned)
  words = f"% of the floating bytes of .*{side} have no partner in .*: tower.0"
  with pytest.raises(ValueError, match=words) as raised:
    run()
  assert "--allow_unmatched" in str(raised.value)
  assert not (tmp_path / "out").exists()
  report = run(allow_unmatched=True)
  assert report.totals["unmatched_bytes"][side] == 5 * 8 * 8 * 4
  assert statuses(report)["tower.0.weight"][0] == "not representable"


def test_an_adapter_that_is_not_merged_is_no_finetune(tmp_path):
  """Its base layers are the base's: the change would be nothing."""
  tuned = {
    name.replace("proj.weight", "proj.base_layer.weight"): array
    for name, array in TUNED.items()
  }
  tuned |= {
    f"{Q}.lora_A.default.weight": draw(1, 16),
    f"{Q}.lora_B.default.weight": draw(8, 1),
  }
  run = extract(tmp_path, BASE, tuned)
  with pytest.raises(ValueError, match=r"not merged: .*lora_A\.default"):
    run()
  report = run(allow_unmatched=True)
  assert report.totals["modules"] == 1


def test_codes_against_values_are_an_error(tmp_path):
  base = BASE | {f"{Q}.weight": np.ones((8, 16), np.int8)}
  with pytest.raises(ValueError, match=f"integers on one side.*{Q}.weight"):
    extract(tmp_path, base, TUNED)()


def test_no_parameters_are_told_and_not_carried(tmp_path):
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  base = BASE | {name: np.ones(1000, np.float32)}
  tuned = TUNED | {name: np.ones(1000, np.float32) / 2}
  for at, finetuned in enumerate((tuned, TUNED)):
    folder = tmp_path / str(at)
    report = extract(folder, base, finetuned)()
    status, why = statuses(report)[name]
    assert status == "no parameter"
    assert "rotary" in why
    rows = [row for row in report.ledger if name in row["base"]]
    assert len(rows) == 1
    assert report.totals["ledger"]["no parameter"] == 2 - at
    assert report.totals["unmatched_bytes"]["base"] == 0
    stored = open_checkpoint(folder / "out" / "adapter_model.safetensors")
    assert not any("inv_freq" in one for one in stored)


def test_the_change_of_a_base_in_four_bits_is_from_its_values(tmp_path):
  made, values = quantise(draw(8, 16, seed=3), "nf4", 16)
  packed = {name.replace("m.", f"{Q}.", 1): x for name, x in made.items()}
  base = {n: x for n, x in BASE.items() if n != f"{Q}.weight"} | packed
  config = {"quantization_config": {"quant_method": "bitsandbytes"}}
  report = extract(tmp_path, base, TUNED, config)()
  assert report.totals["unmatched_bytes"] == {"base": 0, "finetuned": 0}
  found = change_of(tmp_path / "out", Q)
  np.testing.assert_allclose(
    found, TUNED[f"{Q}.weight"] - values, rtol=1e-4, atol=1e-5
  )
  rows = statuses(report)
  assert rows[f"{Q}.weight.absmax"] == (
    "unchanged",
    "scale, multiplied into its weight",
  )
  assert packed.keys() <= rows.keys()


def test_the_change_of_experts_in_mxfp4_is_from_their_values(tmp_path):
  """A finetune of gpt-oss that transformers saved: (expert, in, out)."""
  codes, scales = mxfp4(2, 64, 1)
  name = "model.layers.0.mlp.experts.gate_up_proj"
  write_pair(
    tmp_path / "read", {f"{name}_blocks": codes, f"{name}_scales": scales}, {}
  )
  values = open_checkpoint(tmp_path / "read" / "base")[name]
  values = values.astype(np.float32)
  assert values.shape == (2, 32, 64)
  change = np.float32(0.1) * draw(2, 32, 1) @ draw(2, 1, 64, seed=1)
  base = BASE | {f"{name}_blocks": codes, f"{name}_scales": scales}
  report = extract(
    tmp_path,
    base,
    TUNED | {name: values + change},
    {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
  )()
  assert report.totals["unmatched_bytes"] == {"base": 0, "finetuned": 0}
  assert (
    statuses(report)[f"{name}_blocks"][1] == "codes, read with their scales"
  )
  row = next(row for row in report.modules if row["path"] == name)
  np.testing.assert_allclose(row["norm"], np.linalg.norm(change), rtol=1e-3)
  assert row["singular_values"][1] < 1e-3 * row["singular_values"][0]


def test_a_packed_base_is_refused_before_anything_is_written(tmp_path):
  base = {n: x for n, x in BASE.items() if n != f"{Q}.weight"}
  base |= {
    f"{Q}.qweight": np.zeros((2, 8), np.int32),
    f"{Q}.qzeros": np.zeros((1, 1), np.int32),
    f"{Q}.scales": np.ones((1, 8), np.float16),
  }
  with pytest.raises(ValueError, match=r"base is quantised \(AWQ\).*gptqmodel"):
    extract(tmp_path, base, TUNED, allow_unmatched=True)()
  assert not (tmp_path / "out").exists()


def test_rows_are_compared_by_token_where_both_have_a_tokenizer(tmp_path):
  """New tokens in front, one gone: the change is that of the same tokens."""
  table = draw(6, 16, seed=4)
  change = draw(6, 1, seed=5) @ draw(1, 16, seed=6)
  change[2] = 0
  tuned = np.concatenate([draw(2, 16, seed=7), np.delete(table + change, 2, 0)])
  run = extract(tmp_path, BASE | {HEAD: table}, TUNED | {HEAD: tuned})
  for side, tokens in (("base", "abcdef"), ("finetuned", "xyabdef")):
    vocabulary = {token: number for number, token in enumerate(tokens)}
    text = json.dumps({"model": {"vocab": vocabulary}})
    (tmp_path / side / "tokenizer.json").write_text(text)
  report = run(vocabulary=common_rows)
  found = change_of(tmp_path / "out", "lm_head")
  np.testing.assert_allclose(found, change, rtol=1e-4, atol=1e-5)
  status, why = statuses(report)[HEAD]
  assert status == "extracted"
  assert "by token: 5 of 6 have another number" in why
  assert "1 are not there" in why
