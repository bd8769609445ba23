# SPDX-License-Identifier: Apache-2.0
"""Writes synthetic checkpoint pairs of a Llama's shapes, a tensor at a time.

The weights are noise; the finetune adds changes as finetuning makes them: a
decaying part of low rank over a floor of noise. Embeddings and norms stay.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jlora.checkpoints import stream_checkpoint, write_safetensors

#: The benchmark's model, without its number of layers: the shapes of a Llama of
#: 1.1e9 parameters.
LLAMA = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": 32000,
  "hidden_size": 2048,
  "intermediate_size": 5632,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "head_dim": 64,
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
}


#: Folders of a base and its finetunes, as `write_family` names them.
FAMILY = ("base", "finetuned", "other")


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Lists every tensor of a Llama, as its Hugging Face folder has it.

  Args:
    config: of config.json, with `num_hidden_layers` and `head_dim`.

  Returns:
    Name -> shape, matrices (out, in).

  Example:
    >>> shapes({**LLAMA, "num_hidden_layers": 1})["lm_head.weight"]
    (32000, 2048)
  """
  hidden, inner = config["hidden_size"], config["intermediate_size"]
  queries = config["num_attention_heads"] * config["head_dim"]
  keys = config["num_key_value_heads"] * config["head_dim"]
  table = (config["vocab_size"], hidden)
  layer = {
    "self_attn.q_proj": (queries, hidden),
    "self_attn.k_proj": (keys, hidden),
    "self_attn.v_proj": (keys, hidden),
    "self_attn.o_proj": (hidden, queries),
    "mlp.gate_proj": (inner, hidden),
    "mlp.up_proj": (inner, hidden),
    "mlp.down_proj": (hidden, inner),
    "input_layernorm": (hidden,),
    "post_attention_layernorm": (hidden,),
  }
  found = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
  for index in range(config["num_hidden_layers"]):
    for name, shape in layer.items():
      found[f"model.layers.{index}.{name}.weight"] = shape
  if not config["tie_word_embeddings"]:
    found["lm_head.weight"] = table
  return found


class Noise:
  """Standard normal arrays cut out of one large draw, which is faster.

  Args:
    seed: of the draw.
  """

  def __init__(self, seed: int):
    """Draws the pool that arrays are cut from."""
    rng = np.random.default_rng(seed)
    self._pool = rng.standard_normal(2**24, np.float32)

  def __call__(
    self, shape: tuple[int, ...], rng: np.random.Generator
  ) -> np.ndarray:
    """Returns a float32 array of a shape; `rng` chooses where it is cut."""
    size = math.prod(shape)
    start = int(rng.integers(max(self._pool.size - size, 0) + 1))
    cut = self._pool[start : start + size]
    return np.resize(cut, shape) if cut.size < size else cut.reshape(shape)


def change(
  shape: tuple[int, int], rng: np.random.Generator, noise: Noise
) -> np.ndarray:
  """Draws a change as finetuning makes it: 128 directions over noise.

      (Σ_i i^-1/2 x_i y_iᵀ / 2 + noise / 10) / 1000,   x, y Gaussian

  Args:
    shape: (m, n).
    rng: where it is cut out of the noise.
    noise: its source.

  Returns:
    (m, n) float32.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> round(float(change((64, 64), rng, Noise(0)).std()), 3)
    0.001
  """
  count = min(128, *shape)
  sizes = np.arange(1, count + 1, dtype=np.float32) ** -0.5 / 2000
  left = noise((shape[0], count), rng) * sizes
  right = noise((count, shape[1]), rng)
  return left @ right + noise(shape, rng) / 10000


def write_pair(
  folder: str | os.PathLike[str],
  config: Mapping[str, Any],
  *,
  seed: int = 0,
  dtype: Any = ml_dtypes.bfloat16,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes a random Llama and its finetune: Hugging Face folders.

  Args:
    folder: receives the folders `base` and `finetuned`.
    config: of config.json.
    seed: of the weights.
    dtype: they are stored in.

  Returns:
    The base folder and the finetuned folder. One tensor is held at a time;
    disk: twice the model.

  Raises:
    ValueError: a folder holds such files already.
  """
  spec = shapes(config)
  stored = {name: (shape, dtype) for name, shape in spec.items()}
  made = pathlib.Path(folder) / "base", pathlib.Path(folder) / "finetuned"
  for path in made:
    path.mkdir(parents=True)
    tensors = _tensors(spec, seed, finetuned=path == made[1])
    arrays = ((name, array.astype(dtype)) for name, array in tensors)
    stream_checkpoint(path, stored, arrays)
    (path / "config.json").write_text(json.dumps(dict(config), indent=2))
  return made


def write_family(
  folder: str | os.PathLike[str],
  config: Mapping[str, Any],
  *,
  seed: int = 0,
  dtype: Any = ml_dtypes.bfloat16,
) -> list[pathlib.Path]:
  """Writes a random Llama and two finetunes of it: Hugging Face folders.

  Args:
    folder: receives the folders of `FAMILY`.
    config: of config.json.
    seed: of the weights; each finetune's changes have their own.
    dtype: they are stored in.

  Returns:
    The folders. One tensor is held at a time; disk: three times the model.

  Raises:
    ValueError: a folder holds such files already.
  """
  spec = shapes(config)
  stored = {name: (shape, dtype) for name, shape in spec.items()}
  made = [pathlib.Path(folder) / name for name in FAMILY]
  for index, path in enumerate(made):
    path.mkdir(parents=True)
    tensors = _tensors(spec, seed, finetuned=index > 0, changes=index)
    arrays = ((name, array.astype(dtype)) for name, array in tensors)
    stream_checkpoint(path, stored, arrays)
    (path / "config.json").write_text(json.dumps(dict(config), indent=2))
  return made


def write_matrices(
  folder: str | os.PathLike[str], spec: Mapping[str, tuple[int, ...]]
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes a random set of matrices and its finetune, two files in float32.

  Args:
    folder: receives `base.safetensors` and `finetuned.safetensors`.
    spec: name -> shape; all named `..._proj.weight` change.

  Returns:
    The base file and the finetuned file.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  made = folder / "base.safetensors", folder / "finetuned.safetensors"
  for file in made:
    tensors = _tensors(spec, 0, finetuned=file == made[1])
    write_safetensors(file, dict(tensors))
  return made


def _tensors(
  spec: Mapping[str, tuple[int, ...]],
  seed: int,
  *,
  finetuned: bool,
  changes: int = 1,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields float32 weights by name; a finetune begins with the base's."""
  noise = Noise(seed)
  for index, (name, shape) in enumerate(spec.items()):
    rng = np.random.default_rng((seed, index))
    if len(shape) == 1:
      yield name, np.ones(shape, np.float32)
      continue
    weights = noise(shape, rng) / 50
    if finetuned and name.endswith("_proj.weight"):
      if changes > 1:
        rng = np.random.default_rng((seed, index, changes))
      weights += change((shape[0], shape[1]), rng, noise)
    yield name, weights
