# SPDX-License-Identifier: Apache-2.0
"""Steps and calls that the benchmark of routers compares, on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import routing
from experiments.bench.adapters import TINY
from jlora import models


@pytest.mark.long
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


def test_a_library_has_all_matrices_of_its_layers():
  bank = routing.draw_library(2, 3, 2)
  assert len(bank) == 2 * len(routing.LAYER)
  assert bank["1/down"].a.shape == (3, 2, 8192)
  assert bank["0/k"].b.shape == (3, 2, 512)
  wall, spent = routing.time_prototypes({"0/k": bank["0/k"]})
  assert min(wall, spent) > 0
