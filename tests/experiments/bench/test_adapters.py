# SPDX-License-Identifier: Apache-2.0
"""The programs that the benchmark compares, on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from experiments.bench.adapters import (
  LORA,
  TINY,
  WAYS,
  compile_way,
  draw_adapter,
  list_programs,
  list_steps,
  time_programs,
)
from jlora import models


@pytest.mark.long
def test_programs_do_what_their_names_say():
  run, params = models.init(TINY, jax.random.key(0))
  adapters = [draw_adapter(params, 2, seed) for seed in range(2)]
  tokens = jnp.arange(12).reshape(2, 6)
  programs = list_programs(run, params, tokens, adapters, [1, 2])
  base, merged, bound, *rows = (each() for each in programs.values())
  assert np.abs(merged - base).max() > 1e-6
  assert len(rows) == 2 * len(WAYS)
  for found in (bound, *rows[: len(WAYS)]):
    np.testing.assert_allclose(found, merged, rtol=1e-3, atol=1e-5)
  for own in rows[len(WAYS) :]:
    np.testing.assert_allclose(own[0], merged[0], rtol=1e-3, atol=1e-5)
    assert np.abs(own[1] - merged[1]).max() > 1e-7
  spent = time_programs(programs, 1)
  assert list(spent) == list(programs)
  assert min(spent.values()) > 0


def test_ways_are_forced():
  """Of 50 adapters all are multiplied, or a row's own are fetched."""
  adapters = [{"w": jlora.Lora(jnp.ones((1, 3)), jnp.ones((1, 2)),
                               jnp.float32(1))}] * 50  # fmt: skip
  given = {"w": jnp.ones((3, 2))}, jlora.make_bank(adapters), jnp.arange(2)
  run = lambda params, x: x @ params["w"]  # noqa: E731
  counts = {
    name: compile_way(run, way, (*given, jnp.ones((2, 3)))).cost_analysis()
    for name, way in WAYS.items()
  }
  masked, fetched = (counts[name]["flops"] for name in list(WAYS)[1:])
  assert masked > 3 * fetched


@pytest.mark.long
def test_steps_train_what_their_names_say():
  run, params = models.init(TINY, jax.random.key(0))
  adapters = [draw_adapter(params, 2, seed) for seed in range(3)]
  tokens = jnp.arange(12).reshape(2, 6)
  steps = list_steps(run, params, tokens, adapters)
  with jax.numpy_dtype_promotion("standard"):  # Adam counts in int32
    moved = {name: step() for name, step in steps.items()}
  losses = [np.asarray(loss) for *_, loss in moved.values()]
  np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
  path = next(iter(adapters[0]))
  assert moved[LORA][0][path].rank == 6
  assert moved["weights of each module"][0][path].shape == (3,)
  assert moved["weights of each adapter"][0].keys() == {"all"}
