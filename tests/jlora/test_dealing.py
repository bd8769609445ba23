# SPDX-License-Identifier: Apache-2.0
"""Modules dealt to processes: all of them, once, and near the best."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.dealing import cost_of, deal

costs = st.lists(st.integers(0, 50), max_size=7)
hands = st.integers(1, 4)


@given(st.lists(st.integers(0, 10**12), max_size=60), st.integers(1, 9))
def test_every_item_is_dealt_once(costs, hands):
  dealt = deal(costs, hands)
  assert len(dealt) == hands
  assert sorted(itertools.chain(*dealt)) == list(range(len(costs)))


def largest(costs, dealt):
  return max(sum(costs[item] for item in hand) for hand in dealt)


@settings(max_examples=60, deadline=None)
@given(costs, hands)
def test_the_largest_load_is_near_the_smallest_possible(costs, hands):
  best = min(
    max(
      sum(c for c, at in zip(costs, owners, strict=True) if at == hand)
      for hand in range(hands)
    )
    for owners in itertools.product(range(hands), repeat=len(costs))
  )
  found = largest(costs, deal(costs, hands))
  assert best <= found <= (4 / 3 - 1 / (3 * hands)) * best + 1e-9


def test_the_bound_is_reached():
  """Graham's worst case for two hands: 7/6 of the best."""
  assert largest([3, 3, 2, 2, 2], deal([3, 3, 2, 2, 2], 2)) == 7


def test_ties_go_by_position():
  assert deal([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]


@given(st.permutations(range(5)))
def test_the_loads_do_not_depend_on_the_order(order):
  costs = [9, 7, 4, 3, 1]
  given_so = [costs[at] for at in order]
  assert largest(given_so, deal(given_so, 2)) == largest(costs, deal(costs, 2))


def test_more_hands_than_items_leave_some_empty():
  assert deal([5], 3) == [[0], [], []]


@pytest.mark.parametrize(
  ("costs", "hands", "message"),
  [([1], 0, "a hand"), ([1, -2], 2, "not be negative, got -2")],
)
def test_what_cannot_be_dealt(costs, hands, message):
  with pytest.raises(ValueError, match=message):
    deal(costs, hands)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 512))
def test_what_is_factored_costs_more_than_what_is_read(m, n, rank):
  assert cost_of((m, n), rank) > cost_of((m, n), 0) > 0
  assert cost_of((3, m, n), rank) == 3 * cost_of((m, n), rank)


def test_what_is_no_matrix_has_a_cost():
  assert cost_of((), 0) < cost_of((7,), 0)
