# SPDX-License-Identifier: Apache-2.0
"""Whitened factors against the dense weighted optimum, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora.factoring.whitening import diagonal, full, whitened
from tests.helpers.matrices import SPECTRA, matrix

M, N, RANK = 96, 128, 8
LIBRARIES = {"numpy": np.asarray, "jax": jnp.asarray}

every_library = pytest.mark.parametrize("library", LIBRARIES)


def moment_of(size, seed, decay=3.0):
  """A second moment whose eigenvalues span `decay` powers of ten."""
  rng = np.random.default_rng(seed)
  vectors = np.linalg.qr(rng.standard_normal((size, size)))[0]
  values = np.logspace(0, -decay, size)
  return ((vectors * values) @ vectors.T).astype(np.float32)


def dense_root(moment, ridge=0.0):
  c = np.asarray(moment, np.float64)
  c = c + ridge * np.trace(c) / len(c) * np.eye(len(c))
  values, vectors = np.linalg.eigh(c)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def only_diagonal(moment):
  return np.diag(np.diag(moment))


C, G = moment_of(M, 1), moment_of(N, 2)
#: name -> (weights of `whitened`, the roots that they stand for).
WEIGHTS = {
  "plain": lambda like: ({}, (np.eye(M), np.eye(N))),
  "diagonal": lambda like: (
    {"inputs": diagonal(like(C), 0.1)},
    (dense_root(only_diagonal(C), 0.1), np.eye(N)),
  ),
  "full": lambda like: (
    {"inputs": full(like(C))},
    (dense_root(C), np.eye(N)),
  ),
  "ridge": lambda like: (
    {"inputs": full(like(C), 0.1)},
    (dense_root(C, 0.1), np.eye(N)),
  ),
  "outputs": lambda like: (
    {"outputs": full(like(G), 0.01)},
    (np.eye(M), dense_root(G, 0.01)),
  ),
  "two-sided": lambda like: (
    {"inputs": full(like(C), 0.01), "outputs": full(like(G), 0.01)},
    (dense_root(C, 0.01), dense_root(G, 0.01)),
  ),
  "mixed": lambda like: (
    {"inputs": diagonal(like(C)), "outputs": full(like(G))},
    (dense_root(only_diagonal(C)), dense_root(G)),
  ),
}

every_weight = pytest.mark.parametrize("weight", WEIGHTS)


def product(factors):
  u, s, vt = (np.asarray(x, np.float64) for x in factors)
  return (u * s[..., None, :]) @ vt


def lost(delta, factors, roots):
  left, right = roots
  return np.linalg.norm(left @ (np.float64(delta) - product(factors)) @ right)


@every_weight
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_error_is_the_weighted_optimum(weight, spectrum):
  weights, roots = WEIGHTS[weight](np.asarray)
  delta = matrix(SPECTRA[spectrum](M), M, N)
  found = whitened(delta, RANK, **weights)
  assert all(type(x) is np.ndarray for x in found)
  check_optimum(delta, found, roots)


@pytest.mark.parametrize("weight", ["mixed", "two-sided"])
def test_compiled_it_is_the_optimum_as_well(weight):
  weights, roots = WEIGHTS[weight](jnp.asarray)
  delta = matrix(SPECTRA["power_law"](M), M, N)
  whiten = jax.jit(lambda delta, weights: whitened(delta, RANK, **weights))
  check_optimum(delta, whiten(delta, weights), roots)


def check_optimum(delta, found, roots):
  left, right = roots
  sigma = np.linalg.svd(left @ np.float64(delta) @ right, compute_uv=False)
  assert all(x.dtype == np.float32 for x in found)
  slack = 2e-5 * np.linalg.norm(sigma)
  best = np.linalg.norm(sigma[RANK:])
  assert lost(delta, found, roots) <= 1.001 * best + slack
  np.testing.assert_allclose(
    found.s, sigma[:RANK], rtol=2e-3, atol=2e-5 * sigma[0]
  )


@every_library
def test_without_weights_it_is_the_factoriser(library):
  delta = LIBRARIES[library](matrix(SPECTRA["flat"](M), M, N))
  for factor in (jlora.factoring.svd, jlora.factoring.gram)[
    : 2 if library == "numpy" else 1
  ]:
    found = whitened(delta, RANK, jax.random.key(3), factor=factor)
    for one, two in zip(
      found, factor(delta, RANK, jax.random.key(3)), strict=True
    ):
      np.testing.assert_array_equal(one, two)


@every_weight
def test_factors_are_orthonormal_under_the_weights_and_nested(weight):
  weights, (left, right) = WEIGHTS[weight](np.asarray)
  delta = matrix(SPECTRA["power_law"](M), M, N)
  u, s, vt = whitened(delta, RANK, **weights)
  sigma = np.linalg.svd(left @ np.float64(delta) @ right, compute_uv=False)
  eye = np.eye(RANK)
  np.testing.assert_allclose(u.T @ left @ left @ u, eye, atol=2e-3)
  np.testing.assert_allclose(vt @ right @ right @ vt.T, eye, atol=2e-3)
  for rank in range(1, RANK):
    cut = jlora.loras.Factors(u[:, :rank], s[:rank], vt[:rank])
    best = np.linalg.norm(sigma[rank:])
    assert lost(delta, cut, (left, right)) <= 1.001 * best


def test_worked_numbers():
  """Spec 02, example 3; then the smaller value first, for it is read more."""
  delta = np.array([[3, 0], [4, 5]], np.float32)
  np.testing.assert_allclose(
    whitened(delta, 2).s, [6.708204, 2.236068], rtol=1e-6
  )
  eye = full(7 * np.eye(2, dtype=np.float32))
  same = whitened(delta, 1, inputs=eye, outputs=eye)
  np.testing.assert_allclose(product(same), [[1.5, 1.5], [4.5, 4.5]], rtol=1e-5)
  # The first row alone is read: it is kept exactly, the second given up.
  once = full(np.diag(np.array([1, 0], np.float32)))
  found = whitened(delta, 1, inputs=once)
  np.testing.assert_allclose(product(found), [[3, 0], [0, 0]], atol=1e-6)


@every_library
def test_the_error_is_what_layers_write_wrongly(library):
  """Against inputs themselves, through the collector's Moment."""
  like = LIBRARIES[library]
  rng = np.random.default_rng(5)
  x = rng.standard_normal((500, M)) * np.geomspace(1, 1e-2, M)
  delta = matrix(SPECTRA["power_law"](M), M, N)
  moment = jlora.factoring.Moment(like(np.float32(x.T @ x)), len(x))
  found = whitened(like(delta), RANK, inputs=full(moment))
  written = np.linalg.svd(x @ delta, compute_uv=False) / np.sqrt(len(x))
  np.testing.assert_allclose(found.s, written[:RANK], rtol=1e-3)
  plain = jlora.loras.from_factors(jlora.factoring.svd(delta, RANK))
  ours = jlora.loras.from_factors(found)
  assert jlora.factoring.weighted_error(
    like(delta), ours, moment
  ) == pytest.approx(
    np.linalg.norm(written[RANK:]) / np.linalg.norm(written), rel=1e-3
  )
  assert jlora.factoring.weighted_error(like(delta), ours, moment) < 0.8 * (
    jlora.factoring.weighted_error(delta, plain, moment)
  )


@settings(max_examples=30, deadline=None)
@given(
  shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
  seen=st.integers(1, 9),
  rank=st.integers(1, 4),
  seed=st.integers(0, 2**16),
)
def test_no_other_change_of_that_rank_loses_less(shape, seen, rank, seed):
  """Also where fewer inputs were seen than there are channels."""
  rng = np.random.default_rng(seed)
  delta = rng.standard_normal(shape).astype(np.float32)
  x = rng.standard_normal((seen, shape[0])).astype(np.float32)
  g = rng.standard_normal((20, shape[1])).astype(np.float32)
  found = whitened(delta, rank, inputs=full(x.T @ x), outputs=full(g.T @ g))
  assert np.isfinite(product(found)).all()

  def loss(change):
    return np.linalg.norm(x @ (delta - change) @ g.T)

  ours, slack = loss(product(found)), 1e-4 * loss(0)
  for scale in (1e-3, 0.1, 1.0):
    u = rng.standard_normal((shape[0], rank))
    v = rng.standard_normal((rank, shape[1]))
    assert ours <= loss(scale * u @ v) + slack
  assert ours <= loss(product(jlora.factoring.svd(delta, rank))) + slack


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-6, 1e6), kind=st.sampled_from([full, diagonal]))
def test_only_the_proportions_of_a_moment_matter(scale, kind):
  delta = matrix(SPECTRA["spiked"](M), M, N)
  one, two = (
    product(whitened(delta, RANK, inputs=kind(c, 0.01)))
    for c in (C, C * np.float32(scale))
  )
  np.testing.assert_allclose(one, two, atol=2e-4 * np.abs(one).max())


def test_a_large_ridge_is_no_weight_and_the_kinds_agree_on_diagonals():
  delta = matrix(SPECTRA["spiked"](M), M, N)
  plain = product(jlora.factoring.svd(delta, RANK))
  ridged = whitened(
    delta, RANK, inputs=full(C, 1e5), factor=jlora.factoring.svd
  )
  np.testing.assert_allclose(product(ridged), plain, atol=1e-3)
  weak = only_diagonal(C)
  one, two = (
    product(whitened(delta, RANK, inputs=kind(weak, 0.1)))
    for kind in (full, diagonal)
  )
  np.testing.assert_allclose(one, two, atol=1e-4)
  assert np.abs(one - plain).max() > 1e-2


@pytest.mark.parametrize("kind", [full, diagonal])
def test_batches_are_single_ones_side_by_side(kind):
  deltas = np.stack(
    [matrix(SPECTRA["flat"](24), 24, 40, seed=i) for i in (1, 2)]
  )
  moments = np.stack([moment_of(24, i) for i in (3, 4)])
  jitted = jax.jit(
    lambda deltas, moments: whitened(
      deltas, 4, inputs=kind(moments), factor=jlora.factoring.svd
    )
  )
  together = product(jitted(deltas, moments))
  for at in range(2):
    alone = whitened(
      deltas[at], 4, inputs=kind(moments[at]), factor=jlora.factoring.svd
    )
    np.testing.assert_allclose(together[at], product(alone), atol=1e-3)


def test_what_does_not_fit_is_refused():
  delta = np.ones((4, 6), np.float32)
  weight = full(np.eye(6, dtype=np.float32))
  with pytest.raises(ValueError, match=r"inputs weight \(6, 6\) does not fit"):
    whitened(delta, 1, inputs=weight)
  whitened(delta, 1, outputs=weight)
  with pytest.raises(ValueError, match=r"outputs weight \(4,\) does not fit"):
    whitened(delta, 1, outputs=diagonal(np.eye(4)))
  with pytest.raises(ValueError, match="two axes"):
    whitened(delta[0], 1, inputs=weight)
  for kind in (full, diagonal):
    with pytest.raises(ValueError, match=r"got \(2, 3\) and 0"):
      kind(np.ones((2, 3)))
    with pytest.raises(ValueError, match="-1"):
      kind(np.eye(2), -1.0)
    with pytest.raises(ValueError, match="nan"):
      kind(np.eye(2), float("nan"))
