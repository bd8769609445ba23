# SPDX-License-Identifier: Apache-2.0
"""The command: a recipe in, a checkpoint out; what is wrong is one message."""

import json
import pathlib

import numpy as np
import pytest
import yaml

import jlora
from jlora.checkpoints.safetensors import write_safetensors
from jlora.commands import entry, merge


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


@pytest.fixture
def run(capsys, monkeypatch):
  """The command on flags: its exit code, and what it said."""
  monkeypatch.setattr(merge, "keep_compilations", lambda cache: None)

  def start(*words):
    code = entry.run(merge.COMMAND, list(map(str, words)))
    return code, capsys.readouterr()

  return start


def test_a_recipe_becomes_a_checkpoint(run, recipe, tmp_path):
  out = tmp_path / "out"
  flags = [f"--config={recipe}", f"--out={out}"]
  code, said = run(*flags, "--vocabulary=common")
  assert code == 0
  found = jlora.open_checkpoint(out)
  assert found["model.embed_tokens.weight"].tolist() == [[0.5, 0.5]] * 3
  assert "vocabulary 3 in the base, 4 in the finetune" in said.out
  assert "1 tensors" in said.out


def test_a_bad_merge_is_one_message(run, recipe, tmp_path):
  code, said = run(f"--config={recipe}", f"--out={tmp_path / 'out'}")
  assert code == 1
  (line,) = said.err.splitlines()
  assert line.startswith("error: model.embed_tokens.weight: vocabulary")


def test_several_recipes_build_on_each_other(run, tmp_path):
  path, out = str(tmp_path / "a.safetensors"), tmp_path / "out"
  write_safetensors(path, {"w": np.ones(2, np.float32)})
  models = lambda one: [{"model": one, "parameters": {"scale": 3}}]  # noqa: E731
  half = {"name": "thrice", "models": models(path)}
  last = {"models": models("thrice")}
  both = [{"merge_method": "passthrough", **one} for one in (last, half)]
  file = tmp_path / "recipes.yml"
  file.write_text(yaml.dump_all(both))
  flags = [f"--config={file}", f"--out={out}"]
  code, said = run(*flags)
  assert code == 1
  assert "--intermediates=DIR" in said.err
  flags.append(f"--intermediates={tmp_path / 'mid'}")
  code, said = run(*flags)
  assert code == 0
  assert jlora.open_checkpoint(out)["w"].tolist() == [9, 9]
  assert jlora.open_checkpoint(tmp_path / "mid/thrice")["w"].tolist() == [3, 3]
  half["models"] = [{"model": path, "parameters": {"scale": 4}}]
  both = [{"merge_method": "passthrough", **one} for one in (last, half)]
  file.write_text(yaml.dump_all(both))
  code, said = run(*flags)
  assert code == 1  # what is finished is of another recipe
  code, said = run(*flags, "--overwrite")
  assert code == 0
  assert jlora.open_checkpoint(out)["w"].tolist() == [12, 12]
  file.write_text(yaml.dump_all([both[1]]))
  code, said = run(*flags)
  assert "every recipe" in said.err


def test_a_tokenizer_leaves_no_policy_to_choose(run, recipe, tmp_path):
  raw = yaml.safe_load(pathlib.Path(recipe).read_text())
  pathlib.Path(recipe).write_text(
    yaml.dump({**raw, "tokenizer_source": "base"})
  )
  flags = [f"--config={recipe}", f"--out={tmp_path / 'out'}"]
  code, said = run(*flags, "--vocabulary=common")
  assert code == 1
  assert "leave --vocabulary out" in said.err


def test_models_trimmed_as_wholes(run, tmp_path):
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
  flags = [f"--config={file}", f"--out={out}"]
  code, said = run(*flags, "--whole_model_density=0.5")
  assert code == 0, said.err
  found = jlora.open_checkpoint(out)
  assert found["v"].tolist() == [4, -3]
  assert found["w"].tolist() == [0, 0]


def test_a_full_folder_is_told_in_flags(run, recipe, tmp_path):
  out = tmp_path / "full"
  out.mkdir()
  (out / "notes").touch()
  code, said = run(f"--config={recipe}", f"--out={out}", "--vocabulary=common")
  assert code == 1
  assert said.err.endswith(
    "Use --resume to continue, --overwrite to replace, or another --out.\n"
  )


def test_a_merged_model_keeps_no_path_of_this_machine(run, recipe, tmp_path):
  folder = tmp_path / "a"
  folder.mkdir()
  (tmp_path / "a.safetensors").rename(folder / "model.safetensors")
  config = {"_name_or_path": "/home/me/a", "vocab_size": 3}
  (folder / "config.json").write_text(json.dumps(config))
  file, out = pathlib.Path(recipe), tmp_path / "out"
  text = yaml.safe_load(file.read_text())
  text["models"][0]["model"] = str(folder)
  file.write_text(yaml.dump(text))
  code, said = run(f"--config={recipe}", f"--out={out}", "--vocabulary=common")
  assert code == 0, said.err
  assert json.loads((out / "config.json").read_text()) == {"vocab_size": 3}
