# SPDX-License-Identifier: Apache-2.0
"""One table: every merge of Loras against every property it should have.

Above all that only changes count: the same adapters in another gauge, (R a,
R⁻ᵀ b), must give the same. A sum of factors, as PEFT's `linear`, does not.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora.loras import Lora

IN, OUT = 16, 8


@dataclasses.dataclass(frozen=True)
class Row:
  """A method with settings, and what is true of it.

  Attributes:
    method: the method.
    symmetric: adapters are interchangeable, with their weights.
    whole: one adapter alone comes out.
    leaves_out: weight 0 is as if the adapter were not there. It is there in
      the space of all, whose coordinates are what some methods cut by.
    has_door: it takes Loras and weights itself; others have tests of their own.
  """

  method: Callable
  symmetric: bool = True
  whole: bool = True
  leaves_out: bool = True
  has_door: bool = True


def mixed(loras, weights):
  """`mix` of adapters of one module."""
  adapters = [{"w": lora} for lora in loras]
  return jlora.merging.mix(adapters, {"w": weights})["w"]


def zipped(loras, weights):
  """`zip_columns` with one coefficient for all inputs."""
  adapters = [{"w": lora} for lora in loras]
  return jlora.merging.zip_columns(adapters, {"w": weights[:, None]})["w"]


def core(method, **settings):
  return functools.partial(jlora.merging.core_space, method=method, **settings)


CUT = {"whole": False, "leaves_out": False}
DRAWN = {"symmetric": False, **CUT}
METHODS = {
  "concat": Row(jlora.merging.concat),
  "svd_merge": Row(functools.partial(jlora.merging.svd_merge, rank=7)),
  "svd_merge cut": Row(
    functools.partial(jlora.merging.svd_merge, rank=2), whole=False
  ),
  "core task_arithmetic": Row(core(jlora.merging.task_arithmetic)),
  "core ties": Row(core(jlora.merging.ties, density=1.0)),
  "core ties cut": Row(core(jlora.merging.ties, density=0.3, rank=3), **CUT),
  "core dare": Row(core(jlora.merging.dare, density=0.5), **DRAWN),
  "core tsv": Row(core(jlora.merging.tsv)),
  "core iso_c": Row(core(jlora.merging.iso_c), whole=False),
  "knots ties": Row(functools.partial(jlora.merging.knots, density=1.0)),
  "knots dare": Row(
    functools.partial(
      jlora.merging.knots, method=jlora.merging.dare, density=0.5
    ),
    **DRAWN,
  ),
  "lego": Row(functools.partial(jlora.merging.lego, rank=4), whole=False),
  "lego of all units": Row(functools.partial(jlora.merging.lego, rank=7)),
  "mix": Row(mixed, has_door=False),
  "columns": Row(zipped, has_door=False),
}
every = pytest.mark.parametrize("name", METHODS)
WEIGHTS = np.float32([1, 0.5, 0.8])


@functools.cache
def compiled(name):
  """The merge with one program for all Loras of these shapes."""
  return jax.jit(METHODS[name].method)


# Worked on by the host, where nothing is compiled.
ON_HOST = ("concat", "svd_merge", "svd_merge cut")


def run(name, loras, weights=WEIGHTS):
  """The change that comes out, (in, out)."""
  merge = METHODS[name].method if name in ON_HOST else compiled(name)
  return change(merge(loras, np.float32(weights)))


def change(lora):
  a, b, scale = (np.float64(x) for x in (lora.a, lora.b, lora.scale))
  return scale[..., None, None] * (np.swapaxes(a, -1, -2) @ b)


def draw(seed=0, ranks=(2, 3, 2), leading=()):
  rng = np.random.default_rng(seed)
  return [
    Lora(
      *(rng.standard_normal((*leading, r, n), np.float32) for n in (IN, OUT)),
      np.float32(rng.uniform(0.5, 2, leading)),
    )
    for r in ranks
  ]


def gauged(lora, rng):
  """The same change of other factors."""
  turn = np.linalg.qr(rng.standard_normal((lora.rank, lora.rank)))[0]
  turn = turn * rng.uniform(0.5, 2, lora.rank)
  return Lora(
    np.float32(turn @ lora.a),
    np.float32(np.linalg.inv(turn).T @ lora.b) / np.float32(2),
    lora.scale * np.float32(2),
  )


def close(found, wanted, tolerance=2e-4):
  np.testing.assert_allclose(found, wanted, atol=tolerance * IN**0.5)


def check_gauge(merge, seed):
  rng = np.random.default_rng(seed)
  loras = draw(seed, ranks=(2, 2, 2) if merge is peft_linear else (2, 3, 2))
  close(merge([gauged(x, rng) for x in loras]), merge(loras))


def peft_linear(loras, weights=WEIGHTS):
  """Sums of the As and of the Bs: cross terms."""
  roots = [np.sqrt(w * x.scale) for w, x in zip(weights, loras, strict=True)]
  a = sum(root * x.a for root, x in zip(roots, loras, strict=True))
  b = sum(root * x.b for root, x in zip(roots, loras, strict=True))
  return a.T @ b


@every
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 999))
def test_only_changes_count(name, seed):
  check_gauge(functools.partial(run, name), seed)


def test_the_gauge_test_catches_a_sum_of_factors():
  for seed in range(6):
    with pytest.raises(AssertionError):
      check_gauge(peft_linear, seed)


@every
def test_adapters_are_interchangeable(name):
  loras = draw()
  found = run(name, loras[::-1], WEIGHTS[::-1])
  if METHODS[name].symmetric:
    close(found, run(name, loras))
  else:  # entries are drawn by an adapter's place
    assert not np.allclose(found, run(name, loras), atol=1e-2)


@pytest.mark.parametrize("name", [*ON_HOST[:2], "core tsv", "knots ties"])
def test_one_adapter_comes_out(name):
  lora = draw()[1]
  merge = METHODS[name].method
  if name not in ON_HOST:
    merge = jax.jit(merge)
  close(change(merge([lora], np.float32([1]))), change(lora))


@every
def test_weight_0_leaves_an_adapter_out(name):
  loras, others = draw(), draw(1)
  found = run(name, loras, [0, 1, 0])
  again = run(name, [others[0], loras[1], others[2]], [0, 1, 0])
  assert np.allclose(found, again, atol=1e-3) == METHODS[name].leaves_out
  assert np.allclose(found, change(loras[1]), atol=1e-3) == METHODS[name].whole


@every
def test_no_change_stays_none(name):
  none = [Lora(x.a, 0 * x.b, x.scale) for x in draw()]
  np.testing.assert_array_equal(run(name, none), np.zeros((IN, OUT)))
  close(run(name, draw(), 0 * WEIGHTS), np.zeros((IN, OUT)))


@every
def test_equal_adapters_have_a_finite_sum(name):
  """What they span is less than their ranks' sum."""
  one, three, _ = draw()
  found = run(name, [one, three, one])
  assert np.isfinite(found).all()
  if METHODS[name].leaves_out:  # what is cut by entries may be of any rank
    assert np.linalg.matrix_rank(found, tol=1e-3) <= 5


@every
def test_what_is_nan_is_seen(name):
  loras = draw()
  loras[1].a[1, 3] = np.nan
  assert np.isnan(run(name, loras)[3]).all()


# Their other settings change nothing that a compiler or a mesh could.
SAME = ("svd_merge cut", "core ties cut", "core task_arithmetic", "knots dare")


@pytest.mark.parametrize("name", [n for n in METHODS if n not in SAME])
def test_layers_sharded_and_in_bfloat16(name):
  """Two layers over 8 devices at once, each as it is alone on one."""
  # What is drawn is drawn for each layer.
  leading = (2,) if METHODS[name].symmetric else ()
  loras = [
    Lora(x.a.astype(jnp.bfloat16), x.b.astype(jnp.bfloat16), x.scale)
    for x in draw(leading=leading)
  ]
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  place = lambda x, *spec: jax.device_put(  # noqa: E731
    x, NamedSharding(mesh, PartitionSpec(*(None,) * len(leading), *spec))
  )
  merged = compiled(name)(
    [
      Lora(place(x.a, None, "x"), place(x.b, None, "x"), place(x.scale))
      for x in loras
    ],
    WEIGHTS,
  )
  assert merged.a.dtype == merged.b.dtype == jnp.bfloat16
  for i in np.ndindex(leading):
    alone = jax.tree.map(lambda x, i=i: x[i].astype(np.float32), loras)
    off = np.linalg.norm(change(merged)[i] - run(name, alone))
    assert off < 0.01 * np.linalg.norm(change(merged)[i])


@pytest.mark.parametrize("name", ["svd_merge", "core tsv", "knots ties"])
def test_explicit_axes(name):
  """Factors keep the places of what the layer reads and writes."""
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
  place = lambda x, *spec: jax.device_put(  # noqa: E731
    x, NamedSharding(mesh, PartitionSpec(*spec))
  )
  loras = draw()
  merged = compiled(name)(
    [
      Lora(place(x.a, None, "x"), place(x.b, None, "y"), place(x.scale))
      for x in loras
    ],
    WEIGHTS,
  )
  assert merged.a.sharding.spec == PartitionSpec(None, "x")
  assert merged.b.sharding.spec == PartitionSpec(None, "y")
  close(change(merged), run(name, loras))


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].has_door])
def test_the_door(name):
  merge, loras = METHODS[name].method, draw()
  longer = Lora(loras[0].a, np.ones((2, OUT + 1)), loras[0].scale)
  malformed = Lora(loras[0].a, loras[1].b, loras[0].scale)
  for wrong, why in (
    (([], []), "at least one"),
    ((loras, [1.0]), "must be one for each of 3"),
    ((loras, [1.0, np.inf, 1.0]), "must be finite"),
    (([loras[0], longer], [1.0, 1.0]), "do not belong to one parameter"),
    (([malformed], [1.0]), "malformed"),
    ((np.ones((2, 3)), [1.0, 1.0]), "merges a sequence of Loras"),
  ):
    with pytest.raises(ValueError, match=why):
      merge(*wrong)


@pytest.mark.parametrize(
  "merge",
  [
    functools.partial(jlora.merging.svd_merge, rank=0),
    core(jlora.merging.task_arithmetic, rank=0),
    functools.partial(jlora.merging.knots, rank=0),
  ],
)
def test_a_rank_is_at_least_1(merge):
  with pytest.raises(ValueError, match="rank must be at least 1"):
    merge(draw(), WEIGHTS)


def test_the_host_and_jax_agree():
  loras = draw()
  for name in ("concat", "svd_merge"):
    host = METHODS[name].method(loras, WEIGHTS)
    assert isinstance(host.a, np.ndarray)
    close(change(host), change(compiled(name)(loras, WEIGHTS)))


def test_truncation_has_the_best_units_first():
  lora = draw(ranks=(5,))[0]
  cut = jlora.merging.truncate(lora, 4)
  again = jlora.merging.truncate(cut, 4)
  close(change(again), change(cut))
  for rank in (1, 2, 3):
    first = Lora(cut.a[:rank], cut.b[:rank], cut.scale)
    close(change(jlora.merging.truncate(lora, rank)), change(first))


def test_missing_modules_are_zeros():
  one, two, _ = draw()
  with pytest.raises(ValueError, match=r"only in model 1: v.*fill_missing"):
    jlora.merge([{"q": one, "k": two}, {"v": two}], method=jlora.merging.concat)
  filled = jlora.merging.fill_missing([{"q": one, "k": two}, {"v": two}])
  assert [list(own) for own in filled] == [["q", "k", "v"]] * 2
  merged = jlora.merge(filled, method=jlora.merging.concat)
  close(change(merged["q"]), change(one))
  close(change(merged["v"]), change(two))
