# SPDX-License-Identifier: Apache-2.0
"""One batch, an adapter of its own for each row; and decoding with adapters."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import models
from jlora.adapting.banks import make_bank
from jlora.adapting.binding import bind
from jlora.adapting.transforms import adapt, adapt_rows, apply
from jlora.loras import Lora
from tests.jlora.adapting.test_models import CONFIGS, TOKENS, loras_for

KEY = jax.random.key(0)
COUNT = 3
IDS = jnp.array([2, -1, 0, 2])
ROWS = jax.random.randint(jax.random.key(1), (4, 7), 0, 23)


@functools.cache
def small():
  """A model, adapters of ranks 1, 2 and 4, the second with fewer modules."""
  run, params = models.init(CONFIGS["llama, tied"], KEY)
  adapters = [loras_for(params, 10 * i, 2**i) for i in range(COUNT)]
  adapters[1] = {p: x for p, x in adapters[1].items() if "attn" in p}
  return run, params, adapters


@functools.cache
def fast():
  """The model compiled once for rows alone and together."""
  return jax.jit(small()[0])


def test_rows_are_as_in_runs_of_their_own():
  run, params, adapters = small()
  found = jax.jit(adapt_rows(run))(params, make_bank(adapters), IDS, ROWS)
  for row, at in enumerate(IDS.tolist()):
    own = params if at < 0 else apply(params, adapters[at])
    alone = fast()(own, ROWS[row : row + 1])[0]
    np.testing.assert_allclose(found[row], alone, rtol=1e-3, atol=2e-5)


def test_no_adapter_is_the_base_bit_by_bit():
  run, params, adapters = small()
  bank = make_bank(adapters)
  rows = jax.jit(adapt_rows(run))
  base = np.asarray(fast()(params, ROWS))
  none = np.asarray(rows(params, bank, jnp.full_like(IDS, -1), ROWS))
  assert none.tobytes() == base.tobytes()
  found = np.asarray(rows(params, bank, IDS, ROWS))
  assert found[1].tobytes() == base[1].tobytes()
  assert found[0].tobytes() != base[0].tobytes()


def test_several_for_a_row_with_weights():
  run, params, adapters = small()
  ids = jnp.array([[0, 2], [1, -1], [-1, -1], [2, 1]])
  weights = jnp.array([[0.5, 2.0], [1.0, 7.0], [1.0, 1.0], [-1.0, 0.25]])
  found = jax.jit(adapt_rows(run))(
    params, make_bank(adapters), ids, ROWS, weights=weights
  )
  for row in range(4):
    used = [
      (i, w) for i, w in zip(ids[row], weights[row], strict=True) if i >= 0
    ]
    merged = apply(params, [adapters[i] for i, _ in used], [w for _, w in used])
    alone = fast()(merged, ROWS[row : row + 1])[0]
    np.testing.assert_allclose(found[row], alone, rtol=1e-3, atol=5e-5)


def test_rows_are_differentiable():
  run, params, adapters = small()
  bank, ids = make_bank(adapters), IDS[:2]

  def loss(bank):
    return jnp.sum(jnp.sin(adapt_rows(run)(params, bank, ids, ROWS[:2])))

  def alone(bank):
    own = apply(params, jax.tree.map(lambda x: x[2], bank))
    return jnp.sum(jnp.sin(run(own, ROWS[:1])))

  found, wanted = (jax.jit(jax.grad(f))(bank) for f in (loss, alone))
  for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("ids", [[3, 0, 0, 0], [-2, 0, 0, 0]])
def test_ids_that_do_not_exist_are_refused(ids):
  run, params, adapters = small()
  with pytest.raises(ValueError, match=str(ids[0])):
    adapt_rows(run)(params, make_bank(adapters), jnp.array(ids), ROWS)


def test_nothing_is_compiled_again():
  """Another adapter of that shape, scale, set of ids, or rank in a bank."""
  chex.clear_trace_counter()
  run, params, adapters = small()

  @chex.assert_max_traces(n=1)
  def once(params, tokens):
    return run(params, tokens)

  bank = make_bank(adapters[:2], rank=4)
  other = make_bank([adapters[2], adapters[0]], rank=4)
  double = {p: Lora(x.a, x.b, 2 * x.scale) for p, x in bank.items()}
  rows = jax.jit(adapt_rows(once))
  outs = [
    rows(params, each, ids, ROWS)
    for each, ids in (
      (bank, IDS % 2), (other, IDS % 2), (double, IDS % 2), (bank, 1 - IDS % 2),
    )
  ]  # fmt: skip
  assert all(np.abs(outs[0] - out).max() > 1e-3 for out in outs[1:])


def test_decoding_with_adapters_compiles_once_and_agrees_with_merged():
  chex.clear_trace_counter()
  run, params, adapters = small()

  @chex.assert_max_traces(n=1)
  def decode(params, tokens):
    return models.generate(run, params, tokens, 6)

  decode_adapted = jax.jit(adapt(decode))
  swapped = {p: Lora(-x.a, x.b, x.scale) for p, x in adapters[2].items()}
  scaled = {p: Lora(x.a, x.b, 3 * x.scale) for p, x in adapters[2].items()}
  said = []
  for loras in (adapters[2], swapped, scaled):
    found = decode_adapted(bind(params, loras), TOKENS)
    wanted = models.generate(run, apply(params, loras), TOKENS, 6)
    np.testing.assert_array_equal(found, wanted)
    said.append(np.asarray(found))
  assert any(np.any(said[0] != other) for other in said[1:])


def test_rows_decode_with_their_own():
  run, params, adapters = small()
  decode = adapt_rows(lambda p, t: models.generate(run, p, t, 5))
  found = jax.jit(decode)(params, make_bank(adapters), IDS, ROWS)
  for row, at in enumerate(IDS.tolist()):
    own = params if at < 0 else apply(params, adapters[at])
    alone = models.generate(run, own, ROWS[row : row + 1], 5)[0]
    np.testing.assert_array_equal(found[row], alone)
