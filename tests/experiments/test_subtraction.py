# SPDX-License-Identifier: Apache-2.0
"""bfloat16 subtraction is exact where little changed, and else it is not."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.subtraction import (
  as_table,
  effect_table,
  measure_effect,
  measure_matrix,
  measure_pair,
)
from jlora.checkpoints import write_safetensors
from tests.experiments.test_equal_bytes import draw, model

BF16 = ml_dtypes.bfloat16


@given(st.floats(1e-3, 1e3), st.floats(0.5, 2.0))
def test_within_a_factor_of_two_it_is_exact(weight, factor):
  base = np.array([weight], np.float32).astype(BF16)
  tuned = (base.astype(np.float32) * np.float32(factor)).astype(BF16)
  wide = tuned.astype(np.float64), base.astype(np.float64)
  if not 0.5 <= wide[0] / wide[1] <= 2:
    return
  found = measure_matrix(base.astype(np.float32), tuned.astype(np.float32))
  assert found["inexact"] == 0
  assert found["storage"] == 0


def test_each_part_is_counted():
  base = np.array([[1.0, 1.0, 1.001]], np.float32)
  tuned = np.array([[1.0, -3.015625, 1.001]], np.float32)
  found = measure_matrix(base, tuned)
  assert found["size"] == 3
  assert found["inexact"] == 1
  # -4.015625 rounds to -4.03125 or -4: half an ulp of 2^-5 each way.
  assert found["tool"] == pytest.approx(0.015625**2)
  assert found["change"] == pytest.approx(4.015625**2)


def test_types_add_up(tmp_path):
  rng = np.random.default_rng(0)
  base = {
    f"layers.{i}.{name}.weight": rng.standard_normal((8, 8), np.float32)
    for i in range(2)
    for name in ("q_proj", "up_proj")
  }
  tuned = {name: w + np.float32(0.3) for name, w in base.items()}
  sides = []
  for side, tensors in (("base", base), ("tuned", tuned)):
    sides.append(str(tmp_path / f"{side}.safetensors"))
    write_safetensors(sides[-1], tensors)
  groups = measure_pair(*sides)
  assert list(groups) == ["q_proj", "up_proj", "all"]
  for key in groups["all"]:
    both = groups["q_proj"][key] + groups["up_proj"][key]
    assert groups["all"][key] == pytest.approx(both)
  assert as_table(groups).count("\n") == 4


def test_truncation_takes_off_rounding_that_the_effect_hardly_feels():
  """A change of rank 2 that is no larger than the rounding of both files."""
  rng = np.random.default_rng(0)

  def changed(x):
    left, right = (rng.standard_normal((2, side)) for side in x.shape)
    return x + np.float32(1e-3 * left.T @ right)

  base = draw(0)
  tuned = jax.tree.map(changed, base)
  tokens = rng.integers(0, 20, (4, 8)).astype(np.int32)
  rows = measure_effect(model, base, tuned, tokens, 2)
  nothing, rounded, whole, cut, true = rows
  assert (nothing["error"], nothing["kept"]) == (1, 0)
  assert true["error"] < 1e-3 < cut["error"] < rounded["error"]
  assert whole["error"] == pytest.approx(rounded["error"], rel=1e-3)
  lost2 = cut2 = whole2 = 0.0
  trees = map(jax.tree.leaves, (base, tuned))
  for left, right in zip(*trees, strict=True):
    stored = np.float64(right.astype(BF16)) - np.float64(left.astype(BF16))
    lost2 += np.sum((np.float64(right) - left - stored) ** 2)
    u, s, vt = np.linalg.svd(stored, full_matrices=False)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    cut2 += np.sum((np.float64(right) - left - best) ** 2)
    whole2 += np.sum((np.float64(right) - left) ** 2)
  assert cut["error"] == pytest.approx((cut2 / whole2) ** 0.5, rel=1e-3)
  assert rounded["error"] == pytest.approx((lost2 / whole2) ** 0.5, rel=1e-4)
  assert effect_table(rows).count("\n") == 6
