# SPDX-License-Identifier: Apache-2.0
"""A server's programs: rows apart from each other, chance, texts, batches."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import models
from jlora.adapting import adapt, bind
from jlora.adapting.serving import Room
from jlora.commands.serving.batching import Batcher
from jlora.commands.serving.decoding import (
  Choice,
  Decoder,
  Rows,
  Sizes,
  choose,
  count_compilations,
)
from jlora.commands.serving.refusals import Refused
from jlora.commands.serving.text import Transcript, open_tokenizer
from jlora.paths import flatten
from tests.helpers import served

SIZES = served.SIZES
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


@pytest.fixture(scope="module")
def small():
  """A model, its parameters, four adapters, and the modules they change."""
  model, params = models.init(served.CONFIG, jax.random.key(0))
  loras = [served.draw_adapter(params, 1 + i, i) for i in range(4)]
  flat = flatten(params)
  return model, params, loras, {path: flat[path].shape for path in loras[0]}


def greedy(*shape):
  return Choice(np.zeros(shape[0], np.float32), np.zeros(shape, np.float32))


def run(decoder, bank, places):
  """Reads PROMPT and says six tokens in rows {row: id}, others idle at -1.

  Returns {row: (its tokens, its cache)}.
  """
  skip = SIZES.skip(len(PROMPT))
  padded, last = [0] * skip + PROMPT, {}
  for row, identity in places.items():
    for at in range(0, len(padded), SIZES.piece):
      part = padded[at : at + SIZES.piece]
      last[row] = int(
        decoder.read(bank, row, identity, part, at, skip, greedy(1))
      )
  where = Rows(np.full(SIZES.rows, -1, np.int32), *np.zeros((3, 4), np.int32))
  for row, identity in places.items():
    where.ids[row], where.tokens[row] = identity, last[row]
    where.at[row], where.skip[row] = len(padded), skip
  said = {row: [token] for row, token in last.items()}
  for _ in range(2):
    found = np.asarray(decoder.say(bank, where, greedy(4, SIZES.steps)))
    where.at[:] += SIZES.steps
    where.tokens[:] = found[:, -1]
    for row in places:
      said[row] += found[row].tolist()
  used = len(padded) + 2 * SIZES.steps
  cache = jax.tree.map(lambda x: np.array(x[:, :used]), decoder._cache)
  return {
    row: (said[row], jax.tree.map(lambda x, row=row: x[row], cache))
    for row in places
  }


def test_a_row_is_the_same_bit_by_bit_wherever_and_beside_whomever(small):
  """Other rows, other slots, another place: the cache has the same bits."""
  model, params, loras, shapes = small
  room = Room(shapes, slots=4, rank=4)
  for i, own in enumerate(loras):
    assert room.fill(str(i), own).slot == i
  turned = Room(shapes, slots=4, rank=4)
  for i, own in enumerate(loras[::-1]):
    turned.fill(str(i), own)
  decoder = Decoder(model, params, SIZES)
  alone = run(decoder, room.bank, {0: 2})[0]
  others = [
    run(decoder, room.bank, {0: 2, 1: 0, 2: 1, 3: 3})[0],
    run(decoder, room.bank, {3: 2, 0: -1, 1: 2})[3],
    run(decoder, turned.bank, {0: 0, 1: 1, 2: 3})[1],
  ]
  for said, cache in others:
    assert said == alone[0]
    jax.tree.map(np.testing.assert_array_equal, cache, alone[1])
  different = run(decoder, room.bank, {0: 1})[0]
  assert any(
    (x != y).any()
    for x, y in zip(
      jax.tree.leaves(different[1]), jax.tree.leaves(alone[1]), strict=True
    )
  )


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
#: What is served -> its configuration, the dtype of its weights.
SERVED = {
  "gpt2": (
    {"model_type": "gpt2", "vocab_size": 60, "n_embd": 16, "n_layer": 2,
     "n_head": 2, "n_positions": 48},
    jnp.float32,
  ),
  "mixtral": (
    served.CONFIG | HEADS | {"model_type": "mixtral", "num_local_experts": 4,
                             "num_experts_per_tok": 2},
    jnp.float32,
  ),
  "qwen3": (
    served.CONFIG | {"model_type": "qwen3", "head_dim": 8}, jnp.float32
  ),
  "llama in bfloat16": (served.CONFIG, jnp.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_other_models_say_what_their_adapter_says_alone(name):
  """Beside others, and as `generate` on the same bound weights."""
  config, dtype = SERVED[name]
  model, params = models.init(config, jax.random.key(1), dtype=dtype)
  draw = np.random.default_rng(2).standard_normal
  params = jax.tree.map(
    lambda x: x + jnp.asarray(draw(x.shape, np.float32), dtype), params
  )
  # Of one rank, so that one program says what all of them say.
  loras = [served.draw_adapter(params, 2, i) for i in range(3)]
  loras.append(jax.tree.map(np.zeros_like, loras[0]))
  flat = flatten(params)
  room = Room({path: flat[path].shape for path in loras[0]}, slots=3, rank=4)
  for i, own in enumerate(loras[:3]):
    room.fill(str(i), own)
  decoder = Decoder(model, params, SIZES)
  beside = run(decoder, room.bank, {0: 2, 1: -1, 2: 0, 3: 1})
  said = jax.jit(
    adapt(lambda p: models.generate(model, p, jnp.array([PROMPT]), 7))
  )
  for row, own in ((0, 2), (1, 3), (2, 0), (3, 1)):
    found = said(bind(params, jax.tree.map(jnp.asarray, loras[own])))
    assert beside[row][0] == np.asarray(found)[0].tolist()
  alone = run(decoder, room.bank, {1: 1})[1]
  assert alone[0] == beside[3][0]
  jax.tree.map(np.testing.assert_array_equal, alone[1], beside[3][1])
  assert len({tuple(tokens) for tokens, _ in beside.values()}) == 4


def test_the_base_is_the_same_with_and_without_a_room(small):
  model, params, loras, shapes = small
  room = Room(shapes, slots=4, rank=4)
  for i, own in enumerate(loras):
    room.fill(str(i), own)
  beside = run(Decoder(model, params, SIZES), room.bank, {0: 2, 1: -1})[1]
  bare = run(Decoder(model, params, SIZES), Room({}, slots=1).bank, {1: -1})[1]
  assert beside[0] == bare[0]
  jax.tree.map(np.testing.assert_array_equal, beside[1], bare[1])


def test_what_is_not_finite_stays_in_its_row(small):
  """An adapter that overflows spoils neither its neighbours nor who follows."""
  model, params, loras, shapes = small
  wild = jax.tree.map(lambda x: np.where(x > 0, 3e38, -3e38) + 0 * x, loras[0])
  wild = jax.tree.map(lambda x: x.astype(np.float32), wild)
  room = Room(shapes, slots=4, rank=4)
  room.fill("own", loras[1])
  room.fill("wild", wild)
  decoder = Decoder(model, params, SIZES)
  alone = run(decoder, room.bank, {1: 0})[1]
  spoiled = run(decoder, room.bank, {0: 1, 1: 0})
  assert not all(np.isfinite(x).all() for x in jax.tree.leaves(spoiled[0][1]))
  again = run(decoder, room.bank, {0: 0})[0]
  for said, cache in (spoiled[1], again):
    assert said == alone[0]
    jax.tree.map(np.testing.assert_array_equal, cache, alone[1])


def test_nothing_is_compiled_twice(small):
  model, params, loras, shapes = small
  room = Room(shapes, slots=4, rank=4)
  room.fill("a", loras[0])
  decoder = Decoder(model, params, SIZES)
  run(decoder, room.bank, {0: -1})
  place = jax.tree.leaves(decoder._cache)[0].unsafe_buffer_pointer()
  compiled = count_compilations()
  room.fill("b", loras[1])
  run(decoder, room.bank, {0: 0, 2: -1})
  assert compiled() == 0
  # Donated caches are written in place.
  now = jax.tree.leaves(decoder._cache)[0].unsafe_buffer_pointer()
  assert now == place


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    (Sizes(0, 48, 8, 3), "each must be at least 1"),
    (Sizes(4, 8, 8, 3), "length above 8"),
  ],
)
def test_sizes_that_cannot_be(small, sizes, words):
  model, params, *_ = small
  with pytest.raises(ValueError, match=words):
    Decoder(model, params, sizes)


def test_a_gpt2_has_no_more_positions_than_it_learned():
  config = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1,
            "n_head": 2, "n_positions": 40}  # fmt: skip
  model = models.build(config)
  with pytest.raises(ValueError, match="at most 40"):
    Decoder(model, {}, SIZES)


def test_tokens_are_drawn_as_often_as_they_are_likely():
  """Every one for its own part of the numbers from 0 to 1."""
  p = np.array([0.125, 0.5, 0.25, 0.125])
  count = 800
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (count, 4))
  chance = (np.arange(count, dtype=np.float32) + 0.5) / count
  for heat in (1.0, 0.5):
    drawn = choose(logits, Choice(np.full(count, heat, np.float32), chance))
    wanted = p ** (1 / heat) / (p ** (1 / heat)).sum()
    found = np.bincount(drawn, minlength=4) / count
    np.testing.assert_allclose(found, wanted, atol=2 / count)
  ends = Choice(np.ones(2, np.float32), np.array([0.0, 1.0], np.float32))
  assert choose(logits[:2], ends).tolist() == [0, 3]


class Letters:
  """A tokenizer of bytes of UTF-8."""

  @staticmethod
  def decode(tokens, skip_special_tokens):
    assert skip_special_tokens
    return bytes(tokens).decode("utf-8", "replace")


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
  ("text", "stops", "wanted"),
  [
    ("grüße, мир €", (), "grüße, мир €"),
    ("one STOP two", ("STOP",), "one "),
    ("one STO two", ("STOP",), "one STO two"),
    ("a END b STOP", ("STOP", "END"), "a "),
    ("aab aaab", ("aaab",), "aab "),
  ],
)
def test_texts_bit_by_bit(text, stops, wanted, size):
  script, found = Transcript(Letters, stops), ""
  raw = text.encode()
  for at in range(0, len(raw), size):
    new = script.add(raw[at : at + size], is_last=at + size >= len(raw))
    assert "\ufffd" not in new
    assert wanted.startswith(found + new)
    found += new
  assert found == wanted
  assert script.is_stopped == (wanted != text)
  assert Transcript(None).add([1, 2]) == ""


def test_half_a_letter_at_the_end_is_told():
  script = Transcript(Letters)
  assert script.add([65, 0xE2]) == "A"
  assert script.add([0x82], is_last=True) == "\ufffd"


def test_a_damaged_tokenizer_is_told(tmp_path):
  assert open_tokenizer(tmp_path) is None
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
    open_tokenizer(tmp_path)


def test_a_row_whose_adapter_is_gone_is_never_run(small):
  """Whoever gives a lease back too early: the cache is refused, not mixed."""
  model, params, loras, shapes = small
  room = Room(shapes, slots=1, rank=4)
  lease = room.fill("a", loras[0])
  adapters = types.SimpleNamespace(room=room)
  batcher = Batcher(Decoder(model, params, SIZES), adapters)
  row = types.SimpleNamespace(lease=lease, identity=0)
  assert batcher._bank([row, None])[0].tolist() == [0, -1]
  row.identity = 1
  with pytest.raises(ValueError, match="row 0: 1 in the cache, now 0"):
    batcher._bank([row])
  row.identity = 0
  room.give_back(lease)
  room.fill("b", loras[1])
  with pytest.raises(ValueError, match="caches of adapters that were given ba"):
    batcher._bank([row])


def test_a_closed_batcher_takes_nothing(small):
  model, params, *_ = small
  batcher = Batcher(Decoder(model, params, SIZES), types.SimpleNamespace())
  batcher.close()
  with pytest.raises(Refused, match="shutting down"):
    batcher.submit([])
