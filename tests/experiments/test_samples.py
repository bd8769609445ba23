# SPDX-License-Identifier: Apache-2.0
"""Texts are found, tokens go both ways, and samples are told apart."""

import json

import jax
import numpy as np
import pytest

from experiments import samples, texts

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
