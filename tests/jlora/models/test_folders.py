# SPDX-License-Identifier: Apache-2.0
"""Folders read and written, and what is refused."""

import json

import jax
import pytest
import torch
import transformers

from jlora import models
from jlora.checkpoints import checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from tests.helpers import tiny_models

TINY = tiny_models.LLAMA


@pytest.fixture(scope="module")
def tiny():
  """A random model's config, function and parameters; compiled once."""
  config = TINY | {"model_type": "llama"}
  return config, *models.init(config, jax.random.key(0))


def test_save_gives_transformers_the_same_tensors(tmp_path):
  reference = tiny_models.write_model(tmp_path / "base", "qwen2")
  _, params = models.load(tmp_path / "base")
  config = models.read_config(tmp_path / "base")
  note = tmp_path / "tokenizer.json"
  note.write_text("{}")
  models.save(tmp_path / "copy", params, config, copy=[note])
  copied = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
  for name, tensor in reference.state_dict().items():
    assert torch.equal(tensor, copied.state_dict()[name]), name
  assert (tmp_path / "copy/tokenizer.json").read_text() == "{}"


def test_load_names_what_disagrees_with_the_config(tmp_path, tiny):
  config, _, params = tiny
  folder = models.save(tmp_path / "model", params, config)
  wider = config | {"intermediate_size": 50, "num_hidden_layers": 3}
  (folder / "config.json").write_text(json.dumps(wider))
  with pytest.raises(ValueError, match="more") as error:
    models.load(folder)
  text = str(error.value)
  assert "15 weights are not those" in text
  assert "model.layers.0.mlp.down_proj.weight (48, 32) for (50, 32)" in text


def test_a_second_copy_of_tied_embeddings_must_be_a_copy(tmp_path):
  tiny_models.write_model(tmp_path, "llama-tied")
  tensors = dict(checkpoint.open_checkpoint(tmp_path))
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  write_safetensors(tmp_path / "model.safetensors", tensors)
  _, params = models.load(tmp_path)
  assert "head" not in params
  tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
  write_safetensors(tmp_path / "model.safetensors", tensors)
  with pytest.raises(ValueError, match="ties the embeddings, but lm_head"):
    models.load(tmp_path)


def test_load_refuses_a_folder_without_config(tmp_path):
  with pytest.raises(ValueError, match="config.json is missing"):
    models.load(tmp_path)


def test_save_never_overwrites_and_leaves_nothing_half_written(tmp_path, tiny):
  config, _, params = tiny
  models.save(tmp_path / "model", params, config)
  with pytest.raises(ValueError, match="exists"):
    models.save(tmp_path / "model", params, config)
  with pytest.raises(ValueError, match="no parameter"):
    models.save(tmp_path / "other", {"extra": params["norm"]}, config)
  with pytest.raises(FileNotFoundError):
    models.save(tmp_path / "other", params, config, copy=[tmp_path / "no"])
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
