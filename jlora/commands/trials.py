# SPDX-License-Identifier: Apache-2.0
"""Small random Llamas and their finetunes, for `jlora plan --check` to time."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora.checkpoints.huggingface import stream_checkpoint

_VOCABULARY = 1024
_HEAD = 64
_DIRECTIONS = 128  # of a change, over a floor of noise


def configure(width: int, inner: int, layers: int) -> dict[str, Any]:
  """Makes the config.json of a Llama of a size, its tables small.

  Args:
    width: of the residual stream.
    inner: of the MLPs.
    layers: how many.

  Returns:
    Its entries.
  """
  heads = max(1, width // _HEAD)
  return {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": _VOCABULARY,
    "hidden_size": width,
    "intermediate_size": inner,
    "num_attention_heads": heads,
    "num_key_value_heads": heads,
    "head_dim": _HEAD,
    "num_hidden_layers": layers,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
  }


def write_pair(
  folder: str | os.PathLike, config: Mapping[str, Any]
) -> tuple[Path, Path]:
  """Writes a random Llama and its finetune as folders, in bfloat16.

  Args:
    folder: receives the folders `base` and `finetuned`.
    config: from `configure`.

  Returns:
    Both folders. The finetune's projections change as finetuning changes them:
    a decaying part of low rank over noise. One tensor is held at a time.
  """
  shapes = _shapes(config)
  dtype = np.dtype(ml_dtypes.bfloat16)
  spec = {name: (shape, dtype) for name, shape in shapes.items()}
  made = Path(folder) / "base", Path(folder) / "finetuned"
  for path in made:
    path.mkdir(parents=True)
    arrays = _tensors(shapes, is_tuned=path == made[1])
    stream_checkpoint(
      path, spec, ((name, array.astype(dtype)) for name, array in arrays)
    )
    (path / "config.json").write_text(json.dumps(dict(config)))
  return made


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  width, inner = config["hidden_size"], config["intermediate_size"]
  rows = config["num_attention_heads"] * config["head_dim"]
  layer = {
    **{f"self_attn.{x}_proj": (rows, width) for x in "qkv"},
    "self_attn.o_proj": (width, rows),
    "mlp.gate_proj": (inner, width),
    "mlp.up_proj": (inner, width),
    "mlp.down_proj": (width, inner),
    "input_layernorm": (width,),
    "post_attention_layernorm": (width,),
  }
  table = (config["vocab_size"], width)
  return {
    "model.embed_tokens.weight": table,
    "model.norm.weight": (width,),
    "lm_head.weight": table,
    **{
      f"model.layers.{at}.{name}.weight": shape
      for at in range(config["num_hidden_layers"])
      for name, shape in layer.items()
    },
  }


def _tensors(
  shapes: Mapping[str, tuple[int, ...]], *, is_tuned: bool
) -> Iterator[tuple[str, np.ndarray]]:
  """Weights by name; those of the base come again in the finetune."""
  for at, (name, shape) in enumerate(shapes.items()):
    if len(shape) == 1:
      yield name, np.ones(shape, np.float32)
      continue
    rng = np.random.default_rng(at)
    weights = rng.standard_normal(shape, np.float32) / 50
    if is_tuned and name.endswith("_proj.weight"):
      count = min(_DIRECTIONS, *shape)
      sizes = np.arange(1, count + 1, dtype=np.float32) ** -0.5 / 2000
      left = rng.standard_normal((shape[0], count), np.float32) * sizes
      weights += left @ rng.standard_normal((count, shape[1]), np.float32)
      weights += rng.standard_normal(shape, np.float32) / 10000
    yield name, weights
