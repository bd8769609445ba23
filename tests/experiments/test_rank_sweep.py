# SPDX-License-Identifier: Apache-2.0
"""The sweep falls with the rank, and the advice meets its goal."""

import jax
import numpy as np
import pytest

import jlora
from experiments import rank_sweep
from experiments.lib.adapters import error_controls, ladders
from experiments.lib.data import texts
from jlora.ranks import error_of
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


def test_the_outcome_is_reported_of_other_rows(ladder):
  other = np.random.default_rng(4).integers(0, 20, (4, 8)).astype(np.int32)
  found = rank_sweep.advise(ladder, TOKENS, max_kl=0.05, held_out=other)
  again = rank_sweep.divergence(ladder, found.ranks, other)
  assert found.held_out == again
  assert found.held_out.kl != found.value
  steps = list(rank_sweep.sweep(ladder, other, (4, 24)))
  nothing = dict.fromkeys(ladder.loras, 0)
  alone = rank_sweep.divergence(ladder, nothing, TOKENS).kl
  text = rank_sweep.report_advice(found, steps, 0.95, 10**6, alone)
  assert f"chosen with it keeps {1 - found.value / alone:.2%}" in text
  assert f"{1 - again.kl / steps[0].kl:.2%} ({again.kl:.5f} ±" in text


def test_rows_to_choose_with_and_to_report_of_are_apart():
  text = "".join(chr(c) for c in range(97, 97 + 24))
  first, second = texts.excerpts_apart(
    text, texts.encode_bytes, rows=3, length=3
  )
  whole = texts.excerpts(text, texts.encode_bytes, rows=3, length=3)
  np.testing.assert_array_equal(first, whole)
  assert first.shape == second.shape == (3, 4)
  assert len(np.unique([first, second])) == 24
  with pytest.raises(ValueError, match="do not fit"):
    texts.excerpts_apart(text, texts.encode_bytes, rows=3, length=4)


def test_errors_are_those_of_the_residual():
  """Of large matrices, and where next to nothing is missing."""
  rng = np.random.default_rng(0)
  base = {"w": rng.standard_normal((4096, 4096), np.float32)}
  left, right = (rng.standard_normal((2, 4096), np.float32) for _ in range(2))
  small = {"w": base["w"] * 0 + left.T @ right}
  pair = ladders.build_ladder(None, {"w": base["w"] * 0}, small, 3)
  measure = error_of(pair.spectra, pair.norms, pair.rests)
  assert 0 < measure({"w": 3}) < 1e-6  # and not the 3e-4 of the squares
  full = ladders.build_ladder(None, {"w": base["w"] * 0}, base, 1)
  exact = np.sqrt(np.sum(np.square(base["w"], dtype=np.float64)))
  assert full.norms["w"] == pytest.approx(exact, rel=1e-6)
  u = full.loras["w"]
  rest = base["w"].astype(np.float64) - jlora.loras.dense(u)
  found = error_of(full.spectra, full.norms, full.rests)({"w": 1})
  assert found == pytest.approx(np.sqrt(np.sum(rest**2)) / exact, rel=1e-6)


def test_controls_miss_as_much_as_truncation(ladder):
  held = {"a": TOKENS}
  found = list(error_controls.measure_controls(ladder, held, 4, (0, 1)))
  assert [one.way.split(" ")[0] for one in found] == [
    "truncated", "all", "each", "finetune", "finetune",
  ]  # fmt: skip
  ranks = dict.fromkeys(ladder.loras, 4)
  wanted = error_of(ladder.spectra, ladder.norms, ladder.rests)(ranks)
  for one in found:
    assert one.error == pytest.approx(wanted, rel=1e-4)
  truth = rank_sweep.divergence(ladder, ranks, TOKENS)
  assert found[0].kl["a"] == pytest.approx((truth.kl, truth.kl_error), rel=1e-4)
  assert found[3].kl != found[4].kl  # the seeds
  assert error_controls.as_table(found, ["a"]).count("\n") == 6


def test_each_module_misses_its_own_share(ladder):
  missing = error_controls.module_errors(ladder, 4)
  ways = dict(error_controls.alike(ladder, 4, [0]))
  for way in ("truncated to rank 4", "each module smaller",
              "finetune and noise, seed 0"):  # fmt: skip
    params, tuned = map(jlora.paths.flatten, (ways[way], ladder.finetuned))
    for path, norm in missing.items():
      gap = np.linalg.norm(np.float64(params[path]) - tuned[path])
      assert gap == pytest.approx(norm, rel=1e-4)


def test_one_limit_is_needed(ladder):
  with pytest.raises(ValueError, match="one limit"):
    rank_sweep.advise(ladder, TOKENS)
  with pytest.raises(ValueError, match="one limit"):
    rank_sweep.advise(ladder, TOKENS, max_kl=0.1, max_error=0.1)
