# SPDX-License-Identifier: Apache-2.0
"""Schedules of layers, and a tiny model with a layer repeated."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import frankenmerge
from experiments.lib.figures import merges
from experiments.lib.models import skills


def depth_of(schedule):
  return sum(one.stop - one.start for one in schedule.slices)


def test_schedules_of_thirty_layers():
  found = frankenmerge.schedules_of(30)
  by_kind = {one.kind: depth_of(one) for one in found}
  assert by_kind == {
    "base": 30, "block of 4": 34, "block of 1": 31, "each of 4": 34,
    "without 4": 26, "overlapping halves": 40, "two finetunes, no repeats": 30,
  }  # fmt: skip
  assert len({(one.kind, one.slices) for one in found}) == len(found)
  for schedule in found:
    for one in schedule.slices:
      assert 0 <= one.start <= one.stop <= 30


def test_blocks_and_their_layers_one_by_one():
  block, each, without = (
    make(1, 3, 4)
    for make in (
      frankenmerge.repeat_block,
      frankenmerge.repeat_each,
      frankenmerge.leave_out,
    )
  )
  tree = {"layers": {str(i): {"w": i} for i in range(4)}, "norm": 9}
  taken = [
    frankenmerge.restack({"base": tree}, one.slices)[1]
    for one in (block, each, without)
  ]
  assert taken == [[0, 1, 2, 1, 2, 3], [0, 1, 1, 2, 2, 3], [0, 3]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  found = skills.tiny_skills(str(tmp_path_factory.mktemp("tiny")))
  for part, name in (("attn", "o"), ("mlp", "down")):
    module = found.base["layers"]["1"][part][name]
    module["kernel"] = jnp.zeros_like(module["kernel"])
  return list(frankenmerge.measure_all(found, ["base", "block of 1"], []))


def test_a_layer_that_adds_nothing_may_be_repeated(rows):
  base, first, second = (row["kjv"] for row in rows)
  assert [row["depth"] for row in rows] == [2, 3, 3]
  np.testing.assert_allclose(second, base, atol=1e-5)
  assert np.abs(np.subtract(first, base)).max() > 1e-3


def test_rows_become_a_table_and_a_figure(rows):
  lines = frankenmerge.as_table(rows).splitlines()
  assert lines[3].startswith("| block of 1 | base 0, 0-1 | 3 |")
  figure = merges.draw_depths(rows, skills.TITLES)
  line, level = figure.axes[0].lines
  losses = [np.mean(row["kjv"]) for row in rows]
  assert list(line.get_ydata()) == pytest.approx(losses[1:])
  assert level.get_ydata()[0] == pytest.approx(losses[0])
