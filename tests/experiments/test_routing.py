# SPDX-License-Identifier: Apache-2.0
"""Testbeds of routers: what they ask, what rows hold, a small run of each."""

import json

import jax
import numpy as np
import pytest

from experiments import routing
from experiments.lib.adapters import routers
from experiments.lib.data.digits import split_digits
from experiments.lib.data.strings import LENGTH, TOKENS
from experiments.lib.figures import plots, routings
from experiments.lib.models import (
  analogies,
  hidden_regimes,
  modal_strings,
  regimes,
  skill_library,
)


def test_a_regime_is_the_sum_of_its_two_changes():
  task = regimes.open_regimes(0)
  x, y = task.draw(np.random.default_rng(0), (40,))
  mark = x[:, regimes.WIDTH :]
  away = ((mark[:, None] - task.marks[None]) ** 2).sum(-1)
  for own, wanted, c in zip(x, y, away.argmin(1), strict=True):
    first, second = regimes.PAIRS[c]
    whole = task.changes[first] + task.changes[second]
    found = own[: regimes.WIDTH] @ whole
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
  read = np.asarray(regimes.reads_mark(jax.numpy.asarray(x), None))
  assert not read[:, : regimes.WIDTH].any()
  np.testing.assert_array_equal(read[:, regimes.WIDTH :], mark)
  loras = regimes.start(jax.random.key(0), 2)
  assert not loras["w"].a[:, regimes.WIDTH :].any()


def test_texts_of_a_regime_have_its_marks_and_both_codes():
  codes = hidden_regimes.draw_codes(0)
  text = hidden_regimes.write(np.random.default_rng(0), codes, (50,))
  assert text.shape == (50, TOKENS)
  marks = (text[:, :2] - hidden_regimes.SYMBOLS) // 4
  assert (marks[:, 0] == marks[:, 1]).all()
  for row, regime in zip(text, marks[:, 0], strict=True):
    first, second = hidden_regimes.PAIRS[regime]
    wanted = codes[second][codes[first][row[2:8]]]
    np.testing.assert_array_equal(row[-LENGTH:], wanted)


def test_a_librarys_texts_are_copied_where_a_skill_is_not_active():
  codes = np.stack([np.roll(np.arange(16), i + 1) for i in range(8)])
  skills = np.arange(8)
  text = skill_library.write(np.random.default_rng(0), codes, skills, [3])
  same = (text[:, 2:8] == text[:, -LENGTH:]).all(1)
  assert same.tolist() == [i != 3 for i in range(8)]
  np.testing.assert_array_equal(text[3, -LENGTH:], (text[3, 2:8] - 4) % 16)
  marks = (text[:, :2] - hidden_regimes.SYMBOLS) // 3
  assert (marks == skills[:, None]).all()


def test_tasks_of_analogies_undo_each_other():
  images = split_digits(0)[2].images[:3]
  change = analogies.change
  np.testing.assert_array_equal(change(images, (0, 0, 0, 0)), images)
  for once, again in (
    ((1, 0, 0, 0), (3, 0, 0, 0)), ((4, 0, 0, 0), (4, 0, 0, 0)),
    ((0, 0, 1, 0), (0, 0, 1, 0)), ((0, 0, 0, 1), (0, 0, 0, 2)),
  ):  # fmt: skip
    twice = change(change(images, once), again)
    np.testing.assert_array_equal(twice, images)
  assert (change(images, (0, 1, 0, 0)) >= images).all()


def test_answers_to_images_are_labels_in_base_eight():
  with jax.numpy_dtype_promotion("standard"):
    task = modal_strings.open_task(0, modal_strings.SMOKE)
  labels = np.arange(10)
  answer = task.answer(labels)[:, -LENGTH:]
  np.testing.assert_array_equal(8 * answer[:, 0] + answer[:, 1], labels)
  assert not answer[:, 2:].any()
  patches = modal_strings.as_patches(task.images[1][0][:2])
  assert patches.shape == (2, LENGTH, modal_strings.PATCH)
  np.testing.assert_array_equal(
    patches.reshape(2, -1)[:, :64], task.images[1][0][:2]
  )


def test_logits_are_as_spread_as_is_asked():
  start = regimes.start
  mixture = regimes.SMOKE.mixture
  bank = routers.init_bank(start, mixture, jax.random.key(0))
  programs = routers.init_softmax(bank, mixture, 2, jax.random.key(1))
  x, y = regimes.open_regimes(0).draw(np.random.default_rng(0), (256,))
  found = routers.calibrate(programs, 6.0, regimes.loss, regimes.base(), (x, y))
  logits = found["w"].gate(found["w"].params, jax.numpy.asarray(x))[1][0]
  assert float(routers.spread_of(logits)) == pytest.approx(6, rel=1e-4)


def test_differences_are_paired_by_seed(tmp_path):
  rows = [
    {"bed": "regimes", "method": name, "seed": seed, "seconds": 1.0,
     "figures": {"error": x}, "course": [2.0, 1.5]}
    for name, values in (("a", [0.1, 0.3]), ("b", [0.2, 0.5]))
    for seed, x in enumerate(values)
  ]  # fmt: skip
  less = routings.as_differences(rows, {"error": "e"}, [("b", "a"), ("b", "c")])
  assert less.splitlines()[2:] == ["| b | a | +0.150 ± 0.050 |"]
  for row in rows:
    row["figures"]["effective at first"] = 2.0
  plots.save_figure(
    tmp_path / "x.png", lambda: routings.draw(rows, {"regimes": "t"})
  )
  assert (tmp_path / "x.png").stat().st_size > 1000


def test_errors_are_over_tasks_of_all_seeds():
  shares = {("a", 0): [0.5, 0.7], ("b", 0): [0.2, 0.6],
            ("a", 1): [0.9], ("b", 1): [0.7]}  # fmt: skip
  rows = [
    {"method": name, "seed": seed, "tasks": {"seen": own}}
    for (name, seed), own in shares.items()
  ]
  table = routings.as_task_differences(rows, [("a", "b"), ("a", "c")])
  # 0.3, 0.1 and 0.2: 0.1 / sqrt(3)
  assert table.splitlines()[2:] == ["| a | b | +0.200 ± 0.058 |"]
  assert "seen, over 3" in table
  assert routings.as_task_differences([{"method": "a", "seed": 0}], []) == ""


FEW = {
  "regimes": ["probability of sets", "no baseline", "logits of 6"],
  "llama": ["logits of 6"],
  "modalities": ["table", "finetuned", "the sum"],
  "analogies": ["rank 32", "uniform"],
  "library": ["plain sum", "Arrow, 2"],
}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", FEW)
def test_smoke(name, tmp_path, capsys, monkeypatch):
  with (
    jax.numpy_dtype_promotion("standard"),  # optax counts in int32
    jax.numpy_rank_promotion("allow"),  # biases of Flax
  ):
    rows = routing.run([name], 1, FEW[name], tmp_path, smoke=True)
  known = {row["method"]: row for row in rows}
  assert all(any(text in x for text in FEW[name]) for x in known)
  assert f"| {rows[0]['method']} |" in capsys.readouterr().out
  for row in rows:
    assert all(np.isfinite([*row["figures"].values()]))
  CHECKS[name](known)
  shut = routing.BEDS[name]._replace(measure=None)
  monkeypatch.setitem(routing.BEDS, name, shut)
  again = routing.run([name], 1, FEW[name], tmp_path, smoke=True)
  assert json.dumps(again) == json.dumps(rows)


def check_regimes(known):
  assert known["ReMix, no baseline"]["course"] == []
  hard = known["softmax top-k, logits of 6"]
  assert 1 <= hard["figures"]["effective at first"] <= 2


def check_llama(known):
  soft = known["softmax top-k, logits of 6"]
  assert len(soft["course"]) == 3  # steps


def check_modalities(known):
  assert known["adapters by the table"]["figures"]["moved"] == 0


def check_analogies(known):
  assert known[analogies.EVEN]["apart"] < 1e-6
  tasks = known[analogies.ONE]["tasks"]
  assert [len(tasks[x]) for x in ("seen", "unseen")] == [24, 8]


def check_library(known):
  hits = known["Arrow, 2 chosen"]["hits"]
  assert len(hits) == 7  # matrices of a layer
  assert known["the plain sum"]["figures"]["nats"] > 0


CHECKS = {
  "regimes": check_regimes,
  "llama": check_llama,
  "modalities": check_modalities,
  "analogies": check_analogies,
  "library": check_library,
}
