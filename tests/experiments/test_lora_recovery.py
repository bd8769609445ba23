# SPDX-License-Identifier: Apache-2.0
"""A LoRA is given back to rounding, and rounding is what bfloat16 adds."""

import ml_dtypes
import numpy as np
import pytest

from experiments.lib.adapters import ladders
from experiments.lora_recovery import as_table, measure_recovery
from jlora.loras import Lora


@pytest.fixture(scope="module")
def trained():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
  base = {"layers": {"0": {"up": {"kernel": draw(96, 128) / 10}}}}
  path = "layers/0/up/kernel"
  loras = {path: Lora(draw(3, 96) / 50, draw(3, 128) / 50, np.float32(1))}
  return base, ladders.with_loras(base, loras), loras


def test_float32_gives_the_lora_back(trained):
  found = measure_recovery(*trained, np.float32, 3)
  assert found["missed"] < 1e-4
  assert found["rounding"] < 1e-4


def test_in_bfloat16_more_rank_takes_up_more_rounding(trained):
  at, above = (
    measure_recovery(*trained, ml_dtypes.bfloat16, rank) for rank in (3, 12)
  )
  assert at["missed"] < above["missed"] < at["rounding"]
  assert above["error"] < at["error"]
  # The stored change is the LoRA and the rounding of both files.
  assert at["error"] == pytest.approx(at["rounding"], rel=0.15)


def test_the_table_has_a_line_for_each_row(trained):
  row = {"dtype": "float32", "rank": 3}
  row |= measure_recovery(*trained, np.float32, 3)
  assert as_table([row, row]).count("\n| float32 | 3 |") == 2
