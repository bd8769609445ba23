# SPDX-License-Identifier: Apache-2.0
"""Selections without replacement: probabilities, and layers that use them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlora.adapting.binding import bind
from jlora.adapting.programs import Gated
from jlora.adapting.transforms import adapt, lora_dot
from jlora.loras import Lora
from jlora.routing.choices import by_sequence, by_token
from jlora.routing.policy_gradients import with_mask
from jlora.routing.selections import draw, effective, gate, log_prob, routed
from jlora.training.inits import by_root

Q = np.array([0.5, 0.3, 0.2])
LOGITS = jnp.asarray(np.log(Q), jnp.float32)
ORDERS = list(itertools.permutations(range(3), 2))
ORDERED = [0.3, 0.2, 0.214286, 0.085714, 0.125, 0.075]
SETS = {(0, 1): 0.514286, (0, 2): 0.325, (1, 2): 0.160714}
N, R, IN, OUT = 4, 2, 6, 5


def numbers(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def bank_of(n=N, r=R, lead=(), width=IN, out=OUT):
  return Lora(
    numbers(0, n, *lead, r, width), numbers(1, n, *lead, r, out),
    jnp.ones((n, *lead)),
  )  # fmt: skip


def probabilities(q, k):
  """{order: probability} by the definition, in float64."""
  found = {}
  for order in itertools.permutations(range(len(q)), k):
    p, used = 1.0, 0.0
    for i in order:
      p *= q[i] / (1 - used)
      used += q[i]
    found[order] = p
  return found


# Conformance 1.


def test_probabilities_of_draws_and_sets():
  found = jnp.exp(
    jax.vmap(functools.partial(log_prob, LOGITS))(jnp.array(ORDERS))
  )
  np.testing.assert_allclose(found, ORDERED, atol=1e-6)
  for own, p in SETS.items():
    for order in (own, own[::-1]):
      both = jnp.exp(log_prob(LOGITS, jnp.array(order), ordered=False))
      np.testing.assert_allclose(both, p, atol=1e-6)


def test_draws_have_their_probabilities():
  count = 200_000
  wide = jnp.broadcast_to(LOGITS, (count, 3))
  ids = np.asarray(jax.jit(draw, static_argnums=2)(
    jax.random.key(0), wide, 2
  ).ids)  # fmt: skip
  for order, p in zip(ORDERS, ORDERED, strict=True):
    share = np.mean((ids == order).all(axis=1))
    assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / count)
  for i, p in enumerate([0.839286, 0.675, 0.485714]):
    share = np.mean((ids == i).any(axis=1))
    assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize(("n", "k"), [(3, 2), (4, 2), (6, 3), (5, 4), (4, 4)])
def test_probabilities_sum_to_one_and_are_those_of_the_definition(n, k):
  logits = numbers(n, n)
  exact = probabilities(np.float64(jax.nn.softmax(logits)), k)
  ids = jnp.array(list(exact))
  found = jnp.exp(jax.vmap(functools.partial(log_prob, logits))(ids))
  np.testing.assert_allclose(found, [*exact.values()], rtol=2e-5)
  np.testing.assert_allclose(found.sum(), 1, rtol=1e-5)
  alone = sorted({tuple(sorted(order)) for order in exact})
  sets = jax.vmap(functools.partial(log_prob, logits, ordered=False))
  np.testing.assert_allclose(
    jnp.exp(sets(jnp.array(alone))).sum(), 1, rtol=1e-5
  )


# Conformance 4.


@pytest.mark.parametrize("ordered", [True, False])
def test_gradients_sum_to_zero(ordered):
  logits = numbers(3, 6)
  for ids in ([0, 3, 5], [2, 1, 0]):
    slope = jax.grad(functools.partial(log_prob, ordered=ordered))(
      logits, jnp.array(ids)
    )
    np.testing.assert_allclose(slope.sum(), 0, atol=1e-6)
    assert np.abs(slope).max() > 0.05


def test_adapters_that_are_off_are_never_drawn():
  logits = jnp.array([0.0, -jnp.inf, 1.0, 0.5])
  ids = draw(jax.random.key(1), jnp.broadcast_to(logits, (999, 4)), 3).ids
  assert not (ids == 1).any()
  assert log_prob(logits, jnp.array([0, 1])) == -jnp.inf
  assert log_prob(logits, jnp.array([0, 0])) == -jnp.inf
  assert log_prob(logits, jnp.array([0, 1]), ordered=False) == -jnp.inf
  rest = jnp.array([0.0, 1.0, 0.5])
  np.testing.assert_allclose(
    log_prob(logits, jnp.array([2, 3])), log_prob(rest, jnp.array([1, 2])),
    rtol=1e-6,
  )  # fmt: skip
  for ids in ([2, 3], [0, 1], [2, 3, 0]):
    slope = jax.grad(log_prob)(logits, jnp.array(ids))
    assert np.isfinite(slope).all()
    assert slope[1] == float(1 in ids)
  with pytest.raises(ValueError, match="where 3 are left"):
    draw(jax.random.key(0), logits, 4)


def test_extreme_and_half_precision_logits():
  logits = jnp.array([200.0, 0.0, -200.0])
  assert log_prob(logits, jnp.array([0, 1])) == 0
  np.testing.assert_allclose(log_prob(logits, jnp.array([0, 2])), -200)
  half = log_prob(LOGITS.astype(jnp.bfloat16), jnp.array([0, 1]))
  assert half.dtype == jnp.float32
  assert draw(jax.random.key(0), LOGITS.astype(jnp.bfloat16), 2).ids.shape == (
    2,
  )


def test_what_is_out_of_range_is_refused():
  with pytest.raises(ValueError, match="chosen is 4; of 3"):
    draw(jax.random.key(0), LOGITS, 4)
  with pytest.raises(ValueError, match="A set of 5 has 120 orders"):
    log_prob(jnp.zeros(6), jnp.arange(5), ordered=False)
  with pytest.raises(ValueError, match="same axes"):
    log_prob(jnp.zeros((2, 3)), jnp.zeros(2, int))
  with pytest.raises(ValueError, match="make_bank"):
    routed(Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones(())), chosen=1)
  with pytest.raises(
    ValueError, match=r"rows are \(2, 2\), needed is \(4, 6\)"
  ):
    routed(bank_of(), jnp.zeros((2, 2)), chosen=1)


def test_gates_and_the_effective_number():
  ids = jnp.array([[2, 0], [1, 3]])
  found = gate(ids, 4, 3, 0.5)
  assert found.shape == (2, 12)
  assert found[0].tolist() == [0.5] * 3 + [0.0] * 3 + [0.5] * 3 + [0.0] * 3
  assert gate(jnp.array([1, 0]), 2, 1, jnp.array([3.0, 4.0])).tolist() == [4, 3]
  assert effective(found).tolist() == [6.0, 6.0]
  assert effective(jnp.zeros(3)) == 0
  rng = np.random.default_rng(0)
  pi = rng.dirichlet(np.ones(8), 5)
  np.testing.assert_allclose(
    effective(jnp.asarray(7 * pi, jnp.float32)), 1 / (pi**2).sum(1), rtol=1e-5
  )


def y_of(program, x, w=None, mask=None):
  w = jnp.zeros((IN, OUT)) if w is None else w
  programs = {"w": program}
  if mask is not None:
    programs = with_mask(programs, mask)
  run = adapt(lambda p, x: x @ p["w"], strict=True, has_notes=True)
  return run(bind({"w": w}, programs), x)


def test_a_routed_layer_is_lora_dot_with_a_gate():
  x, w = numbers(4, 7, IN), numbers(5, IN, OUT)
  program = routed(bank_of(), numbers(6, N, IN), chosen=2, scaling=by_root)
  y, notes = y_of(program, x, w)
  weight = 2 / np.sqrt(2 * R)
  ids = lax.top_k(x @ program.params["rows"].T, 2)[1]
  one = Lora(
    program.bank.a.reshape(-1, IN), program.bank.b.reshape(-1, OUT),
    jnp.float32(1),
  )  # fmt: skip
  wanted = lora_dot(x, w, one, gate(ids, N, R, weight))
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
  assert (notes["w"][0].ids == ids).all()
  # As many are active as are chosen, whatever the router says.
  np.testing.assert_allclose(effective(gate(ids, N, 1, weight)), 2, rtol=1e-6)


def test_sequences_select_once_and_tokens_each():
  x = numbers(4, 3, 5, IN)
  rows = numbers(6, N, IN)
  y, notes = y_of(routed(bank_of(), rows, chosen=2), x)
  ids = lax.top_k(x.mean(1) @ rows.T, 2)[1]
  assert notes["w"][0].ids[:, 0].tolist() == ids.tolist()
  for i in range(3):
    alone = y_of(routed(bank_of(), rows, chosen=2), x[i : i + 1])[0]
    np.testing.assert_allclose(y[i], alone[0], rtol=1e-4, atol=1e-5)
  y, notes = y_of(routed(bank_of(), rows, chosen=2, reads=by_token), x)
  assert notes["w"][0].ids.shape == (3, 5, 2)
  assert notes["w"][0].log_prob.shape == (3,)
  wanted = log_prob(x @ rows.T, notes["w"][0].ids)
  np.testing.assert_allclose(notes["w"][0].log_prob, wanted.sum(1), rtol=1e-5)


def test_tokens_of_padding_do_not_count():
  x, rows = numbers(4, 2, 5, IN), numbers(6, N, IN)
  mask = jnp.arange(5)[None] < jnp.array([[3], [5]])
  for reads in (by_sequence, by_token):
    program = routed(bank_of(), rows, chosen=2, reads=reads)
    y, notes = y_of(program, x, mask=mask)
    short, own = y_of(program, x[:1, :3])
    np.testing.assert_allclose(y[:1, :3], short, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      notes["w"][0].log_prob[0], own["w"][0].log_prob[0], rtol=1e-5
    )
  assert (by_sequence(x, jnp.zeros((2, 5), bool)) == 0).all()
  with pytest.raises(ValueError, match=r"mask is \(2, 4\)"):
    y_of(program_by(by_sequence, rows), x, mask=mask[:, :4])


def program_by(reads, rows):
  return routed(bank_of(), rows, chosen=2, reads=reads)


# Conformance 5, 6 and 7.


def test_all_chosen_is_a_sum_of_all_and_permuting_changes_nothing():
  x, w = numbers(4, 7, IN), numbers(5, IN, OUT)
  bank, rows = bank_of(), numbers(6, N, IN)
  y, _ = y_of(routed(bank, rows, chosen=N), x, w)
  every = {"w": dataclasses.replace(bank, scale=bank.scale * 2 / (N * R))}
  fixed = Gated(every["w"], jnp.ones(N), lambda p, x: p)
  wanted, _ = y_of(fixed, x, w)
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)

  order = jnp.array([2, 0, 3, 1])
  y, _ = y_of(routed(bank, rows, chosen=2), x, w)
  mixed = jax.tree.map(lambda leaf: leaf[order], bank)
  again, _ = y_of(routed(mixed, rows[order], chosen=2), x, w)
  np.testing.assert_allclose(y, again, rtol=1e-4, atol=1e-5)

  turn = numbers(7, N, R, R) + 2 * jnp.eye(R)[None]
  turned = dataclasses.replace(
    bank, a=turn @ bank.a,
    b=jnp.linalg.inv(turn).swapaxes(1, 2) @ bank.b,
  )  # fmt: skip
  again, _ = y_of(routed(turned, rows, chosen=2), x, w)
  np.testing.assert_allclose(y, again, rtol=1e-3, atol=1e-4)


def test_equal_logits_take_the_first():
  _, notes = y_of(routed(bank_of(), chosen=2), numbers(4, 3, IN))
  assert notes["w"][0].ids.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(("n", "k", "less"), [(3, 2, 0.9), (8, 4, 0.95)])
def test_sets_have_less_variance(n, k, less):
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.standard_normal(n), jnp.float32)
  orders = list(itertools.permutations(range(n), k))
  value = {own: rng.normal() + 3 for own in
           itertools.combinations(range(n), k)}  # fmt: skip
  losses = np.array([value[tuple(sorted(o))] for o in orders])
  p = np.exp(jax.vmap(functools.partial(log_prob, logits))(jnp.array(orders)))
  p = np.float64(p) / np.float64(p).sum()
  picked = rng.choice(len(orders), (4000, 2), p=p)
  spread = []
  for ordered in (True, False):
    slope = jax.jit(jax.vmap(
      jax.grad(functools.partial(log_prob, ordered=ordered)), (None, 0)
    ))  # fmt: skip
    slopes = np.asarray(slope(logits, jnp.array(orders)))[picked]
    found = losses[picked]
    found = (found - found.mean(1, keepdims=True))[..., None] * slopes
    spread.append(found.sum(1).var(0).sum())
  assert spread[1] < less * spread[0]
