# SPDX-License-Identifier: Apache-2.0
"""The product in batches and on meshes: the same numbers, the right traffic."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.lora_dot import Place, Scaled, lora_dot, tpu_dot, xla_dot
from pallas_kernels.lora_dot.gradients import differentiable
from pallas_kernels.lora_dot.partitioning import vary_alike
from tests.pallas_kernels.lora_dot.products import Case, error, operands, truth

KERNEL = functools.partial(tpu_dot, interpret=True)
CASE = Case((2, 16), 64, 48, 3, (2, 1, 3))
# w's axes -> (axes of y's columns, collectives in the forward program)
PLACES = {
  "columns": (P(None, "n"), "n", []),
  "depth": (P("k", None), None, ["all-reduce"] * 2),
  "both": (P("k", "n"), "n", ["all-reduce"] * 2),
  "with-the-rows": (P("d", "n"), "n", ["all-gather"]),
  "everywhere": (P(), None, []),
}
AXES = ("d", "k", "n")


def auto_mesh():
  return Mesh(np.array(jax.devices()).reshape(2, 2, 2), AXES)


def value_and_gradients(f, arrays, dy):
  y, pullback = jax.vjp(f, *arrays)
  return y, *pullback(dy)


def check(found, case, arrays, dy):
  wanted = truth(arrays, dy, case.transpose_w).values()
  for t, exact in zip(found, wanted, strict=True):
    assert error(t, exact) < 1e-6


def placed(mesh, arrays, spec, transpose_w):
  x, w, a, b, gate = arrays
  put = lambda t, spec: jax.device_put(t, NamedSharding(mesh, spec))  # noqa: E731
  sides = (*spec, None, None)[:2]
  return (
    put(x, P("d")),
    put(w, P(*(sides[::-1] if transpose_w else sides))),
    put(a, P()),
    put(b, P()),
    put(gate, P("d")),
  )


def collectives(program):
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  return re.findall(rf" ({kinds})(?:-start)?\(", program)


@pytest.mark.parametrize(
  ("place", "transpose_w"),
  [*((place, False) for place in PLACES), ("both", True)],
)
def test_under_jit_on_a_mesh(place, transpose_w):
  spec, columns, traffic = PLACES[place]
  case = CASE._replace(transpose_w=transpose_w)
  arrays, dy = operands(case, jnp.float32)
  put = placed(auto_mesh(), arrays, spec, transpose_w)
  f = functools.partial(KERNEL, transpose_w=transpose_w)
  check(
    jax.jit(functools.partial(value_and_gradients, f))(put, dy),
    case,
    arrays,
    dy,
  )
  program = jax.jit(f).lower(*put).compile()
  there = (*program.output_shardings.spec, None, None)[:3]
  assert there == ("d", None, columns)
  assert collectives(program.as_text()) == traffic


@pytest.mark.parametrize("transpose_w", [False, True])
def test_on_a_mesh_told_beforehand(transpose_w):
  case = CASE._replace(transpose_w=transpose_w)
  arrays, dy = operands(case, jnp.float32)
  mesh, w = auto_mesh(), P("n", "k") if transpose_w else P("k", "n")
  run = functools.partial(KERNEL, place=Place(mesh, P("d"), w))
  f = functools.partial(run, transpose_w=transpose_w)
  put = placed(mesh, arrays, P("k", "n"), transpose_w)
  found = jax.jit(functools.partial(value_and_gradients, f))(put, dy)
  check(found, case, arrays, dy)
  program = jax.jit(f).lower(*put).compile().as_text()
  assert collectives(program) == ["all-reduce"] * 2


@pytest.mark.parametrize("many_w", [False, True])
def test_batches_on_a_mesh_told_beforehand(many_w):
  case = CASE._replace(gate=(3,))
  each = [operands(case, jnp.float32, seed)[0] for seed in range(2)]
  x, w, a, b, gate = each[0]
  xs = jnp.stack([arrays[0] for arrays in each])
  ws = jnp.stack([arrays[1] for arrays in each]) if many_w else w
  run = functools.partial(KERNEL, place=Place(auto_mesh(), P("d"), P("k", "n")))
  axes = (0, 0 if many_w else None, None, None, None)
  found = jax.jit(jax.vmap(run, in_axes=axes))(xs, ws, a, b, gate)
  for i in range(2):
    alone = (xs[i], ws[i] if many_w else w, a, b, gate)
    assert error(found[i], truth(alone, None, False)["value"]) < 1e-6


def test_partial_sums_are_of_rank_numbers_a_row():
  arrays, _ = operands(CASE, jnp.float32)
  put = placed(auto_mesh(), arrays, P("k", None), False)
  text = jax.jit(KERNEL).lower(*put).compile().as_text()
  shapes = re.findall(r"= f32\[([\d,]*)\]\S* all-reduce", text)
  assert sorted(shapes) == ["16,3", "16,48"]


def test_codes_on_a_mesh():
  arrays, _ = operands(CASE, jnp.float32)
  x, w, a, b, gate = placed(auto_mesh(), arrays, P("k", "n"), False)
  codes = jnp.round(w * 20).astype(jnp.int8)
  for scale in (jnp.full((1, 48), 0.05), jnp.full((64, 1), 0.05)):
    held = Scaled(codes, scale)
    found = jax.jit(KERNEL)(x, held, a, b, gate)
    wanted = truth((x, held, a, b, gate), None, False)["value"]
    assert error(found, wanted) < 1e-6


@pytest.mark.parametrize("run", [KERNEL, xla_dot])
@pytest.mark.parametrize("spec", [P(None, "n"), P("k", "n")])
def test_axes_that_are_part_of_types(spec, run):
  mesh = jax.make_mesh((2, 2, 2), AXES)
  arrays, dy = operands(CASE, jnp.float32)
  f = functools.partial(lora_dot, implementation=run)
  with jax.set_mesh(mesh):
    put = placed(mesh, arrays, spec, False)
    dy_put = jax.device_put(dy, NamedSharding(mesh, P("d", None, "n")))
    found = jax.jit(functools.partial(value_and_gradients, f))(put, dy_put)
  assert found[0].sharding.spec == P("d", None, "n")
  check([np.asarray(t) for t in found], CASE, arrays, dy)


def of_xla(x, w, a, b, gate, transpose_w, return_u):
  y = xla_dot(x, w, a, b, gate, transpose_w=transpose_w)
  return (y, x @ a.T) if return_u else y


def ruled(*arrays):
  """The gradient rule around XLA; the interpreter takes no check_vma."""
  return differentiable(of_xla, False, *vary_alike(arrays))


@pytest.mark.parametrize(("run", "check_vma"), [(KERNEL, False), (ruled, True)])
def test_gradients_inside_shard_map(run, check_vma):
  case = Case((16,), 64, 48, 3, (3,))
  arrays, dy = operands(case, jnp.float32)
  f = jax.shard_map(
    run,
    mesh=auto_mesh(),
    in_specs=(P("d"), P(None, "n"), P(), P(None, "n"), P()),
    out_specs=P("d", "n"),
    check_vma=check_vma,
  )
  check(
    jax.jit(functools.partial(value_and_gradients, f))(arrays, dy),
    case,
    arrays,
    dy,
  )


@pytest.mark.parametrize(
  ("batched", "gate"),
  [
    ((True, False, False, False, False), (5, 2)),
    ((False, False, False, False, True), (2,)),
    ((True, False, False, False, True), (5, 2)),
    ((True, False, True, True, True), (5, 2)),
    ((True, True, True, True, False), (2,)),
  ],
)
def test_vmap(batched, gate):
  case = Case((5,), 20, 30, 2, gate)
  each = [operands(case, jnp.float32, seed) for seed in range(3)]
  one, dy = each[0]
  arrays = [
    jnp.stack([arrays[i] for arrays, _ in each]) if many else one[i]
    for i, many in enumerate(batched)
  ]
  axes = tuple(0 if many else None for many in batched)
  run = lambda *arrays: value_and_gradients(KERNEL, arrays, dy)  # noqa: E731
  found = jax.jit(jax.vmap(run, in_axes=axes))(*arrays)
  for i in range(3):
    alone = tuple(
      t[i] if many else t for t, many in zip(arrays, batched, strict=True)
    )
    check([t[i] for t in found], case, alone, dy)


def test_a_batch_of_rows_is_one_product():
  x, w, a, b = (
    jnp.ones(shape) for shape in ((3, 5, 4), (4, 6), (2, 4), (2, 6))
  )
  run = jax.vmap(KERNEL, in_axes=(0, None, None, None))
  text = str(jax.make_jaxpr(run)(x, w, a, b))
  assert "f32[15,4]" in text
  assert "f32[3,4,6]" not in text
