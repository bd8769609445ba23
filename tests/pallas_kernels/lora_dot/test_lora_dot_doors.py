# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, what is refused, and what a gradient costs."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.lora_dot import (
  Nf4,
  Place,
  Scaled,
  api,
  lora_dot,
  tpu_dot,
  xla_dot,
)
from pallas_kernels.lora_dot.hopper.call import gpu_dot
from pallas_kernels.lora_dot.quantised import quantise_nf4
from pallas_kernels.lora_dot.tpu import call
from pallas_kernels.lora_dot.tpu.tilings import CHIPS, MIB, Tiling
from tests.pallas_kernels.lora_dot.products import Case, operands

KERNEL = functools.partial(tpu_dot, interpret=True)


def shapes(m, k, n, r, dtype=jnp.bfloat16):
  return tuple(
    jax.ShapeDtypeStruct(shape, dtype) for shape in ((m, k), (k, n), (r, k))
  )


@pytest.mark.parametrize(
  ("chip", "sizes", "chosen"),
  [
    ("v5e", (8192, 4096, 4096, 16), tpu_dot),
    ("v6e", (16384, 4096, 4096, 64), tpu_dot),
    ("v6e", (64, 4096, 4096, 16), xla_dot),
    ("v6e", (8192, 4096, 4096, 128), xla_dot),
    ("v6e", (8192, 8192, 28672, 16), xla_dot),
    ("v5p", (8192, 4096, 4096, 16), xla_dot),
    (None, (8192, 4096, 4096, 16), xla_dot),
  ],
)
def test_choice_is_by_the_table(chip, sizes, chosen, monkeypatch):
  monkeypatch.setattr(api, "chip_here", lambda: chip)
  monkeypatch.setattr(api, "is_local", lambda: True)
  assert api.choose(*shapes(*sizes), transpose_w=False) is chosen
  monkeypatch.setattr(api, "is_local", lambda: False)
  assert api.choose(*shapes(*sizes), transpose_w=False) is xla_dot


@pytest.mark.parametrize(
  ("sizes", "dtype", "chosen"),
  [
    ((2048, 4096, 4096, 16), jnp.bfloat16, gpu_dot),
    ((8192, 1024, 4096, 1024), jnp.bfloat16, gpu_dot),
    ((2048, 14336, 4096, 1), jnp.bfloat16, gpu_dot),
    ((512, 4096, 14336, 16), jnp.bfloat16, xla_dot),
    ((2048, 4096, 1024, 16), jnp.bfloat16, xla_dot),  # too few blocks
    ((2560, 4096, 4096, 16), jnp.bfloat16, xla_dot),  # a last turn half empty
    ((8192, 2048, 2048, 16), jnp.bfloat16, xla_dot),  # not measured
    ((8192, 4096, 4096, 1025), jnp.bfloat16, xla_dot),
    ((8192, 4096, 4100, 16), jnp.bfloat16, xla_dot),  # the kernel refuses
    ((8192, 4096, 4096, 16), jnp.float32, xla_dot),
  ],
)
def test_choice_on_a_card_is_by_its_table(sizes, dtype, chosen, monkeypatch):
  kind = "NVIDIA H100 80GB HBM3"
  monkeypatch.setattr(api, "kind_here", lambda: kind)
  monkeypatch.setattr(api, "is_local", lambda: True)
  assert api.choose(*shapes(*sizes, dtype), transpose_w=False) is chosen
  turned = (*sizes[:1], sizes[2], sizes[1], sizes[3])
  x, w, a = shapes(*turned, dtype)
  x, a = (jax.ShapeDtypeStruct((t.shape[0], w.shape[1]), dtype) for t in (x, a))
  assert api.choose(x, w, a, transpose_w=True) is chosen
  monkeypatch.setattr(api, "kind_here", lambda: "NVIDIA H100 PCIe")
  assert api.choose(*shapes(*sizes, dtype), transpose_w=False) is xla_dot


def test_one_device_is_local_inside_shard_map():
  mesh = Mesh(np.array(jax.devices()), ("d",))
  seen = []

  def f(x):
    seen.append(api.is_local())
    return x

  spec = PartitionSpec("d")
  jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones(8))
  assert seen == [True]
  assert not api.is_local()


def test_one_trace_serves_all_calls():
  traces = []

  @jax.jit
  def f(*arrays):
    traces.append(1)
    return lora_dot(*arrays, implementation=KERNEL)

  case = Case((4,), 8, 8, 2, (2,))
  for seed in range(3):
    f(*operands(case, jnp.float32, seed)[0])
  assert len(traces) == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(w=jnp.ones((5, 3))), "K = 5"),
    (dict(a=jnp.ones((2, 5))), "a \\(2, 5\\)"),
    (dict(b=jnp.ones((3, 3))), "b \\(3, 3\\)"),
    (dict(w=jnp.ones((2, 4, 3))), "jax.vmap"),
    (dict(gate=jnp.ones((7, 2))), "does not broadcast to \\(6, 2\\)"),
    (dict(w=Scaled(jnp.ones((4, 3), jnp.int8), jnp.ones(3))), "scale"),
    (dict(w=Scaled(jnp.ones((4, 3), int), jnp.ones((1, 3)))), "codes are"),
  ],
)
def test_shapes_that_make_no_product(change, message):
  good = dict(
    x=jnp.ones((6, 4)),
    w=jnp.ones((4, 3)),
    a=jnp.ones((2, 4)),
    b=jnp.ones((2, 3)),
  )
  for door in (lora_dot, tpu_dot):
    with pytest.raises(ValueError, match=message):
      door(**(good | change))


@pytest.mark.parametrize(
  ("dtype", "r", "more", "message"),
  [
    (jnp.float16, 2, dict(interpret=True), "x is float16"),
    (jnp.float32, 1025, dict(interpret=True), "rank 1025"),
    (jnp.float32, 2, {}, "no TPU here"),
    (
      *(jnp.float32, 2),
      dict(interpret=True, tiling=Tiling(128, 128, 100, MIB)),
      "bk 100",
    ),
    (
      *(jnp.float32, 2),
      dict(interpret=True, tiling=Tiling(128, 128, 128, 2**40)),
      "over the 134217728 of v5e",
    ),
    (
      *(jnp.float32, 2),
      dict(interpret=True, tiling=Tiling(256, 256, 256, MIB // 4)),
      "blocks fill",
    ),
    (
      *(jnp.float32, 2),
      dict(interpret=True, tiling=Tiling(128, 128, 300, MIB, True)),
      "not cut evenly",
    ),
  ],
)
def test_what_the_kernel_does_not_cover(dtype, r, more, message):
  (x, w, a, b, _), _ = operands(Case((300,), 300, 300, r), dtype)
  run = functools.partial(tpu_dot, **more)
  with pytest.raises(ValueError, match=message):
    lora_dot(x, w, a, b, implementation=run)


def test_a_quantised_w_has_no_gradient():
  (x, w, a, b, _), _ = operands(Case((4,), 8, 8, 2), jnp.float32)
  codes = w.astype(jnp.int8)
  f = lambda scale: KERNEL(x, Scaled(codes, scale), a, b).sum()  # noqa: E731
  with pytest.raises(ValueError, match="stop_gradient"):
    jax.grad(f)(jnp.ones((1, 8)))


def products_in(jaxpr):
  """Shapes of all matrix products of a program, inner ones included."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation.outvars[0].aval.shape
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda p: isinstance(p, jax.extend.core.ClosedJaxpr),
    ):
      if isinstance(inner, jax.extend.core.ClosedJaxpr):
        yield from products_in(inner.jaxpr)
      elif isinstance(inner, jax.extend.core.Jaxpr):
        yield from products_in(inner)


@pytest.mark.parametrize("run", [xla_dot, KERNEL])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_frozen_w_costs_no_gradient(run, jitted):
  (x, w, a, b, _), _ = operands(Case((24,), 40, 56, 2), jnp.float32)

  def loss(adapter, x, w):
    return (jax.jit(run) if jitted else run)(x, w, *adapter).sum()

  of_w = {(40, 56), (56, 40)}
  frozen = jax.make_jaxpr(jax.grad(loss))((a, b), x, w)
  assert not of_w & set(products_in(frozen.jaxpr))
  # The first layer: nothing but da and db, and no dx either.
  assert (24, 40) not in set(products_in(frozen.jaxpr))
  trained = jax.make_jaxpr(jax.grad(loss, argnums=2))((a, b), x, w)
  assert of_w & set(products_in(trained.jaxpr))


def test_a_rank_of_a_thousand():
  (x, w, a, b, _), _ = operands(Case((16,), 32, 24, 1000), jnp.float32)
  found, wanted = KERNEL(x, w, a, b), xla_dot(x, w, a, b)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-2)


def test_four_bits_lie_on_one_device():
  (x, w, a, b, _), _ = operands(Case((8,), 64, 8, 2), jnp.float32)
  w = quantise_nf4(w)
  place = Place(
    Mesh(np.array(jax.devices()[:1]), ("d",)), PartitionSpec(), PartitionSpec()
  )
  with pytest.raises(ValueError, match="call it inside shard_map"):
    KERNEL(x, w, a, b, place=place)
  broken = Nf4(w.codes[1:], w.absmax, w.k)
  with pytest.raises(ValueError, match="of 64 rows: needed are uint8"):
    lora_dot(x, broken, a, b)


def test_chips_are_told_by_their_kind():
  assert call.chip_here() is None
  assert set(call.CHIP_OF_KIND.values()) == set(CHIPS)


def test_a_mesh_whose_devices_are_not_here_is_refused_with_a_way_out():
  arrays = operands(Case((4,), 8, 8, 2), jnp.bfloat16)[0]
  device = jax.sharding.AbstractDevice(
    device_kind="TPU v5e", num_cores=1, platform="tpu"
  )
  for size, refused in ((2, True), (1, False)):
    mesh = jax.sharding.AbstractMesh((size,), ("d",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
      run = functools.partial(jax.eval_shape, KERNEL, *arrays)
      if refused:
        with pytest.raises(ValueError, match="inside shard_map, give place="):
          run()
      else:
        assert run().shape == (4, 8)
