# SPDX-License-Identifier: Apache-2.0
"""Compares the texts that base, finetune and base + adapter generate.

Also reads the held-out texts and a folder's tokenizer, for the prompts.
"""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from sklearn.feature_extraction.text import TfidfVectorizer

from experiments.lib.data import smollm2, texts
from jlora import models

Texts = Mapping[str, Sequence[str]]
Encode = Callable[[str], np.ndarray]
Decode = Callable[[Sequence[int]], str]
#: The models whose texts `compare_texts` needs.
NAMES = ("base", "finetuned", "finetuned again", "extracted")
_EXAMPLES = 3


def compare_samples(
  generate: Callable[..., Any],
  params: Mapping[str, Any],
  prompts: np.ndarray,
  decode: Decode,
  temperatures: Sequence[float],
) -> dict[str, Any]:
  """Generates texts with base, finetune and adapter, and compares them.

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


#: (one model, another, what the comparison tells).
_PAIRS = (
  ("finetuned", "finetuned again", "two samples of the finetune: the ceiling"),
  ("finetuned", "extracted", "the finetune and base + adapter"),
  ("finetuned", "base", "the finetune and the base: what there is to recover"),
)
_SHUFFLED = "the finetune's own texts on other prompts: the floor"


def compare_texts(texts: Texts) -> list[dict[str, Any]]:
  """Compares the finetune's texts with the adapter's, and with controls.

  Args:
    texts: of each of `NAMES`, one text for each prompt.

  Returns:
    Rows for results.json: `pair`, `what`, `cosine` (the mean over prompts),
    `cosine_error` (its standard error, None of one prompt) and, against the
    ceiling prompt by prompt, `below_ceiling` and `below_ceiling_error`.

  Raises:
    ValueError: a name is missing, or numbers of texts differ.

  Example:
    >>> same = ["in the beginning"]
    >>> rows = compare_texts({"base": ["no"], "finetuned": same,
    ...                       "finetuned again": same, "extracted": same})
    >>> [(row["pair"], row["cosine"]) for row in rows]
    [('finetuned / finetuned again', 1.0), ('finetuned / extracted', 1.0),
    ('finetuned / base', 0.0)]
  """
  _check(texts)
  every = [text for name in NAMES for text in texts[name]]
  found = [
    (
      f"{one} / {other}",
      what,
      cosines(list(zip(texts[one], texts[other], strict=True)), every),
    )
    for one, other, what in _PAIRS
  ]
  mine = list(texts["finetuned"])
  if len(mine) > 1:
    turned = [*mine[1:], mine[0]]
    other = cosines(list(zip(mine, turned, strict=True)), every)
    found.append(("finetuned / another prompt", _SHUFFLED, other))
  ceiling = found[0][2]
  return [_row(pair, what, each, ceiling) for pair, what, each in found]


def cosines(pairs: Sequence[tuple[str, str]], texts: Sequence[str]):
  """Computes the cosine of the TF-IDF vectors of each pair of texts.

  Words count with weights tf · (1 + ln((1 + n) / (1 + df))), as scikit-learn
  has them; a word is any run of letters and digits, in lower case.

  Args:
    pairs: texts to compare.
    texts: what the vocabulary and the weights are counted over.

  Returns:
    (pairs,) float64 in 0..1. Equal texts give 1, also without a word; texts
    without a common word give 0.

  Raises:
    ValueError: no pairs.

  Example:
    >>> cosines([("a cat", "A cat!"), ("a cat", "the dog")], ["a cat the dog"])
    array([1., 0.])
  """
  if not pairs:
    raise ValueError("there are no texts to compare; ask for a prompt or more.")
  left, right = zip(*pairs, strict=True)
  equal = np.array([one == other for one, other in pairs])
  vectoriser = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")
  analyse = vectoriser.build_analyzer()
  if not any(analyse(text) for text in texts):
    return equal.astype(float)
  vectoriser.fit(texts)
  u, v = (vectoriser.transform(side) for side in (left, right))
  product = np.asarray(u.multiply(v).sum(axis=1)).ravel()
  return np.where(equal, 1.0, np.clip(product, 0.0, 1.0))


#: Texts by name, of which the last tenth is read; other names are files.
_KNOWN: Mapping[str, Callable[[str | None], str]] = {
  "kjv": smollm2.kjv,
  "pydoc": lambda cache: texts.pydoc(),
}


def read_text(name: str, cache: str | None) -> str:
  """Reads a text: the held-out tenth of a known one, or a file.

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
  """Returns a model folder's functions from text to tokens and back.

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


def _check(texts: Texts) -> None:
  """Raises unless every model has a text for every prompt."""
  missing = [name for name in NAMES if name not in texts]
  if missing:
    raise ValueError(
      f"texts of {', '.join(missing)} are missing; there are those of "
      f"{', '.join(texts)}."
    )
  counts = {name: len(texts[name]) for name in NAMES}
  if len(set(counts.values())) > 1:
    raise ValueError(f"every model needs a text per prompt, got {counts}.")


def _row(pair: str, what: str, each, ceiling) -> dict[str, Any]:
  """Makes a row of `compare_texts` from the cosines of a pair."""
  mean, error = _mean(each)
  below, below_error = _mean(ceiling - each)
  return {
    "pair": pair,
    "what": what,
    "cosine": mean,
    "cosine_error": error,
    "below_ceiling": below,
    "below_ceiling_error": below_error,
  }


def _mean(values: np.ndarray) -> tuple[float, float | None]:
  """Returns the mean and its standard error, None for a single value."""
  error = None
  if values.size > 1:
    error = float(values.std(ddof=1) / np.sqrt(values.size))
  return float(values.mean()), error


def _decode_bytes(ids: Sequence[int]) -> str:
  """Decodes byte tokens as UTF-8."""
  return bytes(ids).decode("utf-8", errors="replace")
