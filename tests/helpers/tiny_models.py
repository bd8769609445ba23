# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of each family, as transformers makes and saves them."""

import functools
import tempfile

import torch
import transformers

from jlora import models

VOCABULARY = 60
LLAMA = {
  "vocab_size": VOCABULARY,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {
  "vocab_size": VOCABULARY,
  "n_embd": 32,
  "n_layer": 2,
  "n_head": 4,
  "n_positions": 40,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
# Name -> transformers' classes, what the config says beside the above.
CASES = {
  "llama": ("Llama", {}),
  "llama-tied": ("Llama", {"tie_word_embeddings": True}),
  "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
  "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
  "mistral-window": ("Mistral", {"sliding_window": 5}),
  "mixtral": ("Mixtral", MIXTURE),
  "mixtral-window": ("Mixtral", MIXTURE | {"sliding_window": 5}),
  "qwen2": ("Qwen2", {}),
  "qwen3": ("Qwen3", {"head_dim": 16}),
  "gpt2": ("GPT2", {}),
  "gpt2-untied": ("GPT2", {"tie_word_embeddings": False, "n_inner": 48}),
}


def write_model(folder, case, **options):
  """A random transformers model, saved; every parameter away from its init."""
  family, extra = CASES[case]
  ends = {"bos_token_id": None, "eos_token_id": None}
  sizes = GPT2 if family == "GPT2" else LLAMA
  config = getattr(transformers, f"{family}Config")(**sizes, **extra, **ends)
  torch.manual_seed(0)
  head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
  model = getattr(transformers, f"{family}{head}")(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  model.save_pretrained(folder, **options)
  return model


@functools.cache
def load_model(case):
  """The model of a case: transformers' own, our function, our parameters."""
  with tempfile.TemporaryDirectory() as folder:
    reference = write_model(folder, case)
    return reference, *models.load(folder)
