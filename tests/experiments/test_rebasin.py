# SPDX-License-Identifier: Apache-2.0
"""Barriers, lines, and that matching lowers the one between strangers."""

import functools

import jax
import numpy as np
import pytest

from experiments import rebasin
from experiments.lib.figures import plots
from experiments.lib.models import basins
from jlora.alignment.permutations import permute
from jlora.models import networks
from jlora.paths import flatten


@pytest.fixture(scope="module")
def task():
  return basins.digits_task(12, 60)


def test_the_same_network_in_another_order_has_no_barrier(task):
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    a = jax.tree.map(np.asarray, task.train(task.start(0), 0, 60))
    orders = {f"unit.{i}": np.roll(np.arange(12), 3) for i in range(2)}
    found = rebasin.compare_pair(
      task, "one network", a, permute(a, orders, task.symmetry)
    )
  plain, *matched = (basins.barrier(c) for c in found.curves.values())
  assert plain > 0.05
  assert max(matched) < 1e-5
  assert list(found.moved.values()) == [0, 1, 1]
  assert found.closer["weights matched"] < 1e-5


def test_outcomes_become_a_table_and_a_figure(task):
  del task
  curves = {m: [1.0, 2.0 + i, 1.0] for i, m in enumerate(rebasin.METHODS)}
  curves = {m: np.interp(np.linspace(0, 1, rebasin.POINTS), [0, 0.5, 1], c)
            for m, c in curves.items()}  # fmt: skip
  ones = dict.fromkeys(rebasin.METHODS, 0.5)
  outcomes = [rebasin.Outcome("x", curves, ones, ones)] * 2
  line = rebasin.as_table(outcomes).splitlines()[-1]
  assert line == (
    "| x | 1.000 ± 0.000 | 1.000 ± 0.000 | 2.000 ± 0.000 | 3.000 ± 0.000 "
    "| 50% | 50% | 0.50 | 0.50 |"
  )
  assert len(rebasin.draw_lines(outcomes).axes) == 1


@pytest.mark.usefixtures("quick_compilation")
def test_smoke(capsys, tmp_path):
  """Of --smoke's networks one comparison each: they compile for seconds."""
  mlp, text = rebasin.tiny_tasks(None)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    outcomes = rebasin.compare_strangers(mlp, 1)
    outcomes += rebasin.compare_siblings(text, 1)
  said = capsys.readouterr().out
  assert "MLP of width 16, two starts: " in said
  assert "Llama of width 16, one base: " in said
  strangers, siblings = (o.moved["weights matched"] for o in outcomes)
  assert strangers > 0.5
  assert siblings < 0.1
  assert len(rebasin.as_table(outcomes).splitlines()) == 4
  path = tmp_path / "new" / "rebasin.png"
  plots.save_figure(path, lambda: rebasin.draw_lines(outcomes))
  assert path.stat().st_size > 1000


def test_a_decoders_outputs_are_named_by_its_parameters():
  config = {**rebasin.LLAMA, "num_hidden_layers": 1, "hidden_size": 16}
  model = networks.build(config)
  tokens = jax.ShapeDtypeStruct((2, 3), np.int32)
  params = jax.eval_shape(model.network.init, jax.random.key(0), tokens)
  params = params["params"]
  found = jax.eval_shape(
    functools.partial(basins.outputs, model), params, tokens
  )
  shapes = {path: x.shape for path, x in flatten(params).items()}
  assert len(found) == 8
  for path, x in found.items():
    assert x.shape == (6, shapes[path][-1])
