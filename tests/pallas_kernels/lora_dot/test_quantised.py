# SPDX-License-Identifier: Apache-2.0
"""Quantised matrices: values, layout, errors, products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from pallas_kernels.lora_dot import (
  Nf4,
  Scaled,
  lora_dot,
  reference_dot,
  xla_dot,
)
from pallas_kernels.lora_dot.quantised import (
  dequantise,
  quantise_int8,
  quantise_nf4,
  quantise_tree,
)
from pallas_kernels.lora_dot.weights import NF4
from tests.pallas_kernels.lora_dot.products import (
  Case,
  bound,
  error,
  measure,
  operands,
  truth,
)


def draw(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def test_the_values_are_quantiles_of_a_normal_distribution():
  # The paper's equation (4): eight on each side of a shared zero.
  end = (1 - 1 / 32 + 1 - 1 / 30) / 2
  up = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
  down = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
  values = np.sort(np.concatenate([up, [0], down]))
  np.testing.assert_allclose(NF4, values / values.max(), atol=1e-6)


def there_and_back(w):
  held = quantise_nf4(w)
  return held, dequantise(held)


@given(k=st.integers(1, 200), n=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_nf4_takes_the_nearest_value_of_each_block(k, n, seed):
  w = draw(k, n, seed=seed)
  held, back = jax.jit(there_and_back)(w)
  assert held.shape == (k, n)
  assert held.codes.shape == (-(-k // 64) * 32, n)
  back = np.asarray(back)
  for start in range(0, k, 64):
    block = w[start : start + 64]
    largest = np.abs(block).max(0)
    choices = np.array(NF4, np.float32)[:, None, None] * largest
    best = np.abs(choices - block).min(0)
    found = np.abs(back[start : start + 64] - block)
    np.testing.assert_allclose(found, best, atol=1e-6)


def test_where_nf4_puts_a_row():
  w = np.zeros((128, 1), np.float32)
  w[64 + 16 * 2 + 5, 0], w[64 + 16 * 3 + 8 + 6, 0] = 1, -2
  codes = np.asarray(quantise_nf4(jnp.asarray(w)).codes)[:, 0]
  # 0.5 of the largest: nearest is NF4[12]; zero is NF4[7].
  assert codes[32 + 4 * 5 + 2] == 7 << 4 | 12
  assert codes[32 + 4 * 6 + 3] == 0 << 4 | 7
  assert np.sum(codes != (7 << 4 | 7)) == 2


def test_int8_is_off_by_half_a_step_at_most():
  w = draw(50, 7)
  w[:, 3] = 0
  held = quantise_int8(jnp.asarray(w))
  off = np.abs(np.asarray(dequantise(held)) - w)
  assert np.all(off <= np.asarray(held.scale) / 2 * (1 + 1e-5))
  assert np.all(np.abs(np.asarray(held.codes, int)).max(0)[[0, 1, 2]] == 127)
  assert np.all(off[:, 3] == 0)


@pytest.mark.parametrize("how", [quantise_int8, quantise_nf4])
def test_what_fits_comes_back_and_again(how):
  once = dequantise(how(jnp.asarray(draw(100, 3))))
  np.testing.assert_allclose(dequantise(how(once)), once, rtol=1e-6)


@pytest.mark.parametrize("how", [quantise_int8, quantise_nf4])
@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_gradients(how, transpose_w, dtype):
  case = Case((3, 5), 96, 40, 4, (4,), transpose_w)
  (x, w, a, b, gate), dy = operands(case, dtype)
  held = how(w)
  near = dequantise(held)
  wanted = truth((x, near, a, b, gate), dy, transpose_w)

  def found(run):
    def f(x, w, a, b, gate, transpose_w):
      del w
      return lora_dot(
        x, held, a, b, gate, transpose_w=transpose_w, implementation=run
      )

    return measure(f, (x, w, a, b, gate), dy, transpose_w)

  of_xla = found(xla_dot)
  for name, t in found(reference_dot).items():
    if name != "dw":
      allowed = bound(error(of_xla[name], wanted[name]), dtype)
      assert error(t, wanted[name]) <= allowed, name


def test_matrices_are_arguments_of_jit():
  traces = []

  @jax.jit
  def run(x, w):
    traces.append(w)
    return lora_dot(x, w, jnp.zeros((1, 70)), jnp.zeros((1, 8)))

  x = jnp.asarray(draw(4, 70))
  for seed in (0, 1):
    w = quantise_nf4(jnp.asarray(draw(70, 8, seed=seed)))
    assert isinstance(w, Nf4)
    np.testing.assert_allclose(run(x, w), x @ dequantise(w), rtol=1e-4)
  assert len(traces) == 1


def test_a_tree_with_its_costs():
  params = {
    "up": {"kernel": jnp.asarray(draw(128, 32)), "bias": jnp.ones(32)},
    "down": {"kernel": jnp.asarray(draw(32, 128), jnp.bfloat16)},
    "zero": jnp.zeros((3, 3)),
  }
  select = lambda path, t: path.endswith("kernel") or path == "zero"  # noqa: E731
  tree, costs = quantise_tree(params, select, quantise_int8)
  assert isinstance(tree["down"]["kernel"], Scaled)
  assert tree["up"]["bias"] is params["up"]["bias"]
  assert list(costs) == ["up/kernel", "down/kernel", "zero"]
  assert costs["up/kernel"][1:] == (128 * 32 + 4 * 32, 4 * 128 * 32)
  assert 0 < costs["up/kernel"].error < 0.02
  assert costs["zero"].error == 0
  coarse = quantise_tree(params, select, quantise_nf4)[1]
  assert 0.05 < coarse["up/kernel"].error < 0.12
  assert coarse["up/kernel"].stored == 128 * 32 // 2 + 4 * 2 * 32
  assert coarse["down/kernel"].before == 2 * 32 * 128


def test_what_is_no_matrix_is_refused():
  with pytest.raises(ValueError, match="needed is a floating matrix"):
    quantise_nf4(jnp.ones((2, 2, 2)))
  with pytest.raises(ValueError, match="int32"):
    quantise_int8(jnp.ones((2, 2), jnp.int32))
  with pytest.raises(ValueError, match="bias .*select what has two axes"):
    quantise_tree({"bias": jnp.ones(3)}, lambda *_: True, quantise_nf4)
  with pytest.raises(ValueError, match="nothing was selected"):
    quantise_tree({"w": jnp.eye(3)}, lambda *_: False, quantise_nf4)
