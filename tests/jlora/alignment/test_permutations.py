# SPDX-License-Identifier: Apache-2.0
"""Permuted networks compute the same; permutations form a group."""

import chex
import jax
import numpy as np
import pytest

from jlora.alignment.layouts import lay_out_units
from jlora.alignment.permutations import (
  compose,
  identity,
  inverse,
  is_identity,
  permute,
  permute_loras,
)
from jlora.loras import Lora
from jlora.paths import flatten, unflatten
from tests.helpers.unit_orders import NAMES, draw, network

every_network = pytest.mark.parametrize("name", NAMES)


@every_network
def test_the_function_is_preserved_and_the_weights_are_not(name):
  model, params, x, symmetry = network(name, 0)
  orders = draw(params, symmetry, 1)
  other = permute(params, orders, symmetry)
  moved = [
    not np.array_equal(u, v)
    for u, v in zip(jax.tree.leaves(params), jax.tree.leaves(other),
                    strict=True)
  ]  # fmt: skip
  assert np.mean(moved) > 0.7
  run = jax.jit(model)
  expected = run(params, x)
  np.testing.assert_allclose(run(other, x), expected, atol=1e-5)
  kinds = {unit.split(".")[0]: unit for unit in orders}  # one of each
  for unit in kinds.values():
    other = permute(params, {unit: orders[unit]}, symmetry)
    np.testing.assert_allclose(run(other, x), expected, atol=1e-5)


@every_network
def test_what_is_done_can_be_undone_and_composed(name):
  _, params, _, symmetry = network(name, 0)
  layout = lay_out_units(symmetry, flatten(params))
  one, two = (draw(params, symmetry, seed) for seed in (1, 2))
  assert is_identity(compose(inverse(one, layout), one, layout))
  assert is_identity(compose(one, inverse(one, layout), layout))
  assert is_identity(identity(layout))
  assert not is_identity(one)
  once = permute(params, one, symmetry)
  chex.assert_trees_all_equal(
    permute(once, two, symmetry),
    permute(params, compose(two, one, layout), symmetry),
  )
  chex.assert_trees_all_equal(
    permute(once, inverse(one, layout), symmetry),
    params,
  )


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "mlp"])
def test_loras_go_along(name):
  _, params, _, symmetry = network(name, 0)
  rng, loras = np.random.default_rng(3), {}
  for i, (path, leaf) in enumerate(flatten(params).items()):
    if leaf.ndim == 2:
      a, b = (rng.standard_normal((1 + i % 3, n), np.float32)
              for n in leaf.shape)  # fmt: skip
      loras[path] = Lora(a, b, np.float32(0.5))
  orders = draw(params, symmetry, 1)
  moved = permute_loras(loras, orders, symmetry, params)
  changes = {
    path: loras[path].a.T @ loras[path].b if path in loras else 0 * leaf
    for path, leaf in flatten(params).items()
  }
  expected = permute(unflatten(changes, params), orders, symmetry)
  for path, change in flatten(expected).items():
    if path in loras:
      found = moved[path].a.T @ moved[path].b
      np.testing.assert_allclose(found, change, atol=1e-6)
  assert moved.keys() == loras.keys()


def test_a_lora_of_a_convolution_goes_along():
  _, params, _, symmetry = network("convolutions", 0)
  path, shape = "params/conv1/kernel", (3, 3, 6, 7)
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal((2, n), np.float32) for n in (54, 7))
  loras = {path: Lora(a, b, np.float32(1))}
  orders = draw(params, symmetry, 1)
  moved = permute_loras(loras, orders, symmetry, params)[path]
  found = (moved.a.T @ moved.b).reshape(shape)
  expected = (a.T @ b).reshape(shape)[:, :, orders["unit.0"]]
  np.testing.assert_allclose(found, expected[..., orders["unit.1"]], atol=1e-5)


def test_jax_arrays_and_numpy_agree():
  _, params, _, symmetry = network("llama", 0)
  orders = draw(params, symmetry, 1)
  on_device = permute(jax.tree.map(jax.numpy.asarray, params), orders, symmetry)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(on_device))
  jax.tree.map(
    np.testing.assert_array_equal, on_device, permute(params, orders, symmetry)
  )


def test_what_is_no_permutation_is_refused():
  _, params, _, symmetry = network("mlp", 0)
  for wrong in ({"unit.0": np.zeros(12, int)}, {"unit.0": np.arange(3)},
                {"unit.9": np.arange(12)}):  # fmt: skip
    with pytest.raises(ValueError, match="no permutations of this network"):
      permute(params, wrong, symmetry)
  lora = Lora(np.ones((1, 9)), np.ones((1, 12)), np.float32(1))
  for path in ("params/a/kernel", "params/a/bias", "nothing"):
    with pytest.raises(ValueError, match="1 Loras fit no matrix"):
      permute_loras({path: lora}, {}, symmetry, params)
