# SPDX-License-Identifier: Apache-2.0
"""Small decompositions: right in both libraries, whole on every device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora.numerics.linalg import (
  alike,
  descending_eigh,
  inverse_of,
  row_space,
  shifted_cholesky,
  thin_qr,
  thin_svd,
)

SQUARE = np.random.default_rng(0).standard_normal((16, 16), np.float32)
GRAM = SQUARE @ SQUARE.T + 8 * np.eye(16, dtype=np.float32)


def from_eigenpairs(x):
  values, vectors = descending_eigh(x)
  return (vectors * values[None]) @ vectors.T


def from_triplets(x):
  u, s, vt = thin_svd(x)
  return (u * s[None]) @ vt


def from_triangle(x):
  q, r = thin_qr(x)
  return q @ r


def from_factor(x):
  lower = shifted_cholesky(x)
  return lower @ lower.T


def from_inverse(x):
  return inverse_of(inverse_of(shifted_cholesky(x)))


CASES = {
  "eigh": (from_eigenpairs, GRAM, GRAM),
  "svd": (from_triplets, SQUARE, SQUARE),
  "qr": (from_triangle, SQUARE, SQUARE),
  "cholesky": (from_factor, GRAM, GRAM),
  "inverse": (from_inverse, GRAM, np.linalg.cholesky(GRAM)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_the_parts_give_the_whole(case, convert):
  rebuild, x, whole = CASES[case]
  with jax.default_matmul_precision("highest"):
    found = np.asarray(rebuild(convert(x)))
  np.testing.assert_allclose(found, whole, atol=2e-4 * np.abs(whole).max())


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_rounding_below_zero_does_not_stop_a_factor(convert):
  # the Gram matrix of two rows among twenty, as float32 products left it
  gram = np.diag(np.float32([1, 1, *[0] * 17, -1.3e-7]))
  lower = shifted_cholesky(convert(gram), np.float32(5e-8))
  assert np.isfinite(np.asarray(lower)).all()
  np.testing.assert_allclose(lower @ lower.T, gram, atol=4e-6)


def test_eigenvalues_come_largest_first():
  values, _ = descending_eigh(jnp.diag(jnp.arange(3.0)))
  assert values.tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("knows_mesh", [True, False])
def test_a_known_mesh_holds_the_problem_whole(knows_mesh):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  cut = NamedSharding(mesh, PartitionSpec(None, "x"))
  x = jax.device_put(GRAM, cut)
  double = jax.jit(lambda x: alike(lambda x: x + x, x))
  if knows_mesh:
    with jax.set_mesh(mesh):
      found = double(x)
  else:
    found = double(x)
  assert found.sharding.is_fully_replicated == knows_mesh
  np.testing.assert_array_equal(found, 2 * GRAM)


def test_a_batch_stays_where_it_is():
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
  cut = NamedSharding(mesh, PartitionSpec("x", None, "y"))
  batch = jax.device_put(np.stack([GRAM] * 8), cut)
  with jax.set_mesh(mesh):
    values, vectors = jax.jit(jax.vmap(descending_eigh))(batch)
  assert values.sharding.spec[0] == vectors.sharding.spec[0] == "x"
  np.testing.assert_allclose(
    values[3], np.linalg.eigvalsh(GRAM)[::-1], rtol=1e-3, atol=1e-3
  )


def test_tpus_take_jacobis_method():
  x = jax.ShapeDtypeStruct((300, 300), jnp.float32)
  program = jax.jit(descending_eigh).trace(x).lower(lowering_platforms=("tpu",))
  assert "Eigh" in program.as_text()
  assert "while" not in program.as_text()  # the other method is a loop


ROWS = {
  "normal": np.ones(12),
  "spread over two decades": 10 ** np.linspace(0, -2, 12),
  "spread over five": 10 ** np.linspace(0, -5, 12),
  "dependent": np.repeat([1.0, 0.0], 6),
  "zero": np.zeros(12),
}


def drawn(scale):
  rng = np.random.default_rng(0)
  mixing = np.linalg.qr(rng.standard_normal((12, 12)))[0]
  rows = np.linalg.qr(rng.standard_normal((70, 12)))[0].T
  return (mixing * scale @ rows).astype(np.float32)


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_space_is_orthonormal_and_holds_the_rows(name, library):
  x = drawn(ROWS[name])
  q, r = (np.asarray(y, np.float64) for y in row_space(library.asarray(x)))
  assert np.abs(q @ q.T - np.eye(12)).max() < 2e-6
  assert np.abs(r @ q - x).max() < 1e-6


@pytest.mark.parametrize(
  ("name", "count"), [("normal", 0), ("spread over five", 1), ("dependent", 1)]
)
def test_householder_is_for_rows_near_to_dependent(monkeypatch, name, count):
  rows, called, plain = drawn(ROWS[name]), [], np.linalg.qr
  monkeypatch.setattr(np.linalg, "qr", lambda x: called.append(1) or plain(x))
  row_space(rows)
  assert len(called) == count
