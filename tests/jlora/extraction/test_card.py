# SPDX-License-Identifier: Apache-2.0
"""The card says what was lost and names no path of this machine."""

import json

import huggingface_hub
import pytest

from jlora.extraction.card import CARD, licence_of, write_card
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
  assert "base_model:" not in front  # "base" in quotes is no name on the Hub
  assert f"\n```sh\n{command}\n```\n" in body
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


CONFIG = {"base_model_name_or_path": "org/x", "r": 4, "task_type": "SEQ_CLS"}


def test_the_hub_reads_the_front_matter(tmp_path):
  (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
  base = tmp_path / "base"
  base.mkdir()
  (base / CARD).write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# B\n")
  settings = SETTINGS | {"base": str(base)}
  write_card(tmp_path, report()._replace(settings=settings), "run")
  data = huggingface_hub.ModelCard.load(tmp_path / CARD).data.to_dict()
  assert data == {
    "base_model": "org/x",
    "base_model_relation": "adapter",
    "library_name": "peft",
    "license": "apache-2.0",
    "pipeline_tag": "text-classification",
    "tags": ["lora", "jlora"],
  }
  text = (tmp_path / CARD).read_text()
  assert "AutoModelForSequenceClassification.from_pretrained" in text


@pytest.mark.parametrize(
  "card",
  [None, "# no front matter\nlicense: mit\n", "---\nx: 1\n---\nlicense: mit\n"],
)
def test_no_licence_is_made_up(tmp_path, card):
  if card:
    (tmp_path / CARD).write_text(card)
  assert licence_of(tmp_path) is None


def test_what_was_measured_is_told_and_what_was_not(tmp_path):
  write_card(tmp_path, report(), "run")
  assert "Not measured." in (tmp_path / CARD).read_text()
  write_card(tmp_path, report(), "run", divergences={"kjv": 0.00099})
  text = (tmp_path / CARD).read_text()
  assert "| kjv | 0.00099 |" in text
  assert "Not measured" not in text
