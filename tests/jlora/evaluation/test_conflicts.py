# SPDX-License-Identifier: Apache-2.0
"""Conflicts of adapters: dense definitions, the gauge, random levels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.evaluation.conflicts import (
  column_cosine,
  compare_adapters,
  compare_signs,
  cosine,
  find_intruders,
)
from jlora.evaluation.overlaps import compare_layers, compare_reads, link_layers
from jlora.loras import Lora, exchange

EYE = np.eye(6, dtype=np.float32)


def draw(seed, rank=3, n_in=12, n_out=9, scale=0.5):
  rng = np.random.default_rng(seed)
  a, b = (rng.standard_normal((rank, n), np.float32) for n in (n_in, n_out))
  return Lora(a, b, np.float32(scale))


def full(lora):
  return np.float64(lora.scale) * np.float64(lora.a).T @ np.float64(lora.b)


def turned(lora, seed):
  """The same change by other factors."""
  g = np.random.default_rng(seed).standard_normal((lora.rank, lora.rank))
  g += 3 * np.eye(lora.rank)
  a = np.linalg.inv(g).T @ lora.a
  return Lora(np.float32(a), np.float32(g @ lora.b), lora.scale)


pairs = given(seed=st.integers(0, 99), r=st.integers(1, 5), s=st.integers(1, 5))


@settings(max_examples=20, deadline=None)
@pairs
def test_cosines_and_signs_are_those_of_the_dense_changes(seed, r, s):
  left, right = draw(seed, r), draw(seed + 100, s, scale=-2)
  x, y = full(left), full(right)
  assert cosine(left, right) == pytest.approx(
    np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6
  )
  rows = (
    np.sum(x * y, 1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
  )
  assert column_cosine(left, right) == pytest.approx(rows.mean(), abs=1e-5)
  signs = compare_signs(left, right)
  assert signs.everywhere == pytest.approx(np.mean(x * y < 0), abs=1e-3)
  large = (abs(x) >= np.quantile(abs(x), 0.8)) & (
    abs(y) >= np.quantile(abs(y), 0.8)
  )
  assert signs.both_large == pytest.approx(large.mean(), abs=0.02)


@settings(max_examples=20, deadline=None)
@pairs
def test_no_figure_knows_the_factors(seed, r, s):
  left, right = draw(seed, r), draw(seed + 100, s)
  rows = [
    compare_adapters({"w": one}, {"w": two})["w"]
    for one, two in (
      (left, right), (turned(left, 1), turned(right, 2)), (right, left)
    )
  ]  # fmt: skip
  for name, value in rows[0].items():
    for other in rows[1:]:
      np.testing.assert_allclose(other[name], value, atol=2e-3, err_msg=name)


def test_the_specs_numbers():
  one = Lora(EYE[:2, :3], np.diag([1, 2]).astype(np.float32), np.float32(1))
  a = np.float32([[1, 0, 0], [0, 0.5, 0.75**0.5]])
  two = Lora(a, EYE[:2, :2], np.float32(1))
  found = compare_reads(one, two)
  assert found.overlap == pytest.approx(0.625, abs=1e-6)
  np.testing.assert_allclose(found.angles, [0, 60], atol=1e-4)
  assert found.level == pytest.approx(2 / 3)
  assert cosine(one, two) == pytest.approx(0.632456, abs=1e-6)
  # ZipLoRA's columns; there a weight is (out, in).
  dc, ds = np.float32([[1, 2], [0, 1]]), np.float32([[1, 0], [1, 1]])
  pair = [Lora(EYE[:2, :2], d.T.copy(), np.float32(1)) for d in (dc, ds)]
  assert column_cosine(*pair) == pytest.approx((0.707107 + 0.447214) / 2)


def test_random_spans_overlap_by_the_level():
  overlaps = [
    compare_reads(draw(i, 4, 64), draw(i + 50, 4, 64)).overlap
    for i in range(40)
  ]
  assert np.mean(overlaps) == pytest.approx(4 / 64, rel=0.2)
  signs = compare_signs(draw(0, 8, 200, 100), draw(1, 8, 200, 100))
  assert signs.everywhere == pytest.approx(0.5, abs=0.05)


def test_equal_and_opposite_changes():
  lora = draw(0)
  row = compare_adapters({"w": lora}, {"w": lora})["w"]
  assert row["cosine"] == pytest.approx(1)
  assert row["sign_conflict"] == 0
  assert row["read_overlap"] == pytest.approx(1)
  np.testing.assert_allclose(row["write_angles"], 0, atol=1e-3)
  against = Lora(lora.a, lora.b, -lora.scale)
  assert cosine(lora, against) == pytest.approx(-1)
  assert column_cosine(lora, against) == pytest.approx(-1)
  assert compare_signs(lora, against).everywhere == 1


def test_blocks_and_samples_change_nothing(monkeypatch):
  pair = draw(0, 3, 300, 40), draw(1, 3, 300, 40)
  whole = compare_signs(*pair)
  monkeypatch.setattr("jlora.evaluation.conflicts._BLOCK", 1000)
  assert compare_signs(*pair) == whole
  monkeypatch.setattr("jlora.evaluation.conflicts._SAMPLE", 2000)
  assert compare_signs(*pair).large == pytest.approx(whole.large, abs=0.05)


def test_what_is_zero_has_no_direction():
  nothing = Lora(np.zeros((3, 12)), np.ones((3, 9)), np.float32(1))
  row = compare_adapters({"w": nothing}, {"w": draw(0)})["w"]
  for name in ("cosine", "column_cosine", "sign_conflict", "read_overlap"):
    assert np.isnan(row[name])
  assert row["write_angles"] == []
  off = Lora(draw(1).a, draw(1).b, np.float32(0))
  assert np.isnan(compare_reads(off, draw(0)).overlap)
  # A unit of no strength is no direction either.
  padded = Lora(
    np.concatenate([draw(0).a, np.ones((2, 12))]).astype(np.float32),
    np.concatenate([draw(0).b, np.zeros((2, 9))]).astype(np.float32),
    np.float32(1),
  )
  assert len(compare_reads(padded, padded).angles) == 3


def test_layers_are_linked_and_compared():
  writer = Lora(EYE[:2], EYE[2:4], np.float32(1))
  reader = Lora(EYE[3:5], EYE[:2], np.float32(1))
  second = {"h/0/o": writer, "h/1/o": writer}
  first = {"h/0/q": writer, "h/1/q": reader}
  links = link_layers([*second, *first], r"h/(\d+)/o", r"h/(\d+)/q")
  assert links == [("h/0/o", "h/1/q")]
  found = compare_layers(first, second, links)[links[0]]
  assert found.overlap == pytest.approx(0.5)
  assert found.level == pytest.approx(1 / 3)
  own = link_layers([*second, *first], r"h/(\d+)/o", r"h/(\d+)/q", ahead=0)
  assert len(own) == 2
  with pytest.raises(ValueError, match="None of 4 modules"):
    link_layers([*second, *first], r"h/(\d+)/o", r"h/(\d+)/q", ahead=2)
  with pytest.raises(ValueError, match="1 modules are not there: h/9/q of the"):
    compare_layers(first, second, [("h/0/o", "h/9/q")])


@pytest.mark.parametrize(("c", "most"), [(1, None), (10, 0.497), (100, 0.269)])
def test_intruders_of_the_specs_case(c, most):
  w = np.diag(np.arange(16.0, 0, -1))
  lora = Lora(np.ones((1, 16)), np.ones((1, 16)), np.float32(c / 16))
  for one, base in ((lora, w), (exchange(lora), w.T)):
    found = find_intruders(base, one)
    assert len(found) == (most is not None)
    if most:
      np.testing.assert_allclose(found, [[0, most]], atol=1e-3)


def test_what_cannot_be_compared_is_refused():
  with pytest.raises(ValueError, match="not of one parameter"):
    cosine(draw(0), draw(0, n_out=8))
  with pytest.raises(ValueError, match="Spaces differ"):
    compare_reads(draw(0), draw(0, n_in=8))
  with pytest.raises(ValueError, match="no module in common: w; and v"):
    compare_adapters({"w": draw(0)}, {"v": draw(0)})
  stack = Lora(np.ones((2, 1, 3)), np.ones((2, 1, 3)), np.ones(2))
  with pytest.raises(ValueError, match="is a stack"):
    cosine(stack, stack)
  with pytest.raises(ValueError, match="is no base of"):
    find_intruders(np.ones((3, 3)), draw(0))
