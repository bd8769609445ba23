# SPDX-License-Identifier: Apache-2.0
"""Rules, where adapters lie, and extraction onto a mesh: on 8 CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.checkpoints import checkpoint
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.extraction.parameters import extract_parameter
from jlora.loras import Lora, dense
from jlora.numerics.meshes import automatic, place_array, sharding_of
from jlora.sharding import assign, of_adapter, spread
from jlora.views import KERNEL, LINEAR, STACKED, MatrixView, as_matrix
from tests.helpers.small_pairs import draw, write_pair

SHAPES = {"q/kernel": (16, 8), "k/kernel": (16, 8), "q/bias": (8,)}


def mesh_of(kind=AxisType.Auto, shape=(4, 2)):
  return jax.make_mesh(shape, ("x", "y"), axis_types=(kind,) * 2)


both_kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


@both_kinds
def test_the_first_rule_decides_and_the_mesh_stays(kind):
  mesh = mesh_of(kind)
  rules = [("q/.*l", P("x", "y")), (".*/kernel", P(("x", "y")))]
  found = assign(SHAPES, mesh, rules)
  assert [own.spec for own in found.values()] == [
    P("x", "y"), P(("x", "y")), P()
  ]  # fmt: skip
  assert all(own.mesh is mesh for own in found.values())


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ([("q", P("x"))], r"1 rules match no path: q; there are q/kernel, k/ker"),
    ([(".*/bias", P(None, "x"))], r"q/bias \(8,\) as .*'x'.*give other rules"),
    ([(".*", P("z"))], r"3 leaves cannot be cut over a mesh of {'x': 4, 'y'"),
    ([("q/kernel", P(None, None, "x"))], "1 leaves cannot be cut"),
    ([("[qk]/kernel", P(("x", "y", "x")))], "2 leaves cannot be cut"),
  ],
)
def test_rules_that_do_not_fit(rules, message):
  with pytest.raises(ValueError, match=message):
    assign(SHAPES, mesh_of(), rules)


@pytest.mark.parametrize(
  ("shape", "first", "spec"),
  [
    ((16, 8), (), P(("x", "y"), None)),
    ((4, 8), (), P(None, ("x", "y"))),
    ((4, 12), (), P("y", "x")),  # 12 / 4 is odd
    ((6, 3), (), P("y", None)),
    ((7, 5), (), P(None, None)),
    ((8, 64, 64), (0,), P(("x", "y"), None, None)),
    ((4, 64, 32), (0,), P("x", "y", None)),
  ],
)
def test_spread(shape, first, spec):
  assert spread(shape, mesh_of(), first) == spec


HEADS = MatrixView(inputs=(0,), outputs=(1, 2))  # (in, head, size)
OUT = MatrixView(inputs=(0, 1), outputs=(2,))  # (head, size, out)
QKV = MatrixView((0,), (2,), (1, 3))  # (qkv, head, in, size)

# (view, shape, spec) -> the specs of in, of out, and of leading axes.
PLACES = [
  (KERNEL, (16, 8), P("x", "y"), "x", "y", ()),
  (LINEAR, (16, 8), P("x", "y"), "y", "x", ()),
  (KERNEL, (16, 8), P(), None, None, ()),
  (KERNEL, (16, 8), P(None, ("y", "x")), None, ("y", "x"), ()),
  (STACKED, (4, 16, 8), P("x", None, "y"), None, "y", ("x",)),
  (STACKED, (8, 16, 8), P(("x", "y")), None, None, (("x", "y"),)),
  (HEADS, (16, 8, 6), P("y", "x"), "y", "x", ()),
  (HEADS, (16, 8, 6), P(None, None, "y"), None, None, ()),  # in pieces
  (HEADS, (16, 8, 6), P(None, "x", "y"), None, "x", ()),  # the first alone
  (HEADS, (16, 4, 6), P(None, "x", "y"), None, ("x", "y"), ()),  # one head each
  (HEADS, (16, 1, 6), P(None, None, "y"), None, "y", ()),
  (OUT, (8, 6, 16), P("y", None, "x"), "y", "x", ()),
  (QKV, (2, 4, 16, 6), P("y", "x"), None, "x", ("y",)),
]


@pytest.mark.parametrize(
  ("view", "shape", "spec", "in_", "out", "lead"), PLACES
)
def test_adapters_lie_as_their_parameter(view, shape, spec, in_, out, lead):
  own = NamedSharding(mesh_of(), spec)
  found = of_adapter(own, view, shape)
  rest = (None,) * (len(view.batch) - len(lead))
  assert found.a.spec == P(*lead, *rest, None, in_)
  assert found.b.spec == P(*lead, *rest, None, out)
  assert found.scale.spec == P(*lead, *rest)
  assert found.a.mesh is own.mesh


@settings(max_examples=30, deadline=None)
@given(
  place=st.sampled_from(PLACES),
  entries=st.permutations([None, "x", "y", ("x", "y")]),
)
def test_devices_hold_the_rows_of_their_shard(place, entries):
  """What a device has of w is read and written by what it has of a and b."""
  view, shape, *_ = place
  names = [x for entry in entries[: len(shape)] for x in (entry or ())]
  if len(names) > len(set(names)):
    entries = [None if isinstance(entry, tuple) else entry for entry in entries]
  own = NamedSharding(mesh_of(), P(*entries[: len(shape)]))
  try:
    own.shard_shape(shape)
  except ValueError:
    return
  for each in (view, view.exchanged):
    found = of_adapter(own, each, shape)
    *lead, m, n = each.shape(shape)
    flat = np.arange(np.prod(shape)).reshape(shape)
    row_of = np.empty(flat.size, int)
    row_of[as_matrix(flat, each)] = np.arange(m)[:, None]
    held = found.a.devices_indices_map((*lead, 1, m))
    for device, part in own.devices_indices_map(shape).items():
      here = set(range(m)[held[device][-1]])
      assert set(row_of[flat[part]].ravel()) <= here


def params_and_loras(mesh):
  specs = {"q/kernel": P("x", "y"), "k/kernel": P(None, ("x", "y"))}
  params = {
    path.split("/")[0]: {
      "kernel": jax.device_put(draw(16, 8), NamedSharding(mesh, spec))
    }
    for path, spec in specs.items()
  }
  lora = Lora(draw(3, 16), draw(3, 8), np.float32(1))
  return params, dict.fromkeys(specs, lora)


@both_kinds
def test_device_put_of_adapters(kind):
  params, loras = params_and_loras(mesh_of(kind))
  placed = jax.device_put(
    loras, jlora.sharding.adapter_shardings(params, loras)
  )
  assert placed["q/kernel"].a.sharding.spec == P(None, "x")
  assert placed["q/kernel"].b.sharding.spec == P(None, "y")
  assert placed["k/kernel"].b.sharding.spec == P(None, ("x", "y"))
  np.testing.assert_array_equal(placed["q/kernel"].b, loras["q/kernel"].b)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    params,
  )
  assert jlora.sharding.adapter_shardings(
    shapes, loras
  ) == jlora.sharding.adapter_shardings(params, loras)


def test_adapters_without_a_place():
  params, loras = params_and_loras(mesh_of())
  loras["v/kernel"] = loras["q/kernel"]
  params["k"]["kernel"] = np.asarray(params["k"]["kernel"])
  params["q"]["kernel"] = params["q"]["kernel"][:8]
  with pytest.raises(ValueError, match=r"3 Loras .*\(16, 8\) for \(8, 8\), k/"):
    jlora.sharding.adapter_shardings(params, loras)


def test_a_shard_is_read_once():
  seen = []

  def read(index):
    seen.append(index)
    return whole[index]

  whole = draw(8, 6)
  array = place_array((8, 6), NamedSharding(mesh_of(), P("x")), read)
  np.testing.assert_array_equal(array, whole)
  assert len(seen) == 4
  assert all(np.zeros((8, 6))[index].shape == (2, 6) for index in seen)


def test_where_arrays_are_known_to_lie():
  seen = []

  def look(x):
    seen.append(sharding_of(x))
    return x

  for kind in (AxisType.Auto, AxisType.Explicit):
    own = NamedSharding(mesh_of(kind), P("x"))
    x = jax.device_put(jnp.ones(8), own)
    assert sharding_of(x) == own
    jax.jit(look)(x)
  assert seen[0] is None
  assert seen[1].spec == P("x")
  assert sharding_of(jnp.ones(8)) is sharding_of(np.ones(8)) is None
  assert automatic(mesh_of(AxisType.Explicit)) == mesh_of()


BASE = {"q": {"kernel": draw(16, 8)}, "experts": {"kernel": draw(4, 8, 6)}}
FINETUNED = jax.tree.map(lambda x: x + draw(*x.shape, seed=1), BASE)
RULES = [("q/kernel", P("x", "y")), ("experts/kernel", P("x", None, "y"))]
WANTED = {
  None: {
    "q/kernel": (P(None, ("x", "y")), P(), P()),
    "experts/kernel": (P("x", None, "y"), P("x", None, None), P("x")),
  },
  "rules": {
    "q/kernel": (P(None, "x"), P(None, "y"), P()),
    "experts/kernel": (P("x", None, None), P("x", None, "y"), P("x")),
  },
}
extract = functools.partial(jlora.extract, rank=3)


def check(loras, wanted, mesh, base=BASE, finetuned=FINETUNED):
  alone = extract(base, finetuned)
  for path, specs in wanted.items():
    for leaf, spec in zip(jax.tree.leaves(loras[path]), specs, strict=True):
      own = NamedSharding(mesh, spec)
      assert leaf.sharding.is_equivalent_to(own, leaf.ndim), (path, leaf)
      assert leaf.sharding.mesh.axis_types == mesh.axis_types
    found = jax.tree.map(np.asarray, loras[path])
    np.testing.assert_allclose(dense(found), dense(alone[path]), atol=1e-5)


@both_kinds
@pytest.mark.parametrize("rules", WANTED)
def test_extraction_places_host_arrays(kind, rules):
  mesh = mesh_of(kind)
  loras = extract(BASE, FINETUNED, mesh=mesh, rules=RULES if rules else None)
  check(loras, WANTED[rules], mesh)


@both_kinds
def test_extraction_leaves_arrays_where_they_are(kind):
  mesh = mesh_of(kind)
  own = assign({"q/kernel": (16, 8), "experts/kernel": (4, 8, 6)}, mesh, RULES)
  put = lambda tree: {  # noqa: E731
    name: {"kernel": jax.device_put(leaf["kernel"], own[f"{name}/kernel"])}
    for name, leaf in tree.items()
  }
  check(extract(put(BASE), put(FINETUNED)), WANTED["rules"], mesh)
  # On one side alone: the other follows.
  check(extract(put(BASE), FINETUNED), WANTED["rules"], mesh)


@both_kinds
def test_extraction_moves_arrays_and_tracers(kind):
  mesh = mesh_of(kind)
  moved = functools.partial(extract, mesh=mesh, rules=RULES)
  whole = NamedSharding(mesh, P())
  base, finetuned = jax.device_put((BASE, FINETUNED), whole)
  check(moved(base, finetuned), WANTED["rules"], mesh)
  check(jax.jit(moved)(base, finetuned), WANTED["rules"], mesh)


@both_kinds
def test_checkpoints_are_read_shard_by_shard(tmp_path, monkeypatch, kind):
  name = "model.layers.0.q_proj.weight"
  base, finetuned = {name: draw(8, 16)}, {name: draw(8, 16, seed=1)}
  sides = [open_checkpoint(x) for x in write_pair(tmp_path, base, finetuned)]
  sizes, read = [], checkpoint.Checkpoint.read

  def spy(self, name, index=()):
    array = read(self, name, index)
    sizes.append(array.size)
    return array

  monkeypatch.setattr(checkpoint.Checkpoint, "read", spy)
  mesh = mesh_of(kind)
  loras = extract(*sides, mesh=mesh, rules=[(".*q_proj.*", P("x"))])
  assert sizes == 8 * [2 * 16]  # four shards of either side, each once
  wanted = {name: (P(), P(None, "x"), P())}
  check(loras, wanted, mesh, *(dict(side) for side in sides))


def test_fused_experts_are_read_by_expert(tmp_path):
  """Experts apart in one checkpoint, fused in the other, both cut."""
  experts = [f"model.layers.0.mlp.experts.{e}" for e in range(2)]
  singles = {
    f"{expert}.{part}_proj.weight": draw(8, 6, seed=10 * e + at)
    for e, expert in enumerate(experts)
    for at, part in enumerate(("gate", "up"))
  }
  fused = np.stack(
    [
      np.concatenate([singles[f"{x}.{p}_proj.weight"] for p in ("gate", "up")])
      for x in experts
    ]
  )
  name = "model.layers.0.mlp.experts.gate_up_proj"
  change = draw(*fused.shape, seed=9)
  for index, (base, finetuned) in enumerate(
    [
      (singles, {name: fused + change}),
      ({name: fused}, {k: v + 1 for k, v in singles.items()}),
    ]
  ):
    paths = write_pair(tmp_path / str(index), base, finetuned)
    sides = list(map(open_checkpoint, paths))
    alone = extract(*sides)
    loras = extract(*sides, mesh=mesh_of())
    assert set(loras) == set(alone)
    for path in alone:
      found = jax.tree.map(np.asarray, loras[path])
      np.testing.assert_allclose(dense(found), dense(alone[path]), atol=1e-5)


def test_rules_need_a_mesh():
  with pytest.raises(ValueError, match="rules without a mesh"):
    extract(BASE, FINETUNED, rules=RULES)


# Operations that all devices do alike, those on the short side's thin factors,
# as a share of all; and how far the rest may be from an nth of itself. A branch
# that is taken only where rounding is all that is left counts too.
ALIKE, OFF = 0.09, 0.01


def operations(spec, devices):
  """That XLA counts in one device's program, each loop's body once."""
  kinds = (AxisType.Auto,) * 2
  mesh = jax.make_mesh((devices, 1), ("x", "y"), axis_types=kinds)
  own = NamedSharding(mesh, spec)
  shape = 1024, 3072
  side = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=own)
  program = extract_parameter.lower(
    side, side, jax.random.key(0), view=KERNEL, rank=16,
    sharding=of_adapter(own, KERNEL, shape),
  ).compile()  # fmt: skip
  return program.cost_analysis()["flops"]


def test_work_on_a_device_falls_with_their_number():
  """One nth of what touches the change, as `spread` cuts it: its long side."""
  assert spread((1024, 3072), mesh_of()) == P(None, ("x", "y"))
  spec = P(None, "x")
  one, eight = operations(spec, 1), operations(spec, 8)
  alike = (8 * eight - one) / 7
  assert alike < ALIKE * one
  for devices in (2, 4):
    expected = alike + (one - alike) / devices
    assert abs(operations(spec, devices) - expected) < OFF * expected
  # All of it on each of eight devices, where nothing is cut.
  assert operations(P(), 8) == one
