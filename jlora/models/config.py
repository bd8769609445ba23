# SPDX-License-Identifier: Apache-2.0
"""Reads the shape of a decoder from a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.documents import (
  FLAG,
  NULL,
  OBJECT,
  REAL,
  TEXT,
  Kind,
  check_fields,
  count_to,
  either,
)
from jlora.messages import name_some


class Family(NamedTuple):
  """The properties of a `model_type` that its config does not state.

  Attributes:
    qkv_bias: whether q, k and v always have biases.
    qk_norm: whether q and k have norms.
    windowed: whether `sliding_window` is used.
    mixture: whether a mixture of experts replaces the MLP.
  """

  qkv_bias: bool = False
  qk_norm: bool = False
  windowed: bool = False
  mixture: bool = False


#: model_type -> its family.
FAMILIES = {
  "llama": Family(),
  "mistral": Family(windowed=True),
  "mixtral": Family(windowed=True, mixture=True),
  "qwen2": Family(qkv_bias=True),
  "qwen3": Family(qk_norm=True),
}

# Larger ones would take longer to lay out than anybody waits.
WIDTH, LAYERS = count_to(2**24), count_to(2**9)
_SWITCH = either(FLAG, NULL)
POSITIVE = Kind("a number above 0", lambda x: REAL.fits(x) and x > 0)
#: Keys without a default.
REQUIRED = {
  "vocab_size": WIDTH,
  "hidden_size": WIDTH,
  "intermediate_size": WIDTH,
  "num_hidden_layers": LAYERS,
  "num_attention_heads": WIDTH,
}
MIXTURE = {"num_local_experts": LAYERS, "num_experts_per_tok": LAYERS}
LLAMA3: dict[str, Kind] = dict.fromkeys(
  (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
  POSITIVE,
)
_OTHERS = {
  "attention_bias": _SWITCH,
  "head_dim": either(count_to(2**16), NULL),
  "mlp_bias": _SWITCH,
  "num_key_value_heads": either(WIDTH, NULL),
  "partial_rotary_factor": either(REAL, NULL),
  "rms_norm_eps": REAL,
  "rope_parameters": either(OBJECT, NULL),
  "rope_scaling": either(OBJECT, NULL),
  "rope_theta": POSITIVE,
  "sliding_window": either(WIDTH, NULL),
  "tie_word_embeddings": _SWITCH,
}
_ROPE = {
  "partial_rotary_factor": REAL,
  "rope_theta": POSITIVE,
  "rope_type": TEXT,
  "type": TEXT,
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes and switches of a network of the Llama family.

  Attributes:
    window: positions attended to, the present one included; None for all.
    tied: whether the head is the embedding, transposed.
    frequencies: head_dim / 2 rotary frequencies, in radians per position.
    experts: number of MLPs of a layer, each of width `mlp`; 0 for a plain MLP.
    chosen: number of experts for each token.
    dtype: of the parameters and of the computation.
  """

  vocab: int
  hidden: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  eps: float
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  qk_norm: bool
  window: int | None
  tied: bool
  frequencies: tuple[float, ...]
  experts: int = 0
  chosen: int = 0
  dtype: Any = jnp.float32


def read_frequencies(config: Mapping, head_dim: int) -> tuple[float, ...]:
  """Computes a config's rotary frequencies, in radians per position.

      f_i = theta^(-2i/d)

  `rope_type` llama3 divides the slow ones by `factor`, keeps the fast ones, and
  interpolates between.

  Args:
    config: the file's content, of transformers 4 or 5.
    head_dim: d, number of channels of one head.

  Returns:
    d/2 numbers, descending.

  Raises:
    ValueError: for another `rope_type`, a partial rotation or a missing key.

  Example:
    >>> read_frequencies({"rope_theta": 100.0}, 4)
    (1.0, 0.1)
  """
  check_fields(dict(config), _OTHERS, "config.json")
  rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
  check_fields(rope, _ROPE, "rope of config.json")
  kind = rope.get("rope_type", rope.get("type", "default"))
  partial = rope.get(
    "partial_rotary_factor", config.get("partial_rotary_factor", 1.0)
  )
  if kind not in ("default", "llama3") or partial != 1.0:
    raise ValueError(
      f"rope_type {kind!r} with partial_rotary_factor {partial} is not "
      "supported; 'default' and 'llama3' of whole heads are"
    )
  theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
  f = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  if kind == "llama3":
    require(rope, LLAMA3)
    turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    f = f * (blend + (1 - blend) / rope["factor"])
  return tuple(f.tolist())


def read_shape(config: Mapping, dtype: Any = jnp.float32) -> Shape:
  """Reads the network's shape from a Hugging Face `config.json`.

  Args:
    config: the file's content.
    dtype: of the parameters and of the computation.

  Returns:
    A `Shape`, hashable.

  Raises:
    ValueError: for a family, activation or window pattern not covered here,
      or a missing key.

  Example:
    >>> config = dict(model_type="llama", vocab_size=9, hidden_size=8,
    ...               intermediate_size=8, num_hidden_layers=1,
    ...               num_attention_heads=2)
    >>> read_shape(config).head_dim
    4
  """
  name = config.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise ValueError(f"model_type {name!r} is not one of {', '.join(FAMILIES)}")
  family = FAMILIES[name]
  if config.get("hidden_act", "silu") != "silu":
    raise ValueError(f"hidden_act {config['hidden_act']!r} is not 'silu'")
  if config.get("use_sliding_window"):
    raise ValueError("use_sliding_window is not supported; set it to false")
  require(config, REQUIRED | (MIXTURE if family.mixture else {}))
  check_fields(dict(config), _OTHERS, "config.json")
  heads = config["num_attention_heads"]
  head_dim = config.get("head_dim") or config["hidden_size"] // heads
  groups = config.get("num_key_value_heads") or heads
  chosen = config["num_experts_per_tok"] if family.mixture else 0
  experts = config["num_local_experts"] if family.mixture else 0
  if heads % groups or head_dim < 2 or head_dim % 2 or chosen > experts:
    raise ValueError(
      f"{heads} heads of {head_dim} channels in {groups} groups, {chosen} of "
      f"{experts} experts: heads must divide into groups, channels be even"
    )
  has_bias = bool(config.get("attention_bias"))
  return Shape(
    vocab=config["vocab_size"],
    hidden=config["hidden_size"],
    mlp=config["intermediate_size"],
    layers=config["num_hidden_layers"],
    heads=heads,
    kv_heads=groups,
    head_dim=head_dim,
    eps=config.get("rms_norm_eps", 1e-6),
    qkv_bias=family.qkv_bias or has_bias,
    out_bias=not family.qkv_bias and has_bias,
    mlp_bias=bool(config.get("mlp_bias")),
    qk_norm=family.qk_norm,
    window=config.get("sliding_window") if family.windowed else None,
    tied=bool(config.get("tie_word_embeddings")),
    frequencies=read_frequencies(config, head_dim),
    experts=experts,
    chosen=chosen,
    dtype=dtype,
  )


def require(config: Mapping, fields: Mapping[str, Kind]) -> None:
  """Raises unless a config has all required keys, and what they should hold.

  Raises:
    ValueError: names up to three missing keys.

  Example:
    >>> require({"a": 1}, {"a": WIDTH, "b": WIDTH})
    Traceback (most recent call last):
    ...
    ValueError: config.json lacks b
  """
  if missing := [key for key in fields if key not in config]:
    raise ValueError(f"config.json lacks {name_some(missing)}")
  check_fields(dict(config), fields, "config.json")
