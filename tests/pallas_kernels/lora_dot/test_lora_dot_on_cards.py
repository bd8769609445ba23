# SPDX-License-Identifier: Apache-2.0
"""The product on a Hopper card: `make test-gpu`; skipped elsewhere.

Against float64, bound by twice what XLA errs on the same card. Elsewhere the
kernel is compiled (`make test-aot`) and interpreted (test_hopper_call.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.lora_dot import api, lora_dot, lora_dot_many, xla_dot
from pallas_kernels.lora_dot.banks.gathered import gathered_dot
from pallas_kernels.lora_dot.banks.grouped import grouped_dot
from pallas_kernels.lora_dot.banks.laned import laned_dot
from pallas_kernels.lora_dot.hopper.call import gpu_dot
from pallas_kernels.lora_dot.hopper.kernel import HopperTiling
from pallas_kernels.lora_dot.quantised import quantise_int8, quantise_nf4
from tests.pallas_kernels.lora_dot import many_products
from tests.pallas_kernels.lora_dot.products import (
  Case,
  bound,
  error,
  exact,
  measure,
  operands,
  truth,
)


def why_not():
  """Why these tests cannot run here, or an empty string."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    return f"no CUDA card: jax sees {device.device_kind}"
  capability = getattr(device, "compute_capability", "unknown")
  return "" if capability == "9.0" else f"{capability} is not Hopper's 9.0"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

TILINGS = {
  "table": None,
  "alone": HopperTiling(paired=False),
  "few workers": HopperTiling(bn=128, stages=6, multiprocessors=4, width=3),
}
CASES = [
  Case((64,), 64, 64, 1),
  Case((128,), 128, 128, 2),
  Case((8,), 64, 320, 3, (3,)),
  Case((5, 40), 192, 256, 16, (16,), transpose_w=True),
  Case((1000,), 512, 1088, 64, (1000, 1)),
  Case((264,), 1088, 512, 100, (264, 100), transpose_w=True),
  Case((2, 168), 256, 768, 256, (2, 168, 256)),
]


@functools.cache
def xla_errors(case, dtype):
  arrays, dy = operands(case, dtype)
  wanted = truth(arrays, dy, case.transpose_w)
  found = measure(xla_dot, arrays, dy, case.transpose_w)
  return {name: error(found[name], wanted[name]) for name in wanted}


def check(implementation, case, dtype):
  arrays, dy = operands(case, dtype)
  wanted = truth(arrays, dy, case.transpose_w)
  found = measure(implementation, arrays, dy, case.transpose_w)
  assert found.keys() == wanted.keys()
  for name in wanted:
    assert found[name].shape == wanted[name].shape
    off = error(found[name], wanted[name])
    assert off <= bound(xla_errors(case, dtype)[name], dtype), name


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case, tiling):
  run = functools.partial(gpu_dot, tiling=TILINGS[tiling])
  check(run, case, jnp.bfloat16)


def test_float16():
  check(gpu_dot, CASES[4], jnp.float16)


def scatter_nans(shape, dtype):
  """Fills what the allocator hands out next with NaN."""
  kept = [jnp.full(shape, jnp.nan, dtype) for _ in range(4)]
  jax.block_until_ready(kept)
  for array in kept:
    array.delete()


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(
  "case",
  [
    Case((2056,), 1024, 1216, 48),
    Case((40000,), 128, 192, 8),  # an odd number of pieces to store
    Case((40000,), 128, 64, 8),
  ],
)
def test_every_number_is_written_and_the_same_each_time(case, tiling):
  (x, w, a, b, _), _ = operands(case, jnp.bfloat16)
  run = jax.jit(functools.partial(gpu_dot, tiling=TILINGS[tiling]))
  first = run(x, w, a, b)
  wanted = xla_dot(x, w, a, b)
  assert error(first, exact(wanted)) < 0.01
  for _ in range(30):
    scatter_nans(first.shape, first.dtype)
    again = run(x, w, a, b)
    assert bool(jnp.all(again == first))


def test_zero_gates_leave_the_base_alone_to_the_bit():
  (x, w, a, b, _), _ = operands(Case((256,), 512, 512, 16), jnp.bfloat16)
  gate = jnp.ones((256, 16)).at[100:].set(0)
  y = gpu_dot(x, w, a, b, gate)
  alone = gpu_dot(x, w, a, jnp.zeros_like(b))
  assert bool(jnp.all(y[100:] == alone[100:]))
  assert not bool(jnp.any(jnp.all(y[:100] == alone[:100], axis=1)))


@pytest.mark.parametrize(
  "axes", [(0, None, None, None), (0, None, None, 0), (0, 0, 0, 0)]
)
def test_batches(axes):
  one = Case((64,), 128, 192, 8)
  sets = [operands(one, jnp.bfloat16, seed)[0][:4] for seed in range(3)]
  batch = [
    sets[0][i] if axis is None else jnp.stack([s[i] for s in sets])
    for i, axis in enumerate(axes)
  ]
  y = jax.jit(jax.vmap(gpu_dot, in_axes=axes))(*batch)
  for i in range(3):
    mine = [
      t if axis is None else t[i] for t, axis in zip(batch, axes, strict=True)
    ]
    wanted = truth((*mine, None), None, False)["value"]
    off = error(y[i], wanted)
    assert off <= bound(error(xla_dot(*mine), wanted), jnp.bfloat16)


def test_inside_shard_map():
  (x, w, a, b, _), _ = operands(Case((128,), 128, 192, 8), jnp.bfloat16)
  rows, all_ = PartitionSpec("rows"), PartitionSpec()
  split = jax.shard_map(
    gpu_dot,
    mesh=Mesh(np.array(jax.devices()[:1]), ("rows",)),
    in_specs=(rows, all_, all_, all_),
    out_specs=rows,
  )
  wanted = gpu_dot(x, w, a, b)
  assert bool(jnp.all(jax.jit(split)(x, w, a, b) == wanted))


def test_the_door_takes_the_kernel_where_it_was_measured_ahead():
  kind = jax.devices()[0].device_kind
  if kind not in api.AHEAD_ON_CARDS:
    pytest.skip(f"nothing was measured on {kind}")
  for rows, chosen in ((2048, gpu_dot), (64, xla_dot)):
    x, w, a, b = operands(Case((rows,), 4096, 4096, 16), jnp.bfloat16)[0][:4]
    assert api.choose(x, w, a, transpose_w=False) is chosen
    y = jax.jit(lora_dot)(x, w, a, b)
    assert bool(jnp.all(y == jax.jit(chosen)(x, w, a, b)))


def test_a_large_layer_against_float32():
  (x, w, a, b, _), _ = operands(Case((8192,), 4096, 4096, 64), jnp.bfloat16)
  with jax.default_matmul_precision("highest"):
    wide = [t.astype(jnp.float32) for t in (x, w, a, b)]
    wanted = np.asarray(xla_dot(*wide), np.float64)
  of_xla = error(xla_dot(x, w, a, b), wanted)
  assert error(gpu_dot(x, w, a, b), wanted) <= 2 * of_xla


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_nf4])
def test_quantised_matrices(quantise):
  (x, w, a, b, _), _ = operands(Case((100,), 192, 130, 8), jnp.bfloat16)
  held = quantise(w.astype(jnp.float32))
  wanted = truth((x, held, a, b, None), None, False)["value"]
  y = jax.jit(lora_dot)(x, held, a, b)
  on_host = jax.device_put((x, held, a, b), jax.devices("cpu")[0])
  of_host = error(xla_dot(*on_host), wanted)
  assert error(y, wanted) <= bound(of_host, jnp.bfloat16)


LANED = functools.partial(laned_dot, implementation=gpu_dot)


@pytest.mark.parametrize(
  "route", [laned_dot, LANED, gathered_dot, grouped_dot, None]
)
def test_many_adapters(route):
  case = many_products.Case((128,), 192, 256, 8, 16, gate=(128, 16))
  arrays, ids, dy = many_products.operands(case, jnp.bfloat16)
  run = functools.partial(lora_dot_many, route=route)
  wanted = many_products.truth(arrays, ids, dy, False)
  found = many_products.measure(run, arrays, ids, dy)
  plain = many_products.measure(many_products.ROUTES["laned"], arrays, ids, dy)
  for name in wanted:
    off = error(found[name], wanted[name])
    limit = bound(error(plain[name], wanted[name]), jnp.bfloat16)
    assert off <= limit, name
  alone = np.asarray(ids) < 0
  base = exact(run(*arrays[:2], 0 * arrays[2], arrays[3], ids))
  np.testing.assert_array_equal(exact(found["value"])[alone], base[alone])
