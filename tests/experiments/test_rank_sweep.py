# SPDX-License-Identifier: Apache-2.0
"""The sweep falls with the rank, and the advice meets its goal."""

import jax
import numpy as np
import pytest

from experiments import ladders, rank_sweep
from tests.experiments.test_equal_bytes import draw, model


@pytest.fixture(scope="module")
def ladder():
  base = draw(0)
  tuned = jax.tree.map(np.add, base, draw(1, 0.2))
  return ladders.build_ladder(model, base, tuned, 24)


TOKENS = np.random.default_rng(3).integers(0, 20, (4, 8)).astype(np.int32)


def test_steps_fall_from_the_base_to_the_finetune(ladder):
  steps = list(rank_sweep.sweep(ladder, TOKENS, (4, 16, 24, 99)))
  assert [step.rank for step in steps] == [0, 4, 16, 24]
  assert steps[0].nbytes == 0
  assert steps[0].error == 1
  assert steps[0].kept == 0
  assert steps[-1].kl < 1e-5
  assert steps[-1].error < 1e-3
  assert steps[-1].kept > 0.999
  for one, two in zip(steps, steps[1:], strict=False):
    assert two.kl < one.kl
    assert two.error < one.error
    assert two.nbytes > one.nbytes


@pytest.mark.parametrize("goal", [{"max_kl": 0.05}, {"max_error": 0.4}])
def test_the_advice_meets_its_goal(ladder, goal):
  found = rank_sweep.advise(ladder, TOKENS, **goal)
  assert found.met
  assert found.value <= next(iter(goal.values()))
  assert found.nbytes == ladders.bytes_of(ladder.shapes, found.ranks)
  assert found.nbytes < ladders.bytes_of(ladder.shapes, 24)
  steps = list(rank_sweep.sweep(ladder, TOKENS, (4, 24)))
  text = rank_sweep.report_advice(found, steps, 0.95, 10**6)
  assert "low-rank: at rank 24" in text


def test_one_limit_is_needed(ladder):
  with pytest.raises(ValueError, match="one limit"):
    rank_sweep.advise(ladder, TOKENS)
  with pytest.raises(ValueError, match="one limit"):
    rank_sweep.advise(ladder, TOKENS, max_kl=0.1, max_error=0.1)
