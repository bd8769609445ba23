# SPDX-License-Identifier: Apache-2.0
"""A few of the recipes of `python -m tests.merges`, at every commit."""

import pytest

from tests.merges import check
from tests.merges.models import FAMILIES
from tests.merges.recipes import CASES


@pytest.mark.parametrize(
  "name", [n for n, case in CASES.items() if case.sample]
)
def test_a_recipe_is_its_definition_and_loads(name, tmp_path):
  assert check.faults(CASES[name], tmp_path) == []


def test_every_family_is_merged():
  assert {case.family for case in CASES.values()} == set(FAMILIES)
  assert len(CASES) >= 40
  assert len(FAMILIES) >= 12


def test_a_wrong_result_is_seen(tmp_path):
  """The check can fail: another recipe's result is not this one's."""
  case = CASES["linear, two stacks"]
  other = case._replace(text=CASES["ties, two stacks"].text)
  assert any(
    "off" in fault
    for fault in check.faults(case._replace(text=other.text), tmp_path)
  )
