# SPDX-License-Identifier: Apache-2.0
"""Pools of adapters: the random control, selection, search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import merging
from jlora.loras import Lora, dense

IN, OUT = 48, 40


def draw(seed, rank=4, leading=()):
  rng = np.random.default_rng(seed)
  a, b = (
    rng.standard_normal((*leading, rank, n), np.float32) for n in (IN, OUT)
  )
  return Lora(3 * a, b, np.full(leading, 0.5, np.float32))


def values(lora):
  return np.linalg.svd(np.asarray(dense(lora)), compute_uv=False)


def share_of(one, other):
  """How much of what one reads lies in what the other reads."""
  u, v = (np.linalg.qr(np.float64(x.a).T)[0] for x in (one, other))
  return np.sum((u.T @ v) ** 2) / v.shape[1]


def test_entries_keep_their_spread():
  lora = draw(0)
  (like,) = merging.random_like([{"q": lora}], jax.random.key(1))
  for x, y in ((lora.a, like["q"].a), (lora.b, like["q"].b)):
    spread = np.std(x)
    assert abs(np.std(np.asarray(y)) - spread) < 3 * spread / np.sqrt(
      2 * x.size
    )
    assert abs(np.mean(np.asarray(y))) < 3 * spread / np.sqrt(x.size)
  assert not np.allclose(values(lora), values(like["q"]), rtol=1e-2)


@pytest.mark.parametrize("rank", [1, 4, 45])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_a_spectrum_is_kept_in_random_directions(rank, leading):
  lora = draw(0, rank, leading)
  # One gauge or another, one value larger than the others.
  lora.a[..., 0, :] *= 20
  (like,) = merging.random_like(
    [{"q": lora}], jax.random.key(1), keep="spectrum"
  )
  like = like["q"]
  assert like.a.shape == lora.a.shape
  assert like.b.shape == lora.b.shape
  np.testing.assert_allclose(
    values(like), values(lora), rtol=1e-5, atol=1e-5 * values(lora).max()
  )
  if rank == 4 and not leading:
    shares = [
      share_of(
        lora,
        merging.random_like(
          [{"q": lora}], jax.random.key(seed), keep="spectrum"
        )[0]["q"],
      )
      for seed in range(30)
    ]
    error = np.std(shares) / np.sqrt(len(shares))
    assert abs(np.mean(shares) - rank / IN) < 3 * error


@pytest.mark.parametrize("keep", ["entries", "spectrum"])
def test_each_lora_has_numbers_of_its_own(keep):
  """By path and place; what else is in the pool changes nothing."""
  lora = draw(0)
  many = [{"q": lora, "k": lora}, {"k": lora, "q": lora}]
  made = merging.random_like(many, jax.random.key(3), keep=keep)
  drawn = [np.asarray(own[path].a) for own in made for path in ("q", "k")]
  for i, x in enumerate(drawn):
    assert not any(np.allclose(x, y) for y in drawn[:i])
  (alone,) = merging.random_like([{"q": lora}], jax.random.key(3), keep=keep)
  np.testing.assert_array_equal(alone["q"].a, made[0]["q"].a)
  other = merging.random_like(many, jax.random.key(4), keep=keep)
  assert not np.allclose(other[0]["q"].a, made[0]["q"].a)
  layers = merging.random_like([{"q": draw(0, 4, (2,))}], keep=keep)[0]["q"]
  assert not np.allclose(layers.a[0], layers.a[1])


def test_dtypes_and_zeros_stay():
  lora = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), draw(0))
  lora = Lora(lora.a, 0 * lora.b, jnp.float32(2))
  for keep in ("entries", "spectrum"):
    like = jax.jit(lambda own, keep=keep: merging.random_like(own, keep=keep))(
      [{"q": lora}]
    )[0]["q"]
    assert like.a.dtype == like.b.dtype == jnp.bfloat16
    assert float(like.scale) == 2
    np.testing.assert_array_equal(dense(like), np.zeros((IN, OUT)))


def test_selection():
  adapters = [{"q": draw(i)} for i in range(4)]
  sizes = [float(np.abs(own["q"].b).sum()) for own in adapters]
  found = merging.select(adapters, lambda one: np.abs(one["q"].b).sum(), 3)
  assert found == [int(i) for i in np.argsort(sizes)[:3]]
  near = {"q": Lora(adapters[2]["q"].a, 2 * adapters[2]["q"].b, np.float32(1))}
  closest = merging.select(
    adapters, lambda one: -merging.closeness(one, near), 1
  )
  assert closest == [2]


def test_closeness():
  one, two = {"q": draw(0), "k": draw(1)}, {"q": draw(0), "k": draw(2)}
  dense_of = lambda own: np.concatenate(  # noqa: E731
    [np.asarray(dense(own[path])).ravel() for path in ("q", "k")]
  )
  x, y = map(dense_of, (one, two))
  wanted = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
  assert abs(merging.closeness(one, two) - wanted) < 1e-5
  assert abs(merging.closeness(one, one) - 1) < 1e-12
  part = merging.closeness(one, {"q": draw(0)})
  lengths = [np.linalg.norm(np.asarray(dense(one[p]))) for p in ("q", "k")]
  assert abs(part - lengths[0] / np.hypot(*lengths)) < 1e-6
  layers = {"q": draw(0, leading=(3,))}
  assert abs(merging.closeness(layers, layers) - 1) < 1e-12
  zero = {"q": Lora(draw(0).a, 0 * draw(0).b, np.float32(1))}
  assert np.isnan(merging.closeness(one, zero))


@pytest.mark.parametrize("seed", range(5))
def test_a_search_comes_near_the_best_weights(seed):
  """Forty trials, as published, of three adapters' weights."""
  wanted = np.float32([1, -0.5, 0.25])
  tried = []

  def loss(w):
    tried.append(w)
    return np.sum((w - wanted) ** 2)

  found = merging.search_weights(loss, 3, key=jax.random.key(seed))
  assert len(tried) == 40
  assert found.dtype == np.float32
  assert np.sum((found - wanted) ** 2) < 0.3 * np.sum(wanted**2)
  assert min(np.sum((w - wanted) ** 2) for w in tried) == np.sum(
    (found - wanted) ** 2
  )
  np.testing.assert_array_equal(tried[0], np.zeros(3))
  assert all((np.abs(w) <= 1.5).all() for w in tried)


def test_a_search_keeps_to_its_bounds_and_passes_nan_over():
  found = merging.search_weights(lambda w: -w.sum(), 2, steps=200)
  np.testing.assert_array_equal(found, np.float32([1.5, 1.5]))
  half = merging.search_weights(
    lambda w: np.nan if w[0] > 0 else -w[0], 1, steps=30
  )
  assert half[0] <= 0


def test_the_door():
  one = {"q": draw(0)}
  for wrong, why in (
    (lambda: merging.random_like([one], keep="size"), "keep is one of"),
    (lambda: merging.select([one], lambda x: 0.0, 2), "k is 1 to 1"),
    (lambda: merging.select([one], lambda x: np.nan, 1), "adapters 0 is NaN"),
    (lambda: merging.closeness(one, {"k": draw(0)}), "no module in common"),
    (lambda: merging.search_weights(sum, 0), "Needed"),
    (lambda: merging.search_weights(sum, 1, low=1.0), "Needed"),
    (lambda: merging.search_weights(lambda w: np.nan, 1), "finite loss"),
  ):
    with pytest.raises(ValueError, match=why):
      wrong()
