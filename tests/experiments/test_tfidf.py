# SPDX-License-Identifier: Apache-2.0
"""TF-IDF cosines: the formula, and controls that behave."""

import math

import numpy as np
import pytest

from experiments.tfidf import NAMES, compare_texts, cosines

PROMPTS = ["in the beginning was light", "a gate of pearl", "six cubits long"]
OTHER = ["static void main", "return null pointer", "import numpy"]


def rows_of(**given):
  texts = dict.fromkeys(NAMES, PROMPTS) | given
  return {row["pair"]: row for row in compare_texts(texts)}


def test_the_formula():
  """Two documents: weights 1 for the common word, 1 + ln 1.5 for the others."""
  weight = 1 + math.log(3 / 2)
  found = cosines([("a b", "a c")], ["a b", "a c"])
  assert found == pytest.approx([1 / (1 + weight**2)])


def test_equal_texts_give_one_and_disjoint_ones_zero():
  rows = rows_of(base=OTHER)
  assert rows["finetuned / finetuned again"]["cosine"] == 1.0
  assert rows["finetuned / extracted"]["cosine"] == 1.0
  assert rows["finetuned / extracted"]["below_ceiling"] == 0.0
  assert rows["finetuned / base"]["cosine"] == 0.0
  assert rows["finetuned / base"]["below_ceiling"] == 1.0
  assert rows["finetuned / another prompt"]["cosine"] < 0.1


def test_pairs_are_not_exchanged():
  rows = rows_of(extracted=OTHER)
  assert rows["finetuned / extracted"]["cosine"] == 0.0
  assert rows["finetuned / base"]["cosine"] == 1.0
  again = rows_of(**{"finetuned again": OTHER})
  assert again["finetuned / finetuned again"]["cosine"] == 0.0
  assert again["finetuned / extracted"]["below_ceiling"] == -1.0


def test_errors_are_over_prompts():
  rows = rows_of(extracted=[PROMPTS[0], OTHER[1], PROMPTS[2]])
  row = rows["finetuned / extracted"]
  assert row["cosine"] == pytest.approx(2 / 3)
  assert row["cosine_error"] == pytest.approx(
    np.std([1, 0, 1], ddof=1) / math.sqrt(3)
  )
  one = compare_texts(dict.fromkeys(NAMES, PROMPTS[:1]))
  assert [row["cosine_error"] for row in one] == [None] * 3


def test_texts_without_words_are_like_themselves_only():
  assert cosines([("", ""), ("", "!?")], ["", "!?"]).tolist() == [1, 0]
  assert cosines([("...", "..."), ("...", "a")], ["a"]).tolist() == [1, 0]


def test_missing_texts_are_refused():
  with pytest.raises(ValueError, match="texts of extracted are missing"):
    compare_texts({name: PROMPTS for name in NAMES[:3]})
  with pytest.raises(ValueError, match="a text per prompt"):
    rows_of(base=PROMPTS[:2])
