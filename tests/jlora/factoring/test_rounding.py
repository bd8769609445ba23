# SPDX-License-Identifier: Apache-2.0
"""What was learnt, estimated from rounded pairs whose updates are known."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.factoring.rounding import learnt_of, ulp_histogram

SIDE = 512
BF16 = ml_dtypes.bfloat16
#: Updates of unit mean square: (shape, rng) -> float64.
UPDATES = {
  "normal": lambda shape, rng: rng.standard_normal(shape),
  "laplace": lambda shape, rng: rng.laplace(size=shape) / 2**0.5,
  "t3": lambda shape, rng: rng.standard_t(3, shape) / 3**0.5,
  "rank 1": lambda shape, rng: (
    rng.standard_normal((shape[0], 1)) * rng.standard_normal((1, shape[1]))
  ),
  "one row of ten": lambda shape, rng: (
    rng.standard_normal(shape) * (rng.random((shape[0], 1)) < 0.1) * 10**0.5
  ),
}


def rounded(x, dtype=BF16):
  return np.asarray(x, np.float32).astype(dtype)


def ulp_of(w, nmant=7):
  """The root mean square ulp."""
  return np.sqrt(np.mean(4.0 ** (np.frexp(w)[1] - 1 - nmant)))


def learnt_from(base, finetuned):
  delta = finetuned.astype(np.float64) - base.astype(np.float64)
  histogram = ulp_histogram(base, finetuned, finetuned.dtype)
  return learnt_of(histogram, np.linalg.norm(delta))


def pair(name, ulps, seed=0, base_dtype=BF16, side=SIDE):
  """A stored base, updates of so many ulps, and what is stored of both."""
  rng = np.random.default_rng(seed)
  weights = 0.02 * rng.standard_normal((side, side))
  base = rounded(weights, base_dtype)
  change = ulps * ulp_of(weights) * UPDATES[name]((side, side), rng)
  return base, change, rounded(base.astype(np.float64) + change)


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("ulps", [0.05, 0.1, 0.3, 0.5, 1, 3, 10])
def test_the_update_before_rounding(name, ulps):
  """From nearly all lost (0.05 ulp) to nearly nothing (10 ulps)."""
  base, change, finetuned = pair(name, ulps)
  found = learnt_from(base, finetuned)
  tolerance = 0.08 if name == "t3" else 0.05
  assert found.norm == pytest.approx(np.linalg.norm(change), rel=tolerance)
  lost = finetuned.astype(np.float64) - (base.astype(np.float64) + change)
  share = np.sum(lost**2) / np.sum(change**2)
  assert found.rounding_share >= 0.85 * share
  if name == "normal":
    assert found.rounding_share <= 1.6 * share
  if name == "normal" and (ulps <= 0.05 or ulps >= 3):
    assert found.rounding_share == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("ulps", [0.05, 0.3, 1, 10])
def test_a_base_that_was_never_rounded(ulps):
  """Then each weight lies anywhere in its cell, and noise is in all of them."""
  base, change, finetuned = pair("normal", ulps, base_dtype=np.float32)
  found = learnt_from(base, finetuned)
  assert found.norm == pytest.approx(np.linalg.norm(change), rel=0.05)


@pytest.mark.parametrize("ulps", [0.05, 0.3, 1, 10])
def test_a_base_that_was_rounded_as_well(ulps):
  rng = np.random.default_rng(0)
  weights = 0.02 * rng.standard_normal((SIDE, SIDE))
  change = ulps * ulp_of(weights) * rng.standard_normal(weights.shape)
  found = learnt_from(rounded(weights), rounded(weights + change))
  assert found.norm == pytest.approx(np.linalg.norm(change), rel=0.05)


def test_more_was_learnt_than_is_stored():
  """At a twentieth of an ulp half of the norm is left, and the rest told."""
  base, change, finetuned = pair("normal", 0.05)
  stored = np.linalg.norm(
    finetuned.astype(np.float64) - base.astype(np.float64)
  )
  assert stored < 0.6 * np.linalg.norm(change)
  assert learnt_from(base, finetuned).norm > 1.6 * stored


@pytest.mark.parametrize("steps", [10, 100])
def test_random_steps_rounded_one_by_one(steps):
  """Training in bfloat16 itself: as stated, 0.6 to 1.1 of what was asked."""
  rng = np.random.default_rng(0)
  weights = rounded(0.02 * rng.standard_normal((SIDE, SIDE)))
  finetuned, asked = weights, 0
  size = 0.3 * ulp_of(weights.astype(np.float64)) / steps**0.5
  for _ in range(steps):
    step = size * rng.standard_normal(weights.shape)
    asked = asked + step
    finetuned = rounded(finetuned.astype(np.float64) + step)
  found = learnt_from(weights, finetuned).norm / np.linalg.norm(asked)
  assert 0.6 < found < 1.1


def test_updates_that_leave_no_trace_are_not_identifiable():
  """Half an ulp is the least that shows, whatever was learnt."""
  base = rounded(np.linspace(1, 2, 4096, endpoint=False).reshape(64, 64))
  finetuned = rounded(base.astype(np.float64) + 0.49 * 2.0**-7)
  assert (finetuned == base).all()
  assert learnt_from(base, finetuned) == (None, None)
  # In proportion to each weight: small weights tell no more than large ones.
  base, _, _ = pair("normal", 1)
  relative = 2.0**-9 * np.random.default_rng(1).uniform(0.5, 1.2, base.shape)
  finetuned = rounded(base.astype(np.float64) * (1 + relative))
  assert (finetuned != base).any()
  assert learnt_from(base, finetuned) == (None, None)


def test_a_base_of_zeros_rounds_nothing():
  delta = np.random.default_rng(0).standard_normal((16, 16))
  base, finetuned = np.zeros((16, 16), np.float32), rounded(delta)
  norm = np.linalg.norm(finetuned.astype(np.float64))
  assert learnt_from(base, finetuned) == (norm, 0)
  assert learnt_from(base, base) == (0, 0)


def test_zeros_among_the_weights_do_not_tell_what_others_learnt():
  """Padding never moves: it is counted as it is, and not taken for small."""
  base, change, finetuned = pair("normal", 0.3)
  padding = np.zeros_like(base)
  found = learnt_from(np.r_[base, padding], np.r_[finetuned, padding])
  assert found.norm == pytest.approx(np.linalg.norm(change), rel=0.05)


@pytest.mark.parametrize("side", [513, 1024, 2048])
def test_a_sample_is_enough(side):
  base, change, finetuned = pair("normal", 0.1, side=side)
  found = learnt_from(base, finetuned)
  assert found.norm == pytest.approx(np.linalg.norm(change), rel=0.05)


@settings(max_examples=20, deadline=None)
@given(
  st.integers(0, 2**31 - 1),
  st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32]),
  st.floats(-30, 30),
)
def test_the_histogram_is_exact_and_the_libraries_agree(seed, dtype, power):
  rng = np.random.default_rng(seed)
  shape = (3, 7, 11)
  base = np.exp(rng.normal(0, 8, shape)) * (rng.random(shape) < 0.9)
  base = rounded(np.clip(base * 2.0**power, 0, 6e4), dtype)
  finetuned = rounded(
    base.astype(np.float64) * (1 - 0.1 * rng.random(shape)), dtype
  )
  host = ulp_histogram(base, finetuned, dtype)
  device = jax.jit(ulp_histogram, static_argnums=2)(base, finetuned, dtype)
  assert host.dtype == device.dtype == np.float32
  np.testing.assert_allclose(host, device, rtol=1e-5)
  assert host[1].sum() == base.size
  delta = finetuned.astype(np.float64) - base.astype(np.float64)
  np.testing.assert_allclose(host[2].sum(), np.sum(delta**2), rtol=1e-5)
  w = np.abs(base.astype(np.float64)).ravel()
  for ulp2, count, changed in host.T[:-1]:
    if count:
      ulp = 2.0 ** (np.frexp(w)[1] - 1 - jnp.finfo(dtype).nmant)
      here = (w > 0) & (np.float32(ulp**2) == ulp2)
      assert count == here.sum()
      expected = np.sum(delta.ravel()[here] ** 2)
      assert changed == pytest.approx(expected, rel=1e-5)


def test_a_sharded_histogram_gathers_nothing():
  mesh = jax.make_mesh(
    (8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
  base, _, finetuned = pair("normal", 0.3)
  step = jax.jit(ulp_histogram, static_argnums=2)
  placed = [jax.device_put(x, cut) for x in (base, finetuned)]
  text = step.lower(*placed, BF16).compile().as_text()
  assert "all-reduce" in text
  assert "all-gather" not in text
  assert "all-to-all" not in text
  host = ulp_histogram(base, finetuned, BF16)
  np.testing.assert_allclose(step(*placed, BF16), host, rtol=1e-4)
