# SPDX-License-Identifier: Apache-2.0
"""Every family against transformers, on tiny random models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jlora import models
from jlora.checkpoints import checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from tests.helpers import tiny_models

TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, (2, 19))
LLAMA = tiny_models.LLAMA | {"model_type": "llama"}
MIXTRAL = LLAMA | tiny_models.MIXTURE | {"model_type": "mixtral"}
GPT2 = tiny_models.GPT2 | {"model_type": "gpt2"}


def _theirs(reference):
  """transformers' logits, float32."""
  with torch.no_grad():
    return reference(torch.from_numpy(TOKENS)).logits.float().numpy()


def _ours(apply, params):
  return np.asarray(jax.jit(apply)(params, jnp.asarray(TOKENS, jnp.int32)))


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_logits_are_those_of_transformers(case):
  reference, apply, params = tiny_models.load_model(case)
  expected = _theirs(reference)
  assert abs(expected).max() > 3
  np.testing.assert_allclose(_ours(apply, params), expected, atol=2e-5)


def test_experts_in_one_tensor_are_the_experts_apart(tmp_path):
  tiny_models.write_model(tmp_path / "apart", "mixtral")
  tiny_models.write_model(
    tmp_path / "fused", "mixtral", save_original_format=False
  )
  fused = checkpoint.open_checkpoint(tmp_path / "fused")
  assert "model.layers.0.mlp.experts.gate_up_proj" in fused
  trees = [models.load(tmp_path / name)[1] for name in ("apart", "fused")]
  jax.tree.map(np.testing.assert_array_equal, *trees)


def test_gpt2_saved_without_its_head_is_the_same(tmp_path):
  """As the hub's folder: no `transformer.`, and causal masks among it."""
  reference = tiny_models.write_model(tmp_path, "gpt2")
  tensors = {
    name.removeprefix("transformer."): array
    for name, array in checkpoint.open_checkpoint(tmp_path).items()
  }
  tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 40, 40), np.float32))
  write_safetensors(tmp_path / "model.safetensors", tensors)
  found = _ours(*models.load(tmp_path))
  np.testing.assert_allclose(found, _theirs(reference), atol=2e-5)


# What is lost to bfloat16, root mean square over that of the logits. A rounded
# score may choose another expert.
@pytest.mark.parametrize(
  ("case", "most"), [("llama", 0.02), ("gpt2", 0.015), ("mixtral", 0.1)]
)
def test_bfloat16_is_as_near_as_that_of_transformers(tmp_path, case, most):
  reference = tiny_models.write_model(tmp_path, case)
  exact = _theirs(reference)
  apply, params = models.load(tmp_path, dtype=jnp.bfloat16)
  logits = _ours(apply, params)
  assert logits.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {logits.dtype}
  theirs, ours = (
    np.linalg.norm(found.astype(np.float32) - exact) / np.linalg.norm(exact)
    for found in (_theirs(reference.bfloat16()), logits)
  )
  assert 0 < ours < min(most, 1.5 * theirs)


@pytest.mark.parametrize("case", ["llama", "mixtral", "gpt2"])
def test_no_position_sees_its_future(case):
  _, apply, params = tiny_models.load_model(case)
  apply = jax.jit(apply)
  tokens = jnp.asarray(TOKENS, jnp.int32)
  before = apply(params, tokens)
  after = apply(params, tokens.at[0, 6].add(1))
  np.testing.assert_array_equal(before[:, :6], after[:, :6])
  assert (before[0, 6:] != after[0, 6:]).any()


@pytest.mark.parametrize("case", ["qwen2", "mixtral", "gpt2", "gpt2-untied"])
def test_save_gives_transformers_the_same_tensors(tmp_path, case):
  reference = tiny_models.write_model(tmp_path / "base", case)
  _, params = models.load(tmp_path / "base")
  config = models.read_config(tmp_path / "base")
  models.save(tmp_path / "copy", params, config)
  copied = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
  for name, tensor in reference.state_dict().items():
    assert torch.equal(tensor, copied.state_dict()[name]), name


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (
      LLAMA | {"model_type": "opt"},
      "model_type 'opt' is not one of llama.*gpt",
    ),
    (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (LLAMA | {"use_sliding_window": True}, "use_sliding_window"),
    (LLAMA | {"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn'"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    (
      LLAMA | {"rope_scaling": {"type": "llama3", "factor": 2}},
      "lacks low_freq_fac",
    ),
    ({"model_type": "llama"}, "lacks vocab_size, hid.* and 2 more"),
    (LLAMA | {"model_type": "mixtral"}, "lacks num_local_experts, num_exp"),
    ({"model_type": "gpt2"}, "lacks vocab_size, n_embd.* and 2 more"),
    (GPT2 | {"activation_function": "relu"}, "activation_function 'relu'"),
    (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inv"),
  ],
)
def test_unsupported_configs_are_refused(key, config, message):
  with pytest.raises(ValueError, match=message):
    models.init(config, key)


def test_a_text_longer_than_the_learned_positions_is_refused():
  _, apply, params = tiny_models.load_model("gpt2")
  with pytest.raises(ValueError, match="41 positions are more than the 40"):
    apply(params, jnp.zeros((1, 41), jnp.int32))
