# SPDX-License-Identifier: Apache-2.0
"""Converts a llama.cpp file (GGUF) to a Hugging Face folder."""

import json
import os
import pathlib
from collections.abc import Iterator

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as token_models

from jlora import models

#: llama.cpp's name of a module -> Hugging Face's, inside a layer.
IN_LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}

#: The key of config.json -> the key of the file's metadata.
CONFIG = {
  "vocab_size": "llama.vocab_size",
  "hidden_size": "llama.embedding_length",
  "intermediate_size": "llama.feed_forward_length",
  "num_hidden_layers": "llama.block_count",
  "num_attention_heads": "llama.attention.head_count",
  "num_key_value_heads": "llama.attention.head_count_kv",
  "head_dim": "llama.rope.dimension_count",
  "max_position_embeddings": "llama.context_length",
  "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
  "rope_theta": "llama.rope.freq_base",
  "bos_token_id": "tokenizer.ggml.bos_token_id",
  "eos_token_id": "tokenizer.ggml.eos_token_id",
  "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def convert(
  path: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> pathlib.Path:
  """Converts a llama-family GGUF file to a Hugging Face folder in float32.

  Args:
    path: a GGUF file of architecture llama with a byte-level BPE tokenizer.
    folder: must not exist yet; appears whole or not at all.

  Returns:
    The folder.

  Raises:
    ValueError: if `folder` exists, or a tensor's name is unknown.
  """
  reader = gguf.GGUFReader(path)
  meta = {key: field.contents() for key, field in reader.fields.items()}
  tensors = dict(_tensors(reader, meta))
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": "lm_head.weight" not in tensors,
    "dtype": "float32",
    **{ours: meta[theirs] for ours, theirs in CONFIG.items()},
  }
  # Metadata is float32: 1e-5 arrives as 9.99999974e-06.
  config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
  config["rope_parameters"] = {
    "rope_type": "default",
    "rope_theta": config["rope_theta"],
  }
  texts = {"config.json": config, "tokenizer_config.json": _special(meta)}
  files = {
    name: json.dumps(content, indent=2) + "\n"
    for name, content in texts.items()
  }
  files["tokenizer.json"] = _tokenizer(meta).to_str()
  return models.write_folder(folder, tensors, files)


def _tensors(
  reader: gguf.GGUFReader, meta: dict
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields each tensor under its Hugging Face name, (out, in) float32."""
  heads = {
    "self_attn.q_proj": meta["llama.attention.head_count"],
    "self_attn.k_proj": meta["llama.attention.head_count_kv"],
  }
  for tensor in reader.tensors:
    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if tensor.name in OUTSIDE:
      yield OUTSIDE[tensor.name], array
      continue
    match tensor.name.split("."):
      case ["blk", layer, module, "weight"] if module in IN_LAYER:
        module = IN_LAYER[module]
      case _:
        raise ValueError(f"tensor {tensor.name!r} has no Hugging Face name")
    if module in heads:
      array = unpermute(array, heads[module])
    yield f"model.layers.{layer}.{module}.weight", np.ascontiguousarray(array)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
  """Reorders rows of q or k from llama.cpp's to Hugging Face's rotary order.

  llama.cpp turns neighbouring channels 2i and 2i + 1 together, Hugging Face
  channels i and i + d/2.

  Args:
    rows: (heads * d, in).
    heads: how many heads the rows belong to.

  Returns:
    The same rows in another order.
  """
  pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(meta: dict) -> tokenizers.Tokenizer:
  """Builds the byte-level BPE tokenizer, which splits digits one by one."""
  tokens = meta["tokenizer.ggml.tokens"]
  merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
  vocab = {token: i for i, token in enumerate(tokens)}
  tokenizer = tokenizers.Tokenizer(token_models.BPE(vocab=vocab, merges=merges))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
  tokenizer.add_special_tokens(
    [
      tokenizers.AddedToken(token, special=True, normalized=False)
      for token, kind in zip(
        tokens, meta["tokenizer.ggml.token_type"], strict=True
      )
      if kind == gguf.TokenType.CONTROL
    ]
  )
  return tokenizer


def _special(meta: dict) -> dict:
  """Returns the content of tokenizer_config.json."""
  tokens = meta["tokenizer.ggml.tokens"]
  return {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
    "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
    "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
    "chat_template": meta.get("tokenizer.chat_template"),
    "clean_up_tokenization_spaces": False,
    "model_max_length": meta["llama.context_length"],
  }
