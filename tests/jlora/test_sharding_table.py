# SPDX-License-Identifier: Apache-2.0
"""One table: what is done with a sharded change, over meshes of 8 CPU devices.

Each row is compiled for parameters that lie as a spec says. Its result is that
of one device, its program sends nothing larger than thin factors, and what it
gives lies as `of_adapter` says. Mesh axes x and y are 4 and 2 devices.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg.cython_lapack  # noqa: F401  whose threads are limited below
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from threadpoolctl import threadpool_limits

import jlora
from experiments.lib.machines.collectives import (
  find_collectives,
  largest_gathered,
)
from jlora.evaluation import weights
from jlora.factoring import certificates
from jlora.factoring.factorisers import cheapest
from jlora.loras import Lora, dense
from jlora.sharding import of_adapter
from jlora.views import KERNEL, STACKED
from tests.helpers.small_pairs import draw

M, N, RANK, OVERSAMPLE, EXPERTS = 384, 512, 16, 16, 4
THIN = (M + N) * (RANK + OVERSAMPLE)
# Inner products of all rows of a Krylov space.
SPAN = (6 * (RANK + OVERSAMPLE)) ** 2
MESHES = {
  kind: jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
  for kind in (AxisType.Auto, AxisType.Explicit)
}
AUTO, EXPLICIT = MESHES


@pytest.fixture(scope="module", autouse=True)
def _one_lapack_thread():
  """Eight devices on few cores: LAPACK's own threads only wait."""
  with threadpool_limits(1, user_api="blas"):
    yield


def change_of(*lead):
  """A few directions over noise."""
  low = draw(*lead, M, 8, seed=1) @ draw(*lead, 8, N, seed=2)
  return 0.01 * low + 0.01 * draw(*lead, M, N, seed=3)


@functools.cache
def parameters(is_stack):
  """Base and finetune."""
  lead = (EXPERTS,) * is_stack
  base = draw(*lead, M, N)
  return base, base + change_of(*lead)


@functools.cache
def adapter(is_stack):
  """A Lora of about the change's size, its scale no 1."""
  lead = (EXPERTS,) * is_stack
  factors = (draw(*lead, RANK, n, seed=n) for n in (M, N))
  return Lora(*factors, np.full(lead, 0.01, np.float32))


# A kernel, or experts.
VIEWS = [("kernel", 2, KERNEL), ("kernel", 3, STACKED)]


def extracted(base, finetuned, factor=jlora.factoring.krylov):
  """`extract`, as it is called under jit by those who know the place."""
  found = jlora.extract(
    {"kernel": base}, {"kernel": finetuned}, rank=RANK, factor=factor,
    views=VIEWS,
  )  # fmt: skip
  return found["kernel"]


def certified(base, finetuned, lora):
  return jlora.factoring.certificate(finetuned - base, lora)


def bounded(base, finetuned, lora):
  """The bound of large matrices, for these."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(certificates, "_SHORT", 64)
    return certified(base, finetuned, lora)


def measured(base, finetuned, lora):
  """The figures of `compare`."""
  view = KERNEL if base.ndim == 2 else STACKED
  found, spectral = weights._measure(
    base, finetuned, lora, view, np.dtype(np.float32)
  )
  return found._replace(lora=None), spectral


def adapted(base, finetuned, lora):
  del finetuned
  run = jlora.adapt(lambda params, x: jnp.matmul(params["kernel"], x))
  params = jlora.bind({"kernel": base}, {"kernel": lora}, views=VIEWS)
  return run(params, jnp.ones((N, 8)))


def applied(base, finetuned, lora):
  del finetuned
  merged = jlora.apply({"kernel": base}, {"kernel": lora}, views=VIEWS)
  return merged["kernel"]


def carried(method):
  """A Lora carried between weights of eight directions over noise."""

  def run(base, finetuned, lora):
    source = finetuned - base
    target = source * jnp.linspace(0.5, 1.5, N)[None, :]
    return jlora.extraction.port(
      lora, source, target, method=method, k=8, factor=jlora.factoring.krylov
    )

  return run


def two_of(lora):
  """Two adapters of one module."""
  return [{"w": lora}, {"w": lora}]


@dataclasses.dataclass(frozen=True)
class Row:
  """An operation, and what is true of it.

  Attributes:
    run: (base, finetuned, lora) -> a Lora, a parameter, or figures.
    gives: which of these.
    sends: entries of the largest array that is put together, for each matrix.
    sums: entries of the largest sum over devices; those of `sends` unless said.
    tolerance: of the largest entry, as single values are ill determined.
  """

  run: Callable
  gives: str = "figures"
  sends: int = THIN
  sums: int = THIN
  tolerance: float = 1e-4


OPERATIONS = {
  "krylov": Row(lambda base, ft, _: extracted(base, ft), "lora", sums=SPAN),
  "gram": Row(
    lambda base, ft, _: extracted(base, ft, jlora.factoring.gram),
    "lora",
    sums=M * M,
  ),
  # A short side that is cut is gathered.
  "gram of a cut short side": Row(
    lambda base, ft, _: extracted(base, ft, jlora.factoring.gram),
    "lora",
    sends=M * N,
    sums=M * N,
  ),
  "svd": Row(
    lambda base, ft, _: extracted(base, ft, jlora.factoring.svd),
    "lora",
    sends=M * N,
    sums=M * N,
  ),
  "certificate": Row(bounded),
  "certificate by values": Row(certified, sums=M * M),
  "figures by values": Row(measured, sums=M * M),
  "truncate": Row(lambda b, f, lora: jlora.merging.truncate(lora, 8), "lora"),
  "concat": Row(
    lambda b, f, lora: jlora.merging.concat([lora, lora], [1.0, -3.0]), "lora"
  ),
  "mix": Row(
    lambda b, f, lora: jlora.merging.mix(
      two_of(lora), {"w": np.float32([1, -3])}
    )["w"],
    "lora",
  ),
  "columns": Row(
    lambda b, f, lora: jlora.merging.zip_columns(
      two_of(lora), {"w": draw(2, M)}
    )["w"],
    "lora",
  ),
  "lego": Row(
    lambda b, f, lora: jlora.merging.lego([lora, lora], [1.0, 0.5], rank=8),
    "lora",
  ),
  "random entries": Row(
    lambda b, f, lora: jlora.merging.random_like([{"w": lora}])[0]["w"],
    "lora",
  ),
  "random directions": Row(
    lambda b, f, lora: jlora.merging.random_like(
      [{"w": lora}], keep="spectrum"
    )[0]["w"],
    "lora",
  ),
  "project": Row(carried(jlora.extraction.project), "lora", sums=SPAN),
  "rotate": Row(carried(jlora.extraction.rotate), "lora", sums=SPAN),
  "apply": Row(applied, "parameter"),
  "adapt": Row(adapted),
  "ties": Row(
    lambda base, ft, _: jlora.merge([ft, base + ft], base=base,
                                    method=jlora.merging.ties),
    "parameter",
  ),
  "slerp": Row(
    lambda base, ft, _: jlora.merge([ft, base], method=jlora.merging.slerp),
    "parameter",
  ),
}  # fmt: skip

MATRIX = [
  P("x"), P("y"), P(None, "x"), P(None, "y"), P("x", "y"), P("y", "x"),
  P(("x", "y")), P(None, ("x", "y")), P(("y", "x")), P(None, ("y", "x")), P(),
]  # fmt: skip
STACK = [P("x"), P("x", "y"), P("x", None, "y"), P(None, "x", "y"), P("y", "x")]
LONG = [P(None, "x"), P(None, ("x", "y"))]
SOME = [P("x", "y"), P(("x", "y")), P(None, ("x", "y"))]

# operation: specs of a matrix and a stack over Auto axes, then over Explicit.
TABLE = {
  "krylov": (MATRIX, STACK, [P("x", "y")], [P("x", None, "y")]),
  "gram": (LONG[:1], [P("x", None, "y")], [], []),
  "gram of a cut short side": ([], [], [P("x", "y")], []),
  "svd": ([], [], [P("x", "y")], []),
  "certificate": (SOME, [P("x", "y")], [P("y", "x")], []),
  "certificate by values": (LONG[1:], [P("x")], [], []),
  "figures by values": (LONG[:1], [P("x", None, "y")], LONG[1:], []),
  "truncate": (SOME[:1], [P("x", "y")], [], [P("x", None, "y")]),
  "concat": (MATRIX, STACK, SOME, STACK),
  "mix": (SOME, [P("x", "y")], SOME[:1], [P("x", None, "y")]),
  "columns": (SOME, [P("x", "y")], SOME[:1], [P("x", None, "y")]),
  "lego": (SOME[:1], [P("x", None, "y")], SOME[:1], []),
  "random entries": (SOME[:1], [P("x", "y")], SOME[:1], []),
  "random directions": (SOME[:1], [P("x", "y")], SOME[:1], []),
  "project": (SOME[:1], [], SOME[:1], []),
  "rotate": (SOME, [], SOME[:1], []),
  "apply": (MATRIX, STACK, SOME, STACK),
  "adapt": (MATRIX, [], SOME, []),
  "ties": (SOME, [P("x", None, "y")], SOME[:1], []),
  "slerp": (SOME, [P("x", None, "y")], SOME[:1], []),
}
KINDS = ((AUTO, False), (AUTO, True), (EXPLICIT, False), (EXPLICIT, True))
CASES = [
  pytest.param(
    name, kind, spec, is_stack,
    id=f"{name}-{kind.name}-{'stack' * is_stack}{tuple(spec)}",
  )
  for name, columns in TABLE.items()
  for (kind, is_stack), specs in zip(KINDS, columns, strict=True)
  for spec in specs
]  # fmt: skip


def placed(kind, spec, is_stack):
  """Parameters and adapter on a mesh, and where the adapter lies."""
  base, finetuned = parameters(is_stack)
  own = NamedSharding(MESHES[kind], spec)
  lies = of_adapter(own, STACKED if is_stack else KERNEL, base.shape)
  given = base, finetuned, adapter(is_stack)
  return jax.device_put(given, (own, own, lies)), own, lies


@functools.cache
def alone(name, is_stack):
  """What one device gives."""
  given = *parameters(is_stack), adapter(is_stack)
  return as_values(jax.jit(OPERATIONS[name].run)(*given))


def as_values(found):
  """Arrays that are determined: of a Lora its change."""
  found = jax.tree.map(np.asarray, found)
  return [np.asarray(dense(found))] if isinstance(found, Lora) else (
    jax.tree.leaves(found)
  )  # fmt: skip


def check_program(row, text, matrices):
  """Nothing larger than allowed is put together from parts, or summed."""
  assert largest_gathered(text) <= matrices * row.sends
  sizes = [found.entries for found in find_collectives(text)]
  assert max(sizes, default=0) <= matrices * max(row.sums, row.sends)


def check_places(found, gives, own, lies):
  """All lies as its parameter; ones, under jit, as the types say."""
  wanted = {"lora": lies, "parameter": own, "figures": None}[gives]
  for leaf, place in zip(
    jax.tree.leaves(found), jax.tree.leaves(wanted), strict=False
  ):
    if leaf.ndim > 1 or EXPLICIT in place.mesh.axis_types:
      assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.parametrize(("name", "kind", "spec", "is_stack"), CASES)
def test_the_table(name, kind, spec, is_stack):
  row = OPERATIONS[name]
  given, own, lies = placed(kind, spec, is_stack)
  program = jax.jit(row.run).lower(*given).compile()
  check_program(row, program.as_text(), EXPERTS if is_stack else 1)
  found = program(*given)
  check_places(found, row.gives, own, lies)
  wanted = alone(name, is_stack)
  for one, other in zip(as_values(found), wanted, strict=True):
    size = max(np.abs(other).max(), 1e-30)
    np.testing.assert_allclose(one, other, atol=row.tolerance * size, rtol=0)


@pytest.mark.parametrize("kind", MESHES)
def test_compare(kind):
  """From parameters on a mesh, the figures of one device."""
  (base, finetuned, lora), *_ = placed(kind, P(None, ("x", "y")), False)
  leaves = ({"w": base}, {"w": finetuned}, {"w": lora})
  found = jlora.compare(*leaves).rows["w"]
  alone = jax.tree.map(jnp.asarray, jax.device_get(leaves))
  wanted = jlora.compare(*alone).rows["w"]
  for name in ("relative_error", "spectral_error", "mse", "effective_rank"):
    assert found[name] == pytest.approx(wanted[name], rel=1e-4), name


def test_the_shape_takes_krylovs_own_path():
  assert cheapest((M, N), RANK) is jlora.factoring.krylov
  assert 4 * THIN < M * N  # so a shard of a gather would be seen too


def test_the_table_fails_where_a_change_is_gathered():
  """A program that gathers is seen, and a result that lies elsewhere."""
  given, own, lies = placed(AUTO, P("x", "y"), False)
  gather = jax.jit(
    lambda base, ft, lora: jax.lax.with_sharding_constraint(
      ft - base, NamedSharding(MESHES[AUTO], P())
    )
  )
  with pytest.raises(AssertionError):
    check_program(
      OPERATIONS["krylov"], gather.lower(*given).compile().as_text(), 1
    )
  with pytest.raises(AssertionError):
    check_places(gather(*given), "parameter", own, lies)
  svd = jax.jit(OPERATIONS["svd"].run).lower(*given).compile().as_text()
  with pytest.raises(AssertionError):
    check_program(OPERATIONS["krylov"], svd, 1)
