# SPDX-License-Identifier: Apache-2.0
"""Variants beside each other in a folder: one is taken, and it is told."""

import json

import numpy as np
import pytest

from jlora.checkpoints import open_checkpoint, write_safetensors

NAME = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
  """A component of a pipeline in float32, float16 and, in shards, bfloat16."""
  (tmp_path / "config.json").write_text('{"model_type": "odd"}')
  for variant, dtype in (("", np.float32), (".fp16", np.float16)):
    path = tmp_path / f"{NAME}{variant}.safetensors"
    write_safetensors(path, {"w": np.ones(2, dtype)})
  return tmp_path


def test_the_file_without_variant_is_taken_and_told(folder):
  with pytest.warns(UserWarning, match=r"model.safetensors is read, and not .*"
                    r"fp16.safetensors; say variant"):  # fmt: skip
    found = open_checkpoint(folder)
  assert found["w"].dtype == np.float32


def test_another_is_taken_where_it_is_asked_for(folder):
  found = open_checkpoint(folder, variant="fp16")
  assert found["w"].dtype == np.float16
  assert found.config == {"model_type": "odd"}
  shard = f"{NAME}.bf16-00001-of-00001.safetensors"
  write_safetensors(folder / shard, {"w": np.full(2, 3, np.float32)})
  index = {"metadata": {"total_size": 8}, "weight_map": {"w": shard}}
  name = f"{NAME}.safetensors.index.bf16.json"
  (folder / name).write_text(json.dumps(index))
  np.testing.assert_array_equal(
    open_checkpoint(folder, variant="bf16")["w"], np.full(2, 3, np.float32)
  )


def test_what_is_not_clear_is_refused(folder):
  with pytest.raises(
    ValueError, match="holds 0 checkpoints of the variant 'x'"
  ):
    open_checkpoint(folder, variant="x")
  with pytest.raises(ValueError, match="is a file, which has no variant"):
    open_checkpoint(folder / f"{NAME}.safetensors", variant="fp16")
  write_safetensors(folder / "x.fp16.safetensors", {"w": np.ones(2)})
  with pytest.raises(ValueError, match="holds 2 checkpoints of the variant"):
    open_checkpoint(folder, variant="fp16")
  with pytest.raises(ValueError, match="3 safetensors files and no"):
    open_checkpoint(folder)
