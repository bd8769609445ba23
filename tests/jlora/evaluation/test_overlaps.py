# SPDX-License-Identifier: Apache-2.0
"""Overlap: between 0 and 1, 1 for equal spans, blind to the gauge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.evaluation.overlaps import overlap
from jlora.loras import Lora, exchange


def draw(seed, rank, n_in=12, n_out=9):
  rng = np.random.default_rng(seed)
  a, b = (rng.standard_normal((rank, n), np.float32) for n in (n_in, n_out))
  return Lora(a, b, np.float32(1))


def expected(left, right):
  """From the dense changes' own singular vectors, pair by pair."""
  u, v = (
    np.linalg.svd(np.float64(x.a).T @ np.float64(x.b))[0][:, : x.rank]
    for x in (left, right)
  )
  return np.array(
    [
      [
        np.sum((u[:, :i].T @ v[:, :j]) ** 2) / min(i, j)
        for j in range(1, right.rank + 1)
      ]
      for i in range(1, left.rank + 1)
    ]
  )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), r=st.integers(1, 5), s=st.integers(1, 5))
def test_it_is_the_papers_figure(seed, r, s):
  left, right = draw(seed, r), draw(seed + 100, s)
  found = overlap(left, right)
  np.testing.assert_allclose(found, expected(left, right), atol=2e-4)
  assert found.min() >= 0
  assert found.max() <= 1 + 1e-5
  np.testing.assert_allclose(overlap(right, left), found.T, atol=2e-4)


def test_equal_spans_overlap_wholly_whatever_the_gauge():
  lora = draw(0, 4)
  g = np.random.default_rng(2).standard_normal((4, 4))
  other = Lora(
    np.float32(np.linalg.inv(g)) @ lora.a,
    np.float32(g.T) @ lora.b,
    lora.scale,
  )
  np.testing.assert_allclose(
    overlap(lora, other), overlap(lora, lora), atol=1e-3
  )
  assert overlap(lora, other)[-1, -1] == pytest.approx(1, abs=1e-4)
  mixed = Lora(lora.a, draw(1, 4).b, lora.scale)  # only the inputs are shared
  assert overlap(lora, mixed)[-1, -1] == pytest.approx(1, abs=1e-4)
  assert overlap(exchange(lora), exchange(mixed))[-1, -1] < 0.9


def test_spans_at_right_angles_do_not_overlap():
  eye = np.eye(8, dtype=np.float32)
  left, right = (
    Lora(eye[at : at + 3], eye[:3, :3], np.float32(1)) for at in (0, 4)
  )
  np.testing.assert_allclose(overlap(left, right), 0, atol=1e-6)


def test_leading_axes_are_kept_and_jax_agrees():
  pairs = [draw(seed, 2) for seed in (0, 1)]
  both = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
  found = jax.jit(overlap)(both, both)
  assert found.shape == (2, 2, 2)
  np.testing.assert_allclose(found[1], overlap(pairs[1], pairs[1]), atol=1e-5)


def test_inputs_must_agree():
  with pytest.raises(ValueError, match="give adapters of one parameter"):
    overlap(draw(0, 2), draw(0, 2, n_in=5))
