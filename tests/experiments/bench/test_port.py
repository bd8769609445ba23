# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of ports says of its models, and prints of its runs."""

import math

import numpy as np

from experiments.bench import port
from experiments.lib.data import pairs
from experiments.lib.machines.processes import Usage
from jlora.checkpoints import write_safetensors


def test_models_are_of_the_sizes_that_are_said():
  for layers, said in ((2, 446), (18, 2048)):
    shapes = pairs.shapes({**pairs.LLAMA, "num_hidden_layers": layers}).values()
    assert 0.98 < 2 * sum(map(math.prod, shapes)) / 2**20 / said < 1.02


def test_ratios_are_of_processor_time_and_medians(tmp_path):
  for name in ("adapter0", "add0", "model"):
    (tmp_path / name).mkdir()
    write_safetensors(tmp_path / name / "x.safetensors", {"w": np.ones(2**18)})
  found = {
    "extract": [Usage(9, x, 2**20) for x in (1, 2, 90)],
    "add": [Usage(1, x, 2**21) for x in (0, 3, 3)],
  }
  rows = {
    row.what: row for row in port._rows(found, tmp_path, tmp_path / "model")
  }
  assert rows["add over extract"].value == 1.5
  assert round(rows["a model"].value) == 2
