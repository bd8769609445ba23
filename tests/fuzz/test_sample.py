# SPDX-License-Identifier: Apache-2.0
"""Five hundred damaged folders of `make fuzz`."""

import random
import signal

import numpy as np
import pytest

from tests.fuzz.doors import DOORS, Door
from tests.fuzz.mutations import damage, field_changed
from tests.fuzz.tries import GOOD, try_all


@pytest.fixture
def _own_alarm():
  """What rang before rings again."""
  was = signal.getsignal(signal.SIGALRM)
  yield
  signal.signal(signal.SIGALRM, was)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_own_alarm")
@pytest.mark.parametrize("name", DOORS)
def test_damage_is_read_or_told(name):
  count = round(
    500 * DOORS[name].weight / sum(x.weight for x in DOORS.values())
  )
  found = list(try_all({name: DOORS[name]}, count, seed=1))
  assert len(found) == count
  assert [one for one in found if one.outcome not in GOOD] == []
  assert {one.outcome for one in found} >= {"ValueError"}


def _wait(folder):
  (folder / "x").read_bytes()
  signal.pause()


FAULTS = {
  "KeyError": lambda folder: {}["x"],
  "RecursionError": lambda folder: _deep(),
  "too long": _wait,
  "ValueError": lambda folder: np.ones(2).reshape(3),
}


def _deep():
  return _deep()


@pytest.mark.usefixtures("_own_alarm")
@pytest.mark.parametrize("outcome", FAULTS)
def test_a_fault_is_seen(outcome, monkeypatch):
  monkeypatch.setattr("tests.fuzz.tries.SECONDS", 0.2)
  entered = []

  def enter(folder):
    entered.append(folder)
    return FAULTS[outcome](folder) if len(entered) > 1 else None

  door = Door(lambda folder: (folder / "x").write_bytes(b"abc"), enter)
  (found,) = try_all({"one": door}, 1, seed=2)
  assert found.outcome == outcome
  assert (found.outcome in GOOD) == (outcome == "ValueError")


def test_the_same_number_is_the_same_damage():
  files = {"a.json": b'{"a": [1, {"b": "c"}]}', "b.safetensors": b"12345678{}"}
  one, other = (damage(files, random.Random("0/x/5")) for _ in range(2))
  assert one == other
  changed = {
    repr(field_changed({"a": [1]}, random.Random(i))) for i in range(99)
  }
  assert len(changed) > 20
