# SPDX-License-Identifier: Apache-2.0
"""What an adapter says of its base, and who warns where it meets another."""

import io
import json
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.commands.serving.adapters import open_base, survey
from jlora.extraction import extract_checkpoint
from jlora.formats import (
  OtherBaseWarning,
  check_fingerprint,
  fingerprint,
  read_fingerprint,
)
from jlora.formats.adapted import open_model
from jlora.formats.fingerprints import ENTRY, sample_of
from jlora.merging import linear
from jlora.merging.checkpoints.adapter_folders import (
  plan_adapters,
  write_adapters,
)
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice

NAMES = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(5)]
CONFIG = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "hidden_size": 8,
}


def tensors_of(seed):
  rng = np.random.default_rng(seed)
  return {n: rng.standard_normal((8, 8)).astype(np.float32) for n in NAMES}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """An adapter of a base, and another base."""
  folder = tmp_path_factory.mktemp("made")
  old, new = tensors_of(0), tensors_of(1)
  tuned = {name: w + 0.1 * new[name] for name, w in old.items()}
  for name, tensors in (("old", old), ("new", new), ("tuned", tuned)):
    (folder / name).mkdir()
    write_safetensors(folder / name / "model.safetensors", tensors)
    (folder / name / "config.json").write_text(json.dumps(CONFIG))
  for rank, name in ((2, "all/adapter"), (1, "other")):
    extract_checkpoint(
      folder / "old", folder / "tuned", folder / name, rank=rank,
      log=io.StringIO(),
    )  # fmt: skip
  return folder


def test_an_extraction_says_of_its_base_what_the_base_is(made):
  found = read_fingerprint(made / "all" / "adapter")
  assert found == fingerprint(open_checkpoint(made / "old"), NAMES)
  w = tensors_of(0)[NAMES[0]]
  one = found[NAMES[0]]
  assert one["shape"] == [8, 8]
  np.testing.assert_allclose(one["norm"], np.linalg.norm(w), rtol=1e-5)
  values = np.linalg.svd(w, compute_uv=False)[:4]
  np.testing.assert_allclose(one["singular_values"], values, rtol=1e-5)


def test_trees_and_checkpoints_are_told_alike(made):
  tree = {name: jnp.asarray(w) for name, w in tensors_of(0).items()}
  found = fingerprint(tree, NAMES)
  known = fingerprint(open_checkpoint(made / "old"), NAMES)
  assert {n: one["hash"] for n, one in found.items()} == {
    n: one["hash"] for n, one in known.items()
  }
  assert check_fingerprint(known, tree) == []


def meets(say):
  """The one warning that comes where an adapter meets another base."""
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    say()
  (one,) = [each for each in said if each.category is OtherBaseWarning]
  return str(one.message)


def test_another_base_is_told_in_one_line(made):
  known = read_fingerprint(made / "all" / "adapter")
  new = open_checkpoint(made / "new")
  said = meets(lambda: check_fingerprint(known, new))
  assert said.startswith("The adapter was made on another base: 5 of 5 weights")
  assert "and 2 more" in said
  assert "jlora port" in said
  assert "\n" not in said
  assert f"{NAMES[0]} (norm {known[NAMES[0]]['norm']:g}, here " in said
  with pytest.warns(OtherBaseWarning, match=r"shape \(8, 8\), here \(8, 4\)"):
    check_fingerprint(known, {NAMES[0]: np.ones((8, 4))})


def test_all_doors_on_disk_warn(made, tmp_path):
  """A model with an adapter, a server's folder, and adapters merged."""
  adapter = made / "all" / "adapter"
  open_model(f"{made / 'old'}+{adapter}")  # warnings are errors
  survey(made / "all", open_base(str(made / "old")))
  assert "5 of 5" in meets(lambda: open_model(f"{made / 'new'}+{adapter}"))
  base = open_base(str(made / "new"))
  assert "5 of 5" in meets(lambda: survey(made / "all", base))
  parts = (Slice((Input(str(adapter)), Input(str(made / "other")))),)
  plan = plan_adapters(Recipe(linear, parts, base=str(made / "old")))
  write_adapters(plan, tmp_path / "merged", None)
  assert read_fingerprint(tmp_path / "merged") == read_fingerprint(adapter)
  one = (Slice((Input(str(adapter)),)),)
  other = Recipe(linear, one, base=str(made / "new"))
  assert "5 of 5" in meets(lambda: plan_adapters(other))


def test_adapters_of_different_bases_are_told(made, tmp_path):
  shutil.copytree(made / "all" / "adapter", tmp_path / "adapter")
  file = tmp_path / "adapter" / "adapter_model.safetensors"
  stored = open_checkpoint(file)
  known = read_fingerprint(tmp_path / "adapter")
  known[NAMES[3]]["hash"] = "0" * 16
  said = {"format": "pt", ENTRY: json.dumps(known)}
  write_safetensors(file, dict(stored), said)
  inputs = Input(str(made / "other")), Input(str(tmp_path / "adapter"))
  recipe = Recipe(linear, (Slice(inputs),))
  assert "1 weights are not those of the first" in meets(
    lambda: plan_adapters(recipe)
  )
  with pytest.warns(OtherBaseWarning):
    plan = plan_adapters(recipe)
  assert plan.fingerprint.keys() == set(NAMES) - {NAMES[3]}


@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 8), (3, 70, 65)]))
def test_bfloat16_is_the_same_base_and_a_finetune_is_not(seed, shape):
  rng = np.random.default_rng(seed)
  w = rng.standard_normal(shape).astype(np.float32)
  known = fingerprint({"w": w}, ["w"])
  assert check_fingerprint(known, {"w": jnp.asarray(w, jnp.bfloat16)}) == []
  moved = w + 0.01 * rng.standard_normal(shape).astype(np.float32)
  with pytest.warns(OtherBaseWarning):
    assert check_fingerprint(known, {"w": moved}) == ["w"]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_a_sample_is_small_and_has_the_first_number(shape):
  shape = tuple(shape)
  sample = np.zeros(shape, bool)[sample_of(shape)]
  assert 1 <= sample.size <= 64 * 64 * 16
  assert all(part.start is None for part in sample_of(shape))


def test_what_is_not_there_or_damaged_is_an_error(made, tmp_path):
  with pytest.raises(ValueError, match=r"1 parameters are not there: x; "):
    fingerprint({"w": np.ones((2, 2))}, ["x"])
  with pytest.raises(ValueError, match="w holds numbers that are not finite"):
    fingerprint({"w": np.full((2, 2), np.nan)}, ["w"])
  for said in ("[", "[]", '{"w": 1}', '{"w": {"shape": [1], "norm": "x"}}'):
    file = tmp_path / "adapter_model.safetensors"
    write_safetensors(file, {"x": np.ones(2)}, {ENTRY: said})
    with pytest.raises(ValueError, match=ENTRY):
      read_fingerprint(tmp_path)
