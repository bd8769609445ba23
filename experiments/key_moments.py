# SPDX-License-Identifier: Apache-2.0
"""What the down projections of a decoder read, as second moments, kept.

Also the text that the model writes itself, for them and before prompts.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments import corpora, texts
from jlora import models

#: What prefixes begin with: three of the five of MEMIT's code.
_BEGINNINGS = ("The", "Therefore", "Because")
#: Tokens in a row of text.
_LENGTH = 128
#: Rows the model writes itself that are held out.
_HELD = 4


def write_text(model: models.Model, params: Any, rows: int) -> np.ndarray:
  """What the model writes from nothing: (rows, 128) int32, temperature 1."""
  start = jnp.zeros((rows, 1), jnp.int32)  # <|endoftext|> of SmolLM2
  key = jax.random.key(1)
  said = models.generate(
    model, params, start, _LENGTH, key=key, temperature=1.0
  )
  return np.asarray(said)


def write_prefixes(
  model: models.Model,
  params: Any,
  encode: Callable[[str], np.ndarray],
  decode: Callable[[Sequence[int]], str],
) -> list[str]:
  """Short sentences of the model's own to put before prompts."""
  ids = [encode(text) for text in _BEGINNINGS]
  lengths = [len(row) for row in ids]
  tokens = np.zeros((len(ids), max(lengths)), np.int32)
  for row, its in zip(tokens, ids, strict=True):
    row[: len(its)] = its
  said = models.generate(
    model,
    params,
    jnp.asarray(tokens),
    6,
    lengths=jnp.asarray(lengths),
    key=jax.random.key(2),
    temperature=1.0,
  )
  rows = zip(_BEGINNINGS, np.asarray(said).tolist(), strict=True)
  return [f"{text}{decode(row)}. " for text, row in rows]


def key_moments(
  apply: models.Model,
  params: Any,
  encode: Callable[[str], np.ndarray],
  *,
  rows: int,
  names: tuple[str, ...],
  cache: str | os.PathLike[str] | None,
  file: pathlib.Path | None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """C = E[k kᵀ] of every down projection, and held-out text of four kinds.

  Half of the tokens are written by the model itself, the rest are training
  parts of the texts of `corpora`: there is no Wikipedia here.

  Args:
    apply: a decoder of `jlora.models`.
    params: its parameters.
    encode: text -> tokens.
    rows: of 128 tokens, own ones; as many again from the texts together.
    names: the texts, of `corpora`.
    cache: as `corpora.parts`.
    file: where both are kept, None to keep nothing.

  Returns:
    {kernel path: (in, in) float64}, and (rows, 128) int32 tokens held out, the
    model's own first.
  """
  if file is not None and file.exists():
    with np.load(file) as kept:
      found = {name: kept[name] for name in kept.files}
    held = found.pop("held")
    wide = {p.replace("|", "/"): c.astype(np.float64) for p, c in found.items()}
    return wide, held
  own = write_text(apply, params, rows + _HELD)
  halves = [corpora.parts(name, cache) for name in names]
  read = [own[_HELD:]]
  held = [own[:_HELD]]
  for seen, unseen in halves:
    some = {"encode": encode, "length": _LENGTH - 1}
    read.append(texts.excerpts(seen, rows=rows // len(names), **some))
    held.append(texts.excerpts(unseen, rows=_HELD // len(names), **some))
  tokens = np.concatenate(read).reshape(-1, 4, _LENGTH)
  moments = jlora.factoring.second_moments(apply, params, tokens)
  found = {
    path: np.asarray(moment.total) / np.float32(moment.count)
    for path, moment in moments.items()
    if path.endswith("mlp/down/kernel")
  }
  held = np.concatenate(held)
  if file is not None:
    part = file.with_name(f".{file.name}.part.npz")
    flat: dict[str, Any] = {p.replace("/", "|"): c for p, c in found.items()}
    np.savez(part, held=held, **flat)
    part.rename(file)
  return {path: c.astype(np.float64) for path, c in found.items()}, held
