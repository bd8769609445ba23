# SPDX-License-Identifier: Apache-2.0
"""Learned sums of frozen adapters: numbers, gradients and gauges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora import merging
from jlora.loras import Lora, dense
from jlora.training import summed

IN, OUT = 6, 5
ACTIVATIONS = {
  "free": merging.free,
  "softmax": merging.softmax,
  "leaky": merging.leaky,
  "sigmoid": merging.sigmoid,
  "unit": merging.unit,
}
every = pytest.mark.parametrize("name", ACTIVATIONS)


@pytest.fixture(autouse=True)
def _optax_counts():
  """Adam counts its steps in int32, by numbers of no dtype."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def draw(seed, rank=2, leading=(), scale=0.5):
  rng = np.random.default_rng(seed)
  a, b = (
    rng.standard_normal((*leading, rank, n), np.float32) for n in (IN, OUT)
  )
  return Lora(a, b, np.full(leading, scale, np.float32))


def pool(*ranks):
  """Adapters of two modules; scales differ, as those of rsLoRA do."""
  return [
    {
      path: draw(10 * at + len(path), rank, scale=np.float32(0.5 + at))
      for path in ("q", "up")
    }
    for at, rank in enumerate(ranks)
  ]


def run(params, x):
  return jnp.tanh(x @ params["q"]) @ params["up"].T


PARAMS = {
  path: np.random.default_rng(7).standard_normal((IN, OUT), np.float32)
  for path in ("q", "up")
}
X = np.random.default_rng(8).standard_normal((4, IN), np.float32)


def loss(params, x):
  return jnp.mean(run(params, x) ** 2)


def changes(loras):
  return {path: np.asarray(dense(lora)) for path, lora in loras.items()}


def test_the_numbers_of_the_specification():
  """softmax (0, ln 3) of diag(1, 0) and diag(0, 1); factors summed differ."""
  one, two = (
    Lora(np.eye(2, dtype=np.float32)[[i]], np.eye(2, dtype=np.float32)[[i]],
         np.float32(1))
    for i in range(2)
  )  # fmt: skip
  z = {"w": np.float32([0, np.log(3)])}
  found = merging.mix([{"w": one}, {"w": two}], z, activation=merging.softmax)
  np.testing.assert_allclose(
    dense(found["w"]), np.diag([0.25, 0.75]), atol=1e-7
  )
  a, b = (
    h * x + g * y
    for (x, y), (h, g) in (
      ((one.a, two.a), (1, 1)),
      ((one.b, two.b), (0.25, 0.75)),
    )
  )
  np.testing.assert_allclose(a.T @ b, [[0.25, 0.75], [0.25, 0.75]], atol=1e-7)


@every
def test_the_sum_is_that_of_the_branches(name):
  """Mixed ranks and scales, beside the weights and summed into them."""
  adapters = pool(1, 3, 2)
  z = {path: np.float32([0.4, -0.3, 1.2]) for path in ("q", "up")}
  h = np.asarray(ACTIVATIONS[name](z["q"]))
  mixed = merging.mix(adapters, z, activation=ACTIVATIONS[name])
  assert {lora.rank for lora in mixed.values()} == {6}
  whole = {
    path: PARAMS[path]
    + sum(
      w * np.asarray(dense(own[path]))
      for w, own in zip(h, adapters, strict=True)
    )
    for path in PARAMS
  }
  wanted = run(whole, X)
  beside = jlora.adapt(run)(jlora.bind(PARAMS, mixed), X)
  np.testing.assert_allclose(beside, wanted, atol=2e-5)
  summed_up = run(jlora.apply(PARAMS, mixed), X)
  np.testing.assert_allclose(summed_up, wanted, atol=2e-5)


def test_one_hot_is_the_adapter_and_nothing_the_base():
  adapters = pool(2, 3)
  one_hot = {path: np.float32([0, 1]) for path in PARAMS}
  found = merging.mix(adapters, one_hot)
  for path, change in changes(found).items():
    np.testing.assert_allclose(change, changes(adapters[1])[path], atol=1e-6)
  none = merging.mix(
    adapters,
    {path: np.float32([0, 0]) for path in PARAMS},
    activation=merging.leaky,
  )
  np.testing.assert_array_equal(
    jax.jit(jlora.adapt(run))(jlora.bind(PARAMS, none), X),
    jax.jit(run)(PARAMS, X),
  )


def test_weights_are_learned_alone():
  """The gradient is Σ of the branches' own; softmax's has their mean off."""
  adapters = pool(2, 2, 1)
  z = merging.init_weights(adapters, 0.0)
  h = np.asarray(merging.softmax(z["q"]))

  def value(h):
    return loss(
      jlora.apply(PARAMS, merging.mix(adapters, {"q": h, "up": h})), X
    )

  by_hand = np.asarray(jax.grad(value)(jnp.asarray(h)))
  wanted = h * (by_hand - np.sum(h * by_hand))
  init, update = merging.learn_weights(
    loss,
    optax.sgd(1.0),
    activation=merging.softmax,
    granularity=merging.by_adapter,
  )
  z = merging.init_weights(adapters, 0.0, granularity=merging.by_adapter)
  moved, _, _ = update(z, init(z), PARAMS, adapters, X)
  np.testing.assert_allclose(z["all"] - moved["all"], wanted, rtol=1e-5)
  assert moved["all"].dtype == jnp.float32
  assert abs(np.sum(wanted)) < 1e-5  # softmax: what one gains another loses


@every
def test_a_step_goes_down_in_the_weights_alone(name):
  adapters = pool(2, 3)
  z = merging.init_weights(adapters, 0.25)
  init, update = merging.learn_weights(
    loss, optax.sgd(1e-3), activation=ACTIVATIONS[name]
  )
  step = jax.jit(update)
  again, state, first = step(z, init(z), PARAMS, adapters, X)
  _, _, second = step(again, state, PARAMS, adapters, X)
  assert second < first
  _, dense_update = merging.learn_weights(
    loss, optax.sgd(1e-3), activation=ACTIVATIONS[name], through=summed
  )
  other, _, _ = dense_update(z, init(z), PARAMS, adapters, X)
  for path in z:
    np.testing.assert_allclose(other[path], again[path], atol=1e-6)


def test_the_best_sum_is_found():
  """A quadratic loss: G z = c, with G_ij = <Δ_i, Δ_j>."""
  adapters = [{"q": draw(at, rank)} for at, rank in enumerate((1, 2, 1))]
  target = np.asarray(dense(draw(9, 3)))
  forms = np.stack([changes(own)["q"].ravel() for own in adapters])
  wanted = np.linalg.solve(forms @ forms.T, forms @ target.ravel())

  def off(params):
    return jnp.sum((params["q"] - target) ** 2)

  init, update = merging.learn_weights(off, optax.adam(0.05), through=summed)
  z, step = merging.init_weights(adapters, 0.0), jax.jit(update)
  state, zero = init(z), {"q": np.zeros((IN, OUT), np.float32)}
  for _ in range(1500):
    z, state, _ = step(z, state, zero, adapters)
  np.testing.assert_allclose(z["q"], wanted, atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), name=st.sampled_from([*ACTIVATIONS]))
def test_only_changes_and_names_count(seed, name):
  """Another gauge, and another order of the adapters with their weights."""
  rng = np.random.default_rng(seed)
  adapters = [{"q": draw(seed + at, rank)} for at, rank in enumerate((2, 3))]
  z = {"q": rng.standard_normal(2).astype(np.float32)}
  mixed = functools.partial(merging.mix, activation=ACTIVATIONS[name])
  wanted = changes(mixed(adapters, z))["q"]

  def gauged(lora):
    turn = np.linalg.qr(rng.standard_normal((lora.rank, lora.rank)))[0] * 2
    inverse = np.linalg.inv(turn).T.astype(np.float32)
    return Lora(turn.astype(np.float32) @ lora.a, inverse @ lora.b, lora.scale)

  turned = [{"q": gauged(own["q"])} for own in adapters]
  found = changes(mixed(turned, z))["q"]
  np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
  swapped = changes(mixed(adapters[::-1], {"q": z["q"][::-1]}))["q"]
  np.testing.assert_allclose(swapped, wanted, atol=1e-5 * np.abs(wanted).max())


def test_adapters_may_lack_modules():
  """A softmax is over those that are there, whatever the others' weights."""
  one, two, three = pool(2, 1, 2)
  del two["q"]
  z = {"q": np.float32([0, 99, np.log(3)]), "up": np.zeros(3, np.float32)}
  found = changes(merging.mix([one, two, three], z, activation=merging.softmax))
  wanted = 0.25 * changes(one)["q"] + 0.75 * changes(three)["q"]
  np.testing.assert_allclose(found["q"], wanted, rtol=1e-5, atol=1e-6)
  assert {*found} == {"q", "up"}


def test_granularities():
  adapters = [
    {
      "layers.0.q": draw(at),
      "layers.0.experts.1.up": draw(at),
      "layers.1.q": draw(at),
      "head": draw(at),
      "stack/q": draw(at, leading=(4,)),
      "stack/experts": draw(at, leading=(4, 3)),
    }
    for at in range(2)
  ]
  made = {
    name: {
      key: x.shape
      for key, x in merging.init_weights(adapters, granularity=of).items()
    }
    for name, of in (
      ("module", merging.by_module),
      ("layer", merging.by_layer),
      ("adapter", merging.by_adapter),
    )
  }
  assert made["adapter"] == {"all": (2,)}
  assert made["layer"] == {
    "layers.0": (2,),
    "layers.1": (2,),
    "rest": (2,),
    "4 layers": (4, 2),
  }
  assert made["module"]["stack/experts"] == (4, 3, 2)
  assert len(made["module"]) == len(adapters[0])
  z = merging.init_weights(adapters, granularity=merging.by_layer)
  z["4 layers"] = np.arange(8, dtype=np.float32).reshape(4, 2)
  found = merging.mix(adapters, z, granularity=merging.by_layer)
  wanted = sum(
    z["4 layers"][:, at, None, None, None]
    * np.asarray(dense(own["stack/experts"]))
    for at, own in enumerate(adapters)
  )
  np.testing.assert_allclose(
    dense(found["stack/experts"]), wanted, rtol=1e-5, atol=1e-5
  )


def test_a_start_may_be_random():
  adapters = [{str(i): draw(i) for i in range(300)}] * 2
  one, two = (
    merging.init_weights(adapters, 0.0, key=jax.random.key(seed))
    for seed in range(2)
  )
  drawn = np.stack([*one.values()])
  assert abs(drawn.std() - 1) < 3 / np.sqrt(2 * drawn.size)
  assert not np.array_equal(one["0"], two["0"])
  some = merging.init_weights(
    [{"7": own["7"]} for own in adapters], 0.0, key=jax.random.key(0)
  )
  np.testing.assert_array_equal(some["7"], one["7"])
  given_two = merging.init_weights(adapters, [0.3, 0.7])
  np.testing.assert_array_equal(given_two["5"], np.float32([0.3, 0.7]))


def test_entropy():
  logits = np.float32([[0, 0, -np.inf, -np.inf], [50, 0, 0, 0]])
  assert abs(merging.entropy(logits) - np.log(2) / 2) < 1e-6
  first = merging.entropy(logits, np.array([True, False]))
  assert abs(first - np.log(2)) < 1e-6
  slope = jax.grad(merging.entropy)(jnp.asarray(logits))
  assert np.isfinite(slope[:, 0]).all()


def test_weights_without_labels():
  """AdaMerging's criterion finds the adapter that decides.

  Two classifiers of two inputs; of the second change all is noise, which makes
  predictions less sure.
  """
  rng = np.random.default_rng(0)
  x = rng.standard_normal((200, 2)).astype(np.float32)
  sure = Lora(np.float32([[1, 0]]), np.float32([[2, -2]]), np.float32(1))
  other = Lora(np.float32([[1, 0]]), np.float32([[-1, 1]]), np.float32(1))
  base = {"w": np.float32([[0.5, -0.5], [0, 0]])}
  init, update = merging.learn_weights(
    lambda params, x: merging.entropy(x @ params["w"]),
    optax.adam(0.05),
    activation=merging.unit,
  )
  adapters = [{"w": sure}, {"w": other}]
  z, step = merging.init_weights(adapters, 0.3), jax.jit(update)
  state = init(z)
  for _ in range(60):
    z, state, _ = step(z, state, base, adapters, x)
  h = np.asarray(merging.unit(z["w"]))
  assert h[0] > 0.99
  assert h[1] < 0.01


def test_many_weights_at_once():
  adapters = pool(2, 3)
  many = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
  mixed = jax.jit(
    jax.vmap(lambda z: merging.mix(adapters, {"q": z, "up": z})["up"])
  )(many)
  for at, z in enumerate(many):
    alone = merging.mix(adapters, {"q": z, "up": z})["up"]
    np.testing.assert_allclose(dense(mixed)[at], dense(alone), atol=1e-5)


def test_learning_compiles_once_for_a_shape():
  traced = []

  def counted(params, x):
    traced.append(1)
    return loss(params, x)

  init, update = merging.learn_weights(counted, optax.adam(0.1))
  step, z = jax.jit(update), merging.init_weights(pool(2, 3))
  for at in range(3):
    adapters = jax.tree.map(lambda x, at=at: x + np.float32(at), pool(2, 3))
    step(z, init(z), PARAMS, adapters, X)
  assert len(traced) == 1


def test_the_door():
  one, two = pool(2, 3)
  z = {path: np.ones(2, np.float32) for path in PARAMS}
  for wrong, why in (
    (lambda: merging.mix([], {}), "no adapters to mix"),
    (lambda: merging.init_weights([]), "no adapters to mix"),
    (
      lambda: merging.mix(
        [one], merging.init_weights([one]), activation=merging.softmax
      ),
      "softmax of one adapter is 1",
    ),
    (lambda: merging.mix([one, two], {"q": z["q"]}), "no weights for up"),
    (lambda: merging.mix([one, two], z | {"k": z["q"]}), "of nothing: k"),
    (
      lambda: merging.mix([one, two], z | {"q": np.ones(3, np.float32)}),
      r"must be \(..., 2\)",
    ),
    (
      lambda: merging.mix([one, {"q": draw(0), "up": one["q"].a}], z),
      "no Loras",
    ),
    (
      lambda: merging.init_weights(
        [{"q": draw(0), "s": draw(0, leading=(3,))}] * 2,
        granularity=lambda path, leading: ("x", leading),
      ),
      "need one shape",
    ),
  ):
    with pytest.raises(ValueError, match=why):
      wrong()
