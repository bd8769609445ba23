# SPDX-License-Identifier: Apache-2.0
"""The tiny pair learns, moves only what it may, and texts stay disjoint."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from experiments.lib.data import texts
from experiments.lib.models import finetunes
from jlora import models


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pair")
  with jax.numpy_dtype_promotion("standard"):  # optax mixes float and int
    return finetunes.tiny_pair(folder, jax.random.key(0))


def test_the_finetune_learns_what_it_did_not_see(pair):
  _, held_out = texts.split(texts.pydoc())
  tokens = texts.excerpts(held_out, texts.encode_bytes, rows=4, length=64)
  base, tuned = (
    finetunes.held_out_loss(*models.load(folder), tokens) for folder in pair
  )
  assert base == pytest.approx(np.log(256), abs=0.6)
  assert tuned < base - 1.0


def test_matrices_move_and_nothing_else(pair):
  base, tuned = (
    traverse_util.flatten_dict(models.load(folder)[1], sep="/")
    for folder in pair
  )
  moved = {p for p in base if not np.array_equal(base[p], tuned[p])}
  assert moved == {path for path in base if finetunes.is_matrix(path)}
  assert len(moved) == 15  # seven matrices a layer, and the embedding


def test_loss_is_the_mean_over_rows_and_positions():
  tokens = np.array([[0, 1, 2], [2, 2, 0]], np.int32)
  logits = np.log(np.array([0.5, 0.25, 0.25], np.float32))

  def apply(params, tokens):
    return params[None, None].repeat(tokens.shape[1], axis=1)

  expected = -logits[tokens[:, 1:]].mean()
  found = finetunes.held_out_loss(apply, jax.numpy.asarray(logits), tokens)
  assert found == pytest.approx(expected, rel=1e-6)


def _bigrams(params, tokens):
  """The smallest model there is: a table of next-token logits."""
  return params["table"]["kernel"][tokens]


def test_the_base_survives_and_shortage_is_an_error(key):
  apply, params = (
    _bigrams,
    {"table": {"kernel": jax.random.normal(key, (4, 4))}},
  )
  before = jax.tree.map(np.array, params)
  tokens = np.zeros((1, 2, 9), np.int32)
  settings = {"steps": 2, "learning_rate": 1e-3}
  with (
    jax.numpy_dtype_promotion("standard"),
    pytest.raises(ValueError, match="2 steps need as many batches, got 1"),
  ):
    finetunes.finetune(apply, params, tokens, **settings)
  jax.tree.map(np.testing.assert_array_equal, params, before)
  with pytest.raises(ValueError, match="selects none of"):
    finetunes.finetune(
      apply, params, tokens, train=lambda path: False, **settings
    )


def test_excerpts_are_disjoint_and_batches_use_each_once():
  text = "".join(map(chr, range(33, 126)))
  tokens = texts.excerpts(text, texts.encode_bytes, rows=6, length=10)
  assert tokens.shape == (6, 11)
  assert len(np.unique(tokens)) == tokens.size
  seen = np.concatenate(list(texts.batches(tokens, 2)))
  assert {row[0] for row in seen.tolist()} == {r[0] for r in tokens.tolist()}
  train, held_out = texts.split(text)
  assert train + held_out == text
  with pytest.raises(ValueError, match="6 stretches of 20 tokens do not fit"):
    texts.excerpts(text, texts.encode_bytes, rows=6, length=19)


def test_a_seed_moves_excerpts_within_their_own_parts():
  text = "".join(map(chr, range(1000, 2000)))

  def starts(seed):
    tokens = texts.excerpts(
      text,
      lambda part: np.array([*map(ord, part)]),
      rows=5,
      length=3,
      seed=seed,
    )
    return tokens[:, 0] - 1000

  assert starts(None).tolist() == [0, 200, 400, 600, 800]
  assert (starts(0) // 200).tolist() == [0, 1, 2, 3, 4]
  assert starts(0).tolist() == starts(0).tolist()
  assert len({*starts(0) % 200, *starts(1) % 200}) > 5


def test_texts_have_names():
  train, held = texts.parts("pydoc")
  assert train + held == texts.pydoc()
  with pytest.raises(ValueError, match="'runes': take kjv, pydoc"):
    texts.parts("runes")
