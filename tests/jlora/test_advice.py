# SPDX-License-Identifier: Apache-2.0
"""Advice: the fewest bytes that reach a goal."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.advice import advise, error_of, verdict
from jlora.ranks import budget

RNG = np.random.default_rng(0)
SPECTRA = {
  name: np.sort(RNG.pareto(2, 40))[::-1] * size
  for name, size in (("q", 1.0), ("k", 0.3), ("up", 3.0))
}
UNITS = {"q": 128, "k": 80, "up": 320}
NORMS = {path: float(np.linalg.norm(s)) * 1.05 for path, s in SPECTRA.items()}


def test_the_error_is_that_of_all_changes_together():
  ranks = {"q": 3, "k": 0, "up": 40}
  rest = sum(
    NORMS[p] ** 2 - np.sum(SPECTRA[p][:r] ** 2) for p, r in ranks.items()
  )
  total = sum(norm**2 for norm in NORMS.values())
  found = error_of(SPECTRA, NORMS)(ranks)
  assert found == pytest.approx(math.sqrt(rest / total))


@settings(deadline=None, max_examples=50)
@given(st.floats(0.31, 1.2))
def test_the_goal_is_met_and_clearly_fewer_bytes_miss_it(goal):
  measure = error_of(SPECTRA, NORMS)
  found = advise(SPECTRA, UNITS, measure, goal)
  assert found.met == (found.value <= goal)
  assert found.met
  assert found.value == measure(found.ranks)
  assert found.nbytes == sum(found.ranks[p] * UNITS[p] for p in UNITS)
  fewer = int(found.nbytes * 0.96) - max(UNITS.values())
  if fewer >= min(UNITS.values()):
    assert measure(budget(SPECTRA, UNITS, fewer)) > goal


def test_what_is_reported_is_of_what_had_no_part_in_choosing():
  """The fewest bytes that meet a goal meet it on other data only by luck."""
  measure = error_of(SPECTRA, NORMS)
  asked = []

  def other(ranks):
    asked.append(ranks)
    return "worse"

  found = advise(SPECTRA, UNITS, measure, 0.5, held_out=other)
  assert found.held_out == "worse"
  assert asked == [found.ranks]
  assert found.value == measure(found.ranks)
  assert advise(SPECTRA, UNITS, measure, 0.5).held_out is None


@pytest.mark.parametrize("rest", [0.0, 1e-3, 1e-5, 1e-7])
def test_small_errors_are_told_from_the_residual(rest):
  """In float32 a norm's square less the spectrum's is noise of about 1e-7."""
  spectra = {"q": np.float32([3.0, 1e-4, 1e-6])}
  whole = math.sqrt(9 + 1e-8 + 1e-12 + rest**2)
  measure = error_of(spectra, {"q": np.float32(whole)}, {"q": rest})
  for rank, left in ((3, 0.0), (2, 1e-12), (1, 1e-12 + 1e-8)):
    true = math.sqrt(left + rest**2) / whole
    assert measure({"q": rank}) == pytest.approx(true, rel=1e-5)
  assert measure({"q": 0}) == measure({}) == 1


def test_a_module_without_a_spectrum_is_missing_whole():
  measure = error_of({"q": [3.0]}, {"q": 3.0, "k": 4.0})
  assert measure({"q": 1}) == pytest.approx(0.8)


def test_a_goal_out_of_reach_gives_all_there_is():
  found = advise(SPECTRA, UNITS, error_of(SPECTRA, NORMS), 0.01)
  assert not found.met
  assert set(found.ranks.values()) == {40}


def test_few_measurements_are_made_and_none_twice():
  calls = []

  def measure(ranks):
    calls.append(tuple(ranks.values()))
    return error_of(SPECTRA, NORMS)(ranks)

  found = advise(SPECTRA, UNITS, measure, 0.5)
  assert len(calls) == len(set(calls)) == len(found.tried) <= 12
  assert found.tried == sorted(found.tried)
  with pytest.raises(ValueError, match="must be a number"):
    advise(SPECTRA, UNITS, measure, math.nan)


def test_verdicts_say_what_is_and_what_it_costs():
  assert verdict(64, 0.99, 0.95, 2**20, 2**30, True).startswith(
    "This finetune is low-rank: at rank 64 the adapter keeps 99.0%"
  )
  assert "not reached" in verdict(8, 0.4, 0.95, 2**20, 2**30, False)
  text = verdict(8, 0.4, 0.95, 2**20, 2**30, True, "an error of 0.5")
  assert text.endswith("; an error of 0.5 needs 1.0 MiB, 0.1% of the model.")
