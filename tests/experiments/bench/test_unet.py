# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a UNet, at a small width."""

import numpy as np

from experiments.bench import unet


def test_the_plan_is_that_of_stable_diffusion():
  shapes = unet.list_shapes(320, 768)
  # As diffusers 0.42.1 counts them; with biases and norms 859,520,964.
  assert len(shapes) == 282
  assert sum(int(np.prod(shape)) for shape in shapes.values()) == 859_077_120


def test_clamping_costs_and_cutting_does_not(tmp_path):
  head, _, *rows = unet.measure(tmp_path, width=8, rank=2)
  assert head.startswith("| 282 modules")
  over = [float(row.split("|")[3]) for row in rows]
  assert over[:2] == [1.0, 1.0]
  assert 1.0 < over[2] < over[3]
