# SPDX-License-Identifier: Apache-2.0
"""Every variant stays within the bytes and is made of what it says."""

import jax
import numpy as np
import pytest

from experiments import equal_bytes, ladders
from experiments.equal_bytes import VARIANTS, Trial


def model(params, tokens):
  x = params["embed"]["embedding"][tokens]
  return jax.numpy.tanh(x @ params["up"]["kernel"]) @ params["head"]["kernel"]


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
  return Trial(ladder, 4, tokens, 8, 0)


@pytest.fixture(scope="module")
def rows(trial):
  held = np.random.default_rng(3).integers(0, 20, (4, 8)).astype(np.int32)
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    return list(equal_bytes.compare_variants(trial, {"held": held}))


def test_no_variant_takes_more_bytes(trial, rows):
  assert [row["variant"] for row in rows] == list(VARIANTS)
  for row in rows:
    assert row["bytes"] <= trial.max_bytes
  assert rows[1]["bytes"] == trial.max_bytes
  # What the budget holds is used, but for a unit.
  assert min(row["bytes"] for row in rows[2:]) > 0.75 * trial.max_bytes


def test_every_variant_beats_no_adapter_and_some_beat_plain_svd(rows):
  kl = {row["variant"]: row["held"]["kl"] for row in rows}
  assert max(list(kl.values())[1:]) < kl["no adapter"]
  assert kl["bits by squared error"] < kl["plain SVD in bfloat16"]


def test_sensitivity_is_the_cost_of_one_module_alone(trial):
  """Against the model run in float64 with that module cut."""
  rank, path = 4, "up/kernel"
  found = equal_bytes.measure_sensitivity(trial.ladder, rank, trial.calibration)
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
