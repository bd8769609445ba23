# SPDX-License-Identifier: Apache-2.0
"""Sums against float64, at the ends of float32 and over several blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.numerics import sums as norms

SCALES = [1.0, 1e-37, 1e-30, 1e30, 3e37]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
  "run", [lambda x: norms.sums_of(np.asarray(x)), jax.jit(norms.sums_of)]
)
def test_sums_at_every_scale(run, scale):
  x = np.random.default_rng(0).standard_normal((37, 41)).astype(np.float32)
  x *= np.float32(scale)
  exact = x.astype(np.float64)
  sums = run(jnp.asarray(x))
  unit = 2.0 ** int(sums.exponent)
  assert float(sums.unit) == unit
  squares, moduli = float(sums.squares), float(sums.moduli)
  assert squares**0.5 * unit == pytest.approx(np.linalg.norm(exact), rel=1e-6)
  assert moduli * unit == pytest.approx(np.abs(exact).sum(), rel=1e-6)


@settings(deadline=None)
@given(
  st.integers(1, 70),
  st.integers(1, 20),
  st.lists(st.integers(-110, 110), min_size=1, max_size=20),
)
def test_blocks_of_any_scale_add_up(rows, block, exponents):
  """Also where one block would overflow or vanish in another's unit."""
  x = np.random.default_rng(rows).standard_normal(rows).astype(np.float32)
  x = np.ldexp(x, np.resize(exponents, rows)).astype(np.float32)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(norms, "BLOCK", block)
    sums = norms.sums_of(x)
  norm = float(sums.squares) ** 0.5 * 2.0 ** int(sums.exponent)
  assert norm == pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=1e-6)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_transposed_array_is_not_copied_wrongly(order):
  x = np.asarray(np.arange(12, dtype=np.float32).reshape(3, 4), order=order)
  assert float(norms.sums_of(x).moduli * norms.sums_of(x).unit) == 66


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("run", [norms.sums_of, jax.jit(norms.sums_of)])
def test_what_is_not_finite_shows(run, bad):
  x = np.ones((3, 5), np.float32)
  x[1, 2] = bad
  assert not np.isfinite(run(x).squares)


def test_zeros():
  sums = norms.sums_of(np.zeros((3, 2), np.float32))
  assert (float(sums.squares), float(sums.moduli)) == (0, 0)


def test_large_arrays_lose_no_digits():
  """One float32 sum of so many squares is 1e-4 too small."""
  x = np.random.default_rng(0).standard_normal((2**24, 1), np.float32)
  exact = float(np.sum(np.square(x, dtype=np.float64)))
  assert float(norms.sum_of_squares(x)) == pytest.approx(exact, rel=1e-6)
  assert norms.norm_of(x) == pytest.approx(exact**0.5, rel=1e-6)
  assert norms.inner_product(x, -x) == pytest.approx(-exact, rel=1e-6)
