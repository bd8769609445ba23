# SPDX-License-Identifier: Apache-2.0
"""Tiny models in folders, and merges of them in two files."""

import io
import json

import jlora
from jlora.checkpoints.huggingface import stream_checkpoint
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
from jlora.merging.checkpoints.run import merge_checkpoints
from tests.helpers.small_pairs import draw

Q = "model.layers.{}.self_attn.q_proj.weight"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "dtype": "float32"}
SHARD = 800  # bytes: two files


def write_models(folder):
  """Paths of a base and of two finetunes, "a", "b" and "c"."""
  return [_write(folder / name, 10 * at) for at, name in enumerate("abc")]


def _write(folder, seed):
  """A model of four tensors, in a folder."""
  tensors = {Q.format(at): draw(12, 8, seed=seed + at) for at in range(2)}
  tensors |= {"model.norm.weight": draw(8, seed=seed + 2)}
  tensors |= {"lm_head.weight": draw(11, 8, seed=seed + 3)}
  spec = {name: (x.shape, x.dtype) for name, x in tensors.items()}
  stream_checkpoint(folder, spec, tensors.items())
  (folder / "config.json").write_text(json.dumps(CONFIG))
  (folder / "tokenizer.json").write_text(json.dumps({"of": folder.name}))
  return str(folder)


def run(recipe, out, **options):
  options = {"max_shard_bytes": SHARD} | options
  return merge_checkpoints(recipe, out, log=io.StringIO(), **options)


def whole(*paths):
  return (Slice(tuple(Input(path) for path in paths)),)


def linear(models):
  return Recipe(jlora.merging.linear, whole(*models[1:]))
