# SPDX-License-Identifier: Apache-2.0
"""TIES from disk with one threshold a model, as in memory."""

import io

import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
from jlora.merging.checkpoints.run import merge_checkpoints
from jlora.merging.checkpoints.trimming import trim_models


def write(path, seed, dtype=np.float32, scales=(1.0, 0.1)):
  rng = np.random.default_rng(seed)
  shapes = {"a": (40, 30), "b": (50,)}
  write_safetensors(path, {
    name: (scale * rng.standard_normal(shape)).astype(dtype)
    for scale, (name, shape) in zip(scales, shapes.items(), strict=True)
  })  # fmt: skip
  return str(path)


def recipe_of(base, *tuned):
  inputs = tuple(Input(path) for path in tuned)
  return Recipe(jlora.merging.ties, (Slice(inputs),), base=base)


def thresholds_of(recipe):
  return [one.settings["threshold"] for one in recipe.slices[0].inputs]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("density", [1e-9, 0.2, 0.731, 1.0])
def test_thresholds_are_those_of_trees(dtype, density, tmp_path, monkeypatch):
  monkeypatch.setattr(jlora.merging.checkpoints.trimming, "_PIECE", 128)
  paths = [write(tmp_path / f"{i}.safetensors", i, dtype) for i in range(3)]
  found = thresholds_of(trim_models(recipe_of(*paths), density))
  base, *tuned = (dict(open_checkpoint(path)) for path in paths)
  expected = jlora.merging.magnitude_thresholds(tuned, base, density)
  np.testing.assert_array_equal(found, np.asarray(expected))


def test_merged_as_in_memory(tmp_path):
  paths = [write(tmp_path / f"{i}.safetensors", i) for i in range(3)]
  recipe = trim_models(recipe_of(*paths), 0.3)
  merge_checkpoints(recipe, tmp_path / "out", log=io.StringIO())
  found = open_checkpoint(tmp_path / "out")
  base, *tuned = (dict(open_checkpoint(path)) for path in paths)
  threshold = jlora.merging.magnitude_thresholds(tuned, base, 0.3)
  expected = jlora.merge(
    tuned,
    method=jlora.merging.ties,
    base=base,
    settings={"threshold": threshold},
  )
  for name in base:
    np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
  # The tensor that changed little loses nearly all, the other one does not.
  kept = {name: np.mean(found[name] != base[name]) for name in base}
  assert kept["a"] > 0.3 > 10 * kept["b"]


def test_weights_in_two_places_count_once(tmp_path):
  """A layer that a frankenmerge has twice."""
  paths = []
  for i in range(2):
    rng = np.random.default_rng(i)
    paths.append(str(tmp_path / f"{i}.safetensors"))
    write_safetensors(paths[-1], {
      f"model.layers.{at}.w.weight": rng.standard_normal((4, 5), np.float32)
      for at in range(2)
    })  # fmt: skip
  base, tuned = paths
  parts = ((0, 2), (1, 2), (1, 2))
  slices = tuple(Slice((Input(tuned, layers=part),)) for part in parts)
  recipe = trim_models(Recipe(jlora.merging.ties, slices, base=base), 0.4)
  own, under = (dict(open_checkpoint(path)) for path in (tuned, base))
  expected = jlora.merging.magnitude_thresholds([own], under, 0.4)
  for part in recipe.slices:
    assert part.inputs[0].settings == {"threshold": float(expected[0])}


def test_the_door(tmp_path):
  paths = [write(tmp_path / f"{i}.safetensors", i) for i in range(2)]
  for density in (0, 1.5, np.nan):
    with pytest.raises(ValueError, match="lies above 0, up to 1"):
      trim_models(recipe_of(*paths), density)
  recipe = recipe_of(*paths)._replace(method=jlora.merging.linear)
  with pytest.raises(ValueError, match="linear takes no threshold"):
    trim_models(recipe, 0.5)
  with pytest.raises(ValueError, match="needs a base"):
    trim_models(recipe_of(*paths)._replace(base=None), 0.5)
