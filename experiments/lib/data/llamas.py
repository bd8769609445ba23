# SPDX-License-Identifier: Apache-2.0
"""Describes Llamas of several sizes by their config.json, and their shapes."""

from collections.abc import Iterator
from typing import Any

from experiments.lib.models import finetunes

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e5}

#: config.json of each model, cut to one layer.
MODELS = {
  "tiny": {
    **_LLAMA,
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
  },
  "square": {
    **_LLAMA,
    "vocab_size": 1024,
    "hidden_size": 8192,
    "intermediate_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_hidden_layers": 1,
  },
  "8B": {
    **_LLAMA,
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
  },
  "70B": {
    **_LLAMA,
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
  },
}


def extractions(
  config: dict[str, Any],
) -> Iterator[tuple[str, tuple[int, int]]]:
  """Yields the matrices of a layer, each shape once.

  Args:
    config: of config.json.

  Yields:
    Name and (in, out).

  Example:
    >>> dict(extractions(MODELS["tiny"]))["down"]
    (1024, 512)
  """
  width, inner = config["hidden_size"], config["intermediate_size"]
  heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
  shapes = {
    "q, o": (width, width),
    "k, v": (width, width * groups // heads),
    "gate, up": (width, inner),
    "down": (inner, width),
  }
  seen = set()
  for name, shape in shapes.items():
    if shape not in seen:
      yield name, shape
    seen.add(shape)


def config_of(width: int) -> dict[str, Any]:
  """Returns the config of the byte-level Llama of a width.

  Args:
    width: hidden size, a multiple of 32.

  Returns:
    Content of config.json: four layers, an MLP of three widths, heads of 32.

  Example:
    >>> config_of(64)["intermediate_size"]
    192
  """
  return {
    **finetunes.TINY,
    "hidden_size": width,
    "intermediate_size": 3 * width,
    "num_hidden_layers": 4,
    "num_attention_heads": width // 32,
    "num_key_value_heads": width // 32,
  }
