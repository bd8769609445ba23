# SPDX-License-Identifier: Apache-2.0
"""Held-out tokens, prompts, and what models say after them."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers

from experiments import smollm2, texts
from experiments.tfidf import NAMES, compare_texts
from jlora import models

Encode = Callable[[str], np.ndarray]
Decode = Callable[[Sequence[int]], str]

#: Texts by name, of which the last tenth is read; others are files.
_KNOWN: Mapping[str, Callable[[str | None], str]] = {
  "kjv": smollm2.kjv,
  "pydoc": lambda cache: texts.pydoc(),
}
_EXAMPLES = 3


def read_text(name: str, cache: str | None) -> str:
  """A text to measure on: the held-out tenth of a known one, or a file.

  Args:
    name: `kjv`, `pydoc`, or the path of a UTF-8 file, read whole.
    cache: as `smollm2.kjv`.

  Returns:
    The text.

  Raises:
    ValueError: neither a known name nor a file.

  Example:
    >>> read_text("nowhere.txt", None)
    Traceback (most recent call last):
    ...
    ValueError: nowhere.txt is neither kjv, pydoc nor a file.
  """
  if name in _KNOWN:
    return texts.split(_KNOWN[name](cache))[1]
  path = pathlib.Path(name)
  if not path.is_file():
    raise ValueError(f"{name} is neither {', '.join(_KNOWN)} nor a file.")
  return path.read_text(encoding="utf-8")


def open_tokens(folder: str | os.PathLike[str]) -> tuple[Encode, Decode]:
  """From text to tokens and back, as a model's folder has it.

  Args:
    folder: holds tokenizer.json, or a config.json with a vocabulary of 256:
      such a model reads bytes.

  Returns:
    encode and decode.

  Raises:
    ValueError: neither is there.
  """
  path = pathlib.Path(folder) / "tokenizer.json"
  if path.is_file():
    model = tokenizers.Tokenizer.from_file(str(path))
    return smollm2.tokenizer(folder), lambda ids: model.decode(list(ids))
  if models.read_config(folder).get("vocab_size") == 256:
    return texts.encode_bytes, _decode_bytes
  raise ValueError(
    f"{path} is missing and the vocabulary is not 256 bytes; put the model's "
    "tokenizer.json there, or use --texts= to compare weights alone."
  )


def _decode_bytes(ids: Sequence[int]) -> str:
  return bytes(ids).decode("utf-8", errors="replace")


def compare_samples(
  generate: Callable[..., Any],
  params: Mapping[str, Any],
  prompts: np.ndarray,
  decode: Decode,
  temperatures: Sequence[float],
) -> dict[str, Any]:
  """What base, finetune and base + adapter say, and how alike it is.

  Args:
    generate: `generate(params, prompts, key=..., temperature=...)` gives
      (prompts, steps) tokens, the prompts not repeated.
    params: parameters of `base`, `finetuned` and `extracted`.
    prompts: (prompts, time) int32.
    decode: tokens -> text.
    temperatures: 0 is greedy; a second sample of the finetune is then the
      first, and its cosine 1 by construction.

  Returns:
    For results.json: `prompts`, `prompt_tokens`, and by temperature
    `rows` and `examples`. Every model draws with a key of its own.
  """
  found: dict[str, Any] = {
    "prompts": len(prompts),
    "prompt_tokens": prompts.shape[1],
  }
  found["temperatures"] = []
  for temperature in temperatures:
    said = {
      name: [
        decode(row)
        for row in np.asarray(
          generate(
            params[name.split()[0]],
            prompts,
            key=jax.random.key(number),
            temperature=temperature,
          )
        ).tolist()
      ]
      for number, name in enumerate(NAMES)
    }
    examples = [
      {"prompt": decode(prompt)} | {name: said[name][i] for name in NAMES}
      for i, prompt in enumerate(prompts[:_EXAMPLES].tolist())
    ]
    found["temperatures"].append(
      {
        "temperature": temperature,
        "rows": compare_texts(said),
        "examples": examples,
      }
    )
  return found
