# SPDX-License-Identifier: Apache-2.0
"""The fit of a value: Adam's own steps, the ball, the stop, and the penalty."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.edit_values import fit_value

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
def test_what_is_refused(start, steps):
  with pytest.raises(ValueError, match="start must be a vector"):
    fit_value(squared, start, START, steps=steps)


def test_a_loss_that_is_not_finite_is_refused():
  with pytest.raises(ValueError, match="the loss is nan at step 0"):
    fit_value(lambda delta: jnp.log(delta.sum() - 1), START)
