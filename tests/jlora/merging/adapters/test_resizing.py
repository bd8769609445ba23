# SPDX-License-Identifier: Apache-2.0
"""Resized and joined adapters against dense matrices and NumPy's SVD."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora import ranks
from jlora.loras import Lora
from jlora.merging import Joined, resize, spectra_of
from tests.helpers.image_adapters import draw, product

SPECTRA = {
  "rank 1": np.r_[1.0, np.full(31, 1e-4)],
  "power law": np.arange(1, 33.0) ** -1.0,
  "flat": np.ones(32),
  "two values": np.array([1.0, 0.1]),
}
POLICIES = {
  "norm": (ranks.norm, 0.9, (1, 3, 26, 1)),
  "sum": (ranks.total, 0.9, (1, 22, 29, 1)),
  "ratio": (ranks.ratio, 10, (1, 9, 32, 1)),
  "threshold": (ranks.above, 0.3, (1, 3, 32, 1)),
  "quantile": (ranks.above_quantile, 0.5, (1, 16, 0, 1)),
}


def of_spectrum(sigma, n_in=40, n_out=36, seed=0):
  """A Lora with these singular values, unbalanced and scaled."""
  rng = np.random.default_rng(seed)
  u, v = (
    np.linalg.qr(rng.standard_normal((n, len(sigma))))[0] for n in (n_in, n_out)
  )
  mix = np.linalg.qr(rng.standard_normal((len(sigma), len(sigma))))[0]
  a, b = mix.T @ u.T * 7, mix.T @ (sigma[:, None] * v.T) / 3.5
  return Lora(a.astype("f4"), b.astype("f4"), np.float32(0.5))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("at", range(4), ids=list(SPECTRA))
def test_policies_give_the_exact_rank(policy, at):
  rule, value, wanted = POLICIES[policy]
  name = list(SPECTRA)[at]
  assert rule({name: SPECTRA[name]}, value) == {name: wanted[at]}


def test_no_rank_is_one_too_large():
  """As kohya's script gave for years."""
  exact = of_spectrum(np.array([3.0, 2.0, 1.0]))
  rule = functools.partial(ranks.norm, share=0.999999)
  small, rows, error = resize({"x": exact}, rule)
  assert rows["x"] == (3, 3, 1.0)
  assert error == 0.0
  _, rows, _ = resize({"x": exact}, functools.partial(ranks.ratio, divisor=2))
  assert rows["x"].new == 2
  assert small["x"].rank == 3


def test_singular_values_are_those_of_the_product():
  loras = draw({"x": (20, 30), "y": (4, 5, 3, 3), "z": (2, 9)}, ranks=(4, 7))
  for path, found in spectra_of(loras).items():
    dense = np.linalg.svd(product(loras[path]), compute_uv=False)
    np.testing.assert_allclose(found, dense[: len(found)], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 5])
def test_resized_is_the_best_of_that_rank(name, rank):
  lora = of_spectrum(SPECTRA[name])
  small, rows, error = resize({"x": lora}, lambda s: ranks.fixed(s, rank))
  u, s, vt = np.linalg.svd(product(lora))
  best = (u[:, :rank] * s[:rank]) @ vt[:rank]
  lost = np.linalg.norm(product(small["x"]) - product(lora))
  assert lost <= np.linalg.norm(best - product(lora)) * 1.0001 + 1e-6
  whole = np.linalg.norm(s)
  assert error == pytest.approx(lost / whole, abs=1e-5)
  assert rows["x"].kept == pytest.approx(
    np.linalg.norm(s[:rank]) / whole, abs=1e-5
  )
  assert small["x"].a.dtype == np.float32


def test_limits_hold_and_a_change_keeps_rank_1():
  loras = {"x": of_spectrum(SPECTRA["flat"]), "y": of_spectrum(np.ones(4))}
  loras["zero"] = Lora(
    np.ones((2, 3), "f4"), np.zeros((2, 3), "f4"), np.float32(1)
  )
  _, rows, _ = resize(loras, lambda s: dict.fromkeys(s, 0), most=2)
  assert [row.new for row in rows.values()] == [1, 1, 0]
  whole = functools.partial(ranks.norm, share=1.0)
  small, rows, _ = resize(loras, whole, most={"x": 9})
  assert [row.new for row in rows.values()] == [9, 4, 0]
  assert small["zero"].rank == 0
  with pytest.raises(ValueError, match="ranks must be at least 1, got x: 0"):
    resize(loras, whole, most={"x": 0})


def test_what_is_not_finite_is_told():
  lora = Lora(
    np.full((1, 2), np.nan, "f4"), np.ones((1, 2), "f4"), np.float32(1)
  )
  with pytest.raises(ValueError, match="1 Loras have factors .* not finite: x"):
    spectra_of({"x": lora})


@given(
  st.lists(st.floats(0.01, 5), min_size=1, max_size=6),
  st.floats(0.05, 1),
)
@settings(max_examples=25, deadline=None)
def test_shares_are_kept_and_no_smaller_rank_would_do(values, share):
  sigma = np.sort(np.array(values))[::-1]
  for rule, power in ((ranks.norm, 2), (ranks.total, 1)):
    rank = rule({"x": sigma}, share)["x"]
    held = np.cumsum(sigma**power) ** (1 / power)
    assert rank >= 1
    assert held[rank - 1] >= share * held[-1] * (1 - 1e-12)
    if rank > 1:
      assert held[rank - 2] < share * held[-1] * (1 + 1e-12)


def test_joined_is_the_exact_weighted_sum():
  shapes = {"x": (6, 9), "y": (5, 9)}
  one, two = draw(shapes), draw({"x": (6, 9)}, ranks=(3,), seed=1, scale=2.0)
  whole = Joined([one, two], [0.5, -2.0])
  assert [lora.rank for lora in whole.values()] == [5, 3]
  want = 0.5 * product(one["x"]) - 2 * product(two["x"])
  np.testing.assert_allclose(product(whole["x"]), want, atol=1e-5)
  cut = Joined([one, two], [0.5, -2.0], rank=2)["x"]
  u, s, vt = np.linalg.svd(want)
  best = (u[:, :2] * s[:2]) @ vt[:2]
  np.testing.assert_allclose(product(cut), best, atol=1e-4)
  with pytest.raises(
    ValueError, match="2 adapters need as many weights, got 1"
  ):
    Joined([one, two], [1.0])
  assert "z" not in dict(whole)


@pytest.mark.parametrize("rule", [ranks.norm, ranks.total])
@pytest.mark.parametrize("share", [0, 1.1, np.nan])
def test_shares_outside_are_refused(rule, share):
  with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
    rule({"x": [1.0]}, share)


def test_other_numbers_outside_are_refused():
  with pytest.raises(ValueError, match="least must be 0 or more, got -1"):
    ranks.above({"x": [1.0]}, -1)
  with pytest.raises(ValueError, match=r"q must be in \[0, 1\), got 1"):
    ranks.above_quantile({"x": [1.0]}, 1)
