# SPDX-License-Identifier: Apache-2.0
"""Two skills put together: what the works ask, what rows hold, a small run."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import composition
from experiments.lib.adapters import (
  benches,
  compositions,
  equal_ranks,
  unit_ranks,
  works,
)
from experiments.lib.adapters.weighings import ENTROPIC
from experiments.lib.data import forms, strings
from experiments.lib.figures import compositions as figures
from experiments.lib.figures import plots
from experiments.lib.measures import kept_rows
from experiments.lib.models import (
  digit_skills,
  loops,
  string_skills,
  token_skills,
)
from jlora.loras import Lora, dense
from jlora.merging import task_arithmetic
from jlora.training import init_lora


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


def test_paragraphs_are_dealt_once_and_forms_keep_their_words():
  found = forms.paragraphs("pydoc")
  parts = forms.split(found)
  assert sorted(x for part in parts for x in part) == sorted(found)
  for paragraph in found[:40]:
    words = paragraph.split()
    assert forms.plain(paragraph).split() == words
    marked, *others = forms.item(paragraph).split()
    assert (marked, others) == ("*", words)
    assert [x for x in forms.quoted(paragraph).split() if x != ">"] == [
      x for x in words if x != ">"
    ]
  encode = forms.tokenizer("".join(found[:40]), 300)
  tokens = encode(forms.item(found[50]))
  assert tokens.dtype == np.int32
  assert 0 <= tokens.min() <= tokens.max() < 300


def test_gaps_and_errors_of_units():
  rows = [row(i, "base", 0.2, "beside") for i in range(2)]
  rows += [row(i, "own", 0.6 + 0.2 * i, "pool") for i in range(2)]
  rows += [row(i, "all", 0.3 + 0.2 * i, "pool") for i in range(2)]
  found = figures.as_gaps(rows, {"thick": "t"}, {"thick": "both"},
                          ("base", "own"))  # fmt: skip
  assert found.splitlines()[-1] == "| all | 0.400 ± 0.100 | 0.375 ± 0.125 |"
  units = [row(0, f"r, {x}", 0.5, "units") for x in ("SVD", "LEGO")]
  for one, error in zip(units, (0.25, 0.5), strict=True):
    one["notes"] = {"error, best scale": error}
  lines = figures.as_units(units, {"thick": "t"}, "SVD").splitlines()
  assert lines[2] == "| r, SVD | 0.250 | 1.00 | 0.500 |"
  assert lines[3] == "| r, LEGO | 0.500 | 2.00 | 0.500 |"


def test_errors_are_those_of_dense_changes():
  pair = [{"w": x} for x in pair_of()]
  whole = benches.add(pair, (1.0, 1.0))
  one, other = unit_ranks.errors_of(whole, whole)
  assert max(one, other) == pytest.approx(0, abs=1e-6)
  wanted, half = np.asarray(dense(whole["w"])), dense(pair[0]["w"])
  found = unit_ranks.errors_of(pair[0], whole)
  size = np.linalg.norm(wanted)
  assert found[0] == pytest.approx(
    np.linalg.norm(half - wanted) / size, rel=1e-4
  )
  best = min(np.linalg.norm(c * half - wanted) for c in np.linspace(0, 3, 3001))
  assert found[1] == pytest.approx(best / size, rel=1e-4)


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
    files = {
      kept_rows.file_of(pathlib.Path(), "work", 0, f"{x.kind} {x.name}")
      for x in rows
    }
    assert len(files) == len(rows)
    known = {x.name for x in rows}
    assert known >= {*composition.NAMED}
    shown = {*composition.SHOWN} - (set() if has_entropy else {*ENTROPIC})
    assert known >= shown
    assert known >= {x for pair in composition.COMPARED for x in pair}


#: A row of each kind, and where a kind has several programs, of each.
KINDS = (
  "base", "1 and 1", "best of 16", "TIES, then SVD", "r, SVD of the sum",
  "r, LEGO, clusters at random",
  "dot 1e-5: their means", "clipped from 0.3, unlabelled", "search of",
  "3 of random entries, with own", "all but the skills",
  "LoRA on the 64 and both", "everything trained on both",
)  # fmt: skip


def tiny_work(seed, size):
  """A matrix as the model: it maps 12 numbers to logits of eight answers."""
  del size
  rng = np.random.default_rng(seed)
  params = {"w": rng.standard_normal((12, 8)).astype(np.float32)}

  def predict(params, x):
    return x @ params["w"]

  def loss(params, x, answer):
    return token_skills.token_losses(predict(params, x), answer).mean()

  def some():
    a, b = (rng.standard_normal((2, x)).astype(np.float32) for x in (12, 8))
    return {"w": Lora(a, b, np.float32(1))}

  def source(wanted):
    def draws(rng, steps, rows):
      x = rng.standard_normal((steps, rows, 12)).astype(np.float32)
      return x, (x @ wanted["w"]).argmax(-1)

    return draws

  first, second = some(), some()
  mine = {
    "first": {"w": params["w"] + dense(first["w"])},
    "second": {"w": params["w"] + dense(second["w"])},
    "both": {"w": params["w"] + dense(first["w"]) + dense(second["w"])},
  }
  draws = {
    "first": source(mine["first"]), "second": source(mine["second"]),
    "plain": source(params),
    **dict.fromkeys(("few", "five", "learned", "chosen", "many"),
                    source(mine["both"])),
    "unlabelled": lambda *shape: source(params)(*shape)[:1],
  }  # fmt: skip
  held = draws["many"](np.random.default_rng(9), 1, 64)

  def right(params):
    return -float(loss(params, held[0][0], held[1][0]))

  def test(params):
    moved = float(np.abs(np.asarray(params["w"] - mine["both"]["w"])).max())
    return {
      "both": right(params),
      "first": 0.5,
      "second": 0.5,
      "distance": moved,
    }

  def start(key, rank):
    return init_lora(params, rank, key, alpha=float(rank))

  functions = works.Functions(predict, loss, works.divergence)
  recipe = works.Recipe(2, 30, 30, 3e-2, 8, 8, 8, 5)
  return works.Work(
    functions, recipe, params, start, (first, second), draws, right, test,
    lambda: [some(), some()],
  )  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
  opening = composition.WORKS["texts"]._replace(open=tiny_work)
  monkeypatch.setattr(composition, "WORKS", {"tiny": opening})
  return opening


def test_every_kind_of_row(tiny, tmp_path, capsys, monkeypatch):
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    rows = composition.run(["tiny"], 1, KINDS, tmp_path, smoke=True)
  known = {x["method"]: x for x in rows}
  assert {x["kind"] for x in rows} == {*figures._LOOKS}
  plain, base = known[compositions.PLAIN], known["base"]
  assert plain["figures"]["distance"] == pytest.approx(0, abs=1e-5)
  assert base["figures"]["both"] < plain["figures"]["both"]
  spoiled = known["dot 1e-5: their means"]
  assert 0 < spoiled["notes"]["moved"] <= 0.01 * 300 * 1.5
  assert spoiled["trained"] == 2 * 12
  recycled = known["3 of random entries, with own"]
  assert len(recycled["notes"]["chosen"]) == 3
  assert recycled["trained"] == 4 + 2 * (12 + 8)
  assert known["all but the skills"]["notes"]["chosen"] == [2, 3]
  whole = known["everything trained on both skills' data"]
  assert whole["trained"] == 96
  units = known["r, LEGO, clusters at random"]["notes"]
  assert len(units["errors"]) == len(units["both"]) == unit_ranks.STARTS
  least = known["r, SVD of the sum"]["notes"]["error, best scale"]
  assert 0 < least <= units["error, best scale"]
  said = capsys.readouterr().out
  assert f"| sum | {compositions.PLAIN} |" in said

  def opened(*_):
    raise AssertionError("a finished work was opened again")

  monkeypatch.setitem(composition.WORKS, "tiny", tiny._replace(open=opened))
  again = composition.run(["tiny"], 1, KINDS, tmp_path, smoke=True)
  assert json.dumps(again) == json.dumps(rows)


@pytest.mark.parametrize("name", ["turned", "strings", "texts"])
def test_smoke(name, tmp_path):
  few = ["base", "1 and 1"]
  with jax.numpy_dtype_promotion("standard"):
    rows = composition.run([name], 1, few, tmp_path, smoke=True)
  known = {x["method"]: x for x in rows}
  assert known["base"]["figures"]["distance"] == pytest.approx(0, abs=1e-6)
  assert known[compositions.PLAIN]["figures"]["distance"] > 0


def test_adapters_of_a_work_start_as_nothing_and_learn_apart():
  with jax.numpy_dtype_promotion("standard"):
    work = string_skills.open_work(0, string_skills.SMOKE)
  for own in work.adapters:
    assert {path.split("/")[0] for path in own} == {"h"}
    assert max(float(np.abs(x.b).max()) for x in own.values()) > 0
  fresh, base = work.start(jax.random.key(0), 3), work.params
  found = work.test(benches.summed(base, fresh))
  assert found["distance"] == pytest.approx(0, abs=1e-6)
  assert {x.rank for x in fresh.values()} == {3}
  large = {
    path: dataclasses.replace(x, scale=500 * x.scale)
    for path, x in work.adapters[0].items()
  }
  assert work.test(benches.summed(base, large))["distance"] > 1e-3
  texts = work.draws["unlabelled"](np.random.default_rng(0), 2, 3)
  assert len(texts) == 1
  assert texts[0].shape == (2, 3, strings.TOKENS)
