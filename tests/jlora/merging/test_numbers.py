# SPDX-License-Identifier: Apache-2.0
"""Merges against numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.loras import Lora, dense
from jlora.merging.adapters import common_spaces, concatenation
from jlora.merging.arrays import (
  averages,
  fusion,
  overlaps,
  pruning,
  singular_vectors,
  sparsifiers,
  spherical,
  task_vectors,
)
from jlora.merging.arrays import (
  averages as stocks,
)
from jlora.merging.arrays import (
  sparsifiers as rescalings,
)
from jlora.merging.arrays import (
  task_vectors as consensus,
)

CHANGES = jnp.array([[2, -1, 0.5, 0], [1, 3, -0.2, 0.4]], jnp.float32)
ONES, NONE = [1.0, 1.0], jnp.zeros(4)
# Whose changes are diag(3, 0) and diag(0, 1).
UNITS = [
  Lora(jnp.eye(2)[i : i + 1], strength * jnp.eye(2)[i : i + 1], jnp.float32(1))
  for i, strength in enumerate((3.0, 1.0))
]


@functools.cache
def program(method, names):
  return jax.jit(method, static_argnames=names)


def run(method, stack, weights, base=None, /, **settings):
  """One program for a test, for less than its operations one by one."""
  values = tuple(sorted(settings))
  whole = program(method, tuple(n for n in values if n in STATIC))
  return whole(stack, np.float32(weights), base, **settings)


# Settings that shape the program; others are its arguments.
STATIC = ("normalize", "axis", "method", "steps")


def close(found, wanted, **tolerance):
  tolerance = tolerance or {"atol": 1e-6}
  np.testing.assert_allclose(found, np.asarray(wanted), **tolerance)


@pytest.mark.parametrize(
  ("settings", "wanted"),
  [
    ({"density": 1.0}, (1.5, 3, 0.5, 0.4)),
    ({"density": 1.0, "normalize": False}, (3, 3, 0.5, 0.4)),
    ({"density": 0.5}, (1.5, 3, 0, 0)),
    ({"density": [1.0, 0.5]}, (1.5, 3, 0.5, 0)),
    ({"threshold": 1.0}, (1.5, 3, 0, 0)),
    ({"threshold": [2.0, 0.3]}, (1.5, 3, 0, 0.4)),
    ({"density": 0.5, "scale": 2.0}, (3, 6, 0, 0)),
  ],
)
def test_ties(settings, wanted):
  close(run(task_vectors.ties, CHANGES, ONES, NONE, **settings), wanted)


def test_the_plain_mean():
  close(run(averages.linear, CHANGES, ONES), (1.5, 1, 0.15, 0.2))


def test_who_is_elected_where_changes_cancel():
  """The paper asks the majority of all entries, mergekit takes plus."""
  changes = jnp.array([[1.0, -2, -2], [-1.0, -2, 1]])
  close(consensus.by_mass(changes), (-1, -1, -1))
  close(consensus.by_mass_or_plus(changes), (1, -1, -1))
  close(consensus.by_count(changes), (1, -1, 1))


def test_rescaling_what_was_kept_by_chance():
  kept = jnp.array([2.0, 0, 0.5, 0])
  close(rescalings.inverse_keep(CHANGES[0], kept, 0.5), (4, 0, 1, 0))
  close(rescalings.match_l1(CHANGES[0], kept, 0.5), (2.8, 0, 0.7, 0))


def test_slerp():
  models = jnp.array([[1.0, 0], [0, 2]])
  close(run(spherical.slerp, models, ONES, t=0.5), (0.70710678, 1.41421356))
  for t in (0, 1):
    np.testing.assert_array_equal(
      run(spherical.slerp, models, ONES, t=float(t)), models[t]
    )
  same = jnp.stack([CHANGES[0]] * 2)
  close(run(spherical.slerp, same, ONES), CHANGES[0])


def test_nuslerp_of_opposite_models_stays_finite():
  models = jnp.stack([CHANGES[0], -CHANGES[0]])
  close(run(spherical.nuslerp, models, [3.0, 1.0]), CHANGES[0] / 2)
  close(run(spherical.nuslerp, models, [1.0, -1.0]), jnp.zeros(4))


def test_the_tangent_of_multislerp_is_zero():
  """What mergekit computes, step by step, in float64."""
  models = np.random.default_rng(0).standard_normal((3, 5))
  shares = np.array([0.5, 0.2, 0.3])
  norms = np.linalg.norm(models, axis=1)
  units = models / norms[:, None]
  mean = shares @ units
  mean /= np.linalg.norm(mean)
  tangent = shares @ (units - (units @ mean)[:, None] * mean)
  assert np.linalg.norm(tangent) < 1e-12
  found = run(spherical.multislerp, jnp.float32(models), shares)
  close(found, mean * (shares @ norms))


def test_the_karcher_mean_is_where_the_logarithms_cancel():
  models = np.random.default_rng(1).standard_normal((3, 5))
  shares = np.array([0.6, 0.3, 0.1])
  found = np.float64(
    run(spherical.karcher, jnp.float32(models), shares, steps=50)
  )
  norms = np.linalg.norm(models, axis=1)
  assert np.linalg.norm(found) == pytest.approx(shares @ norms, rel=1e-5)
  mean = found / np.linalg.norm(found)
  cosines = models @ mean / norms
  logs = models / norms[:, None] - cosines[:, None] * mean
  angles = np.arccos(cosines) / np.sqrt(1 - cosines**2)
  assert np.linalg.norm((shares * angles) @ logs) < 1e-4


def offsets():
  """Three of length 1 with cosines 0.6, 0.6 and 0.36, in the plane and up."""
  return jnp.array([[1.0, 0, 0], [0.6, 0.8, 0], [0.6, 0, 0.8]])


def test_model_stock():
  found = run(stocks.model_stock, offsets(), [1.0] * 3, jnp.zeros(3))
  close(found, (0.560784, 0.203922, 0.203922))
  models = jnp.array([[1.0, 0], [0.5, 0.75**0.5]])
  half = run(stocks.model_stock, models, ONES, jnp.zeros(2))
  close(half, 2 / 3 * jnp.mean(models, axis=0))


def test_model_stock_of_opposite_changes_is_the_base():
  models = 1 + jnp.array([[1.0, 0], [-1.0, 0.1]])
  close(run(stocks.model_stock, models, ONES, jnp.ones(2)), (1, 1))


def test_model_stock_row_by_row():
  rows = jnp.stack([jnp.ones((2, 2)), jnp.array([[1.0, 1], [1, -1]])])
  found = run(stocks.model_stock, rows, ONES, jnp.zeros((2, 2)), axis=-1)
  close(found, [[1, 1], [0, 0]])


def test_nearswap():
  found = run(
    averages.nearswap, jnp.array([[1.01, 1.5, 3.0]]), [1.0], jnp.ones(3), t=0.1
  )
  close(found, (1.01, 1.1, 1.1))


def test_sce():
  found = run(task_vectors.sce, CHANGES, ONES, NONE, density=0.5)
  close(found, (4 / 3, 3, 0, 0))


def test_whom_della_keeps():
  delta = jnp.array([0.1, -0.5, 2, 1])
  found = sparsifiers.keep_probability(delta, 0.7)
  close(found, (0.55, 0.65, 0.85, 0.75))
  close(
    sparsifiers.keep_probability(delta[:, None], 0.7), 0.7 * np.ones((4, 1))
  )


def test_breadcrumbs_keeps_the_middle():
  delta = jnp.array([3.0, -5, 1, 2, -4])
  found = sparsifiers.keep_middle(delta, 0.6, gamma=0.2)
  close(found, (3, 0, 0, 2, -4))


@pytest.mark.parametrize(
  ("gamma", "wanted"),
  [
    (0.0, (3, -5, 0, 0, -4)),
    (0.01, (3, -5, 0, 0, -4)),  # less than an entry
    (0.2, (3, 0, 0, 2, -4)),
    (0.4, (3, 0, 1, 2, 0)),
    (0.9, (3, 0, 1, 2, 0)),  # more than the density leaves
  ],
)
def test_breadcrumbs_keeps_its_share_for_any_gamma(gamma, wanted):
  """What mergekit 0.1.5 keeps too."""
  delta = jnp.array([3.0, -5, 1, 2, -4])
  close(sparsifiers.keep_middle(delta, 0.6, gamma=gamma), wanted)


@pytest.mark.parametrize("gamma", [-0.1, 1.5, [0.1, 2.0]])
def test_breadcrumbs_refuses_a_gamma_that_is_no_share(gamma):
  stack = jnp.ones((2, 5))
  with pytest.raises(ValueError, match="gamma .* must lie in"):
    pruning.breadcrumbs(stack, [1, 1], jnp.zeros(5), density=0.5, gamma=gamma)


def test_settings_of_each_model():
  base = jnp.zeros(5)
  stack = jnp.stack([jnp.array([3.0, -5, 1, 2, -4])] * 2)
  found = pruning.breadcrumbs(
    stack, [1.0, 10.0], base, density=0.6, gamma=[0.0, 0.4]
  )
  close(found, (33, -5, 10, 20, -4))
  loose, tight = jnp.float32([0.0, 0.3])
  both = pruning.della(
    stack, [1.0, 0.0], base, density=0.7, epsilon=[loose, tight]
  )
  close(
    both, pruning.della(stack, [1.0, 0.0], base, density=0.7, epsilon=loose)
  )
  with pytest.raises(ValueError, match=r"must lie in \[0.4, 0.6\]"):
    pruning.della(stack, ONES, base, density=0.7, epsilon=[0.1, 0.4])


def test_rescaling_what_trims_keep():
  """mergekit's `rescale` of methods whose papers have none."""
  given = CHANGES[:1], [1.0], NONE
  close(task_vectors.ties(*given, density=0.5), (2, -1, 0, 0))
  close(
    task_vectors.ties(*given, density=0.5, rescale=rescalings.match_l1),
    np.array([2, -1, 0, 0]) * 3.5 / 3,
  )
  close(
    pruning.breadcrumbs(
      *given, density=0.5, gamma=0.25, rescale=rescalings.match_l1
    ),
    np.array([0, -1, 0.5, 0]) * 3.5 / 1.5,
  )


def test_a_mean_divides_by_the_weights_and_an_election_by_their_size():
  """Without an election a weighted mean; with one it keeps the elected sign."""
  deltas, weights = CHANGES[:, :2], jnp.float32([1.0, -0.5])
  weighted = weights[:, None] * deltas  # (2, -1), (-0.5, -1.5)
  plain = consensus.combine(deltas, weights, normalize=True)
  close(plain, weighted.sum(0) / 0.5)
  elected = consensus.combine(
    deltas, weights, elect=consensus.by_mass, normalize=True
  )
  close(elected, (2 / 1, -2.5 / 1.5))


def test_sce_selects_as_many_entries_as_it_says():
  """Compiled: the spread is then computed again beside its threshold."""
  merge = jax.jit(functools.partial(task_vectors.sce, density=0.4))
  for seed in range(10):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((64, 64), np.float32)
    change = rng.standard_normal((3, 64, 64), np.float32)
    found = merge(base + np.float32(0.1) * change, np.ones(3, np.float32), base)
    assert int((np.asarray(found) != base).sum()) == int(0.4 * 64 * 64)


def test_ram():
  """In float64, as its paper has it."""
  rng = np.random.default_rng(0)
  acts = rng.random((3, 8, 6)) < 0.4
  deltas = np.where(acts, rng.standard_normal((3, 8, 6)), 0)
  base = rng.standard_normal((8, 6))
  counts = acts.sum(0)
  shared, alone = acts & (counts > 1), acts & (counts == 1)
  mean = (shared * deltas).sum(0) / np.maximum(counts, 1)
  rho = shared.sum((1, 2)) / alone.sum((1, 2))
  for strength, bound in ((0.0, 0.2), (0.5, 9.0), (0.5, 0.1)):
    lift = 1 + strength * np.clip(rho, 0, bound)
    wanted = base + mean + (lift[:, None, None] * alone * deltas).sum(0)
    found = overlaps.ram(
      np.float32(base + deltas),
      np.ones(3),
      np.float32(base),
      strength=strength,
      bound=bound,
    )
    close(found, wanted, atol=1e-5)


def test_ram_subtracts_what_a_negative_weight_is_of():
  """Shared entries are not turned around, nor added where weights cancel."""
  stack, base = np.float32([[1, 2, 0], [0, 4, 6]]), np.zeros(3, np.float32)
  close(overlaps.ram(stack, [-1.0, -1.0], base), (-1, -3, -6))
  close(overlaps.ram(stack, [1.0, -1.0], base), (1, -1, -6))


def softmax(x):
  powers = np.exp(x - x.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("size", [2.0, 0.7, 1e-4])
@pytest.mark.parametrize("shape", [(6, 5), (2, 4, 7), (40,), (1,)])
def test_arcee_fusion(shape, size):
  """In float64; of these shapes mergekit 0.1.5 takes the same entries."""
  rng = np.random.default_rng(1)
  base = rng.standard_normal(shape, np.float32).astype(float)
  model = np.float32(base + size * rng.standard_normal(shape)).astype(float)
  p, q = softmax(model), softmax(base)
  score = np.abs(model - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
  ordered = np.sort(score, axis=None)
  low, middle, high = (ordered[(score.size - 1) * k // 4] for k in (1, 2, 3))
  wanted = np.where(score > middle + 1.5 * (high - low), model, base)
  for method in (fusion.arcee_fusion, jax.jit(fusion.arcee_fusion)):
    found = method(np.float32(model)[None], np.float32([1]), np.float32(base))
    close(found, wanted)
  assert 0 < (wanted != base).sum() < base.size or score.size == 1
  same = np.float32(base + 0.5)  # no entry matters more than others
  close(fusion.arcee_fusion(same[None], [1.0], np.float32(base)), base)


def loras(seed=0, ranks=(2, 3), shape=(7, 5)):
  rng = np.random.default_rng(seed)
  return [
    Lora(
      *(jnp.float32(rng.standard_normal((rank, n))) for n in shape),
      jnp.float32(rng.uniform(0.5, 2)),
    )
    for rank in ranks
  ]


def total(given, weights):
  return sum(
    w * np.float64(dense(lora)) for w, lora in zip(weights, given, strict=True)
  )


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -1.0), (0.3, 0.0)])
def test_concat_is_the_sum(weights):
  given = loras()
  merged = concatenation.concat(given, weights)
  assert merged.rank == 5
  close(dense(merged), total(given, weights), atol=2e-6)


def test_negation():
  given = loras()[:1]
  close(dense(concatenation.concat(given, [-1.0])), -dense(given[0]))


def test_the_error_of_svd_merge_is_that_of_the_values_cut():
  given = jax.tree.map(np.asarray, loras(ranks=(3, 2)))
  change = total(given, (1.0, 0.5))
  sigma = np.linalg.svd(change, compute_uv=False)
  for rank in (1, 2, 4, 5, 9):
    merged = concatenation.svd_merge(given, (1.0, 0.5), rank=rank)
    assert merged.rank == min(rank, 5)
    error = np.sum((np.float64(dense(merged)) - change) ** 2)
    assert error == pytest.approx(np.sum(sigma[rank:] ** 2), abs=1e-9, rel=1e-4)


def test_svd_merge_of_orthogonal_units():
  """PEFT's linear gives 0.5 in all entries."""
  units = [jax.tree.map(np.asarray, Lora(x.a, x.a, x.scale)) for x in UNITS]
  merged = concatenation.svd_merge(units, (0.5, 0.5), rank=2)
  close(dense(merged), 0.5 * np.eye(2))


def test_iso_c_and_tsv():
  changes = jnp.stack([dense(lora) for lora in UNITS])
  none = jnp.zeros((2, 2))
  close(run(singular_vectors.iso_c, changes, ONES, none), 2 * np.eye(2))
  close(run(singular_vectors.tsv, changes, ONES, none), np.diag([3, 1]))
  for method, wanted in (
    (singular_vectors.iso_c, 2 * np.eye(2)),
    (singular_vectors.tsv, np.diag([3, 1])),
  ):
    merged = run(common_spaces.core_space, UNITS, ONES, method=method)
    close(dense(merged), wanted)


def test_tsv_of_tasks_that_share_a_direction():
  """The authors' polar factor would add an arbitrary one."""
  changes = jnp.array([[[3.0, 0], [0, 0]], [[1.414, 0], [1.414, 0]]])
  found = run(singular_vectors.tsv, changes, ONES, jnp.zeros((2, 2)))
  close(found[:, 1], (0, 0))
  twice = jnp.stack([changes[0]] * 2)
  merged = run(singular_vectors.tsv, twice, ONES, jnp.zeros((2, 2)))
  close(merged, changes[0], atol=1e-5)


@pytest.mark.parametrize(
  "space", [common_spaces.core_space, common_spaces.knots]
)
def test_nothing_is_lost_in_a_common_space(space):
  merged = jax.jit(functools.partial(space, method=averages.linear))
  for shape in ((6, 4),):  # written less than Σ r
    given = loras(shape=shape, ranks=(2, 3))
    for i, lora in enumerate(given):
      found = merged(given, jnp.eye(2)[i])
      assert found.rank == min(5, *shape)
      close(dense(found), dense(lora), atol=5e-6)


def test_knots_aligns_what_adapters_write():
  """TIES on S Vᵀ against the dense joint decomposition, in float64."""
  given = loras(seed=3, shape=(6, 5), ranks=(2, 2))
  deltas = [np.float64(dense(lora)).T for lora in given]
  u, s, vt = np.linalg.svd(np.concatenate(deltas, 1), full_matrices=False)
  u, tasks = (
    u[:, s > 1e-5],
    [(s[:, None] * part)[s > 1e-5] for part in np.split(vt, 2, axis=1)],
  )
  method = functools.partial(task_vectors.ties, density=0.5)
  wanted = u @ np.float64(
    method(jnp.float32(tasks), ONES, jnp.zeros(tasks[0].shape))
  )
  found = run(common_spaces.knots, given, ONES, method=method)
  close(dense(found), wanted.T, atol=1e-5)


ROWS = {
  "task_arithmetic": task_vectors.task_arithmetic,
  "ties": functools.partial(task_vectors.ties, density=1.0),
  "dare": functools.partial(pruning.dare, density=1.0),
  "della": functools.partial(pruning.della, density=1.0),
  "breadcrumbs": functools.partial(pruning.breadcrumbs, density=1.0),
  "sce": task_vectors.sce,
}


@pytest.mark.parametrize("name", ROWS)
def test_one_model_kept_whole_is_the_model(name):
  base = jnp.array([0.5, 2, -1, 0.25])
  found = run(ROWS[name], base[None] + CHANGES[:1], [1.0], base)
  close(found, base + CHANGES[0])


def test_tsv_in_core_space_is_that_of_the_dense_changes():
  """Where tasks share directions, against the definition in float64."""
  rng = np.random.default_rng(0)
  shared = rng.standard_normal((4, 96)), rng.standard_normal((4, 80))

  def task(size):
    a, b = rng.standard_normal((12, 96)), rng.standard_normal((12, 80))
    a[:4] = shared[0] + 0.5 * a[:4]
    b[:4] = shared[1] + 0.5 * b[:4]
    return Lora(
      *(jnp.asarray(x, "float32") for x in (size * a, b)), jnp.ones(())
    )

  loras = [task(3.0), task(1.0)]
  deltas = [np.asarray(dense(lora), np.float64) for lora in loras]
  u, s, vt = zip(
    *(np.linalg.svd(x, full_matrices=False) for x in deltas), strict=True
  )
  sides = np.hstack([x[:, :12] for x in u]), np.vstack([x[:12] for x in vt])
  left, right = (
    p @ q for p, _, q in (np.linalg.svd(x, full_matrices=False) for x in sides)
  )
  wanted = left * np.concatenate([x[:12] for x in s]) @ right
  found = common_spaces.core_space(
    loras, [1.0, 1.0], method=singular_vectors.tsv
  )
  assert np.linalg.norm(wanted - sum(deltas)) > 0.1 * np.linalg.norm(wanted)
  error = np.linalg.norm(np.asarray(dense(found)) - wanted)
  assert error < 1e-5 * np.linalg.norm(wanted)
