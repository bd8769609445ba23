# SPDX-License-Identifier: Apache-2.0
"""Plans: what is counted, what it is held against, and what is said."""

import json
import math

import numpy as np
import pytest

from jlora.commands import entry, plan
from jlora.commands.costs import Cost, Module, bound_of, cost_of
from jlora.commands.estimates import describe, list_modules, plan_extraction
from jlora.commands.machines import MACHINES, Machine, measure_here
from jlora.commands.plan import COMMAND
from jlora.commands.trials import configure, write_pair
from jlora.factoring import factorisers
from jlora.factoring.factorisers import cheapest, gram, krylov, svd

SMALL = configure(32, 48, 2) | {
  "vocab_size": 96,
  "num_attention_heads": 2,
  "num_key_value_heads": 2,
  "head_dim": 16,
}
UNIT = Machine(1.0, 1.0, 1.0, 10, 1.0, "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_pair(tmp_path_factory.mktemp("pair"), SMALL)[0]


def test_a_config_and_its_checkpoint_have_the_same_matrices(folder):
  from_config = list_modules(str(folder / "config.json"), None)
  from_files = list_modules(str(folder), None)
  shapes = [
    sorted(m.shape for m in found) for found in (from_config, from_files)
  ]
  assert shapes[0] == shapes[1]
  assert {m.itemsize for m in from_config + from_files} == {2}


@pytest.mark.parametrize(
  ("shape", "factor"),
  [((2048, 5632), krylov), ((192, 9000), gram), ((16, 16), svd)],
)
def test_every_factoriser_is_counted_and_shared_out(shape, factor):
  assert cheapest(shape, 8, passes=6) is factor
  module = Module("w", shape, 2)
  one, four = (cost_of(module, 8, 4, n) for n in (1, 4))
  assert one.flops > 0
  assert one.sent == 0 < four.sent
  for name in ("moved", "entries", "held"):
    assert getattr(four, name) == getattr(one, name) / 4


def test_products_are_those_that_are_made(monkeypatch):
  m, n, rank, made = 512, 2048, 16, []
  real = factorisers.times

  def times(rows, matrix):
    made.append(2 * len(rows) * matrix.size)
    return real(rows, matrix)

  monkeypatch.setattr(factorisers, "times", times)
  delta = np.random.default_rng(0).standard_normal((m, n), np.float32)
  krylov(delta, rank)
  width = rank + 16
  passes = (len(made) + 1) // 2
  cost = cost_of(Module("w", (m, n), 4), rank, passes)
  assert set(made) == {2 * width * m * n}
  assert sum(made) < cost.flops < 3 * sum(made)


def test_leading_axes_are_so_many_matrices():
  one, eight = (
    cost_of(Module("w", (*lead, 256, 512), 2), 8, 4) for lead in ((), (8,))
  )
  for name in ("flops", "moved", "entries", "held"):
    assert getattr(eight, name) == pytest.approx(8 * getattr(one, name))


def test_what_travels_stays_under_thrice_the_thin_factors():
  rank, shape = 64, (8192, 28672)
  cost = cost_of(Module("w", shape, 2), rank, 4, 16)
  assert 0 < cost.sent <= 3 * sum(shape) * (rank + 16) * 4


def test_modules_are_dealt_and_cut_ones_shared():
  whole = [Cost(4.0, 0.0, 0.0, 0.0, 0.0), *[Cost(2.0, 0, 0, 0, 0)] * 2]
  cut = [Cost(1.0, 3.0, 1.0, 5.0, 0.0)]
  found = bound_of(whole, cut, UNIT, 2, 0.0)
  assert found.compute == 4.0 + 1.0
  assert found.factoring == found.seconds == 4.0 + 3.0 + 1.0 + 5.0
  assert bound_of(whole, cut, UNIT, 2, 99.0).by == "disk"


def test_an_unchanged_module_is_read_and_nothing_else(folder):
  every, some = (list_modules(str(folder), u) for u in (None, ".*_proj.*"))
  plans = [
    plan_extraction(m, UNIT, devices=1, rank=4, passes=4, disk=1.0)
    for m in (every, some)
  ]
  assert plans[1].modules == plans[0].modules - 14 == 2
  assert plans[1].disk == plans[0].disk
  assert 0 < plans[1].flops < plans[0].flops


def test_llama_70b_is_read_longer_than_it_is_factored(tmp_path):
  config = {
    **SMALL,
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
  }
  file = tmp_path / "config.json"
  file.write_text(json.dumps(config))
  modules = list_modules(str(file), None)
  assert sum(math.prod(m.shape) for m in modules) == pytest.approx(70.6e9, 1e-2)
  v5e = MACHINES["v5e"]
  plan = plan_extraction(
    modules, v5e, devices=16, rank=64, passes=4, disk=4e9, split=2**31
  )
  assert plan.cut == 2  # the embedding and the head
  assert plan.bound.by == "disk"
  assert plan.held < v5e.memory
  alone = plan_extraction(
    modules, v5e, devices=1, rank=64, passes=4, disk=4e9, split=2**31
  )
  assert plan.bound.factoring == pytest.approx(alone.bound.factoring / 16, 0.1)
  said = "\n".join(describe(plan, v5e._replace(memory=10**9), 16))
  assert "DOES NOT FIT" in said
  assert "bound by disk" in said


def test_this_machine_is_measured():
  here = measure_here()
  figures = np.array([*here.machine[:4], here.disk])
  assert np.isfinite(figures).all()
  assert (figures > 1e6).all()


def test_the_command(folder, capsys):
  words = [f"--model={folder}", "--chip=v6e", "--devices=4", "--json"]
  assert entry.run(COMMAND, words) == 0
  plan = json.loads(capsys.readouterr().out)
  assert plan["modules"] == 16
  assert plan["bound"]["by"] == "disk"


@pytest.mark.parametrize(
  ("words", "says"),
  [
    (["--model=nowhere.json"], "nowhere.json cannot be read: No such file"),
    (["--model=nowhere"], "does not exist"),
    ([], "--model is needed"),
    (["more"], "only flags are taken, got more"),
  ],
)
def test_a_bad_model_is_one_sentence(capsys, words, says):
  assert entry.run(COMMAND, words) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert says in line


def test_a_plan_is_checked_by_an_extraction(monkeypatch, capsys, tmp_path):
  """The command itself is started, on two sizes that take no time."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(plan, "_SIZES", ((64, 96, 2),))
  assert entry.run(COMMAND, ["--check", "--rank=4"]) == 0
  said = capsys.readouterr().out
  assert "| 64 | 96 | 2 |" in said
  assert "s to start were taken off." in said
