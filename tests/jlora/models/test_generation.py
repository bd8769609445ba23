# SPDX-License-Identifier: Apache-2.0
"""Generated tokens: greedy against recomputation, samples by their law."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jlora
from jlora import models
from jlora.loras import Lora
from jlora.models import networks
from tests.helpers import tiny_models

PROMPTS = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, (3, 7))
STEPS = 9


def _recomputed(apply, params, steps=STEPS):
  """Greedy tokens without a cache: the whole text again at each step."""
  length = PROMPTS.shape[1] + steps
  texts = np.zeros((len(PROMPTS), length), np.int32)
  texts[:, : PROMPTS.shape[1]] = PROMPTS
  apply = jax.jit(apply)
  for at in range(PROMPTS.shape[1], length):
    # What lies ahead is not seen, so one shape serves every step.
    texts[:, at] = apply(params, jnp.asarray(texts))[:, at - 1].argmax(-1)
  return texts[:, PROMPTS.shape[1] :]


@pytest.mark.parametrize(
  "case", ["llama-tied", "mistral-window", "mixtral", "qwen3", "gpt2"]
)
def test_greedy_is_recomputation_and_transformers(case):
  reference, apply, params = tiny_models.load_model(case)
  found = models.generate(apply, params, PROMPTS, STEPS)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, _recomputed(apply, params))
  prompts = torch.from_numpy(PROMPTS)
  theirs = reference.generate(
    prompts,
    attention_mask=torch.ones_like(prompts),
    max_new_tokens=STEPS,
    do_sample=False,
    pad_token_id=0,
  )
  np.testing.assert_array_equal(found, theirs[:, PROMPTS.shape[1] :])


@pytest.mark.parametrize("case", ["mistral-window", "gpt2"])
def test_prompts_of_unequal_length_say_what_each_says_alone(case):
  _, apply, params = tiny_models.load_model(case)
  lengths = np.array([7, 1, 4])
  prompts = np.where(np.arange(7) < lengths[:, None], PROMPTS, 11)
  found = models.generate(apply, params, prompts, STEPS, lengths=lengths)
  for row, length in enumerate(lengths):
    prompt = prompts[row : row + 1, :length]
    alone = models.generate(apply, params, prompt, STEPS)
    np.testing.assert_array_equal(found[row : row + 1], alone)
  # What fills the rows is not read.
  filled = np.where(np.arange(7) < lengths[:, None], PROMPTS, 23)
  again = models.generate(apply, params, filled, STEPS, lengths=lengths)
  np.testing.assert_array_equal(found, again)


WORDS = 5


@pytest.fixture(scope="module")
def small():
  """A random model of five words."""
  sizes = {"vocab_size": WORDS, "num_hidden_layers": 1, "model_type": "llama"}
  apply, params = models.init(tiny_models.LLAMA | sizes, jax.random.key(3))
  return apply, jax.tree.map(lambda leaf: 2 * leaf, params)


def test_samples_follow_the_model(small):
  """Of two tokens at temperature 1.5, every pair as often as it should be."""
  apply, params = small
  rows = 20_000
  prompts = jnp.full((rows, 1), 3, jnp.int32)
  found = models.generate(apply, params, prompts, 2, temperature=1.5)
  counts = np.zeros((5, 5))
  np.add.at(counts, tuple(np.asarray(found).T), 1)
  pairs = np.array([[3, token] for token in range(5)])
  logits = apply(params, jnp.asarray(pairs, jnp.int32)) / 1.5
  first, second = jax.nn.softmax(logits[0, 0]), jax.nn.softmax(logits[:, 1])
  expected = np.asarray(first[:, None] * second)
  assert expected.max() > 1.5 / 25
  deviation = np.sqrt(expected * (1 - expected) / rows)
  assert (abs(counts / rows - expected) < 4.5 * deviation).all()


def test_samples_are_those_of_the_key(small):
  apply, params = small
  prompts = jnp.zeros((2, 3), jnp.int32)
  first, again, other, zero, default = (
    models.generate(apply, params, prompts, 20, key=key, temperature=1.0)
    for key in (*map(jax.random.key, (1, 1, 2, 0)), None)
  )
  np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(zero, default)
  assert (first != other).any()
  assert (first[0] != first[1]).any()  # equal prompts, samples of their own
  cold = models.generate(apply, params, prompts, 20, temperature=1e-4)
  greedy = models.generate(apply, params, prompts, 20)
  np.testing.assert_array_equal(cold, greedy)


def test_one_step_reads_only_the_prompt(small):
  apply, params = small
  prompts = jnp.asarray(PROMPTS % 5, jnp.int32)
  found = models.generate(apply, params, prompts, 1)
  wanted = apply(params, prompts)[:, -1:].argmax(-1)
  np.testing.assert_array_equal(found, wanted)


def test_adapted_parameters_are_not_compiled_again(key, monkeypatch):
  _, apply, params = tiny_models.load_model("llama-biases")
  traces = []
  extend = networks.Model.extend
  monkeypatch.setattr(
    networks.Model,
    "extend",
    lambda *args: traces.append(1) or extend(*args),
  )
  base = models.generate(apply, params, PROMPTS, STEPS)
  assert len(traces) == 2  # the prompt and the step
  loras = {
    f"layers/{layer}/attn/{name}/kernel": Lora(
      jax.random.normal(key, (2, 32)) / 8,
      jax.random.normal(key, (2, 32)) / 8,
      jnp.float32(1),
    )
    for layer, name in itertools.product(range(2), ("q", "o"))
  }
  adapted = jlora.apply(params, loras)
  found = models.generate(apply, adapted, PROMPTS, STEPS)
  assert len(traces) == 2
  assert (found != base).any()
  np.testing.assert_array_equal(found, _recomputed(apply, adapted))
  for temperature in (0.5, 2.0):
    models.generate(apply, adapted, PROMPTS, STEPS, temperature=temperature)
  assert len(traces) == 4


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"steps": 0}, "steps must be at least 1"),
    ({"temperature": -1.0}, "temperature at least 0; got 3 and -1"),
    ({"temperature": float("nan")}, "and nan"),
    ({"tokens": jnp.zeros((2, 0), jnp.int32)}, r"shape \(2, 0\)"),
    ({"tokens": jnp.zeros(3, jnp.int32)}, r"shape \(3,\)"),
    ({"tokens": jnp.zeros((1, 2))}, "prompts are integers, got float32"),
    ({"lengths": [1, 2]}, r"lengths are \(1,\) integers.*int64 \(2,\)"),
    ({"lengths": [1.0]}, r"one a prompt, got float64"),
    ({"lengths": [3]}, "1 lengths are not from 1 to 2: 3 of prompt 0"),
    ({"lengths": [0]}, "0 of prompt 0"),
  ],
)
def test_impossible_requests_are_refused(small, change, message):
  request = {"tokens": jnp.zeros((1, 2), jnp.int32), "steps": 3} | change
  with pytest.raises(ValueError, match=message):
    models.generate(*small, **request)


def test_gpt2_says_no_more_than_it_has_positions():
  _, apply, params = tiny_models.load_model("gpt2")
  with pytest.raises(ValueError, match="41 positions are more than the 40"):
    models.generate(apply, params, PROMPTS, 35)
  # The last token is said, not read.
  assert models.generate(apply, params, PROMPTS, 34).shape == (3, 34)
