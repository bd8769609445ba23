# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the families that people merge, three of each.

o is a base; a and b are finetunes of it. Files are as transformers saves them.
"""

import zlib

import torch
import transformers

SIZES = {
  "vocab_size": 48,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "bos_token_id": None,
  "eos_token_id": None,
  "pad_token_id": None,
}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 4, "n_head": 4}
GPT2 |= {"n_positions": 40, "bos_token_id": None, "eos_token_id": None}
T5 = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
T5 |= {
  "num_layers": 3,
  "num_decoder_layers": 2,
  "feed_forward_proj": "gated-gelu",
}
BART = {"vocab_size": 48, "d_model": 32, "encoder_layers": 2}
BART |= {"decoder_layers": 3, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48}
BART |= {"decoder_ffn_dim": 48, "max_position_embeddings": 40}
BERT = {k: v for k, v in SIZES.items() if "token" not in k}
VISION = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "image_size": 16,
  "patch_size": 8,
}
GEMMA3 = {
  "text_config": {**SIZES, "head_dim": 8, "sliding_window": 8},
  "vision_config": VISION,
  "mm_tokens_per_image": 4,
  "image_token_index": 47,
  "boi_token_index": 46,
  "eoi_token_index": 45,
}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
WINDOWS = {
  "sliding_window": 8,
  "use_sliding_window": True,
  "max_window_layers": 2,
}
#: Name -> (transformers' class, its configuration, dtype, bytes of a file).
FAMILIES = {
  "llama": ("LlamaForCausalLM", SIZES, "float32", None),
  "llama-tied": (
    "LlamaForCausalLM",
    {**SIZES, "tie_word_embeddings": True, "attention_bias": True},
    "bfloat16",
    None,
  ),
  "qwen2-windows": ("Qwen2ForCausalLM", {**SIZES, **WINDOWS}, "float32", None),
  "mistral-sharded": (
    "MistralForCausalLM",
    {**SIZES, "sliding_window": 8},
    "bfloat16",
    20_000,
  ),
  "gemma2-tied": (
    "Gemma2ForCausalLM",
    {**SIZES, "head_dim": 8, "sliding_window": 8},
    "float32",
    None,
  ),
  "phi3-fused": ("Phi3ForCausalLM", SIZES, "float32", None),
  "gpt2-fused": ("GPT2LMHeadModel", GPT2, "float32", None),
  "gpt-neox-biased": ("GPTNeoXForCausalLM", BERT, "float32", None),
  "t5": ("T5ForConditionalGeneration", T5, "float32", None),
  "bart": ("BartForConditionalGeneration", BART, "float32", None),
  "bert": ("BertForMaskedLM", BERT, "float32", None),
  "mixtral": (
    "MixtralForCausalLM",
    {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2},
    "bfloat16",
    None,
  ),
  "qwen3-moe": (
    "Qwen3MoeForCausalLM",
    {**SIZES, **MOE, "head_dim": 8, "num_experts": 3, "mlp_only_layers": [1]},
    "float32",
    30_000,
  ),
  "deepseek-v3": (
    "DeepseekV3ForCausalLM",
    {
      **SIZES,
      **MOE,
      "num_key_value_heads": 4,
      "n_routed_experts": 4,
      "n_group": 1,
      "topk_group": 1,
      "first_k_dense_replace": 1,
      "q_lora_rank": 16,
      "kv_lora_rank": 16,
      "qk_rope_head_dim": 8,
      "qk_nope_head_dim": 8,
      "v_head_dim": 8,
    },
    "float32",
    None,
  ),
  "gemma3-images": (
    "Gemma3ForConditionalGeneration",
    GEMMA3,
    "float32",
    None,
  ),
}


def write_models(folder, family):
  """Writes the base and two finetunes of a family.

  Args:
    folder: gets the folders o, a and b.
    family: a name of `FAMILIES`.
  """
  name, sizes, dtype, limit = FAMILIES[family]
  kind = getattr(transformers, name)
  torch.manual_seed(zlib.crc32(family.encode()))
  config = kind.config_class(**sizes)
  model = kind(config).to(getattr(torch, dtype)).eval()
  more = {} if limit is None else {"max_shard_size": limit}
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
    own = {name: p.clone() for name, p in model.named_parameters()}
    model.save_pretrained(f"{folder}/o", **more)
    for which in "ab":
      for key, parameter in model.named_parameters():
        parameter.copy_(own[key] + 0.05 * torch.randn_like(parameter))
      model.save_pretrained(f"{folder}/{which}", **more)


def keys_not_loaded(folder):
  """Names that transformers misses, does not know, or has in another shape."""
  config = transformers.AutoConfig.from_pretrained(folder)
  kind = getattr(transformers, config.architectures[0])
  _, info = kind.from_pretrained(folder, output_loading_info=True)
  kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
  return [f"{kind} {key}" for kind in kinds for key in info[kind]]
