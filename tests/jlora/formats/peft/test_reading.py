# SPDX-License-Identifier: Apache-2.0
"""Adapter folders that nobody should have written are told by name."""

import json

import jax
import numpy as np
import pytest

from jlora import load_peft
from jlora.checkpoints import write_safetensors

KEY = "base_model.model.h.0.q_proj"
GOOD = {
  "peft_type": "LORA",
  "r": 2,
  "lora_alpha": 2,
  "target_modules": ["q_proj"],
}


def write(folder, config=None, tensors=None):
  text = (
    config if isinstance(config, str) else json.dumps(GOOD | (config or {}))
  )
  (folder / "adapter_config.json").write_text(text)
  ones = {
    f"{KEY}.lora_A.weight": np.ones((2, 8), np.float32),
    f"{KEY}.lora_B.weight": np.ones((8, 2), np.float32),
  }
  write_safetensors(
    folder / "adapter_model.safetensors", ones | (tensors or {})
  )


INF = float("inf")
ODD = (
  {"lora_alpha": float("nan")},
  {"lora_alpha": INF},
  {"lora_alpha": 1e300},
  {"lora_alpha": 10**400},
  {"lora_alpha": "4"},
  {"lora_alpha": None},
  {"lora_alpha": True},
  {"r": True},
  {"r": 2.0},
  {"r": None},
  {"rank_pattern": {"q_proj": 0}},
  {"rank_pattern": {"(": 2}},
  {"rank_pattern": [2]},
  {"alpha_pattern": [1]},
  {"alpha_pattern": {"q_proj": "7"}},
  {"alpha_pattern": {"q_proj": INF}},
  {"target_modules": 5},
  {"target_modules": "("},
  {"target_modules": [["q"]]},
  {"target_modules": {"q": 1}},
  {"target_parameters": "q"},
  {"modules_to_save": 5},
  {"modules_to_save": ["a(", "b"]},
  {"exclude_modules": 1.5},
  {"use_rslora": "yes"},
  {"bias": 3},
  "[]",
  "null",
  "[" * 100_000,
  '{"r": 1e',
)


@pytest.mark.parametrize("config", ODD, ids=lambda one: str(one)[:40])
def test_odd_configurations_are_errors_with_the_file(config, tmp_path):
  write(tmp_path)
  assert load_peft(tmp_path).loras["h.0.q_proj.weight"].scale == 1
  write(tmp_path, config)
  with pytest.raises(ValueError, match=r"adapter_config\.json"):
    load_peft(tmp_path)


def test_a_pattern_that_never_ends_ends(tmp_path):
  write(tmp_path, {"target_modules": "(.+)+#"})
  with pytest.raises(ValueError, match="adapter_config.json does not explain"):
    load_peft(tmp_path)


@pytest.mark.parametrize("dtype", ["i4", "i1", "?", "u8"])
def test_factors_are_floating(dtype, tmp_path):
  write(tmp_path, {}, {f"{KEY}.lora_A.weight": np.ones((2, 8), dtype)})
  with pytest.raises(ValueError, match="h.0.q_proj: A .*needed are floats"):
    load_peft(tmp_path)


SHAPES = {
  "scalars": {"A": (), "B": ()},
  "vectors": {"A": (2,), "B": (2,)},
  "a matrix and a kernel": {"B": (8, 2, 1, 1)},
  "a kernel that is not 1x1": {"A": (2, 8, 3, 3), "B": (8, 2, 3, 3)},
  "ranks that differ": {"B": (8, 3)},
  "no rank": {"A": (0, 8), "B": (8, 0)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_factors_have_the_axes_of_their_layer(name, tmp_path):
  tensors = {
    f"{KEY}.lora_{side}.weight": np.ones(shape, np.float32)
    for side, shape in SHAPES[name].items()
  }
  write(tmp_path, {}, tensors)
  with pytest.raises(ValueError, match="1 LoRA layers are not whole"):
    load_peft(tmp_path)


def test_a_factor_that_is_there_twice_is_an_error(tmp_path):
  """As a layer's and as an embedding's: one would have replaced the other."""
  write(tmp_path, {}, {f"{KEY}.lora_embedding_A": np.zeros((2, 8), np.float32)})
  with pytest.raises(ValueError, match="1 tensors that adapter_config.json"):
    load_peft(tmp_path)


def test_a_bias_has_the_rows_of_b(tmp_path):
  bias = {f"{KEY}.lora_B.bias": np.ones(3, np.float32)}
  write(tmp_path, {"lora_bias": True}, bias)
  with pytest.raises(ValueError, match="1 LoRA layers are not whole"):
    load_peft(tmp_path)


def test_on_the_host_it_reads_the_same_and_compiles_nothing(tmp_path, caplog):
  """Of a shape that no other test has."""
  normal = np.random.default_rng(0).standard_normal
  write(
    tmp_path,
    {"r": 5, "lora_alpha": 3, "modules_to_save": ["norm"]},
    {
      f"{KEY}.lora_A.weight": normal((5, 83), np.float32),
      f"{KEY}.lora_B.weight": normal((89, 5), np.float32),
      "base_model.model.norm.weight": normal((97,), np.float32),
    },
  )
  with jax.log_compiles(), caplog.at_level("DEBUG", "jax"):
    found = load_peft(tmp_path, on_host=True)
  assert not [x for x in caplog.messages if "ompil" in x or "tracing" in x]
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))
  jax.tree.map(np.testing.assert_array_equal, found, load_peft(tmp_path))
