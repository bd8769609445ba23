# SPDX-License-Identifier: Apache-2.0
"""Flax's NNX around adapters: split and merge, nnx.jit, nnx.Optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from jlora.adapting import adapt, apply, bind
from jlora.training import init_lora, train


@pytest.fixture(autouse=True)
def flax_promotes():
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    yield


class Net(nnx.Module):
  """Two layers with BatchNorm between them."""

  def __init__(self, rngs):
    self.up = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.down = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.relu(self.norm(self.up(x))))


X = jax.random.normal(jax.random.key(0), (6, 4))
Y = jax.random.normal(jax.random.key(1), (6, 3))


def adapters(model):
  """A LoRA on every kernel, b not zero."""
  loras = init_lora(nnx.state(model, nnx.Param), rank=2)
  return {
    path: jlora.Lora(x.a, x.b + 0.1, x.scale) for path, x in loras.items()
  }


def split(model):
  """The graph, and parameters apart from statistics."""
  return nnx.split(model, nnx.Param, nnx.BatchStat)


def test_batchnorm_states_come_out_of_training():
  graph, params, stats = split(Net(nnx.Rngs(0)))
  loras = adapters(Net(nnx.Rngs(0)))

  def loss(params, stats, x, y):
    model = nnx.merge(graph, params, stats)
    error = jnp.mean((model(x) - y) ** 2)
    return error, nnx.state(model, nnx.BatchStat)

  init, update = train(loss, optax.sgd(0.1), has_aux=True)
  own, kept, state, losses = loras, stats, init(loras), []
  step = jax.jit(update)
  for _ in range(5):
    own, state, (value, kept) = step(own, state, params, kept, X, Y)
    losses.append(float(value))
  assert losses[-1] < losses[0]
  assert np.abs(kept["norm"]["mean"][...]).max() > 0
  # The first step's statistics are those of merged weights.
  *_, (_, once) = step(loras, init(loras), params, stats, X, Y)
  merged = nnx.merge(graph, apply(params, loras), stats)
  merged(X)
  np.testing.assert_allclose(
    once["norm"]["mean"][...], merged.norm.mean[...], rtol=1e-4, atol=1e-6
  )


def test_a_loss_without_aux_is_refused_by_name():
  loras = adapters(Net(nnx.Rngs(0)))
  params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
  for fn, has_aux in (
    (lambda params: (jnp.float32(0), {}), False),
    (lambda params: jnp.float32(0), True),
    (lambda params: jnp.zeros(3), False),
  ):
    init, update = train(fn, optax.sgd(0.1), has_aux=has_aux)
    with pytest.raises(ValueError, match=f"The loss returned .*{has_aux}"):
      update(loras, init(loras), params)


def test_nnx_jit_of_a_bound_module():
  """A module is a pytree: bound, it goes into nnx.jit with its adapters."""
  model = Net(nnx.Rngs(0))
  model.eval()
  loras = adapters(model)

  @nnx.jit
  def run(model, loras, x):
    return adapt(lambda model, x: model(x), strict=True)(bind(model, loras), x)

  wanted = apply(model, loras)(X)
  found = run(model, loras, X)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  assert np.abs(found - model(X)).max() > 1e-2


class Adapters(nnx.Module):
  """LoRAs as a module's own parameters, scales fixed."""

  def __init__(self, loras):
    self.paths = nnx.static(tuple(loras))
    self.scales = nnx.data([lora.scale for lora in loras.values()])
    self.a = nnx.List(nnx.Param(lora.a) for lora in loras.values())
    self.b = nnx.List(nnx.Param(lora.b) for lora in loras.values())

  def loras(self):
    """As `bind` takes them."""
    parts = zip(self.paths, self.a, self.b, self.scales, strict=True)
    return {p: jlora.Lora(a[...], b[...], s) for p, a, b, s in parts}


def test_nnx_optimizer_takes_the_steps_of_train():
  model = Net(nnx.Rngs(0))
  model.eval()
  graph, params, stats = split(model)
  loras = adapters(model)

  def loss(params, x, y):
    return jnp.mean((nnx.merge(graph, params, stats)(x) - y) ** 2)

  own = Adapters(loras)
  optimiser = nnx.Optimizer(own, optax.adam(1e-2), wrt=nnx.Param)

  @nnx.jit
  def step(own, optimiser, x, y):
    def value_of(own):
      return adapt(loss, strict=True)(bind(params, own.loras()), x, y)

    value, gradient = nnx.value_and_grad(value_of)(own)
    optimiser.update(own, gradient)
    return value

  init, update = train(loss, optax.adam(1e-2))
  state = init(loras)
  for _ in range(3):
    found = step(own, optimiser, X, Y)
    loras, state, wanted = update(loras, state, params, X, Y)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
  for path, lora in own.loras().items():
    np.testing.assert_allclose(lora.b, loras[path].b, rtol=1e-3, atol=1e-5)
