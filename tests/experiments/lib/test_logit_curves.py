# SPDX-License-Identifier: Apache-2.0
"""Lower ranks are cuts of one adapter, and what it keeps whole comes along."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util

import jlora
from experiments.lib.measures import logit_curves
from experiments.lib.models import finetunes
from jlora import models

CONFIG = finetunes.TINY | {"num_hidden_layers": 1}
HIDDEN = CONFIG["hidden_size"]


def _tuned(params, seed=1):
  """Every parameter moved, the norms too."""
  rng = np.random.default_rng(seed)
  flat = traverse_util.flatten_dict(params, sep="/")
  moved = {
    path: leaf + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32)
    for path, leaf in flat.items()
  }
  return traverse_util.unflatten_dict(moved, sep="/")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pair")
  _, params = models.init(CONFIG, jax.random.key(0))
  base = models.save(folder / "base", params, CONFIG)
  tuned = models.save(folder / "finetuned", _tuned(params), CONFIG)
  out = folder / "out"
  jlora.extract_checkpoint(base, tuned, out, rank=HIDDEN, log=io.StringIO())
  return base, tuned, out


@pytest.fixture(scope="module")
def loaded(pair):
  base, tuned, out = pair
  return (
    *logit_curves.load_pair(base, tuned),
    logit_curves.load_adapter(out, base),
  )


def test_the_whole_adapter_is_the_finetune(loaded):
  _, params, target, adapter = loaded
  assert adapter.full  # the norms, which are no matrices
  found = logit_curves.adapt_params(params, adapter, HIDDEN)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, target
  )


def test_a_cut_is_the_best_change_of_its_rank(loaded):
  _, params, target, adapter = loaded
  found = logit_curves.adapt_params(params, adapter, 5)
  place = lambda tree: np.asarray(  # noqa: E731
    tree["layers"]["0"]["mlp"]["down"]["kernel"], np.float64
  )
  delta = place(target) - place(params)
  u, s, vt = np.linalg.svd(delta, full_matrices=False)
  best = (u[:, :5] * s[:5]) @ vt[:5]
  np.testing.assert_allclose(place(found) - place(params), best, atol=1e-5)


def test_the_curve_begins_at_the_base_and_ends_at_the_finetune(loaded):
  apply, params, target, adapter = loaded
  rng = np.random.default_rng(0)
  texts = {"noise": rng.integers(0, 256, (6, 12)).astype(np.int32)}
  found = logit_curves.sweep_ranks(*loaded, texts, [8, HIDDEN])["noise"]
  rows = found["ranks"]
  assert [row["rank"] for row in rows] == [0, 8, HIDDEN]
  expected = jlora.mean_kl(apply, target, params, [texts["noise"]])
  assert rows[0]["kl"] == pytest.approx(expected.kl, rel=1e-4)
  assert rows[0]["tokens"] == expected.tokens == 72
  assert rows[0]["recovered"] == 0.0
  assert rows[0]["kl"] > rows[1]["kl"] > rows[2]["kl"]
  assert rows[2]["kl"] < 1e-5 * rows[0]["kl"]
  assert rows[1]["recovered"] == 1 - rows[1]["kl"] / rows[0]["kl"]
  loss = jlora.score(apply, target, [texts["noise"]]).loss
  assert found["finetuned"]["loss"] == pytest.approx(loss, rel=1e-5)
  assert rows[2]["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_layout_of_its_own_is_read_as_such(tmp_path):
  """GPT-2 stores (in, out), which its config alone says."""
  config = {
    "model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 1,
    "n_head": 2, "n_positions": 8, "layer_norm_epsilon": 1e-5,
  }  # fmt: skip
  _, params = models.init(config, jax.random.key(0))
  target = _tuned(params)
  base = models.save(tmp_path / "base", params, config)
  tuned = models.save(tmp_path / "tuned", target, config)
  out = tmp_path / "out"
  jlora.extract_checkpoint(base, tuned, out, rank=16, log=io.StringIO())
  adapter = logit_curves.load_adapter(out, base)
  found = logit_curves.adapt_params(params, adapter, 16)
  place = lambda tree: tree["h"]["0"]["mlp"]["c_fc"]["kernel"]  # noqa: E731
  np.testing.assert_allclose(place(found), place(target), atol=1e-5)


def test_batches_have_one_size_and_every_row():
  tokens = np.arange(18).reshape(6, 3)
  parts = logit_curves.batches_of(tokens)
  assert {part.shape for part in parts} == {(3, 3)}
  np.testing.assert_array_equal(np.concatenate(parts), tokens)


def test_models_of_different_networks_are_refused(pair, tmp_path):
  other = shutil.copytree(pair[0], tmp_path / "other")
  config = json.dumps(CONFIG | {"rope_theta": 5e5})
  (other / "config.json").write_text(config)
  with pytest.raises(ValueError, match="describe different networks"):
    logit_curves.load_pair(pair[0], other)
