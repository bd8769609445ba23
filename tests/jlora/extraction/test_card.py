# SPDX-License-Identifier: Apache-2.0
"""The card says what was lost and names no path of this machine."""

import json
import re

import pytest

from jlora.extraction.card import CARD, write_card
from jlora.extraction.report import (
  ledger_lines,
  rounding_line,
  type_table,
  worst_table,
)
from tests.helpers.reports import SETTINGS, report


def test_the_card_repeats_the_run(tmp_path):
  command = "jlora extract base tuned out --rank=8"
  write_card(tmp_path, report(), command)
  text = (tmp_path / CARD).read_text()
  front, body = text.removeprefix("---\n").split("\n---\n")
  assert "library_name: peft" in front.splitlines()
  # JSON is YAML: quotes and colons in a name need no other care.
  (base,) = re.findall(r"base_model: (.*)", front)
  assert json.loads(base) == '"base"'  # of a folder that is here
  assert f"\n```\n{command}\n```\n" in body
  for part in (type_table, worst_table, rounding_line, ledger_lines):
    assert part(report()) in body
  share = report().totals["relative_error"]
  assert f"{share:.2%} of their norm" in body


def test_the_card_has_names_in_place_of_paths(tmp_path):
  paths = {"base": "/a/base", "finetuned": "/a/base-tuned"}
  out = tmp_path / "out"
  out.mkdir()
  command = f"run --base=/a/base --ft /a/base-tuned --out={out} --x=/a/base-t"
  write_card(out, report()._replace(settings=paths), command)
  text = (out / CARD).read_text()
  assert "\nrun --base=base --ft base-tuned --out=out --x=/a/base-t\n" in text
  assert "# LoRA extracted from `base-tuned`\n" in text


@pytest.mark.parametrize(
  ("rank", "room"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)]
)
def test_the_card_asks_vllm_for_a_rank_that_it_takes(tmp_path, rank, room):
  config = {"base_model_name_or_path": "org/x", "r": rank}
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  settings = SETTINGS | {"profile": "vLLM"}
  write_card(tmp_path, report()._replace(settings=settings), "run")
  name = tmp_path.name
  assert (
    f"\nvllm serve org/x --enable-lora --max-lora-rank {room} --lora-modules "
    f"{name}={name}\n"
  ) in (tmp_path / CARD).read_text()
