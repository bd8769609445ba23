# SPDX-License-Identifier: Apache-2.0
"""Edits against worked numbers, optimality, and what they must leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.adapting.transforms import apply
from jlora.editing import (
  address_of,
  edit_key,
  edit_keys,
  edit_layers,
  fit_value,
)

# Worked by hand: w = I, C = diag(1, 4), k = (1, 1), v = (2, 0). Tables are
# the changes in torch's orientation (out, in).
EYE = np.eye(2)
MOMENT = np.diag([1.0, 4.0])
KEY, VALUE = np.ones(2), np.array([2.0, 0.0])
LIKE = pytest.mark.parametrize("like", [np.asarray, jnp.float32])


def change(lora):
  """(out, in), in the factors' own dtype."""
  return np.asarray(lora.scale * (lora.b.T @ lora.a))


@LIKE
def test_one_key_by_hand(like):
  lora = edit_key(*map(like, (EYE, KEY, VALUE, MOMENT)))
  np.testing.assert_allclose(change(lora), [[0.8, 0.2], [-0.8, -0.2]], 1e-6)
  assert lora.a.dtype == like(KEY).dtype
  assert (lora.rank, lora.scale.shape) == (1, ())


@LIKE
@pytest.mark.parametrize(
  ("balance", "wanted"),
  [
    (1.0, [[0.444444, 0.111111], [-0.444444, -0.111111]]),
    (10.0, [[0.088889, 0.022222], [-0.088889, -0.022222]]),
    (0.0, [[0.8, 0.2], [-0.8, -0.2]]),
  ],
)
def test_several_keys_by_hand(like, balance, wanted):
  residual = (VALUE - KEY @ EYE)[None]
  args = map(like, (KEY[None], residual, MOMENT))
  lora = edit_keys(*args, balance=balance)
  np.testing.assert_allclose(change(lora), wanted, atol=1e-6)


@pytest.mark.parametrize(
  ("balance", "wanted"), [(1.0, (1.5556, 0.4444)), (10.0, (1.1111, 0.8889))]
)
def test_how_much_arrives(balance, wanted):
  residual = (VALUE - KEY)[None]
  lora = edit_keys(KEY[None], residual, MOMENT, balance=balance)
  np.testing.assert_allclose(KEY + change(lora) @ KEY, wanted, atol=5e-5)


def test_an_average_key_in_one_place_only_misses_it():
  average = np.array([0.9, 1.2])
  a = address_of(average, MOMENT)
  a = a / (a @ KEY)
  found = np.outer(VALUE - KEY, a)
  np.testing.assert_allclose(found, [[0.75, 0.25], [-0.75, -0.25]])
  np.testing.assert_allclose((EYE + found) @ KEY, VALUE)
  assert np.abs((EYE + found) @ average - VALUE).max() > 0.01


def draw(seed, keys=1, size=6, out=4, dtype=np.float64):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((3 * size, size)) * np.geomspace(1, 0.1, size)
  found = (
    rng.standard_normal((size, out)),
    rng.standard_normal((keys, size)),
    rng.standard_normal((keys, out)),
    x.T @ x / len(x),
  )
  return [part.astype(dtype) for part in found]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0.01, 100))
def test_the_key_maps_to_the_value(seed, ridge, factor):
  w, keys, values, moment = draw(seed)
  lora = edit_key(w, keys[0], values[0], factor * moment, ridge=ridge)
  found = keys[0] @ (w + change(lora).T)
  np.testing.assert_allclose(found, values[0], rtol=1e-9, atol=1e-9)
  # A factor of the moment does not matter.
  one = edit_key(w, keys[0], values[0], moment, ridge=ridge)
  np.testing.assert_allclose(lora.a, one.a, rtol=1e-7, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0, 10))
def test_inputs_orthogonal_under_the_moment_are_untouched(seed, m, balance):
  _, keys, residuals, moment = draw(seed, keys=m)
  lora = edit_keys(keys, residuals, moment, balance=balance)
  others = np.random.default_rng(seed + 1).standard_normal((3, 6))
  inner = lambda x, y: x @ np.linalg.solve(moment, y.T)  # noqa: E731
  others -= inner(others, keys) @ np.linalg.solve(inner(keys, keys), keys)
  assert np.abs(others @ change(lora).T).max() < 1e-9 * np.abs(lora.a).max()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(1e-3, 100))
def test_it_is_the_form_of_the_paper(seed, m, balance):
  """Also where there are more keys than inputs, and with keys twice."""
  _, keys, residuals, moment = draw(seed, keys=m)
  keys, residuals = keys[[0, *range(m)]], residuals[[0, *range(m)]]
  lora = edit_keys(keys, residuals, moment, balance=balance)
  paper = np.linalg.solve(balance * moment + keys.T @ keys, keys.T)
  np.testing.assert_allclose(lora.a, paper.T, rtol=1e-6, atol=1e-9)
  assert (lora.b == residuals).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_a_vanishing_balance_gives_one_key_its_value(seed):
  w, keys, values, moment = draw(seed)
  one = change(edit_key(w, keys[0], values[0], moment))
  gaps = [
    np.linalg.norm(
      change(edit_keys(keys, values - keys @ w, moment, balance=balance)) - one
    )
    for balance in (1e-3, 1e-6, 1e-9)
  ]
  assert gaps[2] < 1e-2 * gaps[1] < 1e-4 * gaps[0] < 1e-5


def test_no_other_change_disturbs_less():
  """The conditions of Karush, Kuhn and Tucker: 2 C D = k μᵀ, and Dᵀ k = r."""
  w, keys, values, moment = draw(0)
  key, value = keys[0], values[0]
  least = change(edit_key(w, key, value, moment)).T
  multiplier = 2 * (moment @ least).T @ key / (key @ key)
  np.testing.assert_allclose(2 * moment @ least, np.outer(key, multiplier))
  cost = lambda d: np.trace(d.T @ moment @ d)  # noqa: E731
  rng = np.random.default_rng(1)
  for _ in range(20):
    off = rng.standard_normal(w.shape)
    off -= np.outer(key, key @ off) / (key @ key)
    assert cost(least + 1e-3 * off) > cost(least)


def test_several_keys_are_at_the_minimum_of_their_sum():
  _, keys, residuals, moment = draw(3, keys=3)

  def cost(change, balance=0.7):
    missed = keys @ change - residuals
    return np.sum(missed**2) + balance * np.trace(change.T @ moment @ change)

  best = change(edit_keys(keys, residuals, moment, balance=0.7)).T
  rng = np.random.default_rng(2)
  for _ in range(20):
    off = 1e-4 * rng.standard_normal(best.shape)
    assert cost(best + off) > cost(best)


def test_a_key_twice_shares_its_residuals():
  _, keys, residuals, moment = draw(4, keys=2)
  twice = edit_keys(keys[[0, 0]], residuals, moment, balance=1.0)
  once = edit_keys(
    keys[:1], residuals.mean(0, keepdims=True), moment, balance=0.5
  )
  np.testing.assert_allclose(change(twice), change(once))


def test_many_facts_at_once_in_float32():
  w, keys, values, moment = draw(5, keys=20, size=64, dtype=np.float32)
  lora = edit_keys(keys, values - keys @ w, moment, balance=0.0)
  edited = apply({"w": jnp.asarray(w)}, {"w": lora})["w"]
  np.testing.assert_allclose(keys @ edited, values, atol=2e-4)
  assert lora.a.dtype == np.float32


def test_a_ridge_is_for_inputs_never_seen():
  w, keys, values, moment = draw(6)
  moment[0] = moment[:, 0] = 0
  with pytest.raises(ValueError, match=r"6 unknowns .* a ridge such as"):
    edit_key(w, keys[0], values[0], moment)
  with pytest.raises(ValueError, match=r"6 unknowns .* a ridge such as"):
    edit_key(*map(jnp.float32, (w, keys[0], values[0], moment)))
  lora = edit_key(w, keys[0], values[0], moment, ridge=1e-4)
  np.testing.assert_allclose(keys[0] @ (w + change(lora).T), values[0])


def test_it_compiles_and_both_libraries_agree():
  args = draw(7, dtype=np.float32)
  args = args[0], args[1][0], args[2][0], args[3]
  host = edit_key(*args)
  device = jax.jit(edit_key)(*map(jnp.asarray, args))
  np.testing.assert_allclose(device.a, host.a, rtol=2e-4, atol=1e-5)
  np.testing.assert_allclose(device.b, host.b, rtol=1e-4, atol=1e-5)
  assert isinstance(host.a, np.ndarray)
  assert isinstance(device.a, jax.Array)


def test_layers_share_and_make_up_for_each_other():
  """A stream through three maps of which each keeps half of its edit."""
  rng = np.random.default_rng(8)
  moments = {name: np.eye(5) for name in "abc"}
  keys, wanted = rng.standard_normal((2, 5)), rng.standard_normal((2, 3))
  seen = []

  def read(loras, path):
    done = sum(
      (0.5 * keys @ change(lora).T for lora in loras.values()),
      start=np.zeros_like(wanted),
    )
    seen.append((path, list(loras)))
    return keys, wanted - done

  loras = edit_layers("abc", read, moments, balance=0.0)
  assert seen == [("a", []), ("b", ["a"]), ("c", ["a", "b"])]
  shares = [1 / 3, 5 / 6 / 2, (1 - 1 / 6 - 5 / 24)]
  for lora, share in zip(loras.values(), shares, strict=True):
    np.testing.assert_allclose(lora.b, share * wanted, rtol=1e-6)


eye = np.eye(2)
nothing = functools.partial(edit_layers, read=None, balance=0.0)


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: edit_key(eye, KEY, np.ones(3), eye), r"needed are \(in, out\)"),
    (lambda: edit_key(eye, eye, VALUE, eye), r"key \(2, 2\) and value \(2,\)"),
    (lambda: address_of(KEY, np.eye(3)), r"moment \(3, 3\) does not fit"),
    (lambda: address_of(eye, eye), r"keys \(1, 2, 2\)"),
    (lambda: address_of(KEY, eye, ridge=-1), "0.0 and -1"),
    (lambda: address_of(0 * KEY, eye), "1 unknowns is not positive"),
    (lambda: address_of(np.nan * KEY, eye), "is NaN"),
    (lambda: edit_keys(eye, eye, eye, balance=-1.0), "-1.0 and 0.0"),
    (lambda: edit_keys(eye, np.eye(3), eye, balance=1.0), r"\(3, 3\) do not"),
    (
      lambda: edit_keys(eye[[0, 0]], eye, eye, balance=0.0),
      "keys depend on each other",
    ),
    (lambda: nothing(paths=[], moments={}), "paths must be some"),
    (lambda: nothing(paths="aa", moments={}), "each once, got a, a"),
    (lambda: nothing(paths="ab", moments={"b": 1}), "1 paths have no moment"),
  ],
)
def test_what_is_refused(call, match):
  with pytest.raises(ValueError, match=match):
    call()


START = jnp.array([3.0, 4.0])


def linear(delta, slope):
  return jnp.vdot(delta, slope)


def squared(delta, target):
  return jnp.sum((delta - target) ** 2)


def test_a_constant_slope_takes_steps_of_the_learning_rate():
  slope = jnp.array([-1.0, 0.0])
  delta, history = fit_value(
    linear, START, slope, steps=4, decay=0.0, learning_rate=0.25, until=-10.0
  )
  # Four evaluations, three steps.
  np.testing.assert_allclose(delta, [0.75, 0.0], atol=1e-5)
  np.testing.assert_allclose(
    history["loss"], [0, -0.25, -0.5, -0.75], atol=1e-5
  )
  np.testing.assert_allclose(history["norm"], [0, 0.25, 0.5, 0.75], atol=1e-5)


def test_the_ball_holds_it():
  target = jnp.array([0.0, 300.0])
  delta, history = fit_value(squared, START, target, radius=0.2)
  np.testing.assert_allclose(delta, [0.0, 1.0], atol=1e-6)
  assert max(history["norm"]) <= 1 + 1e-6


def test_it_stops_once_it_is_good_enough():
  target = jnp.array([0.6, 0.0])
  options = {"learning_rate": 0.1, "decay": 0.0, "steps": 100}
  delta, history = fit_value(squared, START, target, until=0.05, **options)
  assert history["loss"][-1] < 0.05 <= min(history["loss"][:-1])
  assert float(squared(delta, target)) == pytest.approx(history["loss"][-1])


def test_the_norm_is_not_squared_but_divided_by_a_square():
  delta, history = fit_value(
    lambda delta: 0.0 * delta.sum() + 1.0, START, decay=50.0, steps=3
  )
  # Its own gradient at zero is none, so it stays there.
  assert history == {"loss": [1.0] * 3, "norm": [0.0] * 3}
  slope = jnp.array([-10.0, 0.0])
  _, history = fit_value(linear, START, slope, decay=50.0, steps=2, until=-99.0)
  assert history["loss"][1] == pytest.approx(-5 + 50 * 0.5 / 25, rel=1e-4)
  assert np.isfinite(delta).all()


def test_other_context_does_not_compile_again():
  traces = []

  def counted(delta, target):
    traces.append(target.shape)
    return squared(delta, target)

  for target in (START, 2 * START):
    fit_value(counted, START, target)
    fit_value(counted, 3 * START, target, radius=1.0, learning_rate=0.1)
  assert traces == [(2,)]


@pytest.mark.parametrize(
  ("start", "steps"), [(0 * START, 3), (START[None], 3), (START, 0)]
)
def test_values_that_cannot_be_fitted_are_refused(start, steps):
  with pytest.raises(ValueError, match="start must be a vector"):
    fit_value(squared, start, START, steps=steps)


def test_a_loss_that_is_not_finite_is_refused():
  with pytest.raises(ValueError, match="the loss is nan at step 0"):
    fit_value(lambda delta: jnp.log(delta.sum() - 1), START)
