# SPDX-License-Identifier: Apache-2.0
"""Rank policies against worked numbers, definitions and brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora import ranks
from jlora.ranks import advise, budget, error_of, verdict

WORKED = {"q": np.array([4.0, 2.0, 1.0, 0.5])}
NORMS = {"q": math.sqrt(21.25)}

values = st.integers(0, 40).map(lambda k: k / 8)
spectrum = st.lists(values, min_size=1, max_size=4).map(
  lambda s: np.array(sorted(s, reverse=True))
)
some_spectra = st.dictionaries(st.sampled_from("qkvo"), spectrum, min_size=1)


@pytest.mark.parametrize(
  ("share", "rank"), [(0.75, 1), (0.9, 2), (0.95, 3), (0.99, 4), (1.0, 4)]
)
def test_energy_on_worked_numbers(share, rank):
  assert ranks.energy(WORKED, NORMS, share) == {"q": rank}


@pytest.mark.parametrize(("divisor", "rank"), [(3, 2), (4, 2), (9, 4)])
def test_ratio_on_worked_numbers(divisor, rank):
  assert ranks.ratio(WORKED, divisor) == {"q": rank}


def test_energy_counts_what_the_cap_cut_off():
  """Only the norm knows of it: the rest of the spectrum is not given."""
  head = {"q": WORKED["q"][:2]}
  assert ranks.energy(head, NORMS, 0.94) == {"q": 2}
  assert ranks.energy(head, NORMS, 0.99) == {"q": 2}
  assert ranks.energy(head, {"q": math.sqrt(20)}, 0.79) == {"q": 1}


@given(some_spectra, st.floats(0.01, 1))
def test_energy_is_the_smallest_sufficient_rank(spectra, share):
  norms = {path: 1.25 * np.linalg.norm(s) for path, s in spectra.items()}
  for path, rank in ranks.energy(spectra, norms, share).items():
    s, wanted = spectra[path], share * norms[path] ** 2
    assert rank == len(s) or np.sum(s[:rank] ** 2) >= wanted
    assert rank == 0 or np.sum(s[: rank - 1] ** 2) < wanted


def test_fixed_clips_and_takes_a_rank_for_each():
  spectra = {"q": np.ones(2), "k": np.ones((3, 5)), "v": np.zeros(4)}
  assert ranks.fixed(spectra, 3) == {"q": 2, "k": 3, "v": 3}
  each = {"v": 0, "k": 9, "q": np.int64(1)}
  assert ranks.fixed(spectra, each) == {"q": 1, "k": 5, "v": 0}


def test_a_zero_delta_gets_no_rank():
  spectra = {"q": np.zeros(4)}
  assert ranks.energy(spectra, {"q": 0.0}, 0.9) == {"q": 0}
  assert ranks.ratio(spectra, 10) == {"q": 0}
  assert ranks.above_floor(spectra, {"q": 0.0}) == {"q": 0}
  assert ranks.budget(spectra, {"q": 8}, 0) == {"q": 0}


def test_experts_share_one_rank_by_root_sum_of_squares():
  stacked = np.array([[3.0, 0.6, 0.0], [4.0, 0.8, 0.0]])  # together 5, 1, 0
  spectra = {"e": stacked, "f": stacked.reshape(2, 1, 3)}
  norms = {"e": np.array([3.2, 4.4]), "f": math.hypot(3.2, 4.4)}
  assert ranks.ratio(spectra, 4) == {"e": 1, "f": 1}
  assert ranks.ratio(spectra, 6) == {"e": 2, "f": 2}
  assert ranks.energy(spectra, norms, 25 / 29.6 - 1e-6) == {"e": 1, "f": 1}
  assert ranks.energy(spectra, norms, 25 / 29.6 + 1e-6) == {"e": 2, "f": 2}
  # A floor of 0.7 for each of two matrices is 0.99 for both, 0.72 is 1.02.
  below = {"e": 0.7, "f": np.array([[0.7], [0.7]])}
  above = {"e": 0.72, "f": np.array([[0.72], [0.72]])}
  assert ranks.above_floor(spectra, below) == {"e": 2, "f": 2}
  assert ranks.above_floor(spectra, above) == {"e": 1, "f": 1}


def test_noise_floor_separates_signal_from_rounding():
  rng = np.random.default_rng(0)
  m, n, std = 160, 96, 1e-3
  noise = std * rng.standard_normal((m, n))
  u = np.linalg.qr(rng.standard_normal((m, 3)))[0]
  v = np.linalg.qr(rng.standard_normal((n, 3)))[0]
  floor = std * (m**0.5 + n**0.5)  # as `summarise` has it
  top = np.linalg.norm(noise, 2)
  assert 0.9 * floor < top < 1.05 * floor
  spectra = {
    "noise": np.linalg.svd(noise, compute_uv=False)[1:],
    "signal": np.linalg.svd(noise + 3 * floor * u @ v.T, compute_uv=False),
  }
  floors = dict.fromkeys(spectra, floor)
  assert ranks.above_floor(spectra, floors) == {"noise": 0, "signal": 3}


def test_above_floor_is_strict():
  assert ranks.above_floor(WORKED, {"q": 1.0}) == {"q": 2}


def lost(spectra, allocation):
  return sum(np.sum(s[allocation[p] :] ** 2) for p, s in spectra.items())


def spent(costs, allocation):
  return sum(costs[path] * rank for path, rank in allocation.items())


def allocations(spectra, costs, most):
  """Every allocation of at most so many bytes."""
  choices = [range(len(s) + 1) for s in spectra.values()]
  for choice in itertools.product(*choices):
    allocation = dict(zip(spectra, choice, strict=True))
    if spent(costs, allocation) <= most:
      yield allocation


@settings(deadline=None)
@given(some_spectra, st.integers(1, 9), st.integers(0, 60))
def test_budget_is_optimal_at_equal_costs(spectra, cost, extra):
  costs = dict.fromkeys(spectra, cost)
  most = cost + extra
  bought = ranks.budget(spectra, costs, most)
  assert spent(costs, bought) <= most
  best = min(lost(spectra, a) for a in allocations(spectra, costs, most))
  assert lost(spectra, bought) == pytest.approx(best, abs=1e-12)


@settings(deadline=None)
@given(some_spectra, st.data())
def test_budget_is_optimal_up_to_the_first_unit_that_did_not_fit(spectra, data):
  costs = {path: data.draw(st.integers(1, 9)) for path in spectra}
  most = data.draw(st.integers(max(costs.values()), 60))
  bought = ranks.budget(spectra, costs, most)
  assert spent(costs, bought) <= most

  # The same greedy, one unit at a time, up to the first that does not fit.
  prefix, refused = dict.fromkeys(spectra, 0), None
  while refused is None:
    open_ = {p: s[prefix[p]] for p, s in spectra.items() if prefix[p] < len(s)}
    open_ = {path: sigma for path, sigma in open_.items() if sigma > 0}
    if not open_:
      break
    path = max(open_, key=lambda p: open_[p] ** 2 / costs[p])
    if spent(costs, prefix) + costs[path] > most:
      refused = open_[path] ** 2
    else:
      prefix[path] += 1

  # No allocation of the bytes spent so far has a lower error ...
  bytes_then = spent(costs, prefix)
  best_then = min(
    lost(spectra, a) for a in allocations(spectra, costs, bytes_then)
  )
  assert lost(spectra, prefix) == pytest.approx(best_then, abs=1e-9)
  # ... filling up keeps all of it, and what is missed is under one unit.
  assert lost(spectra, bought) <= best_then + 1e-9
  best = min(lost(spectra, a) for a in allocations(spectra, costs, most))
  assert lost(spectra, bought) <= best + (refused or 0) + 1e-9
  # Nothing that would help is left that fits.
  left = most - spent(costs, bought)
  for path, s in spectra.items():
    rest = s[bought[path] :]
    assert rest.size == 0 or rest[0] == 0 or costs[path] > left


def test_budget_fills_up_with_smaller_units():
  spectra = {"big": np.array([10.0, 9.0]), "small": np.array([1.0, 0.5, 0.0])}
  costs = {"big": 100, "small": 10}
  assert ranks.budget(spectra, costs, 130) == {"big": 1, "small": 2}


def test_budget_weighs_a_batch_once():
  """The bytes of a stack are those of all its matrices, given as such."""
  spectra = {"e": np.array([[3.0, 2.0], [4.0, 2.0]]), "q": np.array([4.9, 3.0])}
  assert ranks.budget(spectra, {"e": 8, "q": 8}, 8) == {"e": 1, "q": 0}
  assert ranks.budget(spectra, {"e": 16, "q": 8}, 16) == {"e": 0, "q": 2}


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: ranks.fixed(WORKED, -1), "q: -1"),
    (lambda: ranks.fixed(WORKED, {"q": 2.5}), "whole numbers, got q: 2.5"),
    (lambda: ranks.fixed(WORKED, {"k": 1}), "only in spectra: q.*rank: k"),
    (lambda: ranks.fixed(WORKED, {}), "only in spectra: q"),
    (lambda: ranks.energy(WORKED, NORMS, 0.0), "share must be in"),
    (lambda: ranks.energy(WORKED, NORMS, 1.1), "share must be in"),
    (lambda: ranks.energy(WORKED, NORMS, math.nan), "share must be in"),
    (lambda: ranks.energy(WORKED, {}, 0.5), "only in spectra: q"),
    (lambda: ranks.energy(WORKED, {"q": math.nan}, 0.5), "norms .* q: nan"),
    (lambda: ranks.ratio(WORKED, 1), "divisor must be above 1"),
    (lambda: ranks.above_floor(WORKED, {"q": -1.0}), "floors .* q: -1"),
    (lambda: ranks.budget(WORKED, {"q": 24}, 23), "smallest, of q, takes 24"),
    (lambda: ranks.budget(WORKED, {"q": 0}, 23), "1 or more, got q: 0"),
    (lambda: ranks.ratio({"q": np.array([1.0, 2.0])}, 2), r"q \(2,\)"),
    (lambda: ranks.ratio({"q": np.array([math.nan])}, 2), r"q \(1,\)"),
    (lambda: ranks.ratio({"q": np.array([1.0, -1.0])}, 2), r"q \(2,\)"),
    (lambda: ranks.ratio({"q": np.float64(1)}, 2), r"q \(\)"),
  ],
)
def test_refusals_name_the_offender(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_budget_names_the_smallest_unit_that_would_help():
  spectra = {"q": np.ones(2), "k": np.ones(2), "zero": np.zeros(2)}
  with pytest.raises(ValueError, match="of k, takes 20 bytes"):
    ranks.budget(spectra, {"q": 30, "k": 20, "zero": 1}, 10)


RNG = np.random.default_rng(0)
SPECTRA = {
  name: np.sort(RNG.pareto(2, 40))[::-1] * size
  for name, size in (("q", 1.0), ("k", 0.3), ("up", 3.0))
}
UNITS = {"q": 128, "k": 80, "up": 320}
CHANGES = {path: float(np.linalg.norm(s)) * 1.05 for path, s in SPECTRA.items()}


def test_the_error_is_that_of_all_changes_together():
  ranks = {"q": 3, "k": 0, "up": 40}
  rest = sum(
    CHANGES[p] ** 2 - np.sum(SPECTRA[p][:r] ** 2) for p, r in ranks.items()
  )
  total = sum(norm**2 for norm in CHANGES.values())
  found = error_of(SPECTRA, CHANGES)(ranks)
  assert found == pytest.approx(math.sqrt(rest / total))


@settings(deadline=None, max_examples=50)
@given(st.floats(0.31, 1.2))
def test_the_goal_is_met_and_clearly_fewer_bytes_miss_it(goal):
  measure = error_of(SPECTRA, CHANGES)
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
  measure = error_of(SPECTRA, CHANGES)
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
  found = advise(SPECTRA, UNITS, error_of(SPECTRA, CHANGES), 0.01)
  assert not found.met
  assert set(found.ranks.values()) == {40}


def test_few_measurements_are_made_and_none_twice():
  calls = []

  def measure(ranks):
    calls.append(tuple(ranks.values()))
    return error_of(SPECTRA, CHANGES)(ranks)

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


def test_norm_counts_no_zeros_where_all_is_kept():
  # The square of a rounded root is more than the sum that it is the root of.
  for first, second in ((4.94, 4.62), (7.36, 0.03), (2.77, 1.18)):
    assert ranks.norm({"q": [first, second, 0.0, 0.0]}, 1.0) == {"q": 2}
