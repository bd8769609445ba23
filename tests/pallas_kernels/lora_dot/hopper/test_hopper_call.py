# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel in Mosaic GPU's interpreter, against float64.

The interpreter has no transposed operands, so what surrounds the kernel, its
gradients above all, is tested round a product of the same meaning.
test_lora_dot_on_cards.py has the kernel itself, both ways round.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.lora_dot import Scaled
from pallas_kernels.lora_dot.hopper import call
from pallas_kernels.lora_dot.hopper.kernel import HopperTiling
from pallas_kernels.lora_dot.xla import xla_dot
from tests.pallas_kernels.lora_dot.products import (
  Case,
  bound,
  measure,
  operands,
  truth,
)
from tests.pallas_kernels.lora_dot.products import error as relative

PARAMETERS = InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
TWO = HopperTiling(stages=3, paired=False, multiprocessors=2)
interpreted = functools.partial(call.gpu_dot, tiling=TWO, interpret=PARAMETERS)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
  yield
  interpret_pallas_call.reset_gpu_interpret_mode_state()


@pytest.fixture
def _plain_kernel(monkeypatch):
  def product(x, w, u, b, *, transpose_w, tiling, interpret):
    w, b = (w.T, b.T) if transpose_w else (w, b)
    wide = {"preferred_element_type": jnp.float32}
    y = jnp.matmul(x, w, **wide) + jnp.matmul(u, b, **wide)
    return y.astype(x.dtype)

  monkeypatch.setattr(call, "hopper_matmul", product)
  call._batched.cache_clear()
  yield
  call._batched.cache_clear()


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


def test_the_kernel_is_as_exact_as_xla(key):
  # Two blocks a worker, a ring that goes round, two steps of rank, padded.
  x, w, a, b, gate = draw(key, 128, 64, 512, 100, lead=(2,))
  x, w = jnp.round(4 * x), jnp.round(16 * w)  # summed exactly in any order
  gate = gate.at[1].set(0)
  y = check([x, w, a, b, gate])
  base = jnp.matmul(x[1], w, preferred_element_type=jnp.float32)
  # A zero gate leaves the base alone, to the bit.
  np.testing.assert_array_equal(y[1], base.astype(x.dtype))


GPU_CASES = [
  Case((8,), 64, 128, 1),
  Case((3, 8), 128, 64, 20, (20,), transpose_w=True),
  Case((24,), 64, 192, 70, (24, 70)),
]


@pytest.mark.usefixtures("_plain_kernel")
@pytest.mark.parametrize("case", GPU_CASES)
def test_value_and_gradients_round_the_kernel(case):
  arrays, dy = operands(case, jnp.bfloat16)
  wanted = truth(arrays, dy, case.transpose_w)
  plain = measure(xla_dot, arrays, dy, case.transpose_w)
  found = measure(call.gpu_dot, arrays, dy, case.transpose_w)
  assert found.keys() == wanted.keys()
  for name in wanted:
    off = relative(found[name], wanted[name])
    limit = bound(relative(plain[name], wanted[name]), jnp.bfloat16)
    assert off <= limit, name


@pytest.mark.usefixtures("_plain_kernel")
@pytest.mark.parametrize("axes", [(0, None, None, None), (0, 0, None, 0)])
def test_batches(axes):
  one = Case((8,), 64, 128, 4)
  sets = [operands(one, jnp.bfloat16, seed)[0][:4] for seed in range(3)]
  batch = [
    sets[0][i] if axis is None else jnp.stack([s[i] for s in sets])
    for i, axis in enumerate(axes)
  ]
  found = jax.vmap(call.gpu_dot, in_axes=axes)(*batch)
  wanted = jax.vmap(xla_dot, in_axes=axes)(*batch)
  np.testing.assert_allclose(
    found.astype("float32"), wanted.astype("float32"), rtol=0.02, atol=0.5
  )


X, W = jnp.ones((128, 64), jnp.bfloat16), jnp.ones((64, 256), jnp.bfloat16)
CODES = Scaled(jnp.ones((64, 256), jnp.int8), jnp.ones((1, 256)))
A, B = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((8, 256), jnp.bfloat16)


@pytest.mark.parametrize(
  ("arguments", "options", "reason"),
  [
    ((X[:100], W, A, B), {}, "M is 100: the kernel takes multiples of 8"),
    ((X, W[:, :100], A, B[:, :100]), {}, "w is 100: .* multiples of 64"),
    ((X[:, :32], W[:32], A[:, :32], B), {}, "w is 32: .* multiples of 64"),
    ((X[:0], W, A, B), {}, "M is 0"),
    ((X.astype(jnp.float32), W, A, B), {}, "x is float32"),
    ((X, W.T[:, :32], A, B), {"transpose_w": True}, "needed are x"),
    ((X, CODES, A, B), {}, "w is quantised"),
  ],
)
def test_what_it_does_not_take_is_refused_with_the_reason(
  arguments, options, reason
):
  if not options:
    assert re.search(reason, call.refuse_gpu(*arguments[:3]) or "")
  with pytest.raises(ValueError, match=reason):
    call.gpu_dot(*arguments, **options)


def test_what_it_takes_is_not_refused():
  assert call.refuse_gpu(X, W, A) is None
