# SPDX-License-Identifier: Apache-2.0
"""Models as llama.cpp names them, and what its converter does to their tensors.

References:
  ggml-org/llama.cpp, `convert_hf_to_gguf.py`; `gguf-py/gguf/tensor_mapping.py`.
"""

import importlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.messages import name_some

_TOP = ("model.embed_tokens", "model.norm", "lm_head")
_ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_MLP = tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MORE_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_LLAMA = (*_ATTENTION, *_MLP, *_NORMS)
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj",
          "mlp.down_proj", *_NORMS)  # fmt: skip
#: Tables of numbers that positions are turned by: no parameters.
BUFFERS = r"rope_(freqs|factors_long|factors_short)\.weight"


class Kind(NamedTuple):
  """A model by its name in llama.cpp.

  Attributes:
    model_type: of transformers.
    name: of its class there.
    modules: of a layer.
    is_permuted: whether rows of queries and keys are in another order.
    shift: what is added to weights of norms.
  """

  model_type: str
  name: str
  modules: tuple[str, ...] = _LLAMA
  is_permuted: bool = False
  shift: float = 0.0


#: `general.architecture` -> the model. That of Mistral is Llama's.
KINDS = {
  "llama": Kind("llama", "LlamaForCausalLM", is_permuted=True),
  "granite": Kind("granite", "GraniteForCausalLM", is_permuted=True),
  "qwen2": Kind("qwen2", "Qwen2ForCausalLM"),
  "qwen3": Kind("qwen3", "Qwen3ForCausalLM", (*_LLAMA, *_HEAD_NORMS)),
  "gemma": Kind("gemma", "GemmaForCausalLM", shift=1.0),
  "gemma2": Kind(
    "gemma2", "Gemma2ForCausalLM", (*_LLAMA, *_MORE_NORMS), shift=1.0
  ),
  "gemma3": Kind(
    "gemma3_text",
    "Gemma3ForCausalLM",
    (*_LLAMA, *_MORE_NORMS, *_HEAD_NORMS),
    shift=1.0,
  ),
  "phi3": Kind("phi3", "Phi3ForCausalLM", _FUSED),
}

# config.json's name -> llama.cpp's, after the architecture.
_NUMBERS = {
  "num_hidden_layers": "block_count",
  "hidden_size": "embedding_length",
  "intermediate_size": "feed_forward_length",
  "num_attention_heads": "attention.head_count",
  "num_key_value_heads": "attention.head_count_kv",
  "head_dim": "attention.key_length",
  "max_position_embeddings": "context_length",
  "rms_norm_eps": "attention.layer_norm_rms_epsilon",
  "rope_theta": "rope.freq_base",
}


def import_gguf() -> Any:
  """Imports the package gguf, or says how to install it.

  Raises:
    ValueError: it is not installed.
  """
  try:
    return importlib.import_module("gguf")
  except ModuleNotFoundError as error:
    raise ValueError(
      "GGUF needs the package gguf: pip install 'jlora[gguf]'."
    ) from error


def permuted(b: np.ndarray, heads: int) -> np.ndarray:
  """Puts rows into llama.cpp's order: (head, part, i) to (head, i, part).

  Args:
    b: (out, ...), out a multiple of 2 heads.
    heads: their number.

  Example:
    >>> permuted(np.arange(8)[:, None], 2).ravel()
    array([0, 2, 1, 3, 4, 6, 5, 7])
  """
  return _turned(b, heads, 2, b.shape[0] // heads // 2)


def unpermuted(b: np.ndarray, heads: int) -> np.ndarray:
  """Reverts `permuted`.

  Args:
    b: (out, ...).
    heads: their number.

  Example:
    >>> unpermuted(permuted(np.arange(12)[:, None], 2), 2).ravel()
    array([ 0,  1,  2,  3,  4,  5,  6,  7,  8,  9, 10, 11])
  """
  return _turned(b, heads, b.shape[0] // heads // 2, 2)


def _turned(b: np.ndarray, heads: int, one: int, other: int) -> np.ndarray:
  """Exchanges the two inner axes of rows (head, one, other)."""
  if heads * one * other != len(b):
    raise ValueError(
      f"{len(b)} rows are not {heads} heads of an even size; the config.json "
      "is another model's."
    )
  inner = b.reshape(heads, one, other, *b.shape[1:])
  return inner.swapaxes(1, 2).reshape(b.shape)


def config_of(entries: Mapping[str, Any], tied: bool, tokens: int) -> dict:
  """Returns as much of a config.json as a GGUF file tells.

  It is not all of one: how positions are scaled and what is special to a kind
  of model is not in it.

  Args:
    entries: of its header.
    tied: whether the head is the table of tokens.
    tokens: rows of that table.

  Raises:
    ValueError: an architecture that is not in the table, or a number of layers
      or heads that is missing.

  Example:
    >>> entries = {"general.architecture": "qwen2", "qwen2.block_count": 2,
    ...            "qwen2.attention.head_count": 4}
    >>> config_of(entries, True, 9)["num_attention_heads"]
    4
  """
  own = entries.get("general.architecture")
  if own not in KINDS:
    raise ValueError(
      f"the architecture {own!r} is not in the table of names; known are "
      f"{', '.join(KINDS)}. Give the model that it was made from."
    )
  kind = KINDS[own]
  found: dict[str, Any] = {
    name: entries[f"{own}.{key}"]
    for name, key in _NUMBERS.items()
    if isinstance(entries.get(f"{own}.{key}"), int | float)
  }
  needed = ("num_hidden_layers", "num_attention_heads")
  if wrong := [
    _NUMBERS[name]
    for name in needed
    if not isinstance(n := found.get(name), int) or not 0 < n < 10**5
  ]:
    raise ValueError(f"its header has no number as {name_some(wrong)}")
  return {
    "model_type": kind.model_type,
    "architectures": [kind.name],
    **found,
    "vocab_size": tokens,
    "tie_word_embeddings": tied,
  }


def names_in(architecture: str, layers: int) -> dict[str, str]:
  """Returns {tensor's stem in llama.cpp: module in transformers}.

  Args:
    architecture: a key of `KINDS`.
    layers: their number.

  Example:
    >>> names_in("llama", 1)["blk.0.attn_q"]
    'model.layers.0.self_attn.q_proj'
  """
  package = import_gguf()
  code = next(
    key
    for key, value in package.MODEL_ARCH_NAMES.items()
    if value == architecture
  )
  known = package.get_tensor_name_map(code, layers)
  modules = [
    f"model.layers.{i}.{module}"
    for i in range(layers)
    for module in KINDS[architecture].modules
  ]
  found = {}
  for module in (*_TOP, *modules):
    if stem := known.get_name(module):
      found[stem] = module
  return found


def heads_of(name: str, kind: Kind, config: Mapping[str, Any]) -> int:
  """Returns the heads by which a tensor's rows are permuted, 0 for none.

  Args:
    name: the parameter in transformers.
    kind: the model.
    config: its numbers.
  """
  match = re.search(r"self_attn\.(q|k)_proj\.(weight|bias)$", name)
  if not match or not kind.is_permuted:
    return 0
  queries = int(config["num_attention_heads"])
  keys = int(config.get("num_key_value_heads") or queries)
  return queries if match[1] == "q" else keys
