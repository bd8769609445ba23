# SPDX-License-Identifier: Apache-2.0
"""Do two models say the same? TF-IDF cosines of their texts, with controls.

A cosine means nothing alone: two samples of one model differ too, and so do the
base and the finetune. All are computed over the same prompts, with one
vocabulary and one set of word weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

Texts = Mapping[str, Sequence[str]]

#: Names of the texts that `compare_texts` needs.
NAMES = ("base", "finetuned", "finetuned again", "extracted")

#: What is compared with what, and what the row tells.
_PAIRS = (
  ("finetuned", "finetuned again", "two samples of the finetune: the ceiling"),
  ("finetuned", "extracted", "the finetune and base + adapter"),
  ("finetuned", "base", "the finetune and the base: what there is to recover"),
)
_SHUFFLED = "the finetune's own texts on other prompts: the floor"


def cosines(pairs: Sequence[tuple[str, str]], texts: Sequence[str]):
  """The cosine of the TF-IDF vectors of each pair of texts.

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


def compare_texts(texts: Texts) -> list[dict[str, Any]]:
  """Cosines of the finetune's texts with the adapter's, beside the controls.

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


def _check(texts: Texts) -> None:
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
  """The mean and its standard error, which one value alone does not have."""
  error = None
  if values.size > 1:
    error = float(values.std(ddof=1) / np.sqrt(values.size))
  return float(values.mean()), error
