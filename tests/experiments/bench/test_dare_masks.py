# SPDX-License-Identifier: Apache-2.0
"""Masks are found from merges of one model, by a stand-in for mergekit."""

import numpy as np
import pytest
import yaml

from experiments.bench import dare_masks
from experiments.lib.data import pairs
from jlora.checkpoints.checkpoint import open_checkpoint


def stand_in(shifts):
  """Sums of masked changes, all masks from one generator."""

  def run(work, mergekit, method, weights):
    assert (mergekit, method) == ("there", "dare_linear")
    base, *tuned = (open_checkpoint(work / "small" / n) for n in pairs.FAMILY)
    rng = np.random.default_rng(7 + shifts * int(min(weights) == 0))
    found = {}
    for name in base:
      total = base[name].astype(np.float64)
      for one, weight, density in zip(
        tuned, weights, dare_masks.DENSITIES, strict=True
      ):
        change = one[name].astype(np.float64) - base[name]
        kept = change * (rng.random(change.shape) < density)
        norm = np.abs(kept).sum()
        if norm:
          total += weight * kept * np.abs(change).sum() / norm
      found[name] = total.astype(np.float32)
    return found

  return run


@pytest.mark.parametrize("shifts", [False, True])
def test_masks_of_both_models_are_found(shifts, tmp_path, monkeypatch):
  """Only where every run draws the same: a seed that moves is seen."""
  monkeypatch.setattr(dare_masks, "METHODS", {"dare_linear": "dare_linear"})
  few = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 64)
  few = {**dare_masks.SMALL, **few, "num_hidden_layers": 1}  # two shapes
  monkeypatch.setattr(dare_masks, "SMALL", few)
  monkeypatch.setattr(dare_masks, "_run", stand_in(shifts))
  ((method, largest, _, both),) = dare_masks.compare(tmp_path, "there")
  assert method == "dare_linear"
  assert both == pytest.approx(np.prod(dare_masks.DENSITIES), abs=0.01)
  assert (largest < 2e-7) != shifts


def test_recipes_say_weights_and_densities(tmp_path):
  file = dare_masks.write_recipe(
    tmp_path / "x.yml", "della", ["base", "a", "b"], (0, 1024)
  )
  recipe = yaml.safe_load(file.read_text())
  assert (recipe["merge_method"], recipe["base_model"]) == ("della", "base")
  assert recipe["models"] == [
    {"model": "a", "parameters": {"weight": 0.0, "density": 0.4}},
    {"model": "b", "parameters": {"weight": 1024.0, "density": 0.6}},
  ]
