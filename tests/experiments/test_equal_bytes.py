# SPDX-License-Identifier: Apache-2.0
"""Every variant stays within the bytes and is made of what it says."""

import json
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments import equal_bytes
from experiments.lib.adapters import ladders, teachers, trials
from experiments.lib.adapters.trials import WEIGHINGS, Trial
from experiments.lib.adapters.variants import COSTLY, PLAIN, VARIANTS
from experiments.lib.figures import plots
from jlora.evaluation.outputs import mean_kl

RANK = 4


class Small(nn.Module):
  """An embedding that is no Dense and two layers that are."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(20, 24, name="embed")(tokens)
    x = jax.numpy.tanh(nn.Dense(48, use_bias=False, name="up")(x))
    return nn.Dense(20, use_bias=False, name="head")(x)


def model(params, tokens) -> Any:
  return Small().apply({"params": params}, tokens)


def draw(seed, size=1.0):
  rng = np.random.default_rng(seed)
  shapes = {
    "embed": {"embedding": (20, 24)},
    "up": {"kernel": (24, 48)},
    "head": {"kernel": (48, 20)},
  }
  return {
    module: {
      leaf: size * rng.standard_normal(shape).astype(np.float32)
      for leaf, shape in leaves.items()
    }
    for module, leaves in shapes.items()
  }


@pytest.fixture(scope="module")
def trial():
  base = draw(0)
  tuned = jax.tree.map(np.add, base, draw(1, 0.2))
  ladder = ladders.build_ladder(model, base, tuned, 24)
  tokens = np.random.default_rng(2).integers(0, 20, (6, 8)).astype(np.int32)
  return Trial(ladder, tokens, 8, 0)


@pytest.fixture(scope="module")
def rows(trial):
  held = np.random.default_rng(3).integers(0, 20, (4, 8)).astype(np.int32)
  teacher = teachers.listen(model, trial.ladder.finetuned, held)
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    return list(equal_bytes.compare_variants(trial, {"held": teacher}, RANK))


def test_no_variant_takes_more_bytes(trial, rows):
  assert [row["variant"] for row in rows] == list(VARIANTS)
  for row in rows:
    assert row["bytes"] <= trial.max_bytes(RANK)
  assert rows[1]["bytes"] == trial.max_bytes(RANK)
  # A file has names and shapes besides: of three modules, a few hundred bytes.
  for row in rows[1:]:
    assert 100 < row["file_bytes"] - row["bytes"] < 1200
  # What the budget holds is used, but for a unit.
  assert min(row["bytes"] for row in rows[2:]) > 0.75 * trial.max_bytes(RANK)


def test_every_variant_beats_no_adapter_and_some_beat_plain_svd(rows):
  kl = {row["variant"]: row["held"]["kl"] for row in rows}
  assert max(list(kl.values())[1:]) < kl["no adapter"]
  assert kl["bits by squared error"] < kl[PLAIN]


def test_sensitivity_is_the_cost_of_one_module_alone(trial):
  """Against the model run in float64 with that module cut."""
  rank, path = RANK, "up/kernel"
  found = trials.measure_sensitivity(trial.ladder, rank, trial.calibration)
  ladder = trial.ladder
  lora = ladders.cut({path: ladder.loras[path]}, rank)
  params = dict(ladder.finetuned)
  params["up"] = ladders.with_loras(ladder.base, lora)["up"]

  def log_p(params):
    logits = np.asarray(model(params, trial.calibration), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  p, q = log_p(ladder.finetuned), log_p(params)
  kl = (np.exp(p) * (p - q)).sum(-1).mean()
  rest = np.sum(np.square(ladder.spectra[path][rank:], dtype=np.float64))
  assert found[path] == pytest.approx(kl / rest, rel=1e-3)


def test_ladders_are_cut_and_added(trial):
  ladder = trial.ladder
  whole = ladders.with_loras(ladder.base, ladder.loras)
  for one, two in zip(
    jax.tree.leaves(whole), jax.tree.leaves(ladder.finetuned), strict=True
  ):
    np.testing.assert_allclose(one, two, atol=1e-5)
  none = ladders.cut(ladder.loras, dict.fromkeys(ladder.loras, 0))
  assert none == {}
  assert ladders.bytes_of(ladder.shapes, 2) == 2 * 2 * (44 + 72 + 68)


@pytest.mark.parametrize("name", WEIGHINGS)
def test_whitening_changes_what_is_read_and_leaves_the_rest(trial, rows, name):
  units, plain = trial.whitened(name), trial.ladder
  assert set(units.loras) == set(plain.loras)
  np.testing.assert_array_equal(
    units.loras["embed/embedding"].a, plain.loras["embed/embedding"].a
  )
  for path in ("up/kernel", "head/kernel"):
    one, two = (
      ladders.with_loras(plain.base, ladders.cut({path: loras[path]}, RANK))
      for loras in (units.loras, plain.loras)
    )
    module = path.split("/")[0]
    gap = np.abs(one[module]["kernel"] - two[module]["kernel"]).max()
    assert 1e-4 < gap < 1
  # All units together are the change itself, whatever they were weighed by.
  whole = ladders.with_loras(plain.base, units.loras)
  for one, two in zip(
    jax.tree.leaves(whole), jax.tree.leaves(plain.finetuned), strict=True
  ):
    np.testing.assert_allclose(one, two, atol=1e-3)


def test_what_variants_share_is_made_once_and_timed(trial, rows):
  first = trial.inputs()
  assert trial.inputs() is first
  assert {"moments of inputs", "moments of gradients"} <= trial.spent.keys()
  assert {name for name in VARIANTS if "refined" in name} < set(COSTLY)


def row(variant, seed, kl):
  text = {"kl": kl, "kl_error": 0.01}
  return {"variant": variant, "rank": 4, "seed": seed, "bytes": 2**20,
          "file_bytes": 3 * 2**19, "seconds": 2.0, "kjv": text}  # fmt: skip


def test_summaries_pair_each_seed_with_its_own_plain_svd():
  rows = [row(PLAIN, 0, 0.2), row(PLAIN, 1, 0.4)]
  rows += [row("x", 0, 0.1), row("x", 1, 0.1), row("y", 0, 0.3)]
  plain, x, y = equal_bytes.summarise(rows, ["kjv"])
  assert plain["kjv"]["ratio"] == 1
  assert plain["kjv"]["ratio_error"] == 0
  assert x["kjv"]["ratio"] == pytest.approx((0.5 + 0.25) / 2)
  assert x["kjv"]["ratio_error"] == pytest.approx(0.25 / np.sqrt(2))
  assert x["seeds"], y["seeds"] == (2, 1)
  assert np.isnan(y["kjv"]["ratio_error"])
  table = equal_bytes.as_table([plain, x, y], ["kjv"]).splitlines()
  assert table[3] == (
    "| x | 2 | 1.00 | 1.50 | 0.10000 ± 0.00000 | 0.375 ± 0.177 | 2.0 |"
  )
  assert table[4] == "| y | 1 | 1.00 | 1.50 | 0.30000 ± 0.01000 | 1.500 | 2.0 |"
  with pytest.raises(ValueError, match="is missing at rank 4, seed 2"):
    equal_bytes.summarise([row("x", 2, 0.1)], ["kjv"])


def test_a_teacher_is_as_far_as_mean_kl_says(trial):
  """Five rows: a batch and a rest."""
  tokens = np.random.default_rng(4).integers(0, 20, (5, 8)).astype(np.int32)
  ladder = trial.ladder
  teacher = teachers.listen(model, ladder.finetuned, tokens)
  wanted = mean_kl(model, ladder.finetuned, ladder.base, [tokens])
  found = teachers.distance_from(teacher, ladder.base)
  np.testing.assert_allclose(found, (wanted.kl, wanted.kl_error), rtol=1e-4)
  alone = teachers.listen(model, ladder.finetuned, tokens[:1])
  assert np.isnan(teachers.distance_from(alone, ladder.base)[1])


def test_rows_of_several_runs_are_one_table(tmp_path):
  """What was measured twice is taken from the last file."""
  files = [tmp_path / "first.json", tmp_path / "second.json"]
  first = [row(PLAIN, 0, 0.2), row("x", 0, 0.2)]
  files[0].write_text(json.dumps(first))
  files[1].write_text(json.dumps([row(PLAIN, 0, 0.4), row("y", 0, 0.1)]))
  rows = equal_bytes.read_rows(files)
  ratios = {
    each["variant"]: each["kjv"]["ratio"]
    for each in equal_bytes.summarise(rows, ["kjv"])
  }
  assert ratios == pytest.approx({PLAIN: 1, "x": 0.5, "y": 0.25})


def test_ratios_are_drawn_with_their_bars():
  rows = [row(PLAIN, 0, 0.2), row("x", 0, 0.1), row(PLAIN, 1, 0.4),
          row("x", 1, 0.1), {**row("none", 0, 3.0), "bytes": 0}]  # fmt: skip
  whole = equal_bytes.summarise(rows, ["kjv"])
  axes = plots.draw_ratios(whole, ["kjv"], "title").axes[0]
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert labels == [f"{PLAIN} (2 seeds)", "x (2 seeds)"]
  (line,) = [at for at in axes.get_lines() if at.get_marker() == "o"]
  np.testing.assert_allclose(np.asarray(line.get_xdata(), float), [1, 0.375])
