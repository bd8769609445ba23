# SPDX-License-Identifier: Apache-2.0
"""The decoder against transformers, on tiny random models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jlora import checkpoints, models

TINY = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
CASES = {
  "llama": ("Llama", {}),
  "llama-tied": ("Llama", {"tie_word_embeddings": True}),
  "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
  "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
  "mistral-window": ("Mistral", {"sliding_window": 5}),
  "qwen2": ("Qwen2", {}),
  "qwen3": ("Qwen3", {"head_dim": 16}),
}


def _write(folder, case):
  """A random transformers model, saved; every parameter away from its init."""
  family, extra = CASES[case]
  config = getattr(transformers, f"{family}Config")(**TINY, **extra)
  torch.manual_seed(0)
  model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  model.save_pretrained(folder)
  return model


@pytest.fixture(scope="module")
def tiny():
  """A random model's config, function and parameters; compiled once."""
  config = TINY | {"model_type": "llama"}
  return config, *models.init(config, jax.random.key(0))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path, case):
  reference = _write(tmp_path, case)
  tokens = np.random.default_rng(0).integers(0, 61, (2, 19))
  apply, params = models.load(tmp_path)
  with torch.no_grad():
    expected = reference(torch.from_numpy(tokens)).logits.numpy()
  logits = jax.jit(apply)(params, jnp.asarray(tokens, jnp.int32))
  np.testing.assert_allclose(logits, expected, atol=2e-5 * abs(expected).max())


def test_save_gives_transformers_the_same_tensors(tmp_path):
  reference = _write(tmp_path / "base", "qwen2")
  _, params = models.load(tmp_path / "base")
  config = models.read_config(tmp_path / "base")
  note = tmp_path / "tokenizer.json"
  note.write_text("{}")
  models.save(tmp_path / "copy", params, config, copy=[note])
  copied = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
  for name, tensor in reference.state_dict().items():
    assert torch.equal(tensor, copied.state_dict()[name]), name
  assert (tmp_path / "copy/tokenizer.json").read_text() == "{}"


def test_bfloat16_computes_in_bfloat16(tmp_path):
  _write(tmp_path, "llama")
  tokens = jnp.arange(12, dtype=jnp.int32)[None]
  apply, params = models.load(tmp_path, dtype=jnp.bfloat16)
  exact, exact_params = models.load(tmp_path)
  logits = jax.jit(apply)(params, tokens)
  assert logits.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {logits.dtype}
  wanted = jax.jit(exact)(exact_params, tokens)
  error = jnp.abs(logits.astype(jnp.float32) - wanted).max()
  assert 0 < error < 0.05 * jnp.abs(wanted).max()


def test_no_position_sees_its_future(tiny):
  _, apply, params = tiny
  apply = jax.jit(apply)
  tokens = jnp.arange(10, dtype=jnp.int32)[None]
  changed = tokens.at[0, 6].set(60)
  before, after = apply(params, tokens), apply(params, changed)
  np.testing.assert_array_equal(before[:, :6], after[:, :6])
  assert (before[:, 6:] != after[:, 6:]).any()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_scaling": {"type": "llama3", "factor": 2}}, "lacks low_freq_fac"),
  ],
)
def test_unsupported_configs_are_refused(key, change, message):
  with pytest.raises(ValueError, match=message):
    models.init(TINY | {"model_type": "llama"} | change, key)


def test_an_empty_config_says_what_it_lacks(key):
  with pytest.raises(ValueError, match="lacks vocab_size, hid.* and 2 more"):
    models.init({"model_type": "llama"}, key)


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
  _write(tmp_path, "llama-tied")
  tensors = dict(checkpoints.open_checkpoint(tmp_path))
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  checkpoints.write_safetensors(tmp_path / "model.safetensors", tensors)
  _, params = models.load(tmp_path)
  assert "head" not in params
  tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
  checkpoints.write_safetensors(tmp_path / "model.safetensors", tensors)
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
