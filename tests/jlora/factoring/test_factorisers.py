# SPDX-License-Identifier: Apache-2.0
"""One conformance table for every factoriser, and recompression.

All cases of a factoriser share one shape, so each is compiled once. At that
shape `krylov` does not hand over to another one. Every factoriser is run twice:
compiled, and on the host on NumPy arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.factoring import factorisers, krylov_spaces
from jlora.factoring.factorisers import gram, krylov, recompress, svd
from jlora.loras import Factors, dense, from_factors
from tests.helpers.matrices import SPECTRA, best_errors, matrix


def on_host(factoriser):
  """The factoriser on NumPy arrays, its results checked to be NumPy's."""

  @functools.wraps(factoriser)
  def run(delta, rank, key=None):
    found = factoriser(np.asarray(delta), rank, key)
    assert all(type(x) is np.ndarray for x in found)
    return Factors(*map(jnp.asarray, found))

  run.__name__ = f"{factoriser.__name__}-on-host"
  return run


def krylov_in_bfloat16(delta, rank, key=None):
  return krylov(delta, rank, key, low=True)


COMPILED = [svd, gram, krylov, krylov_in_bfloat16]
FACTORISERS = COMPILED + [on_host(factoriser) for factoriser in COMPILED]
M, N, RANK = 384, 512, 16
SMALL = (24, 40)

every_factoriser = pytest.mark.parametrize(
  "factoriser", FACTORISERS, ids=lambda f: f.__name__
)
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


@functools.cache
def compiled(factoriser):
  if factoriser in COMPILED:
    return jax.jit(factoriser, static_argnums=1)
  return factoriser


@functools.cache
def delta_of(spectrum):
  return matrix(SPECTRA[spectrum](M), M, N)


@functools.cache
def factored(factoriser, spectrum, scale=1.0):
  delta = jnp.asarray(delta_of(spectrum) * np.float32(scale))
  return in_float64(compiled(factoriser)(delta, RANK, jax.random.key(1)))


def in_float64(factors):
  assert all(x.dtype == np.float32 for x in factors)
  return Factors(*(np.asarray(x, np.float64) for x in factors))


def product(factors):
  return (factors.u * factors.s[..., None, :]) @ factors.vt


def random(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def check_orthonormal(factors):
  eye = np.eye(factors.s.shape[-1])
  u, vt = factors.u, factors.vt
  assert np.abs(u.swapaxes(-1, -2) @ u - eye).max() < 1e-5
  assert np.abs(vt @ vt.swapaxes(-1, -2) - eye).max() < 1e-5


def test_krylov_takes_its_own_path_at_the_tested_shape():
  assert factorisers.cheapest((M, N), RANK) is krylov
  assert factorisers.cheapest((N, M), RANK) is krylov


@pytest.mark.parametrize(
  ("shape", "rank", "expected"),
  [
    ((2048, 5632), 64, krylov),
    ((5632, 2048), 64, krylov),
    ((192, 576), 64, gram),  # the Krylov space would fill the short side
    ((256, 8192), 16, gram),  # the short side is small: one product
    ((8, 64), 4, svd),
    ((1, 100_000), 4, svd),
  ],
)
def test_cheapest_counts_operations(shape, rank, expected):
  assert factorisers.cheapest(shape, rank) is expected


@every_factoriser
@every_spectrum
def test_error_is_at_most_a_thousandth_over_the_optimum(factoriser, spectrum):
  delta = delta_of(spectrum).astype(np.float64)
  best = best_errors(SPECTRA[spectrum](M))[RANK]
  # Where nothing but rounding is left the bound is in terms of the norm.
  rounding = {"steep": 1e-6, "low_rank": 5e-6}.get(spectrum, 0.0)
  error = np.linalg.norm(delta - product(factored(factoriser, spectrum)))
  assert error <= 1.001 * best + rounding * np.linalg.norm(delta)


@every_factoriser
@every_spectrum
def test_factors_are_orthonormal_sorted_and_signed(factoriser, spectrum):
  factors = factored(factoriser, spectrum)
  assert factors.u.shape == (M, RANK)
  assert factors.vt.shape == (RANK, N)
  check_orthonormal(factors)
  assert (np.diff(factors.s) <= 0).all()
  assert (factors.s >= 0).all()
  top = np.abs(factors.u).argmax(axis=0)
  assert (factors.u[top, range(RANK)] > 0).all()


@every_factoriser
@every_spectrum
def test_singular_values(factoriser, spectrum):
  sigma = SPECTRA[spectrum](M)[:RANK]
  np.testing.assert_allclose(
    factored(factoriser, spectrum).s, sigma, rtol=2e-3, atol=2e-6 * sigma[0]
  )


@every_factoriser
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("spectrum", ["power_law", "low_rank"])
def test_scale_only_scales(factoriser, scale, spectrum):
  """Squares of such numbers leave float32 on either side."""
  plain = factored(factoriser, spectrum)
  scaled = factored(factoriser, spectrum, scale)
  check_orthonormal(scaled)
  np.testing.assert_allclose(
    product(scaled) / scale, product(plain), atol=2e-4 * plain.s[0]
  )
  np.testing.assert_allclose(
    scaled.s / scale, plain.s, rtol=1e-4, atol=1e-6 * plain.s[0]
  )


@every_factoriser
def test_same_key_same_factors(factoriser):
  delta = jnp.asarray(delta_of("flat"))
  run = functools.partial(compiled(factoriser), delta, RANK)
  for one, two in zip(
    run(jax.random.key(3)), run(jax.random.key(3)), strict=True
  ):
    np.testing.assert_array_equal(one, two)


def test_krylov_starts_from_the_key():
  """The start block is random, what it converges to is not."""
  one = factored(krylov, "power_law")
  delta = jnp.asarray(delta_of("power_law"))
  two = in_float64(compiled(krylov)(delta, RANK, jax.random.key(2)))
  assert np.abs(one.u - two.u).max() > 0
  np.testing.assert_allclose(product(one), product(two), atol=1e-3)


def test_krylov_of_a_batch_of_tall_matrices():
  """Nothing stops early in a batch: low rank is taken through every block."""
  names = ["power_law", "low_rank"]
  deltas = jnp.stack([jnp.asarray(delta_of(name).T) for name in names])
  factors = in_float64(compiled(krylov)(deltas, RANK, jax.random.key(1)))
  assert factors.u.shape == (2, N, RANK)
  check_orthonormal(factors)
  top = np.abs(factors.u).argmax(axis=1)
  assert (np.take_along_axis(factors.u, top[:, None], axis=1) > 0).all()
  for i, name in enumerate(names):
    wide = product(factored(krylov, name))
    np.testing.assert_allclose(product(factors)[i].T, wide, atol=2e-6)


@pytest.mark.parametrize(
  ("spectrum", "blocks"),
  [("zero", 1), ("low_rank", 2), ("steep", 2), ("flat", 5)],
)
def test_krylov_stops_when_nothing_is_left(spectrum, blocks):
  """Counts the blocks that really ran, beyond the start block."""
  count, run = counted_krylov()
  count.clear()
  run(jnp.asarray(delta_of(spectrum)), jax.random.key(1)).s.block_until_ready()
  jax.effects_barrier()
  assert len(count) == blocks


@functools.cache
def counted_krylov():
  """A compiled krylov, and a list that grows by one for every block it adds."""
  count, plain = [], krylov_spaces._residual

  def counting(*args):
    jax.debug.callback(lambda: count.append(1))
    return plain(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(krylov_spaces, "_residual", counting)
    shape = jax.ShapeDtypeStruct((M, N), jnp.float32)
    run = jax.jit(lambda delta, key: krylov(delta, RANK, key))
    return count, run.lower(shape, jax.random.key(0)).compile()


@pytest.mark.parametrize("library", [np, jnp])
def test_krylov_stops_early_but_not_too_early(library):
  """With `tol` it is a little worse than without, and near the optimum."""
  sigma = np.arange(1.0, M + 1) ** -0.6
  delta = matrix(sigma, M, N)
  best = best_errors(sigma)[RANK]
  full, stopped = (
    np.linalg.norm(
      delta - product(in_float64(krylov(library.asarray(delta), RANK, tol=tol)))
    )
    for tol in (0.0, 5e-4)
  )
  assert full < stopped <= 1.001 * best


@every_factoriser
@pytest.mark.parametrize("shape", [(6, 40), (1, 40), (24, 1)])
def test_rank_above_the_short_side_is_clipped(factoriser, shape):
  delta = random(*shape)
  factors = in_float64(compiled(factoriser)(delta, 99))
  assert factors.s.shape == (min(shape),)
  check_orthonormal(factors)
  np.testing.assert_allclose(product(factors), delta, atol=1e-5)


@every_factoriser
def test_batches_equal_one_by_one_and_vmap(factoriser):
  deltas = random(2, 3, *SMALL).at[1, 2].set(0.0)
  together = compiled(factoriser)(deltas, 5)
  assert together.u.shape == (2, 3, 24, 5)
  if factoriser in COMPILED:
    nested = jax.jit(jax.vmap(jax.vmap(lambda delta: factoriser(delta, 5))))(
      deltas
    )
    for one, two in zip(together, nested, strict=True):
      np.testing.assert_allclose(one, two, atol=1e-5)
  alone = compiled(factoriser)(deltas[1, 1], 5)
  for one, two in zip(together, alone, strict=True):
    np.testing.assert_allclose(one[1, 1], two, atol=1e-5)


@every_factoriser
def test_bfloat16_is_read_as_float32(factoriser):
  delta = random(*SMALL).astype(jnp.bfloat16)
  run = compiled(factoriser)
  plain = run(delta.astype(jnp.float32), 5)
  for one, two in zip(run(delta, 5), plain, strict=True):
    assert one.dtype == jnp.float32
    np.testing.assert_array_equal(one, two)


@every_factoriser
def test_worked_example(factoriser):
  delta = jnp.array([[3.0, 0.0], [4.0, 5.0]])
  np.testing.assert_allclose(
    compiled(factoriser)(delta, 2).s, [6.708204, 2.236068], rtol=1e-6
  )
  one = compiled(factoriser)(delta, 1)
  np.testing.assert_allclose(product(one), [[1.5, 1.5], [4.5, 4.5]], rtol=5e-6)
  error = np.linalg.norm(delta - product(one))
  np.testing.assert_allclose(error, 2.236068, rtol=1e-6)
  lora = from_factors(one)
  for factor in (lora.a, lora.b):
    np.testing.assert_allclose(np.linalg.norm(factor), 2.590020, rtol=1e-6)


@every_factoriser
@pytest.mark.parametrize(
  ("delta", "rank", "message"),
  [
    (jnp.ones((3, 4)), 0, "rank must be at least 1, got 0"),
    (jnp.ones((3, 4)), -2, "rank must be at least 1, got -2"),
    (jnp.ones(3), 1, r"two axes or more, got shape \(3,\)"),
  ],
)
def test_refusals(factoriser, delta, rank, message):
  with pytest.raises(ValueError, match=message):
    factoriser(delta, rank)


def draw_spectrum(seed, count):
  """Draws singular values as they come: decays, plateaus, one far above, none.

  Up to 4 as a power of their place, and 1e30 times larger or smaller.
  """
  rng = np.random.default_rng(seed)
  at = np.arange(1, count + 1.0)
  values = at ** -rng.uniform(0, 4)
  match seed % 7:
    case 1:
      values = np.where(at < rng.integers(2, 60), 1, rng.uniform(1e-4, 1))
    case 2:
      values[0] *= 1e4
    case 3:
      values[rng.integers(1, RANK + 4) :] = 0
    case 4:
      values = np.exp(-at * rng.uniform(0, 0.3))
    case 5:
      values[rng.integers(1, RANK) :] *= 10 ** -rng.uniform(0, 4)
    case 6:
      values = np.sort(rng.exponential(size=count))[::-1] ** rng.uniform(0.5, 3)
  return values * 10.0 ** rng.choice([-30, -3, 0, 3, 30])


@pytest.fixture(scope="module")
def bases():
  """Orthonormal rows of both sides of matrices that `krylov` iterates on."""
  rng = np.random.default_rng(0)
  shapes = (512, 512), (768, 512)
  return [np.linalg.qr(rng.standard_normal(shape))[0].T for shape in shapes]


@pytest.mark.parametrize(
  "seeds",
  [range(50), pytest.param(range(50, 400), marks=pytest.mark.long)],
  ids=str,
)
def test_any_spectrum_in_float32_and_in_bfloat16(bases, seeds):
  """Beside the optimum, but for what float32's rounding takes."""
  left, right = bases
  for seed in seeds:
    values = draw_spectrum(seed, len(left))
    delta = ((left.T * values) @ right).astype(np.float32)
    best, norm = (np.linalg.norm(x) for x in (values[RANK:], values))
    full, low = (
      np.linalg.norm(
        delta
        - product(in_float64(krylov(delta, RANK, oversample=8, low=is_low)))
      )
      for is_low in (False, True)
    )
    assert full < 1.005 * best + 2e-6 * norm, seed
    assert low < 1.001 * full + 2e-6 * norm, seed


@pytest.mark.parametrize("options", [{"passes": 0}, {"oversample": -1}])
def test_krylov_refuses_options_without_sense(options):
  with pytest.raises(ValueError, match="passes >= 1 and oversample >= 0"):
    krylov(jnp.ones((3, 4)), 1, **options)


@pytest.mark.parametrize("library", [jnp, np])
def test_orthonormal_rows_of_dependent_and_zero_rows(library):
  x = random(6, 30)
  x = library.asarray(x.at[4].set(x[0] - 2 * x[1]).at[5].set(0.0))
  rows = np.asarray(factorisers.orthonormal_rows(x, 3), np.float64)
  assert np.isfinite(rows).all()
  np.testing.assert_allclose(rows[:4] @ rows[:4].T, np.eye(4), atol=1e-5)
  np.testing.assert_array_equal(rows[5], 0.0)
  off = np.asarray(x[:4], np.float64)
  off = off - off @ rows[:4].T @ rows[:4]
  np.testing.assert_allclose(off, 0.0, atol=1e-4)


def factor_pairs():
  """Thin factors by name: generic, degenerate, and far from 1 in size."""
  a, b = random(12, 40, seed=1), random(12, 30, seed=2)
  return {
    "generic": (a, b),
    "dependent": (a.at[1:].set(a[0]), b),
    "both dependent": (a.at[6:].set(a[:6]), b.at[6:].set(b[:6])),
    "zero a": (0 * a, b),
    "zero": (0 * a, 0 * b),
    "huge and tiny": (1e25 * a, 1e-25 * b),
    "more units than rows": (a[:, :7], b[:, :9]),
  }


@pytest.mark.parametrize("library", [jnp, np])
@pytest.mark.parametrize("name", factor_pairs())
@pytest.mark.parametrize("rank", [1, 5, 50])
def test_recompress_is_the_svd_of_the_product(name, rank, library):
  a, b = map(library.asarray, factor_pairs()[name])
  factors = in_float64(recompress(a, b, rank))
  truth = np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
  u, s, vt = np.linalg.svd(truth, full_matrices=False)
  kept = min(rank, 12, *truth.shape)
  assert factors.s.shape == (kept,)
  check_orthonormal(factors)
  np.testing.assert_allclose(factors.s, s[:kept], rtol=1e-5, atol=1e-6 * s[0])
  best = (u[:, :kept] * s[:kept]) @ vt[:kept]
  size = max(s[0], 1e-30)
  error = np.linalg.norm(truth - product(factors))
  assert error <= np.linalg.norm(truth - best) + 1e-5 * size
  top = np.abs(factors.u).argmax(axis=0)
  assert (factors.u[top, range(kept)] > 0).all()


def test_recompress_batches_and_low_precision():
  a, b = random(2, 3, 12, 40), random(2, 3, 12, 30, seed=1)
  a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  together = jax.jit(recompress, static_argnums=2)(a, b, 5)
  assert together.u.shape == (2, 3, 40, 5)
  alone = recompress(a[1, 2], b[1, 2], 5)
  for one, two in zip(together, alone, strict=True):
    assert one.dtype == jnp.float32
    np.testing.assert_allclose(one[1, 2], two, atol=1e-5)


def test_recompress_undoes_extraction():
  """Taking the factors of a Lora apart again gives the Lora."""
  lora = from_factors(svd(random(*SMALL), 4))
  again = from_factors(recompress(lora.a, lora.b, 4))
  np.testing.assert_allclose(dense(again), dense(lora), atol=1e-5)


@pytest.mark.parametrize(
  ("a", "b", "rank", "message"),
  [
    (jnp.ones((3, 4)), jnp.ones((2, 4)), 1, r"\(3, 4\) and b \(2, 4\)"),
    (jnp.ones((2, 3, 4)), jnp.ones((3, 4)), 1, "must agree"),
    (jnp.ones(3), jnp.ones(3), 1, "must agree|two axes"),
    (jnp.ones((3, 4)), jnp.ones((3, 4)), 0, "at least 1, got 0"),
  ],
)
def test_recompress_refusals(a, b, rank, message):
  with pytest.raises(ValueError, match=message):
    recompress(a, b, rank)
