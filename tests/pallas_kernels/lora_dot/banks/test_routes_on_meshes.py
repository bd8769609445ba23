# SPDX-License-Identifier: Apache-2.0
"""Many adapters in batches and on meshes: bank everywhere, rows in parts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.lora_dot.banks.routes import lora_dot_many
from tests.pallas_kernels.lora_dot.many_products import (
  QUANTITIES,
  ROUTES,
  Case,
  measure,
  operands,
  truth,
)
from tests.pallas_kernels.lora_dot.products import error

CASE = Case((32,), 12, 16, 4, 3, gate=(32, 3))
every_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
XLA_ROUTES = {name: ROUTES[name] for name in ("laned", "grouped", "gathered")}


def mesh():
  return Mesh(np.array(jax.devices()), "d")


def put(arrays, ids, dy):
  spec = lambda rows: NamedSharding(mesh(), P("d") if rows else P())  # noqa: E731
  where = (spec(True), *([spec(False)] * 3), spec(True))
  return (
    tuple(map(jax.device_put, arrays, where)),
    jax.device_put(ids, spec(True)),
    jax.device_put(dy, spec(True)),
  )


def check(found, wanted):
  assert found.keys() == wanted.keys()
  for quantity, t in found.items():
    assert error(t, wanted[quantity]) < 1e-6, quantity


def collectives(program):
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  return re.findall(rf" ({kinds})(?:-start)?\(", program)


@every_route
def test_under_jit_on_a_mesh(route):
  given = operands(CASE, jnp.float32)
  found = jax.jit(functools.partial(measure, route))(*put(*given))
  check(found, truth(*given, False))


# The interpreter takes no check_vma.
@pytest.mark.parametrize(
  ("name", "check_vma"),
  [*((name, True) for name in XLA_ROUTES), ("laned-tpu", False)],
)
def test_inside_shard_map(name, check_vma):
  route = ROUTES[name]
  given = operands(CASE, jnp.float32)

  def run(x, w, a, b, ids, gate, transpose_w):
    f = functools.partial(route, transpose_w=transpose_w)
    return jax.shard_map(
      f,
      mesh=mesh(),
      in_specs=(P("d"), P(), P(), P(), P("d"), P("d")),
      out_specs=P("d"),
      check_vma=check_vma,
    )(x, w, a, b, ids, gate)

  arrays, ids, dy = put(*given)
  found = jax.jit(functools.partial(measure, run))(arrays, ids, dy)
  check(found, truth(*given, False))
  x, w, a, b, gate = arrays
  forward = jax.jit(functools.partial(run, transpose_w=False))
  program = forward.lower(x, w, a, b, ids, gate).compile()
  assert collectives(program.as_text()) == []
  assert program.output_shardings.spec[0] == "d"


@pytest.mark.parametrize("name", ["laned", "gathered"])
def test_rows_need_no_traffic_where_none_is_sorted(name):
  (x, w, a, b, _), ids, _ = put(*operands(CASE, jnp.float32))
  run = jax.jit(functools.partial(lora_dot_many, route=XLA_ROUTES[name]))
  program = run.lower(x, w, a, b, ids).compile()
  assert collectives(program.as_text()) == []


@pytest.mark.parametrize(
  ("name", "many_banks"),
  [*((name, False) for name in ROUTES), ("grouped", True), ("gathered", True)],
)
def test_vmap(name, many_banks):
  route = ROUTES[name]
  case = Case((5,), 6, 8, 3, 2, gate=(5, 2))
  each = [operands(case, jnp.float32, seed) for seed in range(3)]
  (x, w, a, b, gate), ids, dy = jax.tree.map(lambda *t: jnp.stack(t), *each)
  if not many_banks:
    w, a, b = w[0], a[0], b[0]
  bank = 0 if many_banks else None
  axes = ((0, bank, bank, bank, 0), 0, 0)
  run = jax.jit(jax.vmap(functools.partial(measure, route), in_axes=axes))
  found = run((x, w, a, b, gate), ids, dy)
  for i, (arrays, ids, dy) in enumerate(each):
    if not many_banks:
      arrays = (arrays[0], w, a, b, arrays[4])
    wanted = truth(arrays, ids, dy, False)
    check({name: found[name][i] for name in QUANTITIES}, wanted)


def test_a_batch_of_rows_meets_the_bank_once():
  one = jnp.ones
  given = one((3, 5, 4)), one((4, 6)), one((2, 1, 4)), one((2, 1, 6))
  ids = jnp.zeros((3, 5), int)
  run = jax.vmap(ROUTES["grouped"], in_axes=(0, None, None, None, 0))
  text = str(jax.make_jaxpr(run)(*given, ids))
  assert text.count(" ragged_dot_general[") == 2
  assert "f32[15,4]" in text
