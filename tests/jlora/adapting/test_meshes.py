# SPDX-License-Identifier: Apache-2.0
"""Adapted functions on 8 virtual devices: shard_map, and jit with shardings."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jlora.adapting.binding import bind
from jlora.adapting.rows import adapt_rows
from jlora.adapting.transforms import adapt, apply
from jlora.loras import Lora, exchange

K, N, RANK = 16, 8, 3


def draw(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


X, W = draw(0, 8, K), draw(1, K, N)
LORAS = {"w": Lora(draw(2, RANK, K), draw(3, RANK, N), jnp.float32(0.5))}


def mesh_of(kind=AxisType.Auto):
  return jax.make_mesh((2, 4), ("rows", "k"), axis_types=(kind, kind))


def mapped(fn, in_specs, out_specs, check_vma=True):
  return jax.shard_map(
    fn,
    mesh=mesh_of(),
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=check_vma,
  )


MAPPED = {
  "on the depth": mapped(
    lambda x, w: lax.psum(x @ w, "k"), (P("rows", "k"), P("k")), P("rows")
  ),
  "on the columns": mapped(
    lambda x, w: x @ w, (P("rows"), P(None, "k")), P("rows", "k")
  ),
  "gathered within": mapped(
    lambda x, w: x @ lax.all_gather(w, "k", axis=1, tiled=True),
    (P("rows"), P(None, "k")), P("rows"), check_vma=False,
  ),
  "transposed": mapped(
    lambda x, w: lax.psum(jnp.tanh(x) @ w.T, "k"),
    (P("rows", "k"), P(None, "k")), P("rows"),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_shard_map(name):
  fn = MAPPED[name]
  w = W.T if name == "transposed" else W
  loras = LORAS
  if name == "transposed":
    loras = {"w": exchange(LORAS["w"])}

  def loss(combine, run):
    def of(loras, x):
      out = run(x, combine({"w": w}, loras)["w"])
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(loras, X)

  with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = loss(bind, adapt(fn))
  wanted = loss(apply, fn)
  for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spec", [P("k"), P(None, "k"), P("rows", "k"), P()])
def test_jit_with_shardings_gathers_no_weight(spec):
  mesh = mesh_of()
  place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
  params, x = {"w": place(W, spec)}, place(X, P("rows"))
  run = jax.jit(adapt(lambda params, x: jnp.tanh(x @ params["w"])))
  found = run(bind(params, LORAS), x)
  wanted = jnp.tanh(X @ apply({"w": W}, LORAS)["w"])
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_rows_on_a_mesh():
  mesh = mesh_of()
  place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
  bank = jax.tree.map(lambda x: jnp.stack([x, -x, 2 * x]), LORAS)
  ids = jnp.arange(8) % 4 - 1
  rows = jax.jit(adapt_rows(lambda params, x: jnp.tanh(x @ params["w"])))
  wanted = rows({"w": W}, bank, ids, X)
  found = rows(
    {"w": place(W, P(None, "k"))}, bank, place(ids, P("rows")),
    place(X, P("rows")),
  )  # fmt: skip
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_explicit_axes():
  mesh = mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh):
    params = {"w": jax.device_put(W, P(None, "k"))}
    x = jax.device_put(X, P("rows"))
    run = jax.jit(adapt(lambda params, x: x @ params["w"]))
    found = run(bind(params, LORAS), x)
    assert jax.typeof(found).sharding.spec == P("rows", "k")
  wanted = X @ apply({"w": W}, LORAS)["w"]
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
