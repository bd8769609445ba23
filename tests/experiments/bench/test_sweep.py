# SPDX-License-Identifier: Apache-2.0
"""The benchmark's rows on a matrix that takes no time."""

from experiments.bench.sweep import measure_sweep


def test_rows_say_what_took_how_long():
  sweep, all_of_it = measure_sweep((64, 96), (4, 8), 1)
  assert (sweep.part, sweep.unit, sweep.goal) == ("sweep", "x", "<= 1.3")
  assert sweep.value is not None
  assert sweep.value > 0
  assert all_of_it.goal == ""  # told, and not to be reached
  assert "64 x 96, ranks 4 to 8" in sweep.note
