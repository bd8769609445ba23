# SPDX-License-Identifier: Apache-2.0
"""LoRA-LEGO: numbers by hand, and what a clustering of units must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora.loras import Lora
from jlora.merging import given_units, lego, prune, truncate
from jlora.merging.adapters.lego import _assigned, _seeds


def change(lora):
  return np.asarray(lora.scale * (lora.a.T @ lora.b))


def draw(seed, rank=4, sizes=(16, 8), scale=1.0):
  rng = np.random.default_rng(seed)
  a, b = (rng.standard_normal((rank, n), np.float32) for n in sizes)
  return Lora(jnp.asarray(a), jnp.asarray(b), jnp.float32(scale))


def rows(lora):
  """Units, in an order of their own."""
  both = np.concatenate([lora.a, lora.b], axis=1)
  return both[np.lexsort(both.T.round(3))]


def test_four_units_by_hand():
  a = jnp.float32([[1, 0], [0.9, 0.1], [0, 1], [0, -1]])
  b = jnp.float32([[2, 0], [1.8, 0.2], [0, 2], [0, 1]])
  lora = Lora(a, b, jnp.float32(1))
  for key in range(3):
    merged = lego(
      [lora], [1.0], rank=2, units=given_units, output=1.0,
      key=jax.random.key(key),
    )  # fmt: skip
    # The second pair writes opposite changes, 2 and -1: a unit of zeros.
    wanted = [[0, 0, 0, 0], [0.951452, 0.050076, 1.902905, 0.100153]]
    np.testing.assert_allclose(rows(merged), wanted, atol=1e-5)


@pytest.mark.parametrize("ranks", [(2, 3), (1, 1, 4)])
def test_all_units_are_the_sum(ranks):
  loras = [draw(i, r, scale=0.5 + i) for i, r in enumerate(ranks)]
  weights = [1.0, -0.5, 2.0][: len(ranks)]
  merged = lego(loras, weights, rank=sum(ranks))
  wanted = sum(w * change(x) for w, x in zip(weights, loras, strict=True))
  np.testing.assert_allclose(change(merged), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output", [None, 0.5])
def test_equal_adapters_are_one_not_n(output):
  lora = draw(0)
  merged = lego([lora] * 3, [1.0] * 3, rank=4, output=output)
  omega = 1.0 if output is None else output
  np.testing.assert_allclose(
    change(merged), omega * change(lora), rtol=1e-4, atol=1e-4
  )


def test_omega_makes_up_for_the_number_of_units():
  lora = draw(0)
  merged = lego([lora] * 3, [1.0] * 3, rank=8)  # four of them are empty
  np.testing.assert_allclose(
    change(merged), (4 / 8) ** 0.5 * change(lora), rtol=1e-4, atol=1e-4
  )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_orthogonal_groups_are_found(seed):
  rng = np.random.default_rng(seed)
  basis = np.linalg.qr(rng.standard_normal((12, 12)))[0].astype(np.float32)
  length = np.float32([3, 2, 1])[:, None]
  one = Lora(length * basis[:3], length * basis[3:6], jnp.float32(1))
  merged = lego(
    [one] * 4, [1.0] * 4, rank=3, key=jax.random.key(seed), output=1.0
  )
  np.testing.assert_allclose(change(merged), change(one), atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_weights_scale_units_and_turn_them(seed):
  loras = [draw(seed), draw(seed + 1)]
  weights = np.float32([2.0, -0.5])
  found = lego(loras, weights, rank=5)
  scaled = [
    Lora(abs(w) ** 0.5 * x.a, np.sign(w) * abs(w) ** 0.5 * x.b, x.scale)
    for w, x in zip(weights, loras, strict=True)
  ]
  again = lego(scaled, [1.0, 1.0], rank=5)
  np.testing.assert_allclose(change(found), change(again), rtol=1e-3, atol=1e-3)


def gauged(lora, seed):
  """The same change of other factors."""
  rng = np.random.default_rng(seed)
  turn = np.linalg.qr(rng.standard_normal((lora.a.shape[0],) * 2))[0]
  turn = turn * rng.uniform(0.5, 2, len(turn))
  a, b = np.float32(turn @ lora.a), np.float32(np.linalg.inv(turn).T @ lora.b)
  return Lora(-a, -b, lora.scale)


def test_only_changes_count_but_with_given_units():
  loras = [draw(0), draw(1)]
  others = [gauged(x, i) for i, x in enumerate(loras)]
  found, again = (lego(x, [1.0, 1.0], rank=4) for x in (loras, others))
  size = np.linalg.norm(change(found))
  assert np.linalg.norm(change(found) - change(again)) < 1e-4 * size
  found, again = (
    lego(x, [1.0, 1.0], rank=4, units=given_units) for x in (loras, others)
  )
  assert np.linalg.norm(change(found) - change(again)) > 0.1 * size


def test_centroids_are_as_long_as_their_units():
  loras = [draw(0), draw(1)]
  merged = lego(loras, [1.0, 1.0], rank=1, units=given_units, output=1.0)
  units = np.concatenate([np.concatenate([x.a, x.b], axis=1) for x in loras])
  mean = np.linalg.norm(units, axis=1).mean()
  np.testing.assert_allclose(np.linalg.norm(rows(merged)), mean, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), is_aligned=st.booleans())
def test_the_sum_of_squares_never_rises(seed, is_aligned):
  rng = np.random.default_rng(seed)
  units = jnp.asarray(rng.standard_normal((20, 6), np.float32))
  inner, there = units @ units.T, jnp.ones(20)
  shares = _seeds(inner, there, 6, jax.random.key(seed), is_aligned)
  before = np.inf
  for _ in range(8):
    shares, spread = _assigned(inner, there, shares, is_aligned)
    assert spread <= before + 1e-4
    before = spread


def test_pruning_loses_more_than_truncating():
  lora = draw(0)
  lost = [
    np.linalg.norm(change(cut(lora, 2)) - change(lora))
    for cut in (truncate, prune)
  ]
  assert lost[0] < lost[1] < np.linalg.norm(change(lora))


def test_a_rank_is_at_most_all_units():
  for rank in (0, 9):
    with pytest.raises(ValueError, match=f"rank {rank} must be 1 to 8"):
      lego([draw(0), draw(1)], [1.0, 1.0], rank=rank)


def test_merge_calls_it():
  adapters = [{"q": draw(i), "k": draw(i + 9)} for i in range(2)]
  merged = jlora.merge(
    adapters, method=jax.tree_util.Partial(lego, rank=4), weights=[1.0, 1.0]
  )
  assert merged["q"].a.shape == (4, 16)
