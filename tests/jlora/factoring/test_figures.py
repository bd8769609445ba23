# SPDX-License-Identifier: Apache-2.0
"""A module's figures against float64 NumPy on matrices known in full."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.factoring.certificates import Certificate, certificate
from jlora.factoring.deltas import survey
from jlora.factoring.figures import at_rank, summarise
from jlora.factoring.rounding import ulp_histogram
from jlora.loras import Lora
from tests.helpers.matrices import matrix

M, N, RANK = 7, 5, 3
SIGMA = np.array([4.0, 2.0, 1.0, 0.5, 0.25])
BASE_NORM, NOISE = 50.0, 0.3

certify = jax.jit(certificate)


def factors(delta):
  """The best rank-3 change of a (..., m, n) delta, in float32."""
  u, s, vt = np.linalg.svd(np.asarray(delta, np.float64), full_matrices=False)
  root = np.sqrt(s[..., :RANK, None])
  a = root * np.swapaxes(u, -1, -2)[..., :RANK, :]
  b = root * vt[..., :RANK, :]
  a, b = a.astype(np.float32), b.astype(np.float32)
  return a, b, s[..., :RANK].astype(np.float32)


def figures_of(delta, noise_std=NOISE):
  a, b, sigma = factors(delta)
  scale = jnp.ones(delta.shape[:-2])
  lora = Lora(jnp.asarray(a), jnp.asarray(b), scale)
  found = jax.tree.map(np.asarray, certify(jnp.asarray(delta), lora))
  return summarise(
    found,
    sigma,
    delta.shape,
    base_norm=BASE_NORM,
    noise_std=noise_std,
    unchanged=float(np.mean(delta == 0)),
  )


def single():
  return matrix(SIGMA, M, N)


def batched():
  """(2, 3, m, n): six matrices of different size and direction."""
  stack = [matrix((1 + at) * SIGMA, M, N, seed=at) for at in range(6)]
  return np.stack(stack).reshape(2, 3, M, N)


def check_figures(delta, figures, rank):
  """Everything again in float64, from the matrices themselves."""
  a, b, _ = factors(delta)
  delta = np.asarray(delta, np.float64)
  change = np.einsum(
    "...ri,...ro->...io",
    a[..., :rank, :].astype(np.float64),
    b[..., :rank, :].astype(np.float64),
  )
  rest, norm = delta - change, math.sqrt(np.sum(delta**2))
  error, size = math.sqrt(np.sum(rest**2)), math.sqrt(np.sum(change**2))
  found = at_rank(figures, rank, delta.size)
  assert figures["norm"] == pytest.approx(norm, rel=1e-6)
  assert figures["mean_abs_delta"] == pytest.approx(np.abs(delta).mean())
  assert figures["relative_change"] == pytest.approx(norm / BASE_NORM, rel=1e-6)
  assert found["relative_error"] == pytest.approx(error / norm, rel=1e-5)
  assert found["energy"] == pytest.approx(1 - (error / norm) ** 2, abs=1e-6)
  assert found["mse"] == pytest.approx(np.mean(rest**2), rel=2e-5)
  cosine = np.sum(delta * change) / (norm * size) if size else 0.0
  assert found["cosine_distance"] == pytest.approx(1 - cosine, abs=1e-6)


@pytest.mark.parametrize("make", [single, batched])
@pytest.mark.parametrize("rank", range(RANK + 1))
def test_figures_at_every_rank(make, rank):
  delta = make()
  check_figures(delta, figures_of(delta), rank)


@pytest.mark.parametrize("make", [single, batched])
@pytest.mark.parametrize("rank", range(1, RANK + 1))
def test_optimality_bounds_the_ratio_to_the_best(make, rank):
  """These factors are the best, so the bound is near 1 and never below."""
  found = at_rank(figures_of(make()), rank, 1)
  assert 1 <= found["optimality"] < 2


def test_ranks_of_a_known_spectrum():
  figures = figures_of(single())
  assert figures["singular_values"] == pytest.approx(SIGMA[:RANK], rel=1e-6)
  # Over the largest value: the whole norm, not only what was kept.
  assert figures["stable_rank"] == pytest.approx(np.sum(SIGMA**2) / 16)
  share = SIGMA[:RANK] ** 2 / np.sum(SIGMA[:RANK] ** 2)
  entropy = -np.sum(share * np.log(share))
  assert figures["effective_rank"] == pytest.approx(np.exp(entropy))


def test_equal_values_count_fully():
  figures = figures_of(matrix(np.array([2.0, 2.0, 2.0]), M, N))
  assert figures["effective_rank"] == pytest.approx(3, rel=1e-5)
  assert figures["stable_rank"] == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize(
  ("noise", "count"), [(0.0, 3), (0.3, 2), (0.6, 1), (1.0, 0)]
)
def test_values_above_the_edge_of_noise(noise, count):
  """The largest value of m x n noise of deviation d is d (√m + √n)."""
  figures = figures_of(single(), noise)
  edge = noise * (math.sqrt(M) + math.sqrt(N))
  assert figures["noise_floor"] == pytest.approx(edge)
  assert figures["noise_floor_rank"] == count == np.sum(SIGMA[:RANK] > edge)


def test_repeating_a_matrix_changes_no_rank():
  one = figures_of(single())
  many = figures_of(np.broadcast_to(single(), (2, 3, M, N)))
  for name in ("stable_rank", "effective_rank", "noise_floor_rank"):
    assert many[name] == pytest.approx(one[name], rel=1e-6)
  assert many["mean_abs_delta"] == pytest.approx(one["mean_abs_delta"])
  for name in ("singular_values", "errors", "changes", "floors"):
    expected = np.sqrt(6) * np.array(one[name])
    assert many[name] == pytest.approx(expected, rel=1e-5)
  for name in ("norm", "noise_floor"):
    assert many[name] == pytest.approx(math.sqrt(6) * one[name])
  assert many["inner"] == pytest.approx(6 * np.array(one["inner"]), rel=1e-5)


@pytest.mark.parametrize("shape", [(M, N), (2, 3, M, N)])
def test_no_change_has_figures(shape):
  figures = figures_of(np.zeros(shape, np.float32))
  json.dumps(figures, allow_nan=False)
  names = ("norm", "mean_abs_delta", "relative_change", "stable_rank")
  assert [figures[name] for name in names] == [0, 0, 0, 0]
  assert (figures["effective_rank"], figures["noise_floor_rank"]) == (0, 0)
  for rank in range(RANK + 1):
    found = at_rank(figures, rank, 35)
    assert (found["relative_error"], found["mse"]) == (0, 0)
    assert found["optimality"] is None


def test_a_base_of_zeros_has_no_relative_change():
  one = np.ones(())
  flat = np.array([1.0, 0.0])
  found = Certificate(one, one, flat, flat, flat, flat)
  figures = summarise(
    found, np.ones(1), (2, 2), base_norm=0.0, noise_std=0.0, unchanged=0.0
  )
  assert figures["relative_change"] is None


def test_large_norms_do_not_overflow():
  """Each fits float32; their squares do not."""
  large = np.full(2, 3e30, np.float32)
  curve = np.stack([large, large / 2], axis=-1)
  found = Certificate(large, large, curve, curve, curve, curve)
  figures = summarise(
    found,
    large[:, None],
    (2, 2, 2),
    base_norm=1e30,
    noise_std=0.0,
    unchanged=0.0,
  )
  assert figures["norm"] == pytest.approx(math.sqrt(2) * 3e30)
  assert at_rank(figures, 1, 8)["relative_error"] == pytest.approx(0.5)


def test_ranks_that_keep_a_share_of_the_energy():
  """The worked example of the spectrum 4, 2, 1, 1/2: 2, 3 and 4 units."""
  delta = matrix(np.array([4.0, 2.0, 1.0, 0.5]), M, N)
  figures = figures_of(delta)
  # Three units were stored and keep 98.8%: for 99% nobody looked.
  ranks = [figures[name] for name in ("rank_90", "rank_95", "rank_99")]
  assert ranks == [2, 3, None]
  exact = figures_of(matrix(np.array([2.0, 2.0, 2.0]), M, N))
  assert exact["rank_99"] == 3
  nothing = figures_of(np.zeros((M, N), np.float32))
  assert (nothing["rank_90"], nothing["rank_99"]) == (0, 0)


@pytest.mark.parametrize("make", [single, batched])
@pytest.mark.parametrize("rank", range(RANK + 1))
def test_the_spectral_bound_holds(make, rank):
  delta = make()
  bound = at_rank(figures_of(delta), rank, delta.size)["spectral_bound"]
  a, b, _ = factors(delta)
  change = np.einsum("...ri,...ro->...io", a[..., :rank, :], b[..., :rank, :])
  true = np.linalg.norm(delta - change, ord=2, axis=(-2, -1)).max()
  assert bound >= true * (1 - 1e-5)
  if make is single and rank < RANK:
    assert bound == pytest.approx(SIGMA[rank], rel=1e-5)


def test_what_was_learnt_is_not_told_where_nobody_looked():
  figures = figures_of(single())
  assert (figures["learnt_norm"], figures["rounding_share"]) == (None, None)


def bfloat16_pair(relative_change):
  """512 x 512 of entries 0.02, a rank-4 change, both stored in bfloat16."""
  rng = np.random.default_rng(0)
  base = jnp.asarray(0.02 * rng.standard_normal((512, 512)), jnp.bfloat16)
  base = np.asarray(base, np.float64)
  change = rng.standard_normal((512, 4)) @ rng.standard_normal((4, 512))
  change *= relative_change * np.linalg.norm(base) / np.linalg.norm(change)
  tuned = jnp.asarray(base + change, jnp.bfloat16)
  return base, change, np.asarray(tuned, np.float32)


def top_four(delta):
  """Their share of the energy."""
  values = np.linalg.svd(delta, compute_uv=False)
  return np.sum(values[:4] ** 2) / np.sum(values**2)


def test_rounding_of_bfloat16_is_told_from_the_finetune():
  """At 1e-2 of the weights: what the four values do not hold is rounding."""
  base, change, tuned = bfloat16_pair(1e-2)
  share = top_four(tuned - base)
  assert share == pytest.approx(0.974, abs=0.001)
  figures = rounded_figures(base, tuned)
  norm = np.linalg.norm(change)
  assert figures["learnt_norm"] == pytest.approx(norm, rel=0.003)
  assert figures["norm"] > 1.012 * norm
  assert figures["rounding_share"] == pytest.approx(1 - share, abs=0.003)
  assert figures["noise_floor_rank"] == 4


def rounded_figures(base, tuned):
  delta = (tuned - base).astype(np.float32)
  u, s, vt = np.linalg.svd(delta, full_matrices=False)
  root = np.sqrt(s[:8, None])
  _, found = survey(base, tuned, jnp.bfloat16)
  lora = Lora(root * u.T[:8], root * vt[:8], np.float32(1))
  return summarise(
    certificate(delta, lora),
    s[:8],
    delta.shape,
    base_norm=float(found.base_norm),
    noise_std=float(found.noise_std),
    unchanged=float(found.unchanged),
    ulps=ulp_histogram(base.astype(np.float32), tuned, jnp.bfloat16),
  )


@pytest.mark.parametrize(
  ("relative_change", "energy", "unchanged"),
  [(1e-3, 0.505, 0.79), (1e-4, 0.113, 0.978)],
)
def test_updates_under_half_an_ulp_leave_most_entries_as_they_were(
  relative_change, energy, unchanged
):
  """Small weights tell all the same what was learnt."""
  base, change, tuned = bfloat16_pair(relative_change)
  assert top_four(tuned - base) == pytest.approx(energy, abs=0.01)
  figures = rounded_figures(base, tuned)
  assert figures["unchanged"] == np.mean(tuned == base)
  assert figures["unchanged"] == pytest.approx(unchanged, abs=0.01)
  norm = np.linalg.norm(change)
  assert figures["learnt_norm"] == pytest.approx(norm, rel=0.05)
  assert abs(figures["norm"] / norm - 1) > 0.1
  lost = np.linalg.norm(tuned - (base + change)) ** 2 / norm**2
  assert figures["rounding_share"] == pytest.approx(lost, rel=0.2)
