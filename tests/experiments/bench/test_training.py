# SPDX-License-Identifier: Apache-2.0
"""The training benchmark's ratios, and that both train the same adapter."""

import importlib.util

import numpy as np
import pytest

from experiments.bench import scoring, training
from experiments.lib.machines import processes


@pytest.fixture
def pretended(monkeypatch):
  """Ours takes 1 s and 2 s of processor time, PEFT 3 and 4, products half."""

  def take_turns(names, folder, sizes):
    found = {
      "ours": [1.0, 2.0, 5.0],
      "PEFT": [3.0, 4.0, 5.0],
      training.PRODUCTS: [0.5, 1.0, 0.0],
    }
    return {name: np.array([found[name]] * sizes.turns) for name in names}

  monkeypatch.setattr(training, "_take_turns", take_turns)


def _rows(sizes=training.QUICK):
  return list(training.measure_training("", sizes, label="pretended"))


def test_ratios_are_those_of_the_turns(pretended):
  ours, theirs, products, ratio = _rows()
  assert ours.value == 64.0
  assert theirs.value == pytest.approx(64 / 3)
  assert products.value == 128.0
  assert (ratio.value, ratio.goal) == (3.0, ">= 1.2")
  assert "2.00 x in processor time" in ratio.note


def test_without_peft_its_row_says_so(pretended, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  ours, _, ratio = _rows()
  assert ours.what == "ours"
  assert (ratio.value, ratio.note) == (None, "not run")


def test_losses_that_differ_are_no_comparison(monkeypatch):
  monkeypatch.setattr(
    training,
    "_take_turns",
    lambda names, *_: {n: np.full((1, 3), i) for i, n in enumerate(names)},
  )
  with pytest.raises(RuntimeError, match="the losses of .* differ"):
    _rows()


def test_memory_is_told_beside_theory(monkeypatch):
  peaks = {"'ours'": 100 * 2**20, "'full'": 400 * 2**20}

  def measure(command):
    (peak,) = (peaks[name] for name in peaks if f"serve({name}" in command[-1])
    return processes.Usage(1.0, 1.0, peak)

  monkeypatch.setattr(processes, "measure", measure)
  with scoring.some_model(None, quick=True) as (folder, _):
    rows = list(training.measure_memory(folder, training.QUICK))
  assert [row.value for row in rows[:3]] == [100, 400, 300]
  assert rows[3].value == pytest.approx(300 * 2**20 / (2 * 4 * 83008), rel=0.2)


@pytest.mark.long
def test_both_take_the_same_steps():
  """In processes of their own, on a tiny model: losses agree in every turn."""
  sizes = training.QUICK._replace(turns=1)
  with scoring.some_model(None, quick=True) as (folder, label):
    rows = list(training.measure_training(folder, sizes, label=label))
  names = ["ours", "PEFT", training.PRODUCTS, "ours over PEFT"]
  assert [row.what for row in rows] == names
  assert all(row.value > 0 for row in rows)
