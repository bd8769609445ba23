# SPDX-License-Identifier: Apache-2.0
"""Some types of the walk of `make test-families`, of every kind one or two."""

import pytest

from tests.families.walk import ACCOUNTED, RIGHT, WITH_WHOLE, walk

SAMPLE = (
  "bert", "gemma3", "gpt2", "llama", "llava", "mamba", "mixtral", "t5", "vit",
)  # fmt: skip


@pytest.fixture(scope="module")
def row_of(tmp_path_factory):
  """Walks a type once for all tests."""
  rows = {}

  def find(name):
    if name not in rows:
      rows[name] = walk(name, tmp_path_factory.mktemp(name))
    return rows[name]

  return find


@pytest.mark.parametrize("name", SAMPLE)
def test_peft_loads_the_finetune_or_the_ledger_says_what_is_missing(
  name, row_of
):
  row = row_of(name)
  assert row["verdict"] in (RIGHT, WITH_WHOLE, ACCOUNTED), row["why"]


@pytest.mark.parametrize("name", SAMPLE)
def test_transformers_loads_the_finetune_from_a_merged_folder(name, row_of):
  row = row_of(name)
  assert row["merged"] == RIGHT, row["merged_why"]
