# SPDX-License-Identifier: Apache-2.0
"""Loras carried to another weight: what methods keep, and in what gauge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.extraction import (
  add,
  both_parts,
  find_spaces,
  port,
  project,
  rotate,
)
from jlora.factoring import krylov
from jlora.loras import Factors, Lora, dense

METHODS = (add, project, both_parts, rotate)
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
each = pytest.mark.parametrize("method", METHODS)


def lora_of(rng, rank, n_in, n_out, lead=()):
  normal = lambda *s: jnp.asarray(rng.standard_normal((*lead, *s)), jnp.float32)  # noqa: E731
  scale = jnp.full(lead, 0.5, jnp.float32)
  return Lora(normal(rank, n_in), normal(rank, n_out), scale)


def weights(rng, n_in, n_out, drift=0.3):
  w = rng.standard_normal((n_in, n_out))
  other = w + drift * rng.standard_normal((n_in, n_out))
  return jnp.float32(w), jnp.float32(other)


def turn(rng, n, angle):
  """A rotation (n, n) by up to `angle`, in float64."""
  skew = rng.standard_normal((n, n))
  skew -= skew.T
  return scipy.linalg.expm(angle * skew / np.linalg.norm(skew, 2))


def in_float64(method, lora, w_source, w_target, k):
  """The formulas as they are written, dense."""
  spaces = []
  for w in (w_source, w_target):
    u, _, vt = np.linalg.svd(np.asarray(w, float), full_matrices=False)
    spaces.append((u[:, :k] @ u[:, :k].T, vt[:k].T @ vt[:k]))
  (ps, qs), (pt, qt) = spaces
  delta, one, two = (
    np.asarray(dense(lora), float),
    np.eye(len(ps)),
    np.eye(len(qs)),
  )
  if method is add:
    return delta
  if method is project:
    return pt @ delta @ qt
  if method is both_parts:
    inside = pt @ ps @ delta @ qs @ qt
    return inside + (one - pt) @ (one - ps) @ delta @ (two - qs) @ (two - qt)
  # Kato's form of the direct rotation: by projections, without any basis.
  turned = []
  for old, new, own in ((ps, pt, one), (qs, qt, two)):
    middle = own - (old - new) @ (old - new)
    root = np.real(scipy.linalg.sqrtm(np.linalg.inv(middle)))
    turned.append(root @ (new @ old + (own - new) @ (own - old)))
  return turned[0] @ delta @ turned[1].T


@each
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (7, 7)])
def test_factors_give_what_the_formula_gives(method, shape, k):
  rng = np.random.default_rng(k)
  lora, (old, new) = lora_of(rng, 2, *shape), weights(rng, *shape)
  found = port(lora, old, new, method=method, k=k)
  close(dense(found), in_float64(method, lora, old, new, k))
  assert found.rank == (4 if method is both_parts else 2)


@each
def test_the_same_base_changes_nothing(method):
  rng = np.random.default_rng(0)
  lora, (w, _) = lora_of(rng, 3, 6, 6), weights(rng, 6, 6)
  close(dense(port(lora, w, w, method=method)), dense(lora))


def test_all_directions_make_project_add_whatever_the_target():
  rng = np.random.default_rng(1)
  lora, (old, new) = lora_of(rng, 3, 6, 6), weights(rng, 6, 6, drift=9.0)
  close(dense(port(lora, old, new, method=project)), dense(lora))


def test_a_turned_plane_keeps_its_cosine():
  """θ = 30° in R³."""
  c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
  target = jnp.float32([[c, 0], [0, 1], [s, 0]]) * jnp.float32([[2.0, 1.0]])
  source = jnp.float32(np.eye(3)[:, :2]) * jnp.float32([[2.0, 1.0]])
  lora = Lora(jnp.eye(3)[:1], jnp.eye(2)[:1], jnp.float32(1))
  kept = dense(port(lora, source, target, method=project))
  close(kept[:, 0], (0.75, 0, 0.433013))
  close(np.linalg.norm(kept), 0.866025)
  moved = dense(port(lora, source, target, method=rotate))
  close(moved[:, 0], (0.866025, 0, 0.5))


def test_a_rotation_out_of_the_space_is_followed():
  """The nearest one between the spaces; one within them cannot be seen."""
  rng = np.random.default_rng(2)
  u = np.linalg.qr(rng.standard_normal((6, 6)))[0]
  angles = (0.3, 0.5)
  across = np.zeros((6, 6))
  for i, angle in enumerate(angles):  # each plane: one inside, one outside
    across[i, 4 + i], across[4 + i, i] = -angle, angle
  q = u @ scipy.linalg.expm(across) @ u.T
  w = u[:, :4] @ np.diag([4.0, 3, 2, 1]) @ np.eye(4)
  lora = lora_of(rng, 2, 6, 4)
  found = port(lora, jnp.float32(w), jnp.float32(q @ w), method=rotate)
  close(dense(found), q @ np.asarray(dense(lora)))
  within = u[:, :4] @ turn(rng, 4, 1.0) @ u[:, :4].T @ w
  close(
    dense(port(lora, jnp.float32(w), jnp.float32(within), method=rotate)),
    dense(lora),
  )


@each
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 6))
def test_any_gauge_gives_the_same(method, seed, k):
  """Of the factors, and of the singular vectors: signs, and equal values."""
  rng = np.random.default_rng(seed)
  lora, (old, new) = lora_of(rng, 3, 7, 6), weights(rng, 7, 6)
  r = rng.standard_normal((3, 3)) + 3 * np.eye(3)
  other = Lora(
    jnp.float32(r @ np.asarray(lora.a)),
    jnp.float32(np.linalg.inv(r).T @ np.asarray(lora.b)),
    lora.scale,
  )

  def shuffled(w, k, key=None):
    """A factoriser with other signs and another order."""
    del key
    u, s, vt = np.linalg.svd(np.asarray(w, float), full_matrices=False)
    order, signs = rng.permutation(k), rng.choice([-1.0, 1.0], k)
    u, vt = (u[:, :k] * signs)[:, order], (vt[:k] * signs[:, None])[order]
    # Values only say which directions are there.
    return Factors(*map(jnp.float32, (u, np.full(k, s[0]), vt)))

  wanted = dense(port(lora, old, new, method=method, k=k))
  close(dense(port(other, old, new, method=method, k=k)), wanted, atol=1e-3)
  found = port(lora, old, new, method=method, k=k, factor=shuffled)
  close(dense(found), wanted, atol=1e-3)


def test_project_is_idempotent_and_rotate_keeps_the_length():
  rng = np.random.default_rng(3)
  lora, (old, new) = lora_of(rng, 2, 9, 8), weights(rng, 9, 8)
  once = port(lora, old, new, method=project, k=4)
  close(dense(port(once, old, new, method=project, k=4)), dense(once))
  assert np.linalg.norm(dense(once)) < np.linalg.norm(dense(lora))
  turned = port(lora, old, new, method=rotate, k=4)
  close(np.linalg.norm(dense(turned)), np.linalg.norm(dense(lora)), atol=1e-4)


@each
def test_stacks_jit_and_other_factorisers(method):
  rng = np.random.default_rng(4)
  lora = lora_of(rng, 2, 12, 10, lead=(3,))
  old, new = (
    jnp.float32(rng.standard_normal((3, 12, 10)) + np.eye(12, 10) * 9)
    for _ in range(2)
  )
  run = jax.jit(functools.partial(port, method=method, k=4))
  found = run(lora, old, new)
  for i in range(3):
    layer = jax.tree.map(lambda x, i=i: x[i], lora)
    one = port(layer, old[i], new[i], method=method, k=4)
    close(dense(found)[i], dense(one), atol=1e-4)
  by_krylov = port(lora, old, new, method=method, k=4, factor=krylov)
  close(dense(by_krylov), dense(found), atol=1e-3)


@each
def test_a_weight_of_lower_rank_has_no_more_directions(method):
  rng = np.random.default_rng(5)
  lora = lora_of(rng, 2, 6, 6)
  low = [
    jnp.float32(rng.standard_normal((6, r)) @ rng.standard_normal((r, 6)))
    for r in (2, 3)
  ]
  found = dense(port(lora, *low, method=method, k=5))
  assert np.isfinite(found).all()
  assert np.linalg.norm(found) <= np.linalg.norm(dense(lora)) * 1.0001
  rank = np.linalg.matrix_rank(find_spaces(low[0], 5).reads)
  assert rank == 2


def test_directions_without_a_counterpart_stay():
  """At a right angle, or where one weight has fewer of them."""
  rng = np.random.default_rng(7)
  one = lora_of(rng, 1, 2, 1)
  across = jnp.eye(2)[:, :1], jnp.eye(2)[:, 1:]
  close(dense(port(one, *across, method=rotate)), dense(one))
  lora = lora_of(rng, 2, 6, 6)
  low, high = (
    jnp.float32(rng.standard_normal((6, r)) @ rng.standard_normal((r, 6)))
    for r in (2, 3)
  )
  for pair in ((low, high), (high, low)):
    found = dense(port(lora, *pair, method=rotate, k=5))
    close(np.linalg.norm(found), np.linalg.norm(dense(lora)), atol=1e-4)


def test_what_does_not_fit_is_refused():
  rng = np.random.default_rng(6)
  lora, (w, _) = lora_of(rng, 2, 6, 5), weights(rng, 6, 5)
  with pytest.raises(ValueError, match=r"\(6, 5\); w_source is \(6, 5\) and"):
    port(lora, w, w[:5])
  for k in (0, 6):
    with pytest.raises(ValueError, match="has 1 to 5"):
      port(lora, w, w, k=k)
