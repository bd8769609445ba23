# SPDX-License-Identifier: Apache-2.0
"""A process's share in threads: over all devices, until something is wrong."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from jlora import shares
from jlora.hosts import LostProcess
from jlora.pairs import Pair, Part
from jlora.shares import _in_threads


class Devices:
  """In place of an Extractor: which thread was given which device."""

  def __init__(self, *devices):
    self.devices, self.used = list(devices), {}

  def use(self, device):
    self.used[threading.get_ident()] = device


def pairs_of(*sizes):
  return [
    Pair(f"m{at}", (size, 2), Part("w"), Part("w"))
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
    lambda _: together.wait(), pairs_of(*[1] * threads), devices, well()
  )
  held = [list(devices.used.values()).count(at) for at in range(count)]
  assert sum(held) == threads
  assert max(held) - min(held) <= 1


def test_on_the_host_no_device_is_chosen():
  done = []
  _in_threads(
    lambda pair: done.append(pair.path), pairs_of(1), Devices(), well()
  )
  assert done == ["m0"]


def test_the_largest_go_first(monkeypatch):
  monkeypatch.setattr(shares, "_THREADS", 1)
  done = []
  _in_threads(
    lambda pair: done.append(pair.shape[0]),
    pairs_of(3, 9, 5, 7),
    Devices(),
    well(),
  )
  assert done == [9, 7, 5, 3]


def test_an_error_ends_the_rest(monkeypatch):
  monkeypatch.setattr(shares, "_THREADS", 1)
  began = []

  def work(pair):
    began.append(pair.path)
    time.sleep(0.02)
    raise ValueError(f"{pair.path} is damaged")

  with pytest.raises(ValueError, match="m0 is damaged"):
    _in_threads(work, pairs_of(*np.arange(50)[::-1]), Devices(), well())
  assert len(began) < 5


def test_a_lost_process_ends_it_at_once(monkeypatch):
  monkeypatch.setattr(shares, "process_count", lambda: 2)
  monkeypatch.setattr(shares, "_POLL", 0.01)
  go_on = threading.Event()

  def check():
    raise LostProcess("process 1 ended")

  watch = SimpleNamespace(check=check, is_lost=True)
  with pytest.raises(LostProcess, match="process 1"):
    _in_threads(lambda _: go_on.wait(30), pairs_of(1), Devices(), watch)
  assert not go_on.is_set()  # it did not wait for the module in work
  go_on.set()


@pytest.mark.parametrize(
  ("needs", "memory"),
  [
    ([], shares._MEMORY),
    ([1000] * 3, shares._MEMORY),
    # Two of the usual size, whatever tables there are and however many norms.
    ([2**30] * 80 + [2**34] * 2 + [2**26] * 90, 2**31),
  ],
)
def test_two_modules_of_the_usual_size_have_room(needs, memory):
  assert shares._memory(needs) == memory
