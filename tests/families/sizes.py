# SPDX-License-Identifier: Apache-2.0
"""How large each attribute of a configuration of transformers is made.

The first row whose pattern is the whole name decides. What has no row stays.
"""

import re
from collections.abc import Callable
from typing import Any

VOCABULARY = 128
WIDTH, HEADS, HEAD, INNER = 32, 4, 8, 48
IMAGE, PATCH = 32, 8

# Names of whole numbers -> the most that is kept.
NUMBERS: tuple[tuple[str, int | Callable[[int], int]], ...] = (
  (r".*(cost|coefficient|_loss.*|ignore_index|dropout|rate|seed)", lambda v: v),
  (r".*vocab_size.*|num_embeds|vocab_offset", VOCABULARY),
  (
    r"codebook_size|num_codebook_vectors|codevector_dim|audio_channel_vocab",
    64,
  ),
  (r"num_feat_extract_layers|insert_layer_id|num_conv_layers", lambda v: v),
  (r"num_kv_shared_layers|first_k_dense_replace|num_dense_layers", 1),
  (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers", 1),
  (
    r"((num|n)_)?((\w+_)?hidden_|\w+_)?(layers?|depth|num_blocks|blocks)",
    2,
  ),
  (r"time_step_rank|mamba_dt_rank", 4),
  (r"(mamba_d_state|ssm_state_size|state_size)", HEAD),
  (r"mamba_(n|num)_heads|ssm_num_heads", 8),
  (r"n_groups|mamba_n_groups|mamba_ngroups|n_group|topk_group", 1),
  (r"\w*chunk_size", 16),
  (r"qk_rope_head_dim|\w*rotary_dim|rope_head_dim", HEAD),
  (r"qk_head_dim|index_head_dim|global_head_dim", 2 * HEAD),
  (r"\w*(head_dim|d_head|dim_head|head_size|kv_channels)\w*|d_kv", HEAD),
  (r"linear_num_key_heads|num_key_value_heads|num_kv_heads|n_kv_heads", 2),
  (r"\w*key_value_heads|multi_query_group_num|kv_n_heads", 2),
  (r"((num|n)_)?(\w+_)?(heads?)|\w+_n_heads|num_\w+_heads", HEADS),
  (r"\w*lora_rank", 16),
  (r"(num_|n_|moe_num_)(local_|routed_)?experts", 4),
  (r"(num_)?(experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts)", 2),
  (r"num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
  (r"index_topk", 16),
  (
    r"\w*(intermediate_size|ffn_dim|mlp_dim|ffn_hidden_size|d_ff|d_inner"
    r"|n_inner|linear_units|feed_forward_hidden_size|ffn_size|ff_dim"
    r"|intermediate_dim|feedforward_dim|mlp_hidden_size|d_ffn"
    r"|hidden_size_ffn|inner_dim|shared_intermediate_size|dim_feedforward)",
    INNER,
  ),
  (r"max_position_embeddings_per_\w+", 32),
  (r"num_position_embeddings", 64),
  (r"original_max_position_embeddings", 64),
  (r"\w*(positions|max_position_embeddings|max_pos_emb|seq_length)", 64),
  (r"\w*max_2d_position_embeddings|max_rel_pos|max_rel_2d_pos", 64),
  (r"coordinate_size|shape_size", 5),
  (r"\w*window_size", 4),
  (r"sliding_window\w*|local_attention|attention_window", 16),
  (r"(pretrain_|vision_)?(image_size|img_size)|input_size", IMAGE),
  (r"(spatial_|vision_)?patch_size", PATCH),
  (r"num_query_tokens|num_queries|num_latents|resampler_n_latents", 8),
  (r"num_labels|num_classes", 4),
  (
    r"\w*(hidden_size|hidden_sizes|d_model|n_embd|embed_dim|emb_dim"
    r"|hidden_dim|projection_dim|proj_dim|embedding_size|output_dim"
    r"|embedding_dim|hidden_dims|projection_size|d_embed|hidden_channels"
    r"|out_channels|proj_size|hidden_size_per_layer_input|d_latents|latent_dim"
    r"|output_channels|base_channels|classifier_proj_size|feature_dim"
    r"|pooler_output_size|dim_model|encoder_dim|decoder_dim|output_size"
    r"|xvector_output_dim|codebook_dim|embed_size|hidden_size_\w+)",
    WIDTH,
  ),
  (r"dim|width|channels", WIDTH),
)

# Names of lists of numbers.
ONES = r"depths|\w*num_block_repeats|stage_num_blocks|blocks_per_stage"
WIDTHS = r"\w*(hidden_sizes|embed_dims?|channels|num_features|conv_dim)"
TDNN = r"tdnn_dim"
INDEXES = r"\w*(indexes|indices|layer_ids|feature_layers?)"
DROPPED = {
  "out_indices",
  "out_features",
  "stage_names",
  "per_layer_config",
  "id2label",
  "label2id",
}


def smaller(name: str, value: int) -> int:
  """A number of a configuration, made small."""
  for pattern, most in NUMBERS:
    if re.fullmatch(pattern, name):
      if callable(most):
        return most(value)
      return min(value, most)
  return value


def smaller_list(name: str, value: list[Any]) -> list[Any]:
  """A list of numbers of a configuration, made small."""
  if not value or not all(type(x) is int for x in value):
    return value
  if re.fullmatch(ONES, name):
    return [1] * len(value)
  if re.fullmatch(r"\w*(image_size|img_size)", name):
    return [IMAGE] * len(value)
  if re.fullmatch(r"patch_size|spatial_patch_size", name):
    return [min(x, PATCH) for x in value] if len(value) < 3 else value
  if re.fullmatch(r"(num_)?(attention_)?heads", name) and min(value) > 1:
    return [max(1, x // min(value)) for x in value]
  if name == "mrope_section":
    return [1, 1, 2]
  if re.fullmatch(INDEXES, name) and max(value) > 1:
    return [1]
  if re.fullmatch(WIDTHS, name) and max(value) > 64:
    part = max(value) // 64
    return [max(8, x // part // 8 * 8) for x in value]
  if re.fullmatch(TDNN, name):
    return [WIDTH] * len(value)
  return value


# What has to fit other sizes, by model type: attribute -> value, at the top or
# in a part ("text_config.hidden_size").
_MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": HEAD}
EXCEPTIONS: dict[str, dict[str, Any]] = {
  "aria": {"text_config.pad_token_id": 0},
  "autoformer": {"prediction_length": 4},
  "bark": {"codec_config.num_filters": 4, "codec_config.hidden_size": 16},
  "bit": {"num_groups": HEAD},
  "blt": {"encoder_hash_byte_group_vocab": 64},
  "bridgetower": {
    "vision_config.hidden_size": 64,
    "text_config.hidden_size": 64,
    "hidden_size": 64,
  },
  "bridgetower_vision_model": {"hidden_size": 64},
  "chameleon": {"vocabulary_map": {"<image>": 120, "IMGIMGA": 7}},
  "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
  "emu3": {"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121}},
  "encodec": {"num_filters": 4, "hidden_size": 16},
  "ernie4_5_vl_moe": {
    "text_config.moe_num_experts": 4,
    "text_config.moe_intermediate_size": [INNER, INNER],
  },
  "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
  "falcon_h1": _MAMBA,
  "fun_asr_nano": {"adaptor_config.intermediate_size": HEAD},
  "gemma3n": {"text_config.intermediate_size": INNER},
  "gemma3n_text": {"intermediate_size": INNER},
  "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
  "gradium_phonon_tts": {"flow_head_config.condition_dim": WIDTH},
  "granite_speech": {"encoder_config.context_size": 16},
  "granite_speech_encoder": {"context_size": 16},
  "granite_speech_plus": {"encoder_config.context_size": 16},
  "granite_speech_plus_encoder": {"context_size": 16},
  "granite_speech5_ctc": {"encoder_config.context_size": 16},
  "granite_speech5_encoder": {"context_size": 16},
  "hunyuan_v1_dense": {"head_dim": HEAD},
  "hunyuan_v1_moe": {"head_dim": HEAD},
  "hunyuan_vl": {"text_config.head_dim": HEAD},
  "hunyuan_vl_text": {"head_dim": HEAD},
  "informer": {"prediction_length": 4},
  "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
  "mamba2": {"num_heads": 8},
  "ministral": {"head_dim": HEAD},
  "moonshine_streaming": {"num_key_value_heads": HEADS},
  "nemotron": {"num_key_value_heads": 2},
  "pocket_tts": {"flow_head_config.condition_dim": WIDTH},
  "speecht5_hifigan": {"upsample_initial_channel": 64},
  "time_series_transformer": {"prediction_length": 4},
  "vits": {"upsample_initial_channel": 64},
}
