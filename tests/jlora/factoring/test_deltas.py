# SPDX-License-Identifier: Apache-2.0
"""Differences against float64, and rounding noise against real rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.factoring.deltas import difference, survey
from jlora.selection import is_floating, is_matrix
from tests.helpers.small_pairs import draw


def test_a_small_change_survives_bfloat16_inputs():
  """Subtracted in bfloat16, 1 + 2^-7 against 256 steps would be lost."""
  base = jnp.asarray(draw(16, 16), jnp.bfloat16)
  finetuned = base.astype(jnp.float32) + 1e-4
  delta = np.asarray(difference(base, finetuned))
  exact = np.asarray(finetuned, np.float64) - np.asarray(base, np.float64)
  assert delta.dtype == np.float32
  np.testing.assert_allclose(delta, exact, rtol=1e-6, atol=0)
  in_bfloat16 = finetuned.astype(jnp.bfloat16) - base
  assert np.abs(np.asarray(in_bfloat16, np.float64) - exact).max() > 5e-5


@pytest.mark.parametrize("library", [np, jnp])
def test_differing_shapes_are_named(library):
  sides = library.ones((2, 3), np.float32), library.ones((3, 2), np.float32)
  with pytest.raises(ValueError, match=r"\(2, 3\) and finetuned \(3, 2\)"):
    difference(*sides)
  with pytest.raises(ValueError, match=r"\(2, 3\) and finetuned \(3, 2\)"):
    survey(*sides, np.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_noise_is_that_of_rounding(dtype):
  values = draw(400, 200)
  stored = jnp.asarray(values).astype(dtype)
  error = np.asarray(stored, np.float64) - values
  noise = float(survey(stored, stored, dtype)[1].noise_std)
  assert noise == pytest.approx(error.std(), rel=0.02)


def noise_of(stored):
  return float(survey(stored, stored, jnp.bfloat16)[1].noise_std)


def test_noise_of_zeros_and_of_a_scalar():
  assert noise_of(jnp.zeros((3, 3))) == 0
  one = noise_of(jnp.float32(1))
  assert one == pytest.approx(2**-7 / 12**0.5)


@pytest.mark.parametrize(
  ("shape", "dtype", "answer"),
  [
    ((3, 3), jnp.bfloat16, True),
    ((2, 3, 3), jnp.float8_e4m3fn, True),
    ((3,), jnp.float32, False),
    ((), jnp.float32, False),
    ((3, 3), jnp.int8, False),
    ((3, 3), jnp.bool_, False),
  ],
)
def test_what_is_a_matrix(shape, dtype, answer):
  assert is_matrix("any", jnp.zeros(shape, dtype)) is answer
  floating = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32)
  assert is_floating(dtype) == (dtype in floating)


@pytest.mark.parametrize("bad", [None, np.inf, np.nan])
def test_a_survey_sums_the_change_that_it_returns(bad):
  """Over several blocks, in bfloat16; zeros where it is not finite."""
  base = draw(300, 200).astype(jnp.bfloat16)
  finetuned = (base.astype(np.float32) + draw(300, 200)).astype(jnp.bfloat16)
  if bad is not None:
    finetuned[299, 3] = bad
  for sides in ((base, finetuned), map(jnp.asarray, (base, finetuned))):
    delta, found = survey(*sides, jnp.bfloat16)
    exact = np.asarray(delta, np.float64)
    assert bool(found.is_finite) == (bad is None) == bool(exact.any())
    unit = float(found.sums.unit)
    squares, moduli = (float(x) for x in found.sums[1:])
    assert squares * unit**2 == pytest.approx(np.square(exact).sum(), rel=1e-5)
    assert moduli * unit == pytest.approx(np.abs(exact).sum(), rel=1e-5)
