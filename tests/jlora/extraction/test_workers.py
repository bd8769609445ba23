# SPDX-License-Identifier: Apache-2.0
"""A process's share in threads: over all devices, until something is wrong."""

import functools
import itertools
import threading
import time
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.extraction import workers
from jlora.extraction.planning import ModuleJob, cost_of, plan_jobs
from jlora.extraction.workers import (
  _in_threads,
  cut,
  deal,
  share_out,
)
from jlora.numerics.meshes import place_array
from jlora.pairing.match import common_rows, keep_whole, pair_up
from jlora.pairing.pairs import Pair, TensorPart, read_region_of_side
from jlora.paths import matching
from jlora.runs.processes import LostProcess
from jlora.views import KERNEL
from tests.helpers.small_pairs import write_pair


class Devices:
  """In place of an Extractor: which thread was given which device."""

  def __init__(self, *devices):
    self.devices, self.used = list(devices), {}

  def use(self, device):
    self.used[threading.get_ident()] = device


def jobs_of(*sizes):
  part = TensorPart("w")
  return [
    ModuleJob(Pair(f"m{at}", (size, 2), part, part), KERNEL, 1, 0)
    for at, size in enumerate(sizes)
  ]


def well(found=None):
  return SimpleNamespace(check=lambda: found, is_lost=False)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_threads_are_spread_over_the_devices(count):
  devices = Devices(*range(count))
  threads = 3 + 2 * (count - 1)
  together = threading.Barrier(threads, timeout=30)
  _in_threads(
    lambda _: together.wait(), jobs_of(*[1] * threads), devices, well()
  )
  held = [list(devices.used.values()).count(at) for at in range(count)]
  assert sum(held) == threads
  assert max(held) - min(held) <= 1


def test_on_the_host_no_device_is_chosen():
  done = []
  _in_threads(
    lambda job: done.append(job.pair.path), jobs_of(1), Devices(), well()
  )
  assert done == ["m0"]


def test_the_largest_go_first(monkeypatch):
  monkeypatch.setattr(workers, "THREADS", 1)
  done = []
  _in_threads(
    lambda job: done.append(job.pair.shape[0]),
    jobs_of(3, 9, 5, 7),
    Devices(),
    well(),
  )
  assert done == [9, 7, 5, 3]


def test_an_error_ends_the_rest(monkeypatch):
  monkeypatch.setattr(workers, "THREADS", 1)
  began = []

  def work(job):
    began.append(job.pair.path)
    time.sleep(0.02)
    raise ValueError(f"{job.pair.path} is damaged")

  with pytest.raises(ValueError, match="m0 is damaged"):
    _in_threads(work, jobs_of(*np.arange(50)[::-1]), Devices(), well())
  assert len(began) < 5


def test_a_lost_process_ends_it_at_once(monkeypatch):
  monkeypatch.setattr(workers, "process_count", lambda: 2)
  monkeypatch.setattr(workers, "_POLL", 0.01)
  go_on = threading.Event()

  def check():
    raise LostProcess("process 1 ended")

  watch = SimpleNamespace(check=check, is_lost=True)
  with pytest.raises(LostProcess, match="process 1"):
    _in_threads(lambda _: go_on.wait(30), jobs_of(1), Devices(), watch)
  assert not go_on.is_set()  # it did not wait for the module in work
  go_on.set()


@pytest.mark.parametrize(
  ("needs", "memory"),
  [
    ([], workers.MEMORY),
    ([1000] * 3, workers.MEMORY),
    # Two of the usual size, whatever tables there are and however many norms.
    ([2**30] * 80 + [2**34] * 2 + [2**26] * 90, 2**31),
  ],
)
def test_two_modules_of_the_usual_size_have_room(needs, memory):
  assert workers._memory(needs) == memory


costs = st.lists(st.integers(0, 50), max_size=7)
hands = st.integers(1, 4)


@given(st.lists(st.integers(0, 10**12), max_size=60), st.integers(1, 9))
def test_every_item_is_dealt_once(costs, hands):
  dealt = deal(costs, hands)
  assert len(dealt) == hands
  assert sorted(itertools.chain(*dealt)) == list(range(len(costs)))


def largest(costs, dealt):
  return max(sum(costs[item] for item in hand) for hand in dealt)


@settings(max_examples=60, deadline=None)
@given(costs, hands)
def test_the_largest_load_is_near_the_smallest_possible(costs, hands):
  best = min(
    max(
      sum(c for c, at in zip(costs, owners, strict=True) if at == hand)
      for hand in range(hands)
    )
    for owners in itertools.product(range(hands), repeat=len(costs))
  )
  found = largest(costs, deal(costs, hands))
  assert best <= found <= (4 / 3 - 1 / (3 * hands)) * best + 1e-9


def test_the_bound_is_reached():
  """Graham's worst case for two hands: 7/6 of the best."""
  assert largest([3, 3, 2, 2, 2], deal([3, 3, 2, 2, 2], 2)) == 7


def test_ties_go_by_position():
  assert deal([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]


@given(st.permutations(range(5)))
def test_the_loads_do_not_depend_on_the_order(order):
  costs = [9, 7, 4, 3, 1]
  given_so = [costs[at] for at in order]
  assert largest(given_so, deal(given_so, 2)) == largest(costs, deal(costs, 2))


def test_more_hands_than_items_leave_some_empty():
  assert deal([5], 3) == [[0], [], []]


@pytest.mark.parametrize(
  ("costs", "hands", "message"),
  [([1], 0, "a hand"), ([1, -2], 2, "not be negative, got -2")],
)
def test_what_cannot_be_dealt(costs, hands, message):
  with pytest.raises(ValueError, match=message):
    deal(costs, hands)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 512))
def test_what_is_factored_costs_more_than_what_is_read(m, n, rank):
  assert cost_of((m, n), rank) > cost_of((m, n), 0) > 0
  assert cost_of((3, m, n), rank) == 3 * cost_of((m, n), rank)


def test_what_is_no_matrix_has_a_cost():
  assert cost_of((), 0) < cost_of((7,), 0)


shapes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(shapes.map(tuple), st.integers(1, 16))
def test_a_cut_is_into_as_many_equal_parts_as_there_can_be(shape, devices):
  axis, parts = cut(shape, devices)
  assert 1 <= parts <= devices
  assert shape[axis] % parts == 0
  assert not any(
    size % more == 0 for size in shape for more in range(parts + 1, devices + 1)
  )
  assert all(size % parts for size in shape[:axis])


@pytest.mark.parametrize(
  ("shape", "devices", "axis", "parts"),
  [
    ((64, 48), 4, 0, 4),
    ((27, 64), 4, 1, 4),
    ((128256, 8192), 256, 0, 256),  # Llama 3: 256 * 501 rows
    ((6, 9), 4, 0, 3),
    ((5, 7), 4, 0, 1),
    ((), 4, 0, 1),
    ((0, 4), 4, 1, 4),
  ],
)
def test_cuts(shape, devices, axis, parts):
  assert cut(shape, devices) == (axis, parts)


def test_a_tensor_that_nothing_divides_is_not_spread():
  assert share_out((11, 13)) is None
  assert share_out((16, 3)).spec == jax.sharding.PartitionSpec("shards")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(16, 6), (7, 16), (6, 7), (8, 3, 5)])
def test_shards_are_the_tensor_and_leading_ones_are_read_alone(
  tmp_path, shape, dtype
):
  w = np.random.default_rng(0).normal(size=shape).astype(dtype)
  write_safetensors(tmp_path / "w.safetensors", {"w": w})
  checkpoint = open_checkpoint(tmp_path / "w.safetensors")
  before, sharding = checkpoint.bytes_read, share_out(shape)
  read = functools.partial(read_region_of_side, checkpoint, TensorPart("w"))
  array = place_array(shape, sharding, read)
  np.testing.assert_array_equal(np.asarray(array), w)
  assert array.dtype == dtype
  axis, parts = cut(shape, jax.device_count())
  assert len({str(shard.index) for shard in array.addressable_shards}) == parts
  times = parts if axis else 1  # of inner axes whole rows are read
  assert checkpoint.bytes_read - before == times * w.nbytes


def test_only_two_whole_matrices_that_are_factored_can_be_split(tmp_path):
  base = {
    "model.q.weight": np.ones((4, 6), np.float32),
    "model.k.weight": np.ones((4, 6), np.float32),
    "model.norm.weight": np.ones(4, np.float32),
    "model.embed_tokens.weight": np.ones((8, 4), np.float32),
    "model.ids.weight": np.ones((4, 4), np.int32),
  }
  grown = {"model.embed_tokens.weight": np.ones((9, 4), np.float32)}
  pair = write_pair(tmp_path, base, base | grown)
  for vocabulary in (keep_whole, common_rows):
    sides = [open_checkpoint(folder) for folder in pair]
    pairing = pair_up(*(side.spec for side in sides), vocabulary=vocabulary)
    plan = plan_jobs(*sides, pairing, matching(exclude=".*k[.]weight"), 8)
    fit = {job.pair.path for job in plan.jobs if job.can_be_split}
    assert fit == {"model.q.weight"}
