# SPDX-License-Identifier: Apache-2.0
"""Merges of two tiny random changes of one model, and their table."""

import numpy as np
import pytest

from experiments import merge_skills
from experiments.lib.adapters import merge_settings
from experiments.lib.figures import merges
from experiments.lib.models import mixtures, skills
from jlora.loras import Lora
from jlora.paths import flatten


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  return skills.tiny_skills(str(tmp_path_factory.mktemp("tiny")))


def test_rows_of_an_average_and_of_the_base(found):
  rows = list(
    merge_skills.measure_all(found, 2, ["base", "finetune", "linear"], [])
  )
  by_name = {(row["method"], row["setting"]): row for row in rows}
  assert by_name["base", ""]["change"] == 0
  # Changes of equal size at right angles: their mean is 1/√2 as long.
  one = by_name["finetune", "pydoc alone"]["change"]
  both = by_name["linear", "plain average"]["change"]
  assert both / one == pytest.approx(0.5**0.5, rel=0.02)
  assert all(len(row["kjv"]) == len(row["pydoc"]) == 2 for row in rows)
  assert np.isfinite([row["kjv"] + row["pydoc"] for row in rows]).all()
  # What is there is not measured again.
  left = merge_skills.measure_all(found, 2, ["base", "linear"], rows)
  assert list(left) == []


def test_adapters_are_put_onto_the_base(found, monkeypatch):
  path = "layers/0/mlp/up/kernel"

  def extract(base, tree, *, rank):
    change = np.asarray(flatten(tree)[path] - flatten(base)[path])
    eye = np.eye(len(change), dtype=np.float32)
    return {path: Lora(eye, change * rank, np.float32(1 / rank))}

  monkeypatch.setattr(merge_skills.jlora, "extract", extract)
  made = {
    (method, setting): make
    for _, method, setting, make in merge_skills.merges_of(found, 2)
  }
  adapted = flatten(made["concat", "the Bible's alone"]())
  target, base = flatten(found.finetuned["kjv"]), flatten(found.base)
  np.testing.assert_allclose(adapted[path], target[path], atol=1e-6)
  other = "layers/0/mlp/down/kernel"
  np.testing.assert_array_equal(adapted[other], base[other])


def test_random_factors_keep_their_standard_deviations():
  rng = np.random.default_rng(0)
  a, b = rng.normal(0, 2, (8, 400)), rng.normal(0, 0.1, (8, 300))
  loras = {"w": Lora(np.float32(a), np.float32(b), np.float32(1))}
  drawn = merge_skills.randomise(loras, 0)["w"]
  assert float(np.std(drawn.a)) == pytest.approx(2, rel=0.1)
  assert float(np.std(drawn.b)) == pytest.approx(0.1, rel=0.1)
  assert abs(np.corrcoef(np.ravel(drawn.a), np.ravel(a))[0, 1]) < 0.1


def test_a_mixture_has_both_mlps_and_the_rest_of_the_base(found):
  one = next(x for x in mixtures.MIXTURES if x.setting.endswith("equal shares"))
  model, params = mixtures.mix(one, found)
  paths = [f"layers/0/moe/experts/{i}/down/kernel" for i in range(2)]
  for path, tree in zip(paths, found.finetuned.values(), strict=True):
    own = flatten(tree)["layers/0/mlp/down/kernel"]
    np.testing.assert_array_equal(flatten(params)[path], own)
  q = "layers/1/attn/q/kernel"
  np.testing.assert_array_equal(flatten(params)[q], flatten(found.base)[q])
  # Ties count half: a router of zeros says nothing about either text.
  shares = mixtures.routed(model, params, found.held_out)
  assert shares == {"kjv": 0.5, "pydoc": 0.5}


def test_routers_of_states_tell_tokens_apart(found):
  """Two texts of one byte each go to their own expert, wholly."""
  rows = {"kjv": np.full((2, 9), 7), "pydoc": np.full((2, 9), 200)}
  rows = {name: tokens.astype(np.int32) for name, tokens in rows.items()}
  known = found._replace(train=rows, held_out=rows)
  one = next(x for x in mixtures.MIXTURES if x.averaged and x.chosen == 1)
  model, params = mixtures.mix(one, known)
  shares = mixtures.routed(model, params, rows)
  assert min(shares.values()) > 0.95
  mean = merge_skills.run(
    merge_settings.WHOLE[0], list(found.finetuned.values())
  )
  q = "layers/1/attn/q/kernel"
  np.testing.assert_allclose(flatten(params)[q], flatten(mean)[q], atol=1e-6)


def test_the_table_and_the_figure_mark_the_front():
  rows = [
    {"kind": "beside", "method": "base", "setting": "", "change": 0.0,
     "kjv": [3.0, 4.0], "pydoc": [3.0, 3.0]},
    {"kind": "whole", "method": "good", "setting": "s", "change": 0.1,
     "kjv": [3.0, 3.0], "pydoc": [2.0, 3.0]},
    {"kind": "mixture", "method": "far", "setting": "s", "change": None,
     "kjv": [9.0, 9.0], "pydoc": [9.0, 9.0]},
  ]  # fmt: skip
  lines = merge_skills.as_table(rows, list(skills.TITLES)).splitlines()
  assert lines[2].endswith("| 3.500 | 3.000 | 3.250 |  |")
  assert lines[3].endswith("| 3.000 | 2.500 | 2.750 | * |")
  assert lines[4].startswith("| mixture | far | s |  | 9.000 |")
  best = merge_skills.front(rows, list(skills.TITLES))
  assert [row["method"] for row in best] == ["good"]
  figure = merges.draw_losses(rows, best, skills.TITLES)
  said = [text.get_text() for text in figure.axes[0].texts]
  names = "Pareto front\n1  good, s"
  assert said == ["1", names, "not shown:\nfar s: 9.00, 9.00"]
