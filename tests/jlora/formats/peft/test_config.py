# SPDX-License-Identifier: Apache-2.0
"""The rules of adapter_config.json against PEFT's own functions."""

import math
import re

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from jlora.formats.peft.config import (
  by_pattern,
  is_targeted,
  rank_and_scale,
  shortest_targets,
)

LEAVES = st.sampled_from(["q", "k", "q.k", "lm_head", "xq", "0", "1"])
NAMES = st.lists(LEAVES, min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(
  NAMES,
  NAMES.map(lambda name: f"^{re.escape(name)}"),
  st.sampled_from([".*q", "k|q", r"\d\.q"]),
)


@given(st.dictionaries(PATTERNS, st.integers(1, 9), max_size=4), NAMES)
def test_patterns_match_as_in_peft(patterns, name):
  expected = patterns.get(get_pattern_key(list(patterns), name), 0)
  assert by_pattern(patterns, name, 0) == expected


@given(
  st.one_of(st.lists(NAMES, max_size=4), PATTERNS),
  st.lists(NAMES, max_size=2),
  st.lists(NAMES, max_size=2),
  NAMES,
)
def test_targets_are_those_of_peft(targets, excluded, saved, name):
  entries = {
    "target_modules": targets,
    "exclude_modules": excluded,
    "modules_to_save": saved,
  }
  expected = check_target_module_exists(peft.LoraConfig(**entries), name)
  assert is_targeted(entries, name) == bool(expected)


@given(st.sets(NAMES, min_size=1, max_size=6), st.sets(NAMES, max_size=6))
def test_targets_wrap_exactly_the_modules(modules, others):
  others -= modules
  config = peft.LoraConfig(target_modules=shortest_targets(modules, others))
  for name in modules | others:
    found = bool(check_target_module_exists(config, name))
    assert found == (name in modules)


@pytest.mark.parametrize(
  ("config", "expected"),
  [
    ({"r": 4, "lora_alpha": 8}, (4, 2.0)),
    ({"r": 4}, (4, 2.0)),
    ({"r": 4, "lora_alpha": 8, "use_rslora": True}, (4, 4.0)),
    ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2}}, (2, 4.0)),
    (
      {"r": 4, "rank_pattern": {"q": 9}, "alpha_pattern": {"q": 2},
       "use_rslora": True},
      (9, 2 / 3),
    ),
  ],
)  # fmt: skip
def test_scale_of_a_module(config, expected):
  rank, scale = rank_and_scale(config, "model.layers.0.q")
  assert rank == expected[0]
  assert math.isclose(scale, expected[1])
