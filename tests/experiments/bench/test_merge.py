# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of merges writes and compares."""

import math

import numpy as np
import pytest

import jlora
from experiments.bench import merge
from experiments.lib.data import pairs
from jlora.merging.checkpoints.mergekit import read_recipe


def test_the_benchmarks_recipes_are_read(tmp_path):
  bench = merge.Bench(tmp_path)
  for method in (*merge.METHODS, "passthrough"):
    file = bench.write_recipe(method, "small", {"dtype": "float32"})
    assert read_recipe(file).models[-1].endswith(("other", "finetuned"))


def test_models_are_of_the_sizes_that_are_said():
  for name in merge.SIZES:
    shapes = pairs.shapes(merge.config_of(name)).values()
    mib = 2 * sum(map(math.prod, shapes)) / 2**20
    said = int(name[:-3]) * (1024 if name.endswith("GiB") else 1)
    assert 0.9 < mib / said < 1.1


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
