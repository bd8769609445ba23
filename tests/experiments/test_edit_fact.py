# SPDX-License-Identifier: Apache-2.0
"""Edits of a tiny model: what is fitted is what is deployed, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from experiments.edit_fact import save
from experiments.lib.adapters import edits
from experiments.lib.adapters.edits import go_on, read_modules, to_logits
from experiments.lib.adapters.moments import key_moments
from experiments.lib.data import facts
from experiments.lib.data.texts import encode_bytes
from experiments.lib.measures.fact_edits import Measure, harmonic
from experiments.lib.models.finetunes import TINY
from jlora import models

FACT = facts.Fact("Ann", "Ann is in", " A", " B", ("Where is Ann? In",))
MULTIPLE = 32


@functools.cache
def model():
  apply, params = models.init(TINY, jax.random.key(0))
  moments, held = key_moments(
    apply,
    params,
    encode_bytes,
    rows=4,
    names=("pydoc",),
    cache=None,
    file=None,
  )
  prefixes = "", "So it is. "
  found = edits.Model(
    apply, params, encode_bytes, prefixes, moments, (0, 1), MULTIPLE
  )
  return found, held


def tokens_of(rows, answer):
  rows = [(row, answer, "Ann") for row in rows]
  return facts.encode_prompts(rows, encode_bytes, MULTIPLE)


def test_layers_run_by_themselves_give_the_logits():
  m, _ = model()
  prompts = tokens_of(["Ann is", "Here is Ann now"], "")
  for layer in (0, 1):
    read = read_modules(m.apply, (f"layers/{layer}",), m.params, prompts.tokens)
    normed = go_on(m.apply, layer, m.params, read[f"layers/{layer}"][1])
    np.testing.assert_allclose(
      to_logits(m.apply, m.params, normed),
      m.apply(m.params, prompts.tokens),
      atol=1e-4,
    )
  with pytest.raises(ValueError, match="no module layers/7 was called"):
    read_modules(m.apply, ("layers/7",), m.params, prompts.tokens)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_loss_fitted_is_that_of_the_edited_model(layer):
  m, _ = model()
  options = {"steps": 4, "decay": 0.0, "radius": 4.0}
  fit = edits.fit_through_weights(m, FACT, layer, ridge=0.0, **options)
  assert fit.history["loss"][-1] < fit.history["loss"][0]
  edited = jlora.apply(m.params, edits.one_key(m, fit, layer, ridge=0.0))
  asked = edits.ask(m, FACT, layer)
  both = [
    jax.nn.log_softmax(m.apply(params, asked.prompts.tokens))
    for params in (m.params, edited)
  ]
  gained = [
    both[1][row, end + i, asked.prompts.tokens[row, end + i + 1]]
    for row, end in enumerate(asked.prompts.ends[:-1])
    for i in range(2)
  ]
  before, now = (x[-1, asked.prompts.places[-1]] for x in both)
  kl = jnp.sum(jnp.exp(now) * (now - before))
  wanted = 0.0625 * kl - jnp.mean(jnp.stack(gained))
  assert fit.history["loss"][-1] == pytest.approx(float(wanted), abs=1e-4)


def test_the_mean_key_gets_the_value_and_the_first_code_misses_it():
  m, _ = model()
  fit = edits.fit_at_subject(m, FACT, 1, steps=3)
  kernel = edits.kernel_of(1)
  change = {}
  for make in (edits.one_key, edits.two_keys):
    lora = make(m, fit, 1, ridge=0.0)[kernel]
    change[make] = np.asarray(jlora.loras.dense(lora), np.float64)
  one, two = change[edits.one_key], change[edits.two_keys]
  np.testing.assert_allclose(fit.key @ one, fit.delta, atol=1e-4)
  np.testing.assert_allclose(fit.single @ two, fit.delta, atol=1e-4)
  assert np.abs(fit.key @ two - fit.delta).max() > 1e-3


def test_at_the_subject_the_stream_moves_by_delta():
  """The fit's loss at zero steps of it is the base's own."""
  m, _ = model()
  losses = [
    fit(m, FACT, 0, steps=1).history["loss"]
    for fit in (
      edits.fit_at_subject,
      functools.partial(edits.fit_through_weights, ridge=0.0),
    )
  ]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_many_at_once_move_the_stream_where_it_is_wanted():
  m, _ = model()
  other = FACT._replace(prompt="Ann eats", new=" C")
  both = [FACT, other]
  streams = edits.fit_streams(m, both, 1, steps=3, radius=0.75)
  gaps = []
  for balance in (1e-4, 1e4):
    loras = edits.many_at_once(m, both, streams, (0, 1), balance=balance)
    assert {lora.rank for lora in loras.values()} == {2}
    there = m._replace(params=jlora.apply(m.params, loras))
    stands = []
    for fact in both:
      asked = edits.ask(there, fact, 1)
      stands.append(asked.at_subject(asked.stream)[0])
    gaps.append(np.linalg.norm(streams - np.stack(stands)))
  assert gaps[0] < 0.7 * gaps[1]


def test_random_edits_have_the_norm():
  lora = jlora.Lora(jnp.ones((1, 5)), jnp.ones((1, 4)), jnp.ones(()))
  for fields in ("a", "b", "ab"):
    found = edits.random_like({"w": lora}, 0, fields)["w"]
    for name in "ab":
      drawn, given = getattr(found, name), getattr(lora, name)
      assert bool((drawn == given).all()) == (name not in fields)
    norms = [np.linalg.norm(jlora.loras.dense(x)) for x in (found, lora)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_figures_of_nothing_are_the_base_and_the_score_is_a_mean():
  m, held = model()
  (row,) = Measure(m, held, 96)([facts.FACTS[0]], {})
  assert row["kl"] == pytest.approx(0, abs=1e-6)
  assert row["norm"] == 0
  # All bytes of answers begin with a space: one and the same probability.
  assert row["new"] == row["old"] < 0.1
  base = {"right": 0.5}
  best = {"new": 1.0, "asked_new": 1.0, "right": 0.9}
  assert harmonic(best, base) == pytest.approx(1.0)
  assert harmonic(best | {"new": 0.0}, base) < 1e-6


def test_an_edit_survives_its_folder(tmp_path):
  m, _ = model()
  base = models.save(tmp_path / "base", m.params, TINY)
  fit = edits.fit_through_weights(m, FACT, 0, ridge=0.0, steps=2)
  loras = edits.one_key(m, fit, 0, ridge=0.0)
  assert save(tmp_path / "adapter", loras, base) == 0


def test_moments_are_kept(tmp_path):
  m, held = model()
  options = {"rows": 4, "names": ("pydoc",), "cache": None}
  file = tmp_path / "moments.npz"
  np.savez(file, held=held, **{"layers|0|w": np.eye(2, dtype=np.float32)})
  found = key_moments(m.apply, m.params, encode_bytes, file=file, **options)
  assert found[0]["layers/0/w"].dtype == np.float64
  np.testing.assert_array_equal(found[1], held)


def test_no_neighbour_is_right_with_a_new_answer():
  """An edit that is said of it as well would pass for one that is not."""
  wanted = {fact.new for fact in (*facts.FACTS, *facts.TRIALS)}
  assert not wanted & {right for _, right in facts.NEIGHBOURS}


def test_facts_name_their_subject():
  for fact in (*facts.FACTS, *facts.TRIALS):
    for text in (fact.prompt, *fact.paraphrases):
      assert fact.subject in text
    assert len(fact.paraphrases) >= 4
    assert fact.new != fact.old
  assert not {f.prompt for f in facts.FACTS} & {f.prompt for f in facts.TRIALS}
  with pytest.raises(ValueError, match="'Bob' does not end with a token"):
    facts.encode_prompts([("Ann is", "", "Bob")], encode_bytes, 8)
