# SPDX-License-Identifier: Apache-2.0
"""The peer around torch's svd_lowrank, run on a tiny pair."""

import pytest

from experiments.bench import lowrank
from experiments.bench.extract import QUICK
from experiments.lib.machines.processes import Usage


def test_a_further_layer_is_the_difference_of_two_depths(tmp_path, monkeypatch):
  """Ours: 2 s and 1 s a layer; torch's: 1 s and 3 s a layer."""

  def pretend(command, environment=None):
    count = next(int(n) for n in ("2", "1") if f"/{n}/" in str(command))
    ours = "jlora.commands.extract" in command
    seconds = 2.0 + count if ours else 1.0 + 3 * count
    return Usage(seconds, 2 * seconds, 0)

  monkeypatch.setattr(lowrank, "measure", pretend)
  errors = {"ours": 1.0, "torch": 2.0}
  monkeypatch.setattr(lowrank, "_errors", lambda folder: errors)
  config, rank = QUICK.config, QUICK.rank
  rows = lowrank.measure_files(tmp_path, config, rank, (1, 2), 1)
  found = {row.what: row.value for row in rows}
  assert found["speed-up, each further layer"] == 3.0
  assert found["speed-up, whole, 2 layers"] == 7 / 4
  assert found["our error over torch's"] == 0.5


@pytest.mark.long
def test_both_sides_run(tmp_path):
  config, rank = QUICK.config, QUICK.rank
  rows = list(lowrank.measure_files(tmp_path, config, rank, (1, 2), 1))
  ratio = next(row.value for row in rows if row.what.startswith("our error"))
  assert 0.99 < ratio < 1.001
  rows = list(lowrank.measure_arrays(tmp_path, config, rank, 1))
  assert len(rows) == 3
  assert all(row.value > 0 for row in rows)
