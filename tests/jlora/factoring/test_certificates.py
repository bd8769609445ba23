# SPDX-License-Identifier: Apache-2.0
"""Certificates against float64 truth: exact errors, floors under the optimum.

One shape throughout, so that the certificate is compiled once per dtype. All
is checked compiled and on the host, on NumPy arrays; and with floors from
bounds, as large matrices have them, though the test's own are small.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.factoring import certificates
from jlora.factoring.certificates import Certificate, certificate
from jlora.factoring.factorisers import svd
from jlora.loras import Lora, from_factors
from jlora.numerics import sums
from jlora.numerics.sums import sums_of
from tests.helpers.matrices import SPECTRA, best_errors, matrix

M, N, RANK = 48, 64, 8


@pytest.fixture(scope="module", params=["compiled", "host"])
def run(request):
  """The certificate of arrays of either library, with bounds for floors."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(certificates, "_SHORT", 0)
    yield on_host if request.param == "host" else jax.jit(bounded)


def bounded(delta, lora, key=None):
  """The certificate under a name of its own: compilations are not shared."""
  return certificate(delta, lora, key)


def on_host(delta, lora, key=None):
  found = certificate(np.asarray(delta), jax.tree.map(np.asarray, lora), key)
  assert all(isinstance(x, np.ndarray | np.generic) for x in found)
  return found


factor = jax.jit(svd, static_argnums=1)


def extracted(delta, dtype=jnp.float32, rank=RANK):
  return from_factors(factor(jnp.asarray(delta), rank), dtype)


def in_float64(x):
  return np.asarray(x.astype(np.float32), np.float64)


def changes(lora):
  """(r + 1, m, n) the change by the first 0..r stored units, in float64."""
  a, b, scale = (in_float64(x) for x in (lora.a, lora.b, lora.scale))
  units = scale * np.einsum("rm,rn->rmn", a, b)
  return np.concatenate([np.zeros((1, *units.shape[1:])), units.cumsum(0)])


def check(delta, lora, found):
  """Everything but the floors equals plain float64 arithmetic."""
  delta = np.asarray(delta, np.float64)
  nested = changes(lora)
  errors = np.linalg.norm(delta - nested, axis=(1, 2))
  norm, size = np.linalg.norm(delta), np.linalg.norm(nested[-1])
  np.testing.assert_allclose(found.norm, norm, rtol=1e-6)
  np.testing.assert_allclose(found.mean_abs, np.abs(delta).mean(), rtol=1e-6)
  # Errors come from sums of squares: what is lost is a share of the largest.
  np.testing.assert_allclose(
    np.float64(found.errors) ** 2,
    errors**2,
    rtol=1e-4,
    atol=1e-6 * max(size, norm) ** 2,
  )
  np.testing.assert_allclose(found.errors[0], norm, rtol=1e-6)
  np.testing.assert_allclose(
    found.errors[-1], errors[-1], rtol=1e-5, atol=1e-6 * norm
  )
  sizes = np.linalg.norm(nested, axis=(1, 2)) * norm
  inner = (delta * nested).sum(axis=(1, 2))
  cosines = np.divide(inner, sizes, out=np.zeros(len(sizes)), where=sizes > 0)
  np.testing.assert_allclose(found.cosines, cosines, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_errors_are_those_of_the_stored_factors(run, spectrum, dtype):
  delta = matrix(SPECTRA[spectrum](M), M, N)
  lora = extracted(delta, dtype)
  found = run(delta, lora)
  assert all(x.dtype == jnp.float32 for x in found)
  assert found.errors.shape == (RANK + 1,)
  check(delta, lora, found)


def test_rounding_to_storage_is_part_of_the_error(run):
  delta = matrix(SPECTRA["low_rank"](M), M, N)
  kept = [
    float(run(delta, extracted(delta, dtype)).errors[-1])
    for dtype in (jnp.float32, jnp.bfloat16)
  ]
  norm = np.linalg.norm(delta)
  assert kept[0] < 1e-5 * norm
  assert 1e-4 * norm < kept[1] < 1e-2 * norm


def test_errors_of_an_arbitrary_change(run):
  """Not orthogonal, not sorted, not even close to the delta."""
  rng = np.random.default_rng(0)
  a = rng.standard_normal((RANK, M)).astype(np.float32)
  b = rng.standard_normal((RANK, N)).astype(np.float32)
  delta = rng.standard_normal((M, N)).astype(np.float32)
  lora = Lora(jnp.asarray(a), jnp.asarray(b), jnp.float32(-0.7))
  found = run(delta, lora)
  check(delta, lora, found)
  assert (np.asarray(found.floors) <= np.asarray(found.errors)).all()


def test_worked_example(run):
  delta = jnp.array([[3.0, 0.0], [4.0, 5.0]])
  found = run(delta, extracted(delta, rank=1))
  np.testing.assert_allclose(found.norm, 7.0710678, rtol=1e-6)
  np.testing.assert_allclose(found.errors, [7.0710678, 2.236068], rtol=3e-6)
  np.testing.assert_allclose(found.mean_abs, 3.0, rtol=1e-6)
  np.testing.assert_allclose(found.cosines, [0, np.sqrt(0.9)], rtol=1e-6)
  assert found.floors[1] <= 2.236068 * (1 + 1e-6)


spectra = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=M).map(
  lambda s: np.array(sorted(s, reverse=True))
)


@settings(deadline=None, max_examples=60)
@given(spectra, st.integers(0, 99), st.sampled_from([0.0, 0.1, 3.0]))
def test_floors_are_never_above_the_optimum(run, sigma, seed, disturbance):
  """Whatever the change is: its rows may be far from the best ones."""
  delta = matrix(sigma, M, N, seed)
  padded = np.append(sigma, np.zeros(M - len(sigma)))
  best = best_errors(padded)[: RANK + 1]
  lora = extracted(delta)
  rng = np.random.default_rng(seed)
  noise = rng.standard_normal(lora.b.shape).astype(np.float32)
  b = lora.b + disturbance * np.sqrt(sigma[0] / N, dtype=np.float32) * noise
  found = run(delta, Lora(lora.a, b, lora.scale), jax.random.key(seed))
  assert (np.asarray(found.floors) <= best * (1 + 1e-6)).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_floors_are_never_above_the_optimum_on_named_spectra(run, spectrum):
  sigma = SPECTRA[spectrum](M)
  delta = matrix(sigma, M, N)
  best = best_errors(sigma)[: RANK + 1]
  floors = np.asarray(run(delta, extracted(delta)).floors)
  assert (floors <= best * (1 + 1e-6)).all()


@pytest.mark.parametrize("spectrum", ["flat", "power_law"])
def test_floors_are_tight(run, spectrum):
  """Within 20% of the optimum at every rank."""
  sigma = SPECTRA[spectrum](M)
  delta = matrix(sigma, M, N)
  best = best_errors(sigma)[: RANK + 1]
  assert (np.asarray(run(delta, extracted(delta)).floors) >= 0.8 * best).all()


def test_floor_of_rank_zero_is_the_norm(run):
  delta = matrix(SPECTRA["power_law"](M), M, N)
  found = run(delta, extracted(delta))
  np.testing.assert_allclose(found.floors[0], found.norm, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_units_of_the_delta_only_scale(run, scale):
  delta = matrix(SPECTRA["power_law"](M), M, N)
  plain = run(delta, extracted(delta))
  big = (delta * np.float64(scale)).astype(np.float32)
  found = run(big, extracted(big))
  for name in ("norm", "mean_abs", "errors", "floors"):
    one = np.asarray(getattr(found, name), np.float64) / scale
    np.testing.assert_allclose(one, getattr(plain, name), rtol=1e-3)
  np.testing.assert_allclose(found.cosines, plain.cosines, atol=1e-5)


def test_the_scale_is_folded_in(run):
  delta = matrix(SPECTRA["power_law"](M), M, N)
  lora = extracted(delta)
  other = Lora(lora.a / 4, lora.b, jnp.float32(4))
  for one, two in zip(run(delta, lora), run(delta, other), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_zero_deltas_and_zero_changes(run):
  lora = extracted(matrix(SPECTRA["power_law"](M), M, N))
  found = run(np.zeros((M, N), np.float32), lora)
  check(np.zeros((M, N)), lora, found)
  np.testing.assert_array_equal(found.floors, 0.0)
  delta = matrix(SPECTRA["flat"](M), M, N)
  nothing = Lora(0 * lora.a, 0 * lora.b, lora.scale)
  check(delta, nothing, run(delta, nothing))


def test_batches_equal_one_by_one(run):
  deltas = np.stack(
    [matrix(SPECTRA[name](M), M, N, i) for i, name in enumerate(SPECTRA)][:6]
  ).reshape(2, 3, M, N)
  loras = extracted(deltas)
  together = run(deltas, loras)
  assert together.errors.shape == (2, 3, RANK + 1)
  alone = run(deltas[1, 0], jax.tree.map(lambda x: x[1, 0], loras))
  for one, two, name in zip(together, alone, Certificate._fields, strict=True):
    # Floors are differences of squares: float32 tells 1e-4 of the norm apart.
    slack = 1e-4 * float(alone.norm) if name == "floors" else 0.0
    np.testing.assert_allclose(
      one[1, 0], two, rtol=1e-3, atol=slack, err_msg=name
    )


@pytest.mark.parametrize("library", [jnp, np])
@pytest.mark.parametrize("rows", [1, 5, 16, 47])
def test_blocks_of_rows_add_up(monkeypatch, rows, library):
  """Blocks that divide the height and blocks that leave a rest."""
  delta = matrix(SPECTRA["flat"](M), M, N)
  lora = jax.tree.map(library.asarray, extracted(delta))
  error = np.linalg.norm(delta - changes(lora)[-1])
  monkeypatch.setattr(sums, "_ROWS_BLOCK", rows * N)
  delta = library.asarray(delta)
  residual = certificates._residual(delta, lora.a, lora.b, np.float32(1))
  np.testing.assert_allclose(residual, error**2, rtol=1e-5)


@pytest.mark.parametrize("how", [jax.jit(certificate), on_host])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_floors_of_a_short_side_are_the_optimum(spectrum, how, monkeypatch):
  """All of it is known then: what float32 squares lose is all that is off."""
  monkeypatch.setattr(certificates, "_SHORT", M)
  sigma = SPECTRA[spectrum](M)
  delta = matrix(sigma, M, N)
  norm = np.linalg.norm(sigma)
  for matrix_, rank in ((delta, RANK), (delta.T, RANK), (delta[:5], 5)):
    best = best_errors(np.linalg.svd(np.float64(matrix_), compute_uv=False))
    best = best[: rank + 1]
    floors = np.asarray(how(matrix_, extracted(matrix_, rank=rank)).floors)
    assert (floors <= best * (1 + 1e-6)).all()
    told = np.maximum(best**2 - 1.5e-5 * norm**2, 0)
    assert (floors**2 >= told * (1 - 1e-5)).all()


def test_refuses_shapes_that_do_not_fit():
  lora = Lora(jnp.ones((2, 3)), jnp.ones((2, 5)), jnp.float32(1))
  with pytest.raises(ValueError, match=r"delta \(5, 3\) does not fit a \(2, 3"):
    certificate(jnp.ones((5, 3)), lora)
  uneven = Lora(jnp.ones((2, 3)), jnp.ones((1, 5)), jnp.float32(1))
  with pytest.raises(ValueError, match=r"b \(1, 5\)"):
    certificate(jnp.ones((3, 5)), uneven)


@pytest.mark.parametrize("library", [np, jnp])
def test_sums_that_are_known_change_nothing(library):
  delta = library.asarray(matrix(SPECTRA["flat"](M), M, N))
  lora = jax.tree.map(library.asarray, extracted(delta))
  known = sums_of(delta)
  for one, two in zip(
    certificate(delta, lora, sums=known), certificate(delta, lora), strict=True
  ):
    np.testing.assert_array_equal(one, two)
  batch = jax.tree.map(lambda x: library.stack([x, x]), (delta, lora))
  with pytest.raises(ValueError, match="one matrix"):
    certificate(*batch, sums=known)
