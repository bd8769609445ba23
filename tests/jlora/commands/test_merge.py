# SPDX-License-Identifier: Apache-2.0
"""The command: a recipe in, a checkpoint out; what is wrong is one message."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import yaml

import jlora
from experiments.bench import merge
from experiments.lib.data import pairs
from jlora.checkpoints.checkpoint import write_safetensors
from jlora.merging.checkpoints.mergekit import read_recipe

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
  paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
  for at, path in enumerate(paths):
    table = np.full((3 + at, 2), at, np.float32)
    write_safetensors(path, {"model.embed_tokens.weight": table})
  models = [{"model": path, "parameters": {"weight": 1}} for path in paths]
  file = tmp_path / "recipe.yml"
  file.write_text(yaml.dump({"merge_method": "linear", "models": models}))
  return str(file)


def run(*flags):
  command = [sys.executable, "-m", "experiments.merge", *map(str, flags)]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_recipe_becomes_a_checkpoint(recipe, tmp_path):
  out, cache = tmp_path / "out", tmp_path / "cache"
  flags = [f"--config={recipe}", f"--out={out}", f"--cache={cache}"]
  done = run(*flags, "--vocabulary=common")
  found = jlora.open_checkpoint(out)
  assert found["model.embed_tokens.weight"].tolist() == [[0.5, 0.5]] * 3
  assert "vocabulary 3 in the base, 4 in the finetune" in done.stdout
  assert "1 tensors" in done.stdout


def test_a_bad_merge_is_one_message(recipe, tmp_path):
  done = run(f"--config={recipe}", f"--out={tmp_path / 'out'}")
  assert done.returncode == 1
  assert "error: model.embed_tokens.weight: vocabulary" in done.stderr
  assert "Traceback" not in done.stderr


def test_the_benchmarks_recipes_are_read(tmp_path):
  bench = merge.Bench(tmp_path)
  for method in (*merge.METHODS, "passthrough"):
    file = bench.write_recipe(method, "small", {"dtype": "float32"})
    assert read_recipe(file).models[-1].endswith(("other", "finetuned"))


def test_a_family_is_a_base_and_two_finetunes(tmp_path):
  sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 4}
  heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
  config = {**pairs.LLAMA, **sizes, **heads, "num_hidden_layers": 1}
  folders = pairs.write_family(tmp_path, config, dtype=np.float32)
  base, one, two = map(jlora.open_checkpoint, folders)
  name = "model.layers.0.mlp.up_proj.weight"
  changes = [(own[name] - base[name]).ravel() for own in (one, two)]
  assert abs(np.corrcoef(*changes)[0, 1]) < 0.9
  np.testing.assert_array_equal(one["lm_head.weight"], base["lm_head.weight"])


def test_differences_are_of_the_largest_entry():
  ours, theirs = {"w": np.float32([1, 4])}, {"w": np.float32([2, 4])}
  assert merge.difference_of(ours, theirs) == (0.25, 0.5)
  with pytest.raises(ValueError, match="tensors differ"):
    merge.difference_of(ours, {"v": theirs["w"]})


def test_models_trimmed_as_wholes(tmp_path):
  paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
  for path, values in zip(
    paths, ([[0, 0], [0, 0]], [[4, -3], [1, 2]]), strict=True
  ):
    tensors = zip("vw", np.asarray(values, np.float32), strict=True)
    write_safetensors(path, dict(tensors))
  given = {"merge_method": "ties", "base_model": paths[0]}
  models = [{"model": paths[1], "parameters": {"weight": 1, "density": 0.9}}]
  file, out = tmp_path / "recipe.yml", tmp_path / "out"
  file.write_text(yaml.dump({**given, "models": models}))
  flags = [f"--config={file}", f"--out={out}", f"--cache={tmp_path / 'cache'}"]
  done = run(*flags, "--whole_model_density=0.5")
  assert done.returncode == 0, done.stderr
  found = jlora.open_checkpoint(out)
  assert found["v"].tolist() == [4, -3]
  assert found["w"].tolist() == [0, 0]
