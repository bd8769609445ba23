# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel in Mosaic GPU's interpreter, against float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.lora_dot import Scaled, gpu
from pallas_kernels.lora_dot.xla import xla_dot

PARAMETERS = InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
interpreted = functools.partial(gpu.gpu_dot, interpret=PARAMETERS)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
  yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()


def draw(key, m, k, n, r, dtype=jnp.bfloat16, lead=()):
  shapes = (*lead, m, k), (k, n), (r, k), (r, n), (*lead, m, r)
  keys = jax.random.split(key, len(shapes))
  drawn = [
    jax.random.normal(key, shape)
    for key, shape in zip(keys, shapes, strict=True)
  ]
  x, w, a, b, gate = drawn
  scaled = x, w / k**0.5, a / k**0.5, b / r**0.5, gate
  return [t.astype(dtype) for t in scaled]


def exact(x, w, a, b, gate=None):
  x, w, a, b = (np.asarray(t, np.float64) for t in (x, w, a, b))
  u = x @ a.T
  if gate is not None:
    u = u * np.asarray(gate, np.float64)
  return x @ w + u @ b


def error(y, truth):
  return np.linalg.norm(np.asarray(y, np.float64) - truth)


def check(arguments):
  truth = exact(*arguments)
  y = interpreted(*arguments)
  assert y.shape == truth.shape
  assert y.dtype == arguments[0].dtype
  assert error(y, truth) <= 2 * error(xla_dot(*arguments), truth)
  assert not interpret_pallas_call.get_races().races_found
  return y


@pytest.mark.parametrize(
  ("m", "k", "n", "r", "dtype"),
  [
    (128, 64, 256, 1, jnp.float16),  # one step of depth, a padded rank
    (256, 192, 512, 100, jnp.bfloat16),  # four blocks, two chunks of rank
  ],
)
def test_the_kernel_is_as_exact_as_xla(key, m, k, n, r, dtype):
  check(draw(key, m, k, n, r, dtype)[:4])


def test_gates_and_leading_axes(key):
  *arguments, gate = draw(key, 64, 64, 256, 16, lead=(2,))
  gate = gate.at[1].set(0)
  y = check([*arguments, gate])
  x, w = arguments[:2]
  base = jnp.matmul(x[1], w, preferred_element_type=jnp.float32)
  # A zero gate leaves the base alone, to the bit.
  np.testing.assert_array_equal(y[1], base.astype(x.dtype))


def test_derivatives_are_those_of_xla(key):
  arguments = draw(key, 128, 64, 256, 16)

  def total(f, *arguments):
    return f(*arguments).astype(jnp.float32).sum()

  def gradients(f):
    return jax.grad(functools.partial(total, f), range(5))(*arguments)

  for got, wanted in zip(
    gradients(interpreted), gradients(xla_dot), strict=True
  ):
    np.testing.assert_array_equal(got, wanted)


X, W = jnp.ones((128, 64), jnp.bfloat16), jnp.ones((64, 256), jnp.bfloat16)
A, B = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((8, 256), jnp.bfloat16)


@pytest.mark.parametrize(
  ("arguments", "options", "reason"),
  [
    ((X[:100], W, A, B), {}, "M is 100: the kernel takes multiples of 128"),
    ((X, W[:, :128], A, B[:, :128]), {}, "N is 128: .* multiples of 256"),
    ((X[:, :32], W[:32], A[:, :32], B), {}, "K is 32: .* multiples of 64"),
    ((X[:0], W, A, B), {}, "M is 0"),
    ((X.astype(jnp.float32), W, A, B), {}, "x is float32"),
    ((X, W.T, A, B), {"transpose_w": True}, r"w is stored \(N, K\)"),
    ((X, Scaled(W, jnp.ones((1, 256))), A, B), {}, "w is quantised"),
  ],
)
def test_what_it_does_not_take_is_refused_with_the_reason(
  arguments, options, reason
):
  said = gpu.unsupported(*arguments, **options)
  assert said is not None
  assert re.search(reason, said)
  with pytest.raises(ValueError, match=reason):
    gpu.gpu_dot(*arguments, **options)


def test_what_it_takes_is_not_refused():
  assert gpu.unsupported(X, W, A, B) is None
