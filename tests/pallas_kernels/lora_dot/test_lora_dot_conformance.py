# SPDX-License-Identifier: Apache-2.0
"""One table for every implementation of the product.

Implementation x shape x dtype x {value, dx, dw, da, db, dgate}, against
float64. The bound is twice the error that XLA makes in that dtype. Batches,
meshes and the TPU interpreter have tables of their own.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.lora_dot import Scaled, tpu_dot, xla_dot
from pallas_kernels.lora_dot.quantised import quantise_nf4
from tests.pallas_kernels.lora_dot.products import (
  IMPLEMENTATIONS,
  RESIDENT,
  STREAMED,
  Case,
  bound,
  error,
  measure,
  operands,
  truth,
)

CASES = [
  Case((1,), 1, 1, 1, (1,)),
  Case((9,), 8, 1, 2, transpose_w=True),
  Case((3, 5), 30, 20, 3, (3, 1, 1)),
  Case((200,), 300, 333, 5, (200, 5)),
  Case((2, 70), 256, 130, 16, (16,), transpose_w=True),
]
DTYPES = [jnp.float32, jnp.bfloat16]


@functools.cache
def xla_errors(case, dtype):
  arrays, dy = operands(case, dtype)
  wanted = truth(arrays, dy, case.transpose_w)
  found = measure(xla_dot, arrays, dy, case.transpose_w)
  return {name: error(found[name], wanted[name]) for name in wanted}


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("reference", jnp.float32),
    *((name, t) for name in ("tpu", "tpu-blocks") for t in DTYPES),
  ],
)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(name, case, dtype):
  arrays, dy = operands(case, dtype)
  wanted = truth(arrays, dy, case.transpose_w)
  found = measure(IMPLEMENTATIONS[name], arrays, dy, case.transpose_w)
  assert found.keys() == wanted.keys()
  allowed = xla_errors(case, dtype)
  for quantity, t in found.items():
    like = arrays[0] if quantity == "value" else t
    assert t.dtype == like.dtype == dtype
    assert t.shape == wanted[quantity].shape
    off = error(t, wanted[quantity])
    assert off <= bound(allowed[quantity], dtype), quantity


@pytest.mark.parametrize("transpose_w", [False, True])
def test_w_that_stays_in_memory(transpose_w):
  case = Case((300,), 256, 384, 5, (5,), transpose_w)
  arrays, dy = operands(case, jnp.float32)
  wanted = truth(arrays, dy, transpose_w)
  run = functools.partial(tpu_dot, interpret=True, tiling=RESIDENT)
  found = run(*arrays, transpose_w=transpose_w)
  allowed = bound(xla_errors(case, jnp.float32)["value"], jnp.float32)
  assert error(found, wanted["value"]) <= allowed


sizes = st.integers(1, 260)


@hypothesis.given(
  m=sizes,
  k=sizes,
  n=sizes,
  r=st.integers(1, 20),
  gate=st.sampled_from(["none", "one", "rank", "rows"]),
  transpose_w=st.booleans(),
  dtype=st.sampled_from(DTYPES),
)
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
def test_any_shape(m, k, n, r, gate, transpose_w, dtype):
  gates = {"none": None, "one": (), "rank": (r,), "rows": (m, r)}
  case = Case((m,), k, n, r, gates[gate], transpose_w)
  arrays, _ = operands(case, dtype)
  wanted = truth(arrays, None, transpose_w)["value"]
  run = functools.partial(tpu_dot, interpret=True, tiling=STREAMED)
  found = run(*arrays, transpose_w=transpose_w)
  allowed = error(xla_dot(*arrays, transpose_w=transpose_w), wanted)
  assert error(found, wanted) <= bound(allowed, dtype)


@pytest.mark.parametrize(
  ("codes", "per_row", "transpose_w"),
  [
    (jnp.int8, False, False),
    (jnp.int8, True, False),
    (jnp.int8, True, True),
    (jnp.float8_e4m3fn, False, True),
  ],
)
def test_quantised_weights(codes, per_row, transpose_w):
  m, k, n, r = 60, 200, 140, 4
  rng = np.random.default_rng(0)
  case = Case((m,), k, n, r, (r,), transpose_w)
  shape = (n, k) if transpose_w else (k, n)
  stored = jnp.asarray(rng.integers(-127, 128, shape), jnp.float32)
  sides = (shape[0], 1) if per_row else (1, shape[1])
  scale = jnp.asarray(rng.uniform(0.001, 0.01, sides), jnp.float32)
  agrees(case, Scaled(stored.astype(codes), scale))


@pytest.mark.parametrize(
  ("case", "tiling"),
  [
    (Case((60,), 200, 140, 4, (4,)), STREAMED),  # x dense, dx transposed
    (Case((200,), 256, 384, 4, (4,), True), RESIDENT),
  ],
)
def test_four_bits(case, tiling):
  arrays, _ = operands(case, jnp.float32)
  agrees(case, quantise_nf4(arrays[1]), tiling)


def agrees(case, w, tiling=STREAMED):
  """Value and gradients with a w of codes are as near as XLA's."""
  arrays, dy = operands(case, jnp.bfloat16)
  transpose_w = case.transpose_w
  x, _, a, b, gate = arrays
  wanted = truth((x, w, a, b, gate), dy, transpose_w)
  del wanted["dw"]

  def adapted(run, **more):
    def f(x, a, b, gate, **keywords):
      return run(x, w, a, b, gate, **keywords, **more)

    names = ("value", "dx", "da", "db", "dgate")
    arguments = (x, a, b, gate)
    return dict(
      zip(
        names,
        _value_and_gradients(f, arguments, dy, transpose_w),
        strict=True,
      )
    )

  found = adapted(tpu_dot, interpret=True, tiling=tiling)
  allowed = adapted(xla_dot)
  for name in wanted:
    most = bound(error(allowed[name], wanted[name]), jnp.bfloat16)
    assert error(found[name], wanted[name]) <= most, name


def _value_and_gradients(f, arguments, dy, transpose_w):
  @jax.jit
  def run(arguments, dy):
    y, pullback = jax.vjp(
      functools.partial(f, transpose_w=transpose_w), *arguments
    )
    return y, *pullback(dy)

  return run(arguments, dy)
