# SPDX-License-Identifier: Apache-2.0
"""Lessons: what is taught is learned, and only that moves."""

import jax
import numpy as np
import pytest

from experiments import kinds_of_tuning, which_modules, which_rank
from experiments.lib.data import texts
from experiments.lib.models import lessons
from jlora import models
from jlora.adapting.binding import bind
from jlora.adapting.transforms import adapt, apply
from jlora.training.inits import init_lora


@pytest.fixture(scope="module")
def school():
  """A base of 32 channels and one layer that has learned nothing."""
  config = {
    **which_modules.lessons.llamas.config_of(32),
    "num_hidden_layers": 1,
  }
  model, params = models.init(config, jax.random.key(0))
  tokens = texts.excerpts(texts.pydoc(), texts.encode_bytes, rows=40, length=32)
  return lessons.School(model, params, tokens[:32], tokens[32:])


@pytest.fixture(scope="module")
def trainer(school):
  return lessons.hire(school, 1e-2, 8)


def test_a_lesson_is_learned_and_can_be_repeated(school, trainer):
  before = lessons.examine(school.model, school.params, school.exam)
  loras = init_lora(school.params, 4, jax.random.key(0))
  with jax.numpy_dtype_promotion("standard"):
    taught, again, other = (
      lessons.teach(school, trainer, loras, 8, seed) for seed in (0, 0, 1)
    )
  after = lessons.examine(
    school.model, apply(school.params, taught), school.exam
  )
  assert after < before - 0.05
  jax.tree.map(np.testing.assert_array_equal, taught, again)
  path = next(iter(taught))
  assert not np.array_equal(taught[path].b, other[path].b)
  assert taught[path].scale == loras[path].scale


def test_every_choice_has_the_same_budget():
  config = lessons.llamas.config_of(which_modules.WIDTH)
  shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0))[1])
  sizes = {
    name: sum(
      lora.a.size + lora.b.size
      for lora in jax.eval_shape(
        lambda paths=paths, rank=rank: init_lora(
          shapes, rank, select=which_modules.matching(paths)
        )
      ).values()
    )
    for name, (paths, rank) in which_modules.CHOICES.items()
  }
  assert set(sizes.values()) == {4 * 15360}


def test_tables_tell_mean_and_spread():
  rows = [
    {"name": "q", "rank": 2, "parameters": 1000, "loss": loss}
    for loss in (1.0, 2.0)
  ]
  line = which_modules.as_table(rows, 3.0).splitlines()[-1]
  assert line == "| q | 2 | 1,000 | 1.500 ± 0.707 |"
  grid = np.eye(8)
  tables = which_rank.as_tables({4: [1.0]}, {"q: a pair": grid}, 3.0)
  assert "| 4 | 1.000 |" in tables
  assert "| q: a pair | 1.00 | 1.00 | 1.00 | 0.06 |" in tables
  kinds = [{"name": "norms", "parameters": 256, "state": 2048, "rate": 0.1,
            "losses": [1.0, 2.0]}]  # fmt: skip
  line = kinds_of_tuning.as_table(kinds, 3.0).splitlines()[-1]
  assert line == "| norms | 256 | 1.0 | 2.0 | 0.1 | 1.500 ± 0.707 |"


def test_kinds_begin_as_the_base_and_train_what_they_say(school):
  plain = lessons.examine(school.model, school.params, school.exam)
  for name, kind in kinds_of_tuning.KINDS.items():
    programs = kind.start(school.params, jax.random.key(0))
    count = {"norms": 3, "everything": 11, "prompt of 16": 1}.get(name, 7)
    assert len(programs) == count
    model = adapt(kinds_of_tuning.prompted(school.model, kind.prompt))
    params = bind(school.params, programs)
    begun = lessons.examine(model, params, school.exam)
    assert (begun == pytest.approx(plain, abs=1e-6)) != bool(kind.prompt)


def test_the_rate_is_chosen_on_other_rows_than_are_told(school, monkeypatch):
  kind = kinds_of_tuning.KINDS["prompt of 16"]._replace(rates=(1e-2, 1e-1))
  monkeypatch.setitem(kinds_of_tuning.KINDS, "prompt of 16", kind)
  scores = iter([2.0, 7.0, 1.0, 9.0])  # of each rate: to choose by, to tell
  monkeypatch.setattr(lessons, "examine", lambda *_: next(scores))
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    row = kinds_of_tuning.measure_kind(school, "prompt of 16", 5, 1)
  assert (row["rate"], row["losses"]) == (1e-1, [9.0])
  assert row["parameters"] == 16 * 32


def test_overlaps_are_of_one_part_and_drawn(school):
  loras = jax.tree.map(
    np.asarray, init_lora(school.params, 4, init=_both_random)
  )
  grid = which_rank.mean_overlap(loras, loras, "q")
  np.testing.assert_allclose(np.diag(grid), 1, atol=1e-4)
  figure = which_rank.draw_overlaps({"one": grid, "two": grid})
  assert len(figure.axes) == 3  # the colour bar


def _both_random(key, shape, rank):
  one, two = jax.random.split(key)
  return (
    jax.random.normal(one, (rank, shape[0])),
    jax.random.normal(two, (rank, shape[1])),
  )
