# SPDX-License-Identifier: Apache-2.0
"""Steps and calls that the benchmark of routers compares, on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import routing
from experiments.bench.adapters import TINY
from jlora import models


def test_steps_and_calls_do_what_their_names_say():
  run, params = models.init({**TINY, "num_hidden_layers": 1}, jax.random.key(0))
  tokens, traces = jnp.arange(12).reshape(2, 6), []
  steps = routing.list_steps(run, params, tokens, 2, traces)
  with jax.numpy_dtype_promotion("standard"):  # Adam counts in int32
    moved = {name: step() for name, step in steps.items()}
    for step in steps.values():
      step()
  assert traces == [routing.PASS, "ReMix, M = 2"]  # each once
  path = next(iter(moved[routing.PASS][0]))
  rows = {name: x[0][path].params["rows"] for name, x in moved.items()}
  assert not rows[routing.PASS].any()
  assert rows["ReMix, M = 2"].any()
  calls = routing.list_forwards(run, params, tokens)
  plain, folded, mixed = (np.asarray(call()) for call in calls.values())
  np.testing.assert_allclose(folded, mixed, atol=1e-5)
  assert plain.shape == mixed.shape
