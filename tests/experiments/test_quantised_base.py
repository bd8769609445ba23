# SPDX-License-Identifier: Apache-2.0
"""An adapter made for a quantised base is the better one, and is counted so."""

import numpy as np
import pytest

from experiments.quantised_base import (
  HOW,
  RANKS,
  as_table,
  measure_matrix,
  measure_pair,
)
from jlora.checkpoints.safetensors import write_safetensors


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_sums_of_a_matrix():
  base = draw(0, 96, 128)
  change = draw(1, 96, 8) @ draw(2, 8, 128) * np.float32(0.01)
  sums = measure_matrix(base, base + change)
  assert sums["size"] == base.size
  assert sums["change"] == pytest.approx(np.sum(change**2), rel=1e-3)
  assert sums["int8 bytes"] == 96 * 128 + 4 * 96
  assert sums["nf4 bytes"] == 96 * 128 / 2 + 4 * 2 * 96
  assert sums["adapter 16"] == 2 * 16 * (96 + 128)
  assert 16 * sums["int8 error"] < sums["nf4 error"] < sums["finetuned"] / 50
  for name in HOW:
    # The change has rank 8: a plain adapter leaves what quantising took.
    for rank in RANKS:
      plain = sums[f"{name} plain {rank}"]
      assert plain == pytest.approx(sums[f"{name} error"], rel=0.1)
    partners = [sums[f"{name} partner {rank}"] for rank in RANKS]
    assert partners[1] < partners[0] < sums[f"{name} plain 16"]


def test_only_matrices_of_layers_count(tmp_path):
  base = {
    f"model.layers.{i}.mlp.up_proj.weight": draw(i, 80, 72) for i in range(3)
  }
  base["model.embed_tokens.weight"] = draw(9, 10, 8)
  base["model.layers.0.norm.weight"] = draw(8, 72)
  tuned = {name: w + np.float32(0.01) for name, w in base.items()}
  sides = []
  for side, tensors in (("base", base), ("tuned", tuned)):
    sides.append(str(tmp_path / f"{side}.safetensors"))
    write_safetensors(sides[-1], tensors)
  sums = measure_pair(*sides, every=2)
  assert sums["size"] == 2 * 80 * 72
  table = as_table(sums).splitlines()
  assert len(table) == 2 + len(HOW) * len(RANKS)
  with pytest.raises(ValueError, match="no matrix of a layer differs"):
    measure_pair(sides[0], sides[0])
