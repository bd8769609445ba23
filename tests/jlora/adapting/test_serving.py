# SPDX-License-Identifier: Apache-2.0
"""Rooms of slots, shelves of adapters: what is kept, replaced and refused."""

import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora.adapting.serving import Room, Shelf, fetch_rows
from jlora.loras import Lora, dense

SHAPES = {"q/kernel": (6, 4), "up/kernel": (6, 10)}


def draw(rank, seed, paths=tuple(SHAPES)):
  normal = np.random.default_rng(seed).standard_normal
  return {
    path: Lora(
      normal((rank, SHAPES[path][0]), np.float32),
      normal((rank, SHAPES[path][1]), np.float32),
      np.float32(0.5 + seed % 3),
    )
    for path in paths
  }


def in_slot(room, slot):
  """The change of each module that a slot holds."""
  one = jax.tree.map(lambda x: x[slot], room.bank)
  return {path: np.asarray(dense(lora)) for path, lora in one.items()}


def assert_holds(room, slot, loras):
  found = in_slot(room, slot)
  for path, shape in SHAPES.items():
    wanted = np.zeros(shape, np.float32)
    if path in loras:
      wanted = np.asarray(dense(loras[path]))
    np.testing.assert_allclose(found[path], wanted, rtol=1e-6, atol=1e-6)


def places(room):
  return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(room.bank)]


def test_slots_are_written_in_place_and_nothing_is_compiled(caplog):
  room = Room(SHAPES, slots=3, rank=4)
  first = room.fill("first", draw(2, 0))
  there, before = places(room), jax.tree.map(np.array, room.bank)
  with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
    for seed in range(1, 9):
      # Other ranks, other modules, other names: one program.
      paths = ("q/kernel",) if seed % 2 else tuple(SHAPES)
      room.give_back(room.fill(f"n{seed}", draw(1 + seed % 4, seed, paths)))
  assert not [x for x in caplog.messages if "ompil" in x or "tracing" in x]
  assert places(room) == there
  for was, now in zip(
    jax.tree.leaves(before), jax.tree.leaves(room.bank), strict=True
  ):
    np.testing.assert_array_equal(was[first.slot], np.asarray(now)[first.slot])
  assert_holds(room, first.slot, draw(2, 0))


def test_the_least_recently_used_goes_and_never_one_in_use():
  room = Room(SHAPES, slots=3, rank=4)
  leases = {name: room.fill(name, draw(1, i)) for i, name in enumerate("abc")}
  with pytest.raises(
    ValueError, match="All 3 slots are in use, by a, b, c; gi"
  ):
    room.fill("d", draw(1, 3))
  assert room.is_full
  assert room.names == ["a", "b", "c"]
  for name in "bca":
    room.give_back(leases[name])
  assert room.names == ["b", "c", "a"]
  again = room.hold("b")
  room.fill("d", draw(1, 3))
  assert room.names == ["a", "b", "d"]
  assert again == leases["b"]
  assert room.hold("c") is None
  assert_holds(room, again.slot, draw(1, 1))


def test_an_adapter_may_be_held_many_times():
  room = Room(SHAPES, slots=1, rank=4)
  lease = room.fill("a", draw(1, 0))
  assert room.hold("a") == lease
  room.give_back(lease)
  assert room.is_full
  room.give_back(lease)
  assert not room.is_full
  with pytest.raises(ValueError, match="was given back; take it once"):
    room.give_back(lease)


def test_who_holds_what_is_forgotten_or_replaced_keeps_it():
  room = Room(SHAPES, slots=2, rank=4)
  old = room.fill("a", draw(1, 0))
  new = room.fill("a", draw(2, 1))
  assert old.slot != new.slot
  assert room.names == ["a"]
  assert room.ids([old, None, new]).tolist() == [old.slot, -1, new.slot]
  assert_holds(room, old.slot, draw(1, 0))
  assert_holds(room, new.slot, draw(2, 1))
  assert room.is_full
  room.forget("a")
  assert room.is_full
  assert room.hold("a") is None
  room.give_back(old)
  assert room.fill("b", draw(1, 2)).slot == old.slot


def test_a_cache_of_another_adapter_is_refused():
  room = Room(SHAPES, slots=1, rank=4)
  old = room.fill("a", draw(1, 0))
  room.give_back(old)
  new = room.fill("b", draw(1, 1))
  assert old.slot == new.slot  # so that the id alone would tell nothing
  with pytest.raises(ValueError, match="1 rows have caches .*: row 1: a; comp"):
    room.ids([new, old])


def test_what_does_not_fit_is_refused_and_nothing_changes():
  room = Room(SHAPES, slots=1, rank=2)
  room.give_back(room.fill("a", draw(1, 0)))
  before = jax.tree.map(np.array, room.bank)
  bad = draw(1, 1)
  bad["q/kernel"].a[0, 0] = np.nan
  turned = {"q/kernel": Lora(*(draw(1, 1)["q/kernel"].b,) * 2, np.float32(1))}
  for loras, words in (
    (draw(3, 1), "q/kernel has rank 3, up/kernel has rank 3"),
    (
      draw(1, 1) | {"other": draw(1, 1)["q/kernel"]},
      "other is no module of it",
    ),
    (bad, "q/kernel is not finite in float32"),
    (turned, r"q/kernel is for \(4, 4\), needed is \(6, 4\)"),
    ({}, "it changes none"),
  ):
    with pytest.raises(ValueError, match=f"b does not fit the room .*{words}"):
      room.fill("b", loras)
  jax.tree.map(np.testing.assert_array_equal, before, room.bank)
  assert room.names == ["a"]
  small = Room(SHAPES, slots=1, rank=2, dtype=jnp.float16)
  a, b = np.full((1, 6), 1e6, np.float32), np.ones((1, 4), np.float32)
  large = {"q/kernel": Lora(a, b, np.float32(1))}
  with pytest.raises(ValueError, match="not finite in float16"):
    small.fill("b", large)


@pytest.mark.parametrize(
  "options", [{"slots": 0}, {"rank": 0}, {"shapes": {"w": (3,)}}]
)
def test_rooms_that_cannot_be(options):
  with pytest.raises(ValueError, match="cannot be made; needed are at least 1"):
    Room(**{"shapes": SHAPES, **options})


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=25))
@settings(max_examples=40, deadline=None)
def test_leases_are_kept_whatever_happens(steps):
  """Each held slot has its adapter, no two adapters have one slot."""
  room, held, version = Room(SHAPES, slots=2, rank=2), [], 0
  for name, step in steps:
    if step == 0:
      lease = room.hold(f"n{name}")
      known = [x for x in held if x[0].filling == (lease and lease.filling)]
      if lease is None and not room.is_full:
        version += 1
        lease, loras = room.fill(f"n{name}", draw(1, version)), version
      elif lease is not None:
        loras = known[0][1] if known else lease.filling
      if lease is not None:
        held.append((lease, loras))
    elif step == 1 and held:
      room.give_back(held.pop(name % len(held))[0])
    elif step == 2:
      room.forget(f"n{name}")
    by_slot = {}
    for lease, seed in held:
      assert by_slot.setdefault(lease.slot, lease.filling) == lease.filling
      assert_holds(room, lease.slot, draw(1, seed))
    assert room.is_full == (len(by_slot) == 2)
    assert room.ids([x for x, _ in held]).tolist() == [x.slot for x, _ in held]


def model(params, x):
  return jnp.tanh(x @ params["q"]["kernel"]).sum() + x @ params["up"]["kernel"]


def test_a_row_is_what_its_adapter_makes_of_it():
  """By fetched rows, by ids, and by weights that were summed."""
  room = Room(SHAPES, slots=4, rank=4)
  normal = np.random.default_rng(9).standard_normal
  params = {
    "q": {"kernel": jnp.asarray(normal((6, 4), np.float32))},
    "up": {"kernel": jnp.asarray(normal((6, 10), np.float32))},
  }
  loras = [draw(1 + i, i, ("q/kernel",) if i == 2 else tuple(SHAPES))
           for i in range(4)]  # fmt: skip
  leases = [room.fill(str(i), x) for i, x in enumerate(loras)]
  rows = [2, None, 0, 3, 1, None, 2]
  ids = room.ids([None if i is None else leases[i] for i in rows])
  x = jnp.asarray(normal((7, 6), np.float32))

  @jax.jit
  def by_rows(bank, ids, x):
    one = lambda own, x: jlora.adapt(model)(jlora.bind(params, own), x)  # noqa: E731
    return jax.vmap(one)(fetch_rows(bank, ids), x)

  found = by_rows(room.bank, ids, x)
  each = lambda params, x: jax.vmap(model, (None, 0))(params, x)  # noqa: E731
  by_ids = jlora.adapt_rows(each)(params, room.bank, ids, x)
  for row, i in enumerate(rows):
    summed = params if i is None else jlora.apply(params, loras[i])
    np.testing.assert_allclose(found[row], model(summed, x[row]), 2e-5, 2e-6)
  np.testing.assert_allclose(found, by_ids, 2e-5, 2e-6)
  base = by_rows(room.bank, np.full(7, -1, np.int32), x)
  bare = jax.jit(jax.vmap(lambda x: model(params, x)))(x)
  np.testing.assert_array_equal(base, bare)
  others = by_rows(room.bank, np.where(ids == -1, -1, 0).astype(np.int32), x)
  for row in (1, 5):
    np.testing.assert_array_equal(found[row], bare[row])
    np.testing.assert_array_equal(others[row], bare[row])


def test_ids_outside_of_the_bank_are_not_taken_for_others():
  bank = jlora.adapting.make_bank([draw(1, 0), draw(1, 1)])
  scale = fetch_rows(bank, jnp.array([-1, 1, 2, -2]))["q/kernel"].scale
  np.testing.assert_array_equal(scale, [0, 1.5, np.nan, np.nan])


def test_axes_of_layers_are_kept():
  room = Room({"layers/kernel": (3, 6, 4)}, slots=2, rank=2)
  normal = np.random.default_rng(0).standard_normal
  lora = Lora(
    normal((3, 1, 6), np.float32), normal((3, 1, 4), np.float32),
    np.arange(1, 4, dtype=np.float32),
  )  # fmt: skip
  lease = room.fill("a", {"layers/kernel": lora})
  found = fetch_rows(room.bank, jnp.array([-1, lease.slot]))["layers/kernel"]
  np.testing.assert_allclose(dense(found)[1], dense(lora), rtol=1e-6)
  np.testing.assert_array_equal(found.scale[0], np.zeros(3))


def test_a_shelf_reads_each_once_and_drops_the_least_recently_asked():
  size = sum(x.nbytes for x in draw(1, 0).values())
  read = []

  def reader(name):
    read.append(name)
    return draw(1, int(name))

  with Shelf(reader, nbytes=2 * size) as shelf:
    for name in "0102":
      shelf.ask(name).result()
    assert read == ["0", "1", "2"]
    assert shelf.names == ["0", "2"]
    assert shelf.ask("0").done()
    shelf.forget("0")
    shelf.put("4", draw(1, 4))
    assert shelf.names == ["2", "4"]
    assert shelf.ask("4").result()["q/kernel"].scale == np.float32(1.5)
    assert len(read) == 3
  with Shelf(reader, nbytes=1) as small:
    assert small.ask("7").result()["q/kernel"].rank == 1
    assert small.names == []


def test_a_shelf_reads_in_the_background_and_once_for_all_who_ask():
  go, read = threading.Event(), []

  def reader(name):
    assert go.wait(60)
    read.append(name)
    return draw(1, 0)

  with Shelf(reader) as shelf:
    first, second = shelf.ask("a"), shelf.ask("a")
    assert not first.done()
    go.set()
    assert first.result(60) is second.result(60)
    assert read == ["a"]


def test_what_is_forgotten_while_it_is_read_is_not_kept():
  begun, go, seeds = threading.Event(), threading.Event(), iter((1, 2))

  def reader(name):
    seed = next(seeds)
    begun.set()
    assert go.wait(60)
    return draw(seed, seed)

  with Shelf(reader) as shelf:
    old = shelf.ask("a")
    assert begun.wait(60)
    shelf.forget("a")
    new = shelf.ask("a")
    go.set()
    assert old.result(60)["q/kernel"].rank == 1
    assert new.result(60)["q/kernel"].rank == 2
    assert shelf.ask("a").result()["q/kernel"].rank == 2


def test_an_error_is_told_and_not_kept():
  given = iter((OSError("no disk"), draw(1, 0)))

  def reader(name):
    found = next(given)
    if isinstance(found, OSError):
      raise found
    return found

  with Shelf(reader) as shelf:
    with pytest.raises(OSError, match="no disk"):
      shelf.ask("a").result()
    assert shelf.ask("a").result()["q/kernel"].rank == 1
