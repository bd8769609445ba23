# SPDX-License-Identifier: Apache-2.0
"""ReMix's policy gradient through `update`, by enumeration and by hand."""

import dataclasses
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.adapting.binding import bind
from jlora.adapting.transforms import adapt, lora_dot
from jlora.loras import Lora
from jlora.paths import key_for
from jlora.routing.policy_gradients import remix, surrogate
from jlora.routing.selections import Selection, draw, gate, log_prob, routed
from jlora.training.trainer import train
from tests.jlora.routing.test_selections import (
  IN,
  LOGITS,
  ORDERS,
  OUT,
  N,
  Q,
  R,
  bank_of,
  numbers,
  probabilities,
)


@pytest.fixture(autouse=True)
def standard_promotion():
  """Optax counts in int32 and multiplies by floats."""
  with jax.numpy_dtype_promotion("standard"):
    yield


LOSSES = np.array([1.0, 2, 4, 8, 3, 5])
GRADIENT = [-1.135077, 0.618750, 0.516327]

# Conformance 2, 3 and 9: the estimator by enumeration, through `update`.


def by_order():
  """A layer that writes which adapters were drawn, in which order.

  Adapter i writes e_i, times 1 at the first place of the draw and 2 at the
  second; so the loss can be any table of ordered draws.
  """
  bank = Lora(jnp.ones((3, 1, 1)), jnp.eye(3)[:, None, :], jnp.ones(3))
  rows = LOGITS[:, None]
  return routed(bank, rows, chosen=2, scaling=lambda *_: (1.0, 2.0))


def loss_of(table):
  """(params, x (B, 1)) -> (B,): the table's entry of what was drawn."""
  codes = np.zeros((6, 3), np.float32)
  for i, (first, second) in enumerate(ORDERS):
    codes[i, first], codes[i, second] = 1, 2

  def loss(params, x):
    y = lax.stop_gradient(x @ params["w"])
    is_one = (jnp.abs(y[:, None] - codes[None]) < 1e-3).all(-1)
    return is_one.astype(jnp.float32) @ jnp.asarray(table, jnp.float32)

  return loss


def forced(key, orders):
  """A `draw` whose two samples are given, found by the keys of `update`."""
  keys = jax.vmap(lambda k: key_for(k, "w"))(jax.random.split(key, len(orders)))
  known = jax.random.key_data(keys)

  def draw(key, logits, chosen):
    own = (jax.random.key_data(key)[None] == known).all(-1)
    ids = own.astype(jnp.int32) @ jnp.asarray(orders, jnp.int32)
    return Selection(jnp.broadcast_to(ids, (*logits.shape[:-1], chosen)), None)

  return draw


def expectation(table, log_prob=log_prob, samples=2):
  """-E[what SGD of rate 1 adds to P], over all draws, by `update` itself."""
  key, program = jax.random.key(5), by_order()
  exact = np.float64([*probabilities(Q, 2).values()])

  def moved(orders):
    init, update = remix(
      loss_of(table), optax.sgd(0.0), optax.sgd(1.0), samples=samples,
      draw=forced(key, orders), log_prob=log_prob,
    )  # fmt: skip
    programs = {"w": program}
    found, *_ = update(
      programs, init(programs), {"w": jnp.zeros((1, 3))}, jnp.ones((1, 1)),
      key=key,
    )  # fmt: skip
    return program.params["rows"] - found["w"].params["rows"]

  moved = jax.jit(moved)
  total = np.zeros(3)
  for many in itertools.product(range(6), repeat=samples):
    step = moved(jnp.array([ORDERS[i] for i in many]))
    total += np.prod(exact[list(many)]) * np.float64(step[:, 0])
  return total


def test_the_estimator_is_exact_through_update():
  np.testing.assert_allclose(expectation(LOSSES), GRADIENT, atol=1e-6)


def enumerated(table):
  """Σ p(order) L ∇ log p(order), by the definition in float64."""
  exact = probabilities(Q, 2)
  total = np.zeros(3)
  for p, value, order in zip(exact.values(), table, exact, strict=True):
    slope, left = np.zeros(3), np.ones(3)
    for i in order:
      slope += np.eye(3)[i] - left * Q / (left * Q).sum()
      left[i] = 0
    total += p * value * slope
  return total


def test_the_definition_itself():
  np.testing.assert_allclose(enumerated(LOSSES), GRADIENT, atol=1e-6)


def test_sets_are_exact_where_the_loss_is_of_sets():
  """Of draws in either order the loss is the same."""
  table = [1.0, 2.0, 1.0, 5.0, 2.0, 5.0]
  by_set = functools.partial(log_prob, ordered=False)
  np.testing.assert_allclose(
    expectation(table, by_set), enumerated(table), atol=1e-6
  )


def not_renormalised(logits, ids):
  """The wrong log Q: a product of q, as if with replacement."""
  return jnp.take_along_axis(jax.nn.log_softmax(logits), ids, axis=-1).sum(-1)


def test_a_product_that_is_not_renormalised_is_biased():
  found = expectation(LOSSES, not_renormalised)
  assert np.linalg.norm(found - GRADIENT) > 0.2


def with_own_sample(losses, log_q):
  """The wrong estimator: a baseline of all samples, divided by M."""
  losses = lax.stop_gradient(losses)
  return jnp.mean((losses - losses.mean(0)[None]) * log_q)


def test_a_baseline_of_all_samples_divided_by_m_is_biased():
  """It is (M-1)/M of the gradient: a half at two samples."""
  exact, total, right = probabilities(Q, 2), np.zeros(3), np.zeros(3)
  p = [*exact.values()]
  both = functools.partial(jnp.array, dtype=jnp.float32)
  slopes = jax.jit(lambda f, table, ids: jax.grad(lambda logits: f(
    table, jax.vmap(lambda own: log_prob(logits, own))(ids)[:, None]
  ))(LOGITS), static_argnums=0)  # fmt: skip
  ours = lambda losses, log_q: surrogate(losses, log_q)[0]  # noqa: E731
  for i, j in itertools.product(range(6), repeat=2):
    ids = jnp.array([ORDERS[i], ORDERS[j]])
    table = both([[LOSSES[i]], [LOSSES[j]]])
    total += p[i] * p[j] * np.float64(slopes(with_own_sample, table, ids))
    right += p[i] * p[j] * np.float64(slopes(ours, table, ids))
  np.testing.assert_allclose(right, GRADIENT, atol=1e-6)
  np.testing.assert_allclose(total, np.array(GRADIENT) / 2, atol=1e-6)
  assert np.linalg.norm(total - GRADIENT) > 0.2


def variance(slopes, p, losses, advantages):
  """E|g - E g|² of Σ_m advantages_m ∇ log Q_m over all pairs of draws.

  slopes (draws, n), p (draws,), losses (draws,), advantages of two losses.
  """
  first, second = np.meshgrid(losses, losses, indexing="ij")
  mine, other = advantages(jnp.float32([first.ravel(), second.ravel()]))
  weight = np.outer(p, p).ravel()
  i, j = (x.ravel() for x in np.indices(first.shape))
  found = np.float64(mine)[:, None] * slopes[i]
  found += np.float64(other)[:, None] * slopes[j]
  mean = weight @ found
  return mean, weight @ ((found - mean) ** 2).sum(1)


@pytest.mark.parametrize("seed", range(3))
def test_leaving_one_out_has_a_quarter_of_the_variance(seed):
  """Two samples of three of six adapters; losses N(3, 1), as in the spec."""
  rng = np.random.default_rng(seed)
  logits = rng.standard_normal(6)
  exact = probabilities(np.exp(logits) / np.exp(logits).sum(), 3)
  orders, p = jnp.array([*exact]), np.array([*exact.values()])
  of_set = {tuple(x): 3 + rng.standard_normal()
            for x in itertools.combinations(range(6), 3)}  # fmt: skip
  losses = np.array([of_set[tuple(sorted(x))] for x in exact])
  slopes = jax.vmap(lambda ids: jax.grad(log_prob)(jnp.float32(logits), ids))
  slopes = np.float64(slopes(orders))

  @jax.vmap
  def leave_one_out(pair):
    score = lambda log_q: surrogate(pair[:, None], log_q)[0]  # noqa: E731
    return jax.grad(score)(jnp.zeros((2, 1)))[:, 0]

  ours = lambda pairs: leave_one_out(pairs.T).T  # noqa: E731
  none = lambda pairs: pairs / 2  # noqa: E731
  mean, less = variance(slopes, p, losses, ours)
  other, more = variance(slopes, p, losses, none)
  wanted = (p * losses) @ slopes
  np.testing.assert_allclose(mean, wanted, atol=1e-5)
  np.testing.assert_allclose(other, wanted, atol=1e-5)
  assert 4 * less < more


def test_the_baseline_needs_no_communication():
  """With all samples of an example on one device, whatever the others do."""
  mesh = jax.make_mesh((8,), ("examples",))
  place = NamedSharding(mesh, P(None, "examples"))
  losses, log_q = (jax.device_put(numbers(i, 4, 16), place) for i in range(2))
  slope = jax.jit(jax.grad(lambda log_q, losses: surrogate(losses, log_q)[0]))
  text = slope.lower(log_q, losses).compile().as_text()
  assert not re.findall(r"all-\w+|collective-\w+|reduce-scatter", text)
  np.testing.assert_allclose(
    slope(log_q, losses), (losses - losses.mean(0)[None]) / 3 / 16, atol=1e-6
  )


def test_a_step_is_a_forward_and_a_backward_pass_for_each_sample():
  """Operations against those of plain `train`; of a loop, of one round."""
  width = 96
  bank = bank_of(width=width, out=width)
  programs = {path: routed(bank, chosen=2) for path in ("v", "w")}
  params = {path: numbers(5, width, width) for path in ("v", "w")}
  x, sgd = numbers(4, 64, width), optax.sgd(0.1)
  each = lambda p, x: jnp.sum(jnp.tanh(x @ p["v"]) @ p["w"], -1)  # noqa: E731
  plain = train(lambda p, x: each(p, x).mean(), sgd)
  ours = remix(each, sgd, sgd, samples=4)

  def operations(trainer, **key):
    step = jax.jit(trainer.update)
    lowered = step.lower(programs, trainer.init(programs), params, x, **key)
    return lowered.compile().cost_analysis()["flops"]

  count = operations(ours, key=jax.random.key(0)) / operations(plain)
  assert 0.5 < count < 1.05


@pytest.mark.parametrize("samples", [3, 4])
def test_a_constant_loss_moves_no_router_bit_by_bit(samples):
  bank, rows = bank_of(), numbers(6, N, IN)
  programs = {"w": routed(bank, rows, chosen=2)}
  loss = lambda p, x: 0 * (x @ p["w"]).sum(-1) + 0.3  # noqa: E731
  init, update = remix(loss, optax.sgd(1.0), optax.sgd(1.0), samples=samples)
  found, _, value = jax.jit(update)(
    programs, init(programs), {"w": jnp.zeros((IN, OUT))}, numbers(4, 7, IN),
    key=jax.random.key(0),
  )  # fmt: skip
  np.testing.assert_allclose(value, 0.3, rtol=1e-6)
  assert np.array_equal(found["w"].params["rows"], rows)


def test_all_chosen_moves_no_router():
  programs = {"w": routed(bank_of(), numbers(6, N, IN), chosen=N)}
  loss = lambda p, x: jnp.sum(jnp.sin(x @ p["w"]), -1)  # noqa: E731
  init, update = remix(loss, optax.sgd(1.0), optax.sgd(1.0))
  found, *_ = jax.jit(update)(
    programs, init(programs), {"w": jnp.zeros((IN, OUT))}, numbers(4, 7, IN),
    key=jax.random.key(0),
  )  # fmt: skip
  assert np.array_equal(found["w"].params["rows"], programs["w"].params["rows"])
  assert np.abs(found["w"].bank.a - programs["w"].bank.a).max() > 1e-3


# Conformance 8.


def test_factors_get_the_gradient_of_the_mean_over_held_selections():
  x, w, key = numbers(4, 7, IN), numbers(5, IN, OUT), jax.random.key(3)
  program = routed(bank_of(), numbers(6, N, IN), chosen=2)
  loss = lambda p, x: jnp.sum(jnp.sin(x @ p["w"]), -1)  # noqa: E731
  init, update = remix(loss, optax.sgd(1.0), optax.sgd(0.0), samples=3)
  programs = {"w": program}
  found, _, value = jax.jit(update)(
    programs, init(programs), {"w": w}, x, key=key
  )
  logits = x @ program.params["rows"].T
  held = [
    draw(key_for(own, "w"), logits, 2).ids for own in jax.random.split(key, 3)
  ]

  def mean(bank):
    one = Lora(bank.a.reshape(-1, IN), bank.b.reshape(-1, OUT), jnp.float32(1))
    ys = [lora_dot(x, w, one, gate(ids, N, R, 2 / (2 * R))) for ids in held]
    return sum(jnp.sum(jnp.sin(y), -1).mean() for y in ys) / 3

  wanted, slope = jax.value_and_grad(mean)(program.bank)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  for name in ("a", "b"):
    moved = getattr(program.bank, name) - getattr(found["w"].bank, name)
    np.testing.assert_allclose(
      moved, getattr(slope, name), rtol=1e-3, atol=1e-5
    )


def test_the_routers_gradient_by_hand_over_modules_layers_and_examples():
  """Two modules, one of them two scanned layers; log Q is their sum."""
  lead = (2,)
  programs = {
    "v": routed(bank_of(width=IN, out=IN), numbers(6, N, IN), chosen=2),
    "w": routed(
      bank_of(lead=lead, width=IN, out=IN), numbers(7, *lead, N, IN), chosen=1
    ),
  }
  params = {"v": numbers(8, IN, IN), "w": numbers(9, *lead, IN, IN)}
  x, key = numbers(4, 5, 3, IN), jax.random.key(2)

  def loss(p, x):
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return lax.scan(body, x @ p["v"], p["w"])[0].sum((1, 2))

  init, update = remix(loss, optax.sgd(0.0), optax.sgd(1.0), samples=3)
  found, *_ = jax.jit(update)(programs, init(programs), params, x, key=key)

  def one(rows, key):
    """The same network written out, with its log Q."""
    total, h = 0.0, x
    keys = {
      "v": key_for(key, "v"), "w": jax.random.split(key_for(key, "w"), lead)
    }  # fmt: skip
    layers = [("v", None), ("w", 0), ("w", 1)]
    for path, at in layers:
      pick = lambda t, at=at: t if at is None else t[at]  # noqa: E731
      program = programs[path]
      bank = jax.tree.map(lambda t, at=at: t if at is None else t[:, at],
                          program.bank)  # fmt: skip
      chosen = program.gate.chosen
      logits = lax.stop_gradient(h).mean(1) @ pick(rows[path]).T
      ids = draw(pick(keys[path]), logits[:, None], chosen).ids[:, 0]
      total = total + log_prob(logits, ids)
      flat = Lora(bank.a.reshape(-1, IN), bank.b.reshape(-1, IN),
                  jnp.float32(1))  # fmt: skip
      gates = gate(ids, N, R, 2 / (chosen * R))[:, None]
      h = lora_dot(h, pick(params[path]), flat, gates)
      h = h if at is None else jnp.tanh(h)
    return h.sum((1, 2)), total

  def total(rows):
    losses, scores = zip(
      *[one(rows, own) for own in jax.random.split(key, 3)], strict=True
    )
    losses, scores = lax.stop_gradient(jnp.stack(losses)), jnp.stack(scores)
    return jnp.mean(((losses - losses.mean(0)[None]) / 2 * scores).sum(0))

  rows = {path: program.params["rows"] for path, program in programs.items()}
  for path, slope in jax.jit(jax.grad(total))(rows).items():
    moved = rows[path] - found[path].params["rows"]
    np.testing.assert_allclose(moved, slope, rtol=2e-3, atol=1e-5)
    assert np.abs(slope).max() > 1e-3


def test_examples_that_do_not_count():
  x, w = numbers(4, 4, IN), numbers(5, IN, OUT)
  programs = {"w": routed(bank_of(), numbers(6, N, IN), chosen=2)}

  def loss(p, x, valid):
    each = jnp.sum(jnp.sin(x @ p["w"]), -1)
    return jnp.where(valid, each, jnp.nan)

  init, update = remix(loss, optax.sgd(1.0), optax.sgd(1.0))
  step = functools.partial(
    jax.jit(update), programs, init(programs), {"w": w}, key=jax.random.key(0)
  )
  valid = jnp.array([True, True, False, False])
  found, _, value = step(x, valid, valid=valid)
  other, _, same = step(x.at[2:].set(7.0), valid, valid=valid)
  assert np.isfinite(value)
  np.testing.assert_allclose(value, same, rtol=1e-6)
  chex.assert_trees_all_close(
    found["w"].params, other["w"].params, rtol=1e-5, atol=1e-6
  )
  assert np.isfinite(found["w"].params["rows"]).all()


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="samples is 1"):
    remix(lambda p: p, optax.sgd(1.0), optax.sgd(1.0), samples=1)
  programs = {"w": routed(bank_of(), chosen=2)}
  params, x = {"w": numbers(5, IN, OUT)}, numbers(4, 4, 3, IN)
  sgd = optax.sgd(1.0)
  key = jax.random.key(0)

  def step(loss, programs=programs, key=key):
    init, update = remix(loss, sgd, sgd)
    return update(programs, init(programs), params, x, key=key)

  with pytest.raises(ValueError, match=r"returned \(\)"):
    step(lambda p, x: (x @ p["w"]).sum())
  with pytest.raises(ValueError, match=r"w: \(12,\).*first axis"):
    step(lambda p, x: (x.reshape(-1, IN) @ p["w"]).reshape(4, -1).sum(-1))
  with pytest.raises(ValueError, match="does not multiply by: w"):
    step(lambda p, x: x.sum((1, 2)))
  with pytest.raises(ValueError, match="key="):
    step(lambda p, x: (x @ p["w"]).sum((1, 2)), key=None)
  plain = {"w": Lora(numbers(0, 2, IN), numbers(1, 2, OUT), jnp.float32(1))}
  with pytest.raises(ValueError, match="of w is routed"):
    step(lambda p, x: (x @ p["w"]).sum((1, 2)), plain)


def test_a_step_compiles_once_and_is_one_pass_for_each_sample():
  chex.clear_trace_counter()

  @chex.assert_max_traces(n=1)
  def loss(p, x):
    return jnp.sum(jnp.sin(x @ p["w"]), -1)

  programs = {"w": routed(bank_of(), chosen=2)}
  params, x = {"w": numbers(5, IN, OUT)}, numbers(4, 4, IN)
  init, update = remix(loss, optax.adam(1e-2), optax.adam(1e-2))
  state, step = init(programs), jax.jit(update)
  for i in range(3):
    key = jax.random.fold_in(jax.random.key(0), i)
    programs, state, _ = step(programs, state, params, x, key=key)


# What it is for.


def test_a_router_learns_which_adapters_a_regime_needs():
  """Six regimes, each a sum of two of four changes: spec's toy, smaller."""
  rng = np.random.default_rng(0)
  parts = rng.standard_normal((4, 8, 1)) @ rng.standard_normal((4, 1, 6)) / 3
  pairs = list(itertools.combinations(range(4), 2))

  def batch(size):
    regime = rng.integers(0, 6, size)
    x = rng.standard_normal((size, 8))
    y = np.stack(
      [
        x[i] @ (parts[pairs[c][0]] + parts[pairs[c][1]])
        for i, c in enumerate(regime)
      ]
    )
    mark = np.eye(6)[regime] * 3
    return jnp.float32(np.concatenate([x, mark], 1)), jnp.float32(y)

  def reads_mark(x, mask):
    del mask
    return x[..., 8:]

  bank = Lora(
    jnp.float32(rng.standard_normal((6, 1, 14)) / 3).at[..., 8:].set(0),
    jnp.zeros((6, 1, 6)), jnp.ones(6),
  )  # fmt: skip
  program = dataclasses.replace(
    routed(bank, chosen=2, reads=reads_mark), params={"rows": jnp.zeros((6, 6))}
  )
  loss = lambda p, x, y: jnp.mean((x @ p["w"] - y) ** 2, -1)  # noqa: E731
  params = {"w": jnp.zeros((14, 6))}
  batches = [batch(64) for _ in range(1200)]
  x, y = batch(512)

  def final(router_rate):
    rate = optax.cosine_decay_schedule(3e-2, len(batches))
    slow = optax.cosine_decay_schedule(router_rate, len(batches))
    init, update = remix(loss, optax.adam(rate), optax.adam(slow))
    programs = {"w": program}
    state, step = init(programs), jax.jit(update, donate_argnums=1)
    for i, own in enumerate(batches):
      key = jax.random.fold_in(jax.random.key(7), i)
      programs, state, _ = step(programs, state, params, *own, key=key)
    best = adapt(loss)(bind(params, programs), x, y).mean()
    return float(best / jnp.mean(y**2))

  learned, frozen = final(3e-2), final(0.0)
  assert learned < 0.1
  assert frozen > 3 * learned


def test_plain_train_takes_a_routed_program_too():
  """With the selections of the k largest: the router then has no gradient."""
  programs = {"w": routed(bank_of(), numbers(6, N, IN), chosen=2)}
  loss = lambda p, x: jnp.mean((x @ p["w"]) ** 2)  # noqa: E731
  init, update = train(loss, optax.sgd(0.1))
  found, *_ = update(
    programs, init(programs), {"w": jnp.zeros((IN, OUT))}, numbers(4, 7, IN)
  )
  assert np.array_equal(found["w"].params["rows"], programs["w"].params["rows"])
  assert not np.array_equal(found["w"].bank.b, programs["w"].bank.b)
