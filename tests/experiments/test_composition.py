# SPDX-License-Identifier: Apache-2.0
"""Two skills put together: what the works ask, what rows hold, a small run."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import composition
from experiments.lib.adapters import benches, compositions, equal_ranks
from experiments.lib.data import strings
from experiments.lib.figures import compositions as figures
from experiments.lib.figures import plots
from experiments.lib.models import digit_skills, loops, string_skills
from jlora.loras import Lora, dense
from jlora.merging import task_arithmetic


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def pair_of(rank=3):
  return [
    Lora(draw(rank, 7, seed=i), draw(rank, 5, seed=9 + i), np.float32(i + 1))
    for i in range(2)
  ]


def test_operations_act_one_after_the_other():
  known = strings.draw_operations(3, 2, 2)
  assert known.known.tolist() == [0, 1, 2, 3, 4]
  assert (known.codes[[0, 1, 2, known.mover]] == np.arange(8)).all()
  assert (known.moves[[0, 3, 4, known.coder]] == np.arange(6)).all()
  rows = {tuple(x) for x in known.moves} | {tuple(x) for x in known.codes}
  assert len(rows) == 2 + 3 + 3  # nobody moves, nobody substitutes
  rng = np.random.default_rng(0)
  text = strings.write(rng, known, [(1, 2)], (5,))
  assert text.shape == (5, strings.TOKENS)
  given, answer = text[:, 2:8], text[:, -6:]
  wanted = given[:, known.moves[1]][:, known.moves[2]]
  np.testing.assert_array_equal(answer, wanted)
  text = strings.write(rng, known, [(known.coder, 1)], (5,))
  wanted = known.codes[known.coder][text[:, 2:8]][:, known.moves[1]]
  np.testing.assert_array_equal(text[:, -6:], wanted)
  assert set(text[:, 8]) == {strings.vocabulary(known) - 1}


def test_neither_skill_sees_the_other():
  known = strings.draw_operations(0, 2, 2)
  plain, move = strings.known_pairs(known), strings.move_pairs(known)
  code, both = strings.code_pairs(known), strings.new_pairs(known)
  assert not {known.mover, known.coder} & {x for pair in plain for x in pair}
  assert all(known.mover in x and known.coder not in x for x in move)
  assert all(known.coder in x and known.mover not in x for x in code)
  assert len(plain) == len(set(plain)) == 2 * 9 - 1
  assert len(move) == len(code) == 6
  assert both == [(known.mover, known.coder), (known.coder, known.mover)]


def test_a_class_and_a_flag_are_asked_for():
  parts = digit_skills.split_parts(0)
  assert set(parts.subject.labels) == {9}
  assert set(parts.others.labels) == set(parts.styled.labels) == {*range(9)}
  source = digit_skills.draw_of(parts.subject, 1)
  noisy, time, asked, clean = source(np.random.default_rng(0), 3, 2)
  assert noisy.shape == clean.shape == (3, 2, 64)
  assert (asked[..., [9, 10]] == 1).all()
  assert (asked.sum(-1) == 2).all()
  late = np.pi / 2 * time[..., None]
  noise = (noisy - np.cos(late) * clean) / np.sin(late)
  assert np.abs(np.mean(noise)) < 0.2
  assert np.std(noise) == pytest.approx(1, abs=0.2)


def test_all_units_in_clusters_of_their_own_are_the_sum():
  pair, rng = pair_of(), np.random.default_rng(0)
  units = [equal_ranks.singular_units(x.a, x.scale * x.b) for x in pair]
  a, b = (np.concatenate(x) for x in zip(*units, strict=True))
  wanted = sum(dense(x) for x in pair)
  alone = Lora(a, b, np.float32(1))
  found = equal_ranks.at_random(alone, pair, rng)
  np.testing.assert_allclose(dense(found), wanted, atol=1e-4)
  some = Lora(a[[0, 3, 5]], b[[0, 3, 5]], np.float32(1))
  fewer = equal_ranks.at_random(some, pair, rng)
  assert fewer.rank == 3
  lengths = np.linalg.norm(np.concatenate([a, b], 1), axis=1)
  own = np.linalg.norm(np.concatenate([fewer.a, fewer.b], 1), axis=1)
  assert lengths.min() - 1e-5 <= own[own > 0].min()
  assert own.max() <= lengths.max() + 1e-5


def test_dense_changes_are_merged_and_truncated():
  pair = pair_of()
  whole = equal_ranks.through_dense(
    pair, np.ones(2, np.float32), rank=5, method=task_arithmetic
  )
  wanted = np.asarray(sum(dense(x) for x in pair))
  np.testing.assert_allclose(dense(whole), wanted, atol=1e-4)
  less = equal_ranks.through_dense(
    pair, np.ones(2, np.float32), rank=2, method=task_arithmetic
  )
  values = np.linalg.svd(wanted, compute_uv=False)
  off = np.linalg.norm(dense(less) - wanted)
  assert off == pytest.approx(np.linalg.norm(values[2:]), rel=1e-3)


def test_sums_and_scales_are_exact():
  first, second = ({"w": x} for x in pair_of())
  summed = benches.add([first, second], (0.5, -1.0))
  wanted = 0.5 * dense(first["w"]) - dense(second["w"])
  np.testing.assert_allclose(dense(summed["w"]), wanted, atol=1e-5)
  twice = benches.scaled(summed, 2.0)
  np.testing.assert_allclose(dense(twice["w"]), 2 * wanted, atol=1e-5)
  assert benches.count_of(first) == 3 * 12


def test_spoiled_columns_keep_entries_or_means():
  columns, rng = draw(2, 5), np.random.default_rng(0)
  other = compositions.shuffled(columns, rng)
  assert not np.array_equal(other, columns)
  np.testing.assert_array_equal(np.sort(other), np.sort(columns))
  means = compositions.averaged(columns, rng)
  np.testing.assert_allclose(means.mean(1), columns.mean(1), rtol=1e-5)
  assert np.ptp(means, axis=1).max() == 0


def test_a_loop_takes_every_batch_once():
  run = loops.whole_run(lambda p, x: ((p - x) ** 2).sum(), 0.1, 50)
  batches = (np.ones((50, 3), np.float32),)
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    found, losses = run(np.zeros(3, np.float32), (), batches)
  assert losses.shape == (50,)
  assert losses[0] == 3
  np.testing.assert_allclose(found, 1, atol=0.2)


def row(seed, method, both, kind="sum"):
  values = {"both": both, "first": 0.5, "second": 1.0, "distance": 0.1}
  return {"work": "thick", "seed": seed, "kind": kind, "method": method,
          "figures": values, "seconds": 2.0, "trained": 1234,
          "notes": {}}  # fmt: skip


def test_differences_are_paired_by_seed(tmp_path):
  rows = [row(0, "1 and 1", 0.2), row(1, "1 and 1", 0.6),
          row(0, "other", 0.3, "weights"),
          row(1, "other", 0.7, "weights")]  # fmt: skip
  table = figures.as_table(rows, digit_skills.MEASURES, ("sum", "1 and 1"))
  lines = table.splitlines()
  assert lines[2].startswith("| sum | 1 and 1 | 0.400 ± 0.200 | +0.000 ± 0.000")
  assert "| 0.500 ± 0.200 | +0.100 ± 0.000 | 0.500 ± 0.000 |" in lines[3]
  assert lines[3].endswith("| 1,234 | 2.0 |")
  pairs = [("other", "1 and 1"), ("other", "not measured")]
  less = figures.as_differences(rows, {"both": "both"}, pairs).splitlines()
  assert less[2:] == ["| other | 1 and 1 | +0.100 ± 0.000 |"]
  plots.save_figure(
    tmp_path / "x.png", lambda: figures.draw(rows, {"thick": "t"}, ["other"])
  )
  assert (tmp_path / "x.png").stat().st_size > 1000


def test_names_of_rows_are_their_own():
  for has_entropy in (False, True):
    rows = compositions.methods(has_entropy=has_entropy)
    assert len({composition.slug(x) for x in rows}) == len(rows)
    known = {x.name for x in rows}
    assert known >= {*composition.NAMED}


FEW = {
  "turned": ["base", "1 and 1", "1e-5: their means", "search of", "at random"],
  "strings": ["base", "1 and 1", "free, the 64", "unlabelled", "64 and both"],
}


@pytest.mark.parametrize("name", FEW)
def test_smoke(name, tmp_path, capsys, monkeypatch):
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    rows = composition.run([name], 1, FEW[name], tmp_path, smoke=True)
  known = {x["method"]: x for x in rows}
  assert all(any(text in x for text in FEW[name]) for x in known)
  assert known["base"]["figures"]["distance"] == pytest.approx(0, abs=1e-6)
  assert known[compositions.PLAIN]["figures"]["distance"] > 0
  if name == "turned":
    columns = known["dot 1e-5: their means"]
    assert 0 < columns["notes"]["moved"] <= 0.01 * 300 * 1.5
    assert columns["trained"] == 2 * (64 + 32 + 64 + 16 + 32 + 64 + 32 + 16)
  else:
    free = known["free, the 64"]
    assert free["trained"] == 2 * 4  # a layer of four matrices, two adapters
    assert free["notes"]["weights"] != [1, 1]
  said = capsys.readouterr().out
  assert f"| sum | {compositions.PLAIN} |" in said

  def opened(*_):
    raise AssertionError("a finished work was opened again")

  shut = composition.WORKS[name]._replace(open=opened)
  monkeypatch.setitem(composition.WORKS, name, shut)
  again = composition.run([name], 1, FEW[name], tmp_path, smoke=True)
  assert json.dumps(again) == json.dumps(rows)


def test_adapters_of_a_work_start_as_nothing_and_learn_apart():
  with jax.numpy_dtype_promotion("standard"):
    work = string_skills.open_work(0, string_skills.SMOKE)
  for own in work.adapters:
    assert {path.split("/")[0] for path in own} == {"h"}
    assert max(float(np.abs(x.b).max()) for x in own.values()) > 0
  fresh = work.start(jax.random.key(0), 3)
  assert work.test(fresh)["distance"] == pytest.approx(0, abs=1e-6)
  assert {x.rank for x in fresh.values()} == {3}
  large = {
    path: dataclasses.replace(x, scale=500 * x.scale)
    for path, x in work.adapters[0].items()
  }
  assert work.test(large)["distance"] > 1e-3
  texts = work.draws["unlabelled"](np.random.default_rng(0), 2, 3)
  assert len(texts) == 1
  assert texts[0].shape == (2, 3, strings.TOKENS)
