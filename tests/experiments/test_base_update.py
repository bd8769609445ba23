# SPDX-License-Identifier: Apache-2.0
"""An updated base: what its texts ask for, its forms, tables, a small run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base_update
from experiments.lib.adapters import language_ports, ports, rank_interference
from experiments.lib.data.strings import TOKENS
from experiments.lib.figures import plots, updates
from experiments.lib.measures import orders
from experiments.lib.models import constrained_updates as forms
from experiments.lib.models import replaced_layers
from experiments.lib.models import updated_strings as strings
from jlora import models
from jlora.loras import dense
from jlora.paths import flatten

SIZE = strings.SMOKE


@pytest.fixture(autouse=True, scope="module")
def promotion():
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    yield


def test_no_two_names_ask_for_the_same():
  texts = strings.draw_texts(3, strings.FULL)
  asked = [pair for own in texts.pairs.values() for pair in own]
  assert len(asked) == len(set(asked)) == len(texts.operations.moves)
  assert len(texts.pairs["known"]) == 11
  assert len(texts.pairs["update"]) == 6
  plain = np.arange(6)
  for name in ("move", "other move"):
    (pair,) = texts.pairs[name]
    assert not np.array_equal(texts.operations.moves[pair[0]], plain)
  for name in ("code", "other code"):
    (pair,) = texts.pairs[name]
    np.testing.assert_array_equal(texts.operations.moves[pair[0]], plain)


def test_the_model_is_that_of_the_library():
  model = strings.make_model(SIZE)
  params = strings.train_base(0, SIZE)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 8, (3, TOKENS)).astype(np.int32)
  whole = models.build(model.config)(params, jnp.asarray(tokens[:, :-1]))
  found = model.predict(params, tokens)
  np.testing.assert_allclose(found, whole[:, -6:], atol=1e-5)


def test_random_parts_are_as_long_as_projected_ones():
  case = ports.open_case(ports.SEED, "move", 0, SIZE)
  one, other = (
    ports.carry(case, ports.WEIGHTS[name])
    for name in ("project, half", "a random part, half")
  )
  for path, lora in one.items():
    left, right = dense(lora), dense(other[path])
    assert np.linalg.norm(left - right) > 0.1 * np.linalg.norm(left)
    np.testing.assert_allclose(
      np.linalg.norm(left), np.linalg.norm(right), rtol=1e-4
    )


def test_forms_keep_to_what_they_are_held_to():
  params = strings.train_base(0, SIZE)
  before = flatten(params)
  adapters = [strings.train_skill(x, 0, SIZE) for x in strings.TASKS]
  for name, rank in (("rank 1", 1), ("rank 4", 4), ("both left alone", None)):
    *_, (steps, there) = forms.snapshots(name, 0, SIZE, SIZE.looks)
    assert steps == SIZE.looks[-1]
    for path, after in flatten(there).items():
      change = np.asarray(after - before[path], np.float64)
      if path not in adapters[0]:
        assert not change.any()
        continue
      assert change.any()
      if rank:
        values = np.linalg.svd(change, compute_uv=False)
        assert values[rank:].max(initial=0) < 1e-3 * values[0]
      else:
        size = np.linalg.norm(change)
        for own in adapters:
          lora = own[path]
          assert np.linalg.norm(lora.a @ change) < 1e-4 * size
          assert np.linalg.norm(change @ np.asarray(lora.b).T) < 1e-4 * size


def test_units_beyond_a_rank_stay_zero():
  loras = rank_interference.train_at(1, "move", 0, SIZE)
  for lora in loras.values():
    assert lora.rank == 4
    assert np.asarray(lora.b)[0].any()
    assert not np.asarray(lora.a)[1:].any()
    assert not np.asarray(lora.b)[1:].any()


def test_a_map_of_full_rank_is_the_least_squares_one():
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((50, 4)), rng.standard_normal((50, 4))
  errors = []
  for rank in (1, 2, 4):
    a, b, bias = replaced_layers.fit(x, y, rank)
    assert a.shape[1] == b.shape[0] == rank
    errors.append(np.linalg.norm(x @ a @ b + bias - y))
  ones = np.concatenate([x, np.ones((50, 1))], 1)
  best = np.linalg.lstsq(ones, y, rcond=None)[0]
  least = np.linalg.norm(ones @ best - y)
  assert errors[0] > errors[1] > errors[2]
  assert errors[2] == pytest.approx(least, rel=1e-5)


def test_a_replaced_layer_does_what_its_map_says():
  params = strings.train_base(0, SIZE)
  tokens = strings.source_of("known", 0, SIZE)(np.random.default_rng(0), 1, 9)
  there = replaced_layers.replaced(params, "0", tokens[0][0], 4, SIZE)
  model = strings.make_model(SIZE)
  x = model.stream(params, tokens[0][0], [])
  own = there["h"]["0"]["map"]
  wanted = x + x @ own["a"] @ own["b"] + own["bias"][None, None]
  found = model.stream(there, tokens[0][0], ["0"])
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)
  same = replaced_layers.compact(there, "0", 4)
  assert same["h"]["0"]["map"]["a"].shape == (16, 4)
  np.testing.assert_allclose(
    model.predict(same, tokens[0][0]), model.predict(there, tokens[0][0]),
    rtol=1e-4, atol=1e-3,
  )  # fmt: skip
  none = replaced_layers.replaced(params, "0", tokens[0][0], 0, SIZE)
  less = replaced_layers.compact(none, "0", 0)
  assert sorted(less["h"]) == ["1"]
  np.testing.assert_allclose(
    model.predict(less, tokens[0][0]), model.predict(none, tokens[0][0]),
    atol=1e-4,
  )  # fmt: skip
  loras = strings.train_skill("move", 0, SIZE)
  moved = replaced_layers.carried(loras, params, there, "0")
  assert {path.split("/")[1] for path in moved} == {"1"}


def test_areas_and_levels():
  assert (
    orders.area_under_curve([0, 1, 1, 2], [False, False, True, True]) == 0.875
  )
  assert np.isnan(orders.area_under_curve([0, 1], [False] * 2))
  assert orders.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
  points = [{"update": (0, x), "at": i} for i, x in enumerate((4, 2, 1))]
  value = lambda point: point["at"]  # noqa: E731
  assert updates.at_level(points, 2.0, value) == 1
  assert updates.at_level(points, 2**0.5, value) == pytest.approx(1.5)
  assert np.isnan(updates.at_level(points, 0.5, value))


def test_decisions_are_by_all_skills_on_all_targets():
  rows = [
    _ported(0, "1 steps", 0.1, 1.0),
    _ported(0, "2 steps", 0.2, 5.0),
    _ported(0, ports.SEED, 0.9, 6.0),
  ]
  table = updates.as_ports(rows)
  assert "| worse than nothing, all | 6 | 4 | 1.000 | 1.000 | 1.000 |" in table
  assert "| worse than nothing, one lineage | 4 | 2 | 1.000 |" in table
  assert "| add | 0.750 | -0.250 | -0.500 |" in table


def test_forms_are_compared_in_each_seed_and_skills_by_the_least():
  def row(name, seed, broken):
    point = {
      "steps": 1, "drift": 0.0, "known": (1, 0),
      **dict.fromkeys(strings.TASKS, (1, broken)),
      **dict.fromkeys(strings.OTHERS, (1, 2 * broken)),
    }  # fmt: skip
    points = [point | {"update": (0, x)} for x in (4.0, 1.5)]
    return {"name": name, "seed": seed, "figures": {"points": points}}

  rows = [
    row(forms.FREE, 0, 1.0), row(forms.FREE, 1, 3.0),
    row("rank 16", 0, 1.5), row("rank 16", 1, 3.5),
  ]  # fmt: skip
  table = updates.as_updates(rows)
  # Apart by as much in both seeds: no error, however far these are apart.
  assert f"| rank 16: {forms.FREE} | +0.500 ± 0.000 | +1.000 ± 0.000 |" in table
  ported = updates.as_ports([_ported(0, "1 steps", 0.1, 1.0)])
  least = ported[ported.index("| least right answers") :].splitlines()
  assert least[2] == "| add | 0.000 |"


def _ported(seed, name, drift, nats):
  names = (*ports.WEIGHTS, *ports.TRAINED)
  methods = {x: (0.5, 0.0) for x in names} | {"add": (0.0, nats)}
  task = {"alone": (0, 4.0), "source": (1, 0.0), "methods": methods}
  figures = {
    "tasks": dict.fromkeys(strings.TASKS, task),
    "weights": {
      "drift": drift, "read_alike": 1 - drift, "write_alike": 1 - drift,
    },
    "known": (1, 0), "update": (1, 0),
  }  # fmt: skip
  return {"part": "ports", "seed": seed, "name": name, "figures": figures}


#: A row or two of every part.
SOME = {
  "ports": ["2 steps", ports.SEED],
  "ranks": ["rank 4"],
  "updates": [forms.FREE],
  "layers": ["layer 0: nothing"],
}


def test_smoke(tmp_path, monkeypatch):
  rows = []
  for part, only in SOME.items():
    rows += base_update.run([part], 1, only, tmp_path, SIZE)
  known = {(row["part"], row["name"]): row["figures"] for row in rows}
  assert len(known) == 5
  far, near = (
    known["ports", x]["weights"]["drift"] for x in (ports.SEED, "2 steps")
  )
  assert far > 1 > near > 0
  plots.save_figure(tmp_path / "x.png", lambda: updates.draw(rows))
  assert (tmp_path / "x.png").stat().st_size > 1000

  def measured(*_):
    raise AssertionError("a finished row was measured again")

  for name in SOME:
    part = base_update.PARTS[name]
    part = part._replace(measure=measured)
    monkeypatch.setitem(base_update.PARTS, name, part)
  again = base_update.run(SOME, 1, ["none of them"], tmp_path, SIZE)
  assert json.dumps(again) == json.dumps(rows)


@pytest.mark.long
def test_smoke_of_a_language_model(tmp_path, capsys):
  (row,) = base_update.run(["texts"], 1, ["2 steps: items"], tmp_path, SIZE)
  figures = row["figures"]
  assert 0 < figures["drift"] < 0.1
  assert figures["update"][1] < figures["update, before"][1]
  assert figures["source"][1] < figures["before"][1]
  nats = {name: pair[1] for name, pair in figures["methods"].items()}
  assert list(nats) == list(language_ports.METHODS)
  assert nats["retrain"] < nats["add"] < figures["alone"][1]
  assert "| retrain, recovered | 1.000 |" in capsys.readouterr().out
