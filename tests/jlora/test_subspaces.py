# SPDX-License-Identifier: Apache-2.0
"""Row spaces by either way of NumPy's, and of JAX's arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.subspaces import row_space

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
