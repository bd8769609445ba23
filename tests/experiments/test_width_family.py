# SPDX-License-Identifier: Apache-2.0
"""The family's figures are those of its members' spectra."""

import numpy as np
import pytest

from experiments import width_family
from experiments.lib.adapters import ladders


def member(width, seed):
  rng = np.random.default_rng(seed)
  layer = {
    "attn": {"q": {"kernel": rng.standard_normal((width, width), np.float32)}},
    "mlp": {"up": {"kernel": rng.standard_normal((width, 96), np.float32)}},
  }
  base = {"layers": {"0": layer}}
  tuned = {"layers": {"0": {
    "attn": {"q": {"kernel": layer["attn"]["q"]["kernel"] + 1}},
    "mlp": {"up": {"kernel": 2 * layer["mlp"]["up"]["kernel"]}},
  }}}  # fmt: skip
  return ladders.build_ladder(None, base, tuned, width // 2), layer


def test_errors_are_those_of_the_spectra():
  ladder, layer = member(64, 0)
  found = width_family.measure_member(ladder, 64)
  assert found["parameters"] == 64 * 64 + 64 * 96
  assert found["attn"]["4"] == pytest.approx(0, abs=2e-3)  # rank one
  assert found["attn"]["stable_rank"] == pytest.approx(1, rel=1e-3)
  sigma = np.linalg.svd(layer["mlp"]["up"]["kernel"], compute_uv=False)
  for rank, key in ((4, "4"), (16, "16"), (8, "share")):
    rest = np.sqrt(np.sum(sigma[rank:] ** 2) / np.sum(sigma**2))
    assert found["mlp"][key] == pytest.approx(rest, rel=1e-3)


def test_the_table_tells_mean_and_spread():
  rows = [
    width_family.measure_member(member(64, seed)[0], 64) for seed in (0, 1)
  ]
  lines = width_family.as_table(rows).splitlines()
  assert len(lines) == 4
  values = [row["mlp"]["8"] for row in rows]
  cell = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
  assert cell in lines[2]
