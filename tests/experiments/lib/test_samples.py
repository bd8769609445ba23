# SPDX-License-Identifier: Apache-2.0
"""Texts are found, tokens go both ways, and samples are told apart."""

import json
import math

import jax
import numpy as np
import pytest

from experiments.lib.data import texts
from experiments.lib.measures import samples
from experiments.lib.measures.samples import NAMES, compare_texts, cosines

PROMPTS = np.array([list(b"In "), list(b"And")], np.int32)
SAYS = {"base": b"null ", "finetuned": b"light", "extracted": b"light"}


def _generate(params, prompts, *, key, temperature):
  """A model that says its own word; warm, a word of its key as well."""
  said = params if temperature == 0 else params[:3] + b" " + _letter(key)
  return np.tile(np.frombuffer(said, np.uint8), (len(prompts), 1))


def _letter(key):
  return bytes([ord("p") + int(jax.random.key_data(key)[-1])])


def test_samples_are_compared_at_every_temperature():
  found = samples.compare_samples(
    _generate, SAYS, PROMPTS, lambda ids: bytes(ids).decode(), [0.0, 1.0]
  )
  assert (found["prompts"], found["prompt_tokens"]) == (2, 3)
  cold, warm = found["temperatures"]
  assert [each["temperature"] for each in (cold, warm)] == [0.0, 1.0]
  rows = {row["pair"]: row["cosine"] for row in cold["rows"]}
  assert rows["finetuned / finetuned again"] == 1.0
  assert rows["finetuned / extracted"] == 1.0
  assert rows["finetuned / base"] == 0.0
  assert cold["examples"][1] == {
    "prompt": "And", "base": "null ", "finetuned": "light",
    "finetuned again": "light", "extracted": "light",
  }  # fmt: skip
  # Every sample has a key of its own.
  said = [text for name, text in warm["examples"][0].items()]
  assert len({text[-1] for text in said[1:]}) == 4
  json.dumps(found)


def test_bytes_are_tokens_of_the_tiny_model(tmp_path):
  (tmp_path / "config.json").write_text('{"vocab_size": 256}')
  encode, decode = samples.open_tokens(tmp_path)
  assert decode(encode("a – b").tolist()) == "a – b"
  assert decode([0xE2, 0x80]) == "�"  # cut within a character


def test_a_model_without_its_tokenizer_is_refused(tmp_path):
  (tmp_path / "config.json").write_text('{"vocab_size": 49152}')
  with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
    samples.open_tokens(tmp_path)


def test_known_texts_give_their_last_tenth_and_files_all(tmp_path):
  assert samples.read_text("pydoc", None) == texts.split(texts.pydoc())[1]
  path = tmp_path / "mine.txt"
  path.write_text("all of it", encoding="utf-8")
  assert samples.read_text(str(path), None) == "all of it"
  with pytest.raises(ValueError, match="neither kjv, pydoc nor a file"):
    samples.read_text(str(tmp_path / "none"), None)


TEXTS = ["in the beginning was light", "a gate of pearl", "six cubits long"]
OTHER = ["static void main", "return null pointer", "import numpy"]


def rows_of(**given):
  texts = dict.fromkeys(NAMES, TEXTS) | given
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
  rows = rows_of(extracted=[TEXTS[0], OTHER[1], TEXTS[2]])
  row = rows["finetuned / extracted"]
  assert row["cosine"] == pytest.approx(2 / 3)
  assert row["cosine_error"] == pytest.approx(
    np.std([1, 0, 1], ddof=1) / math.sqrt(3)
  )
  one = compare_texts(dict.fromkeys(NAMES, TEXTS[:1]))
  assert [row["cosine_error"] for row in one] == [None] * 3


def test_texts_without_words_are_like_themselves_only():
  assert cosines([("", ""), ("", "!?")], ["", "!?"]).tolist() == [1, 0]
  assert cosines([("...", "..."), ("...", "a")], ["a"]).tolist() == [1, 0]


def test_missing_texts_are_refused():
  with pytest.raises(ValueError, match="texts of extracted are missing"):
    compare_texts({name: TEXTS for name in NAMES[:3]})
  with pytest.raises(ValueError, match="a text per prompt"):
    rows_of(base=TEXTS[:2])
