# SPDX-License-Identifier: Apache-2.0
"""Steps of an adapter: its numbers, its bytes, and what may not move."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.adapting.programs import Branch, Rows, Shift
from jlora.adapting.transforms import apply
from jlora.loras import Lora
from jlora.training.inits import init_lora
from jlora.training.trainer import (
  beside,
  lora_plus,
  summed,
  train,
  trained_part,
  with_part,
)

ROUTES = pytest.mark.parametrize("through", [beside, summed])


@pytest.fixture(autouse=True)
def standard_promotion():
  """Optax counts in int32 and multiplies by floats."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def draw(key):
  rng = np.random.default_rng(np.array(jax.random.key_data(key)))

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  params = {
    "up": {"kernel": normal(6, 10), "bias": jnp.zeros(10)},
    "down": {"kernel": normal(10, 4)},
  }
  scale = jnp.float32(2)
  loras = {
    "up/kernel": Lora(normal(2, 6) / 4, normal(2, 10) / 4, scale),
    "down/kernel": Lora(normal(2, 10) / 4, normal(2, 4) / 4, scale),
  }
  return params, loras


def model(params, x):
  hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
  return hidden @ params["down"]["kernel"]


def loss(params, x, y):
  return jnp.mean((model(params, x) - y) ** 2)


@pytest.fixture
def batch(key):
  one, two = jax.random.split(jax.random.fold_in(key, 1))
  return jax.random.normal(one, (8, 6)), jax.random.normal(two, (8, 4))


@ROUTES
def test_the_first_gradient_is_the_papers(through):
  """W = I, A = [[1, 2]], B = 0, s = 2, x = (1, 1), t = (2, 0)."""
  lora = Lora(jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)), jnp.float32(2))

  def half_square(params, x, t):
    return 0.5 * jnp.sum((x @ params["w"] - t) ** 2)

  x, t = jnp.array([[1.0, 1.0]]), jnp.array([[2.0, 0.0]])
  init, update = train(half_square, optax.sgd(1.0), through=through)
  programs = {"w": lora}
  state = init(programs)
  moved, _, value = update(programs, state, {"w": jnp.eye(2)}, x, t)
  assert value == 1
  np.testing.assert_array_equal(moved["w"].b, [[6, -6]])  # minus (-6, 6)
  np.testing.assert_array_equal(moved["w"].a, lora.a)
  assert moved["w"].scale == 2


def test_merged_is_the_papers():
  lora = Lora(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 3.0]]), jnp.float32(2))
  merged = apply({"w": jnp.eye(2)}, {"w": lora})["w"]
  np.testing.assert_array_equal(merged.T, [[1, 0], [6, 13]])  # (out, in)


def test_both_routes_take_the_same_steps(key, batch):
  params, loras = draw(key)
  found = []
  for through in (beside, summed):
    init, update = train(loss, optax.adam(1e-2), through=through)
    programs, state, step = dict(loras), init(loras), jax.jit(update)
    for _ in range(5):
      programs, state, value = step(programs, state, params, *batch)
    found.append((programs, value))
  assert found[0][1] < loss(params, *batch)
  chex.assert_trees_all_close(*found, atol=2e-5)


def test_scales_and_base_stay_and_the_loss_falls(key, batch):
  params, loras = draw(key)
  before = jax.tree.map(np.array, params)
  init, update = train(loss, optax.chain(optax.adam(3e-2)))
  programs, state, step = dict(loras), init(loras), jax.jit(update)
  _, _, first = step(programs, state, params, *batch)
  for _ in range(60):
    programs, state, value = step(programs, state, params, *batch)
  assert value < 0.5 * first
  for path, lora in programs.items():
    assert lora.scale == loras[path].scale
    assert not np.array_equal(lora.a, loras[path].a)
  chex.assert_trees_all_equal(params, before)


@pytest.mark.parametrize("width", [64, 256])
def test_state_is_proportional_to_the_adapter(width):
  params = {str(i): jnp.zeros((width, width)) for i in range(3)}
  loras = init_lora(params, 4)
  init, _ = train(loss, optax.adamw(1e-3))
  size = sum(lora.nbytes for lora in loras.values())
  state = sum(leaf.nbytes for leaf in jax.tree.leaves(init(loras)))
  assert state == 2 * size + 4  # two moments and a count
  assert size == 3 * 4 * 2 * width * 4


def _bytes_made(function, *arguments):
  """All that a compiled step writes: temporaries and results."""
  found = jax.jit(function).lower(*arguments).compile().memory_analysis()
  return found.temp_size_in_bytes + found.output_size_in_bytes


def test_no_gradient_of_a_weight_is_held():
  """In the compiled step: full finetuning holds them, the adapter does not."""
  width, count = 256, 6
  params = {str(i): jnp.zeros((width, width)) for i in range(count)}

  def chain(params, x):
    for i in range(count):
      x = jnp.tanh(x @ params[str(i)])
    return jnp.mean(x**2)

  x = jnp.ones((4, width))
  loras, optimiser = init_lora(params, 4), optax.adam(1e-3)
  init, update = train(chain, optimiser)

  def full(params, state, x):
    gradient = jax.grad(chain)(params, x)
    change, state = optimiser.update(gradient, state)
    return change, state

  ours = _bytes_made(update, loras, init(loras), params, x)
  whole = _bytes_made(full, params, optimiser.init(params), x)
  weights = count * width * width * 4
  assert whole >= 3 * weights  # the change and two moments
  assert ours < weights / 4


@ROUTES
def test_accumulated_gradients_are_the_large_batchs(key, batch, through):
  params, loras = draw(key)
  optimiser = optax.adamw(1e-2)
  large = train(loss, optimiser, through=through)
  small = train(loss, optax.MultiSteps(optimiser, 4), through=through)
  expected, _, _ = jax.jit(large.update)(
    loras, large.init(loras), params, *batch
  )
  programs, state, step = dict(loras), small.init(loras), jax.jit(small.update)
  for at in range(0, 8, 2):
    chex.assert_trees_all_equal(programs, loras)
    part = [x[at : at + 2] for x in batch]
    programs, state, _ = step(programs, state, params, *part)
  chex.assert_trees_all_close(programs, expected, atol=1e-6)


def test_lora_plus_is_a_learning_rate_of_its_own(key, batch):
  params, loras = draw(key)
  ratio, schedule = 8.0, optax.linear_schedule(1e-2, 1e-3, 5)

  def rates(faster):
    return optax.adamw(lambda step: faster * schedule(step), weight_decay=0.1)

  one = optax.chain(rates(1.0), lora_plus(ratio))
  two = optax.partition(
    {"a": rates(1.0), "b": rates(ratio)},
    {path: {"a": "a", "b": "b"} for path in loras},
  )
  found = []
  for optimiser in (one, two):
    init, update = train(loss, optimiser)
    programs, state, step = dict(loras), init(loras), jax.jit(update)
    for _ in range(4):
      programs, state, _ = step(programs, state, params, *batch)
    found.append(programs)
  chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-7)
  with pytest.raises(ValueError, match="at least 1, got 0.5"):
    lora_plus(0.5)


def test_dropout_is_on_the_branchs_input_alone(key):
  """The mean of many draws is the whole; a draw drops inputs, not the base."""
  w, keep = jax.random.normal(key, (6, 3)), 0.75
  lora = Lora(jnp.eye(6), jax.random.normal(key, (6, 3)), jnp.float32(1))
  x = jnp.ones((1, 6))

  def first(params, x):
    return (x @ params["w"])[0, 0]

  def draw_one(key):
    return beside(first, {"w": w}, {"w": lora}, (x,), (1 - keep, key))

  found = np.array(jax.vmap(draw_one)(jax.random.split(key, 4000)))
  base, parts = float(w[:, 0].sum()), np.float64(lora.b[:, 0])
  spread = np.sqrt(np.sum(parts**2) * (1 - keep) / keep)
  assert found.mean() == pytest.approx(base + parts.sum(), abs=5 * spread / 63)
  assert found.std() == pytest.approx(spread, rel=0.05)
  kept = [[int(bit) for bit in f"{n:06b}"] for n in range(64)]
  possible = base + np.array(kept) @ parts / keep
  assert np.abs(found[:, None] - possible).min(axis=1).max() < 1e-4


def test_dropout_needs_a_key_and_follows_it(key, batch):
  params, loras = draw(key)
  init, update = train(loss, optax.sgd(0.1), dropout=0.5)
  with pytest.raises(ValueError, match="needs key="):
    update(loras, init(loras), params, *batch)
  step = jax.jit(update)
  keys = jax.random.split(key, 2)
  one, again, other = (
    step(loras, init(loras), params, *batch, key=k)[0]
    for k in (keys[0], keys[0], keys[1])
  )
  chex.assert_trees_all_equal(one, again)
  assert not np.array_equal(one["up/kernel"].b, other["up/kernel"].b)
  with pytest.raises(ValueError, match="share in"):
    train(loss, optax.sgd(0.1), dropout=1.0)
  with pytest.raises(ValueError, match="through=beside"):
    train(loss, optax.sgd(0.1), through=summed, dropout=0.5).update(
      loras, init(loras), params, *batch, key=key
    )


def test_masters_stay_in_float32_beside_a_bfloat16_base(key, batch):
  params, loras = draw(key)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  x, y = batch[0].astype(jnp.bfloat16), batch[1].astype(jnp.bfloat16)
  init, update = train(loss, optax.adam(1e-5), dtype=jnp.bfloat16)
  programs, state, step = dict(loras), init(loras), jax.jit(update)
  for _ in range(20):
    programs, state, value = step(programs, state, half, x, y)
  assert value.dtype == jnp.float32
  for path, lora in programs.items():
    assert lora.a.dtype == lora.b.dtype == jnp.float32
    # Steps of 1e-5 would be lost in bfloat16 beside numbers of 0.1.
    moved = np.abs(lora.a - loras[path].a).mean()
    assert moved == pytest.approx(2e-4, rel=0.5)
  plain, mixed = (
    train(loss, optax.sgd(1.0), dtype=dtype) for dtype in (None, jnp.bfloat16)
  )
  state = plain.init(loras)
  in_float = jax.jit(plain.update)(loras, state, params, *batch)[0]
  in_half = jax.jit(mixed.update)(loras, state, half, x, y)[0]
  for path in loras:
    one, two = (
      np.float32(p[path].b - loras[path].b) for p in (in_float, in_half)
    )
    assert np.linalg.norm(one - two) < 0.05 * np.linalg.norm(one)


def test_every_kind_of_program_is_trained_where_it_may(key, batch):
  params, loras = draw(key)
  programs = {
    "up/kernel": loras["up/kernel"],
    "up/bias": Shift(jnp.zeros(10)),
    "down/kernel": Branch(_product, jnp.zeros((10, 4)), jnp.float32(0.5)),
  }
  init, update = train(loss, optax.adam(1e-2))
  state, step = init(programs), jax.jit(update)
  first = programs
  for _ in range(3):
    programs, state, _ = step(programs, state, params, *batch)
  moved = {
    f"{path}/{name}"
    for path, fields in trained_part(programs).items()
    for name, leaf in fields.items()
    if not np.array_equal(leaf, trained_part(first)[path][name])
  }
  assert moved == {
    "up/kernel/a", "up/kernel/b", "up/bias/delta", "down/kernel/params"
  }  # fmt: skip
  assert programs["down/kernel"].weight == 0.5
  rows = {"table": Rows(jnp.zeros((2, 3)))}
  found = with_part(rows, trained_part(rows))
  assert jax.tree.structure(found) == jax.tree.structure(rows)
  assert np.array_equal(found["table"].rows, rows["table"].rows)


def _product(params, x):
  return x @ params
