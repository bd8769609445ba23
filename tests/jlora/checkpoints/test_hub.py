# SPDX-License-Identifier: Apache-2.0
"""Hub ids: found in a cache on disk, and what others call a checkpoint."""

import json
import re

import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.hub import (
  folder_name,
  is_hub_id,
  locate,
  model_name,
  name_apart,
  without_paths,
)
from jlora.checkpoints.safetensors import write_safetensors

ID = "some-org/small.model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A Hugging Face cache in a folder of its own, empty."""
  for name in ("HF_HOME", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.chdir(tmp_path)
  return tmp_path / "hub"


def add(cache, commit, value=1.0, name=ID):
  """A snapshot as the Hub's tools leave it: a link to a blob."""
  folder = cache / f"models--{name.replace('/', '--')}"
  blob = folder / "blobs" / commit
  blob.parent.mkdir(parents=True, exist_ok=True)
  file = folder / "weights.safetensors"
  write_safetensors(file, {"w": np.full(2, value)})
  file.rename(blob)
  snapshot = folder / "snapshots" / commit
  snapshot.mkdir(parents=True)
  (snapshot / "model.safetensors").symlink_to(f"../../blobs/{commit}")
  return snapshot


def test_the_only_snapshot_is_taken(cache):
  snapshot = add(cache, "aaa")
  assert locate(ID) == snapshot
  assert open_checkpoint(ID)["w"].tolist() == [1.0, 1.0]


def test_of_several_snapshots_that_of_main_is_taken(cache):
  add(cache, "aaa")
  newer = add(cache, "bbb", 2.0)
  with pytest.raises(
    ValueError, match="2 snapshots and no refs/main: aaa, bbb"
  ):
    locate(ID)
  (newer.parents[1] / "refs").mkdir()
  (newer.parents[1] / "refs" / "main").write_text("bbb")
  assert open_checkpoint(ID)["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
  ("variable", "value", "folder"),
  [
    ("HF_HOME", "home", "home/hub"),
    ("XDG_CACHE_HOME", "xdg", "xdg/huggingface/hub"),
    ("HOME", ".", ".cache/huggingface/hub"),
  ],
)
def test_where_the_cache_is(
  cache, tmp_path, monkeypatch, variable, value, folder
):
  monkeypatch.delenv("HF_HUB_CACHE")
  monkeypatch.setenv(variable, str(tmp_path / value))
  snapshot = add(tmp_path / folder, "aaa", name="gpt2")
  assert locate("gpt2") == snapshot


def test_a_folder_here_comes_before_the_cache(cache, tmp_path):
  add(cache, "aaa")
  (tmp_path / ID).mkdir(parents=True)
  assert not locate(ID).is_absolute()


def test_what_is_not_there_is_told_with_the_command_that_loads_it(cache):
  said = (
    f"{ID} does not exist: no local file or folder; if it is a Hub id: "
    f"`hf download {ID} --local-dir DIR`"
  )
  with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
    open_checkpoint(ID)
  for path in ("/a/b", "./a", "a/b/c", "model.safetensors", "x.json"):
    with pytest.raises(ValueError, match=r"does not exist$"):
      open_checkpoint(path)


def test_names_hold_nothing_of_this_machine(cache, tmp_path):
  snapshot = add(cache, "aaa")
  assert folder_name(ID) == folder_name(snapshot) == ID
  assert model_name(ID) == model_name(snapshot) == ID
  assert model_name(snapshot / "model.safetensors") == ID
  assert folder_name(tmp_path / "tuned") == "tuned"
  assert folder_name(".") == tmp_path.name
  assert model_name(tmp_path / "x" / "model.safetensors") == "x"
  assert model_name(tmp_path / "x" / "weights.safetensors") == "weights"


@pytest.mark.parametrize(
  ("config", "name"),
  [
    ({"_name_or_path": ID}, ID),
    ({"_name_or_path": "/home/me/x"}, "mine"),
    ({"_name_or_path": "../x"}, "mine"),
    ({"_name_or_path": None}, "mine"),
    ({}, "mine"),
    ([], "mine"),
  ],
)
def test_the_configuration_knows_the_hub_id(tmp_path, config, name):
  folder = tmp_path / "mine"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  assert model_name(folder) == name
  assert model_name(folder / "model.safetensors") == name


def test_a_relative_path_that_is_there_is_no_hub_id(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert is_hub_id("models/mine")
  (tmp_path / "models" / "mine").mkdir(parents=True)
  assert not is_hub_id("models/mine")
  assert model_name("models/mine") == "mine"


def test_equal_names_get_their_roles():
  paths = {"base": "/a/m", "finetuned": "/b/m", "out": "/c/m"}
  assert set(name_apart(paths).values()) == {"base/m", "finetuned/m", "out/m"}


def test_a_configuration_to_be_shared_has_no_path():
  assert without_paths({"_name_or_path": ID}) == {"_name_or_path": ID}
  assert without_paths({"_name_or_path": "/a", "x": 1}) == {"x": 1}
  assert without_paths({"x": 1}) == {"x": 1}
