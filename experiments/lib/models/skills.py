# SPDX-License-Identifier: Apache-2.0
"""Provides a base, two finetunes on different texts, and held-out losses."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.data import smollm2, texts
from experiments.lib.models import finetunes
from jlora import models

#: text -> (steps, learning rate) of the finetune on it.
RECIPES = {"kjv": (150, 3e-4), "pydoc": (60, 3e-4)}
#: text -> its name in tables.
TITLES = {"kjv": "the Bible", "pydoc": "pydoc"}


class Skills(NamedTuple):
  """The models and texts that merges begin with.

  Attributes:
    config: of config.json, the same for all three.
    base: parameters.
    finetuned: text -> parameters of the finetune on it.
    held_out: text -> (rows, time + 1) int32.
    train: text -> (rows, time + 1) int32, of the part that was trained on.
    folders: "base" and each text -> Hugging Face folder.
  """

  config: dict[str, Any]
  base: Any
  finetuned: dict[str, Any]
  held_out: dict[str, np.ndarray]
  train: dict[str, np.ndarray]
  folders: dict[str, Any]


def smollm2_skills(cache: str | None) -> Skills:
  """Loads SmolLM2-135M and its finetunes of `RECIPES`; makes them if missing.

  Args:
    cache: folder for downloads and models; None is ~/.cache/jlora.

  Returns:
    Skills of 8 rows of 256 tokens a text; three models in float32, 1.6 GB.
  """
  folders = {}
  for domain, (steps, rate) in RECIPES.items():
    folders["base"], folders[domain] = finetunes.smollm2_pair(
      cache, domain, steps=steps, learning_rate=rate
    )
  encode = smollm2.tokenizer(folders["base"])
  parts = {name: texts.parts(name, cache) for name in RECIPES}
  return _read(folders, parts, encode, rows=8, length=255)


def tiny_skills(folder: str) -> Skills:
  """Makes a random model of bytes and two random changes of it.

  Args:
    folder: receives the folders `base`, `kjv` and `pydoc`.

  Returns:
    Skills of 2 rows of 16 bytes; both texts are parts of Python's help.
  """
  _, params = models.init(finetunes.TINY, jax.random.key(0))
  base = jax.tree.map(np.asarray, params)
  folders = {"base": models.save(f"{folder}/base", base, finetunes.TINY)}
  for seed, name in enumerate(RECIPES):
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(
      lambda x, rng=rng: x + rng.normal(0, 0.01, x.shape).astype(x.dtype), base
    )
    folders[name] = models.save(f"{folder}/{name}", tree, finetunes.TINY)
  half = len(texts.pydoc()) // 2
  pieces = texts.pydoc()[:half], texts.pydoc()[half:]
  parts = {
    name: texts.split(piece)
    for name, piece in zip(RECIPES, pieces, strict=True)
  }
  return _read(folders, parts, texts.encode_bytes, rows=2, length=15)


_row_loss: Callable[..., jax.Array] = functools.partial(
  jax.jit, static_argnums=0
)(finetunes.nll)


def measure(
  apply: finetunes.Apply, params: Any, held_out: Mapping[str, np.ndarray]
) -> dict[str, list[float]]:
  """Computes the losses of every row of every text, nats per token.

  Args:
    apply: `apply(params, tokens) -> logits`; one program for each.
    params: its parameters.
    held_out: text -> (rows, time + 1) int32.

  Returns:
    text -> loss of each row.
  """
  return {
    name: [float(_row_loss(apply, params, row[None])) for row in tokens]
    for name, tokens in held_out.items()
  }


def _read(folders, parts, encode, rows: int, length: int) -> Skills:
  """Loads the models of folders, and excerpts of both parts of the texts."""
  cut = functools.partial(texts.excerpts, encode=encode, rows=rows)
  trees = {
    name: jax.tree.map(jnp.asarray, models.load(folder)[1])
    for name, folder in folders.items()
  }
  return Skills(
    config=models.read_config(folders["base"]),
    base=trees.pop("base"),
    finetuned=trees,
    held_out={
      name: cut(held_out, length=length)
      for name, (_, held_out) in parts.items()
    },
    train={
      name: cut(train, length=length) for name, (train, _) in parts.items()
    },
    folders=folders,
  )
