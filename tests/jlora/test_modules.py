# SPDX-License-Identifier: Apache-2.0
"""Pairs factored one at a time: rooms and devices used again, split tensors."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.factoring import krylov, svd
from jlora.meshes import place
from jlora.modules import Extractor
from jlora.pairs import Pair, Part
from jlora.splits import share_out
from jlora.views import KERNEL, LINEAR, STACKED
from tests.matrices import SPECTRA, matrix

M, N = 24, 40


def test_memory_used_again_changes_nothing():
  """Large, small and large again, by one thread: its delta's room is kept."""
  rng = np.random.default_rng(0)
  step = Extractor(krylov, np.float32, None, on_host=True)
  shapes = {"a": (M, N), "b": (7, 5), "c": (N, M)}
  base = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
  ft = {
    n: w + rng.normal(size=w.shape).astype(np.float32) for n, w in base.items()
  }

  def run(step, name):
    pair = Pair(name, shapes[name], Part(name), Part(name))
    return step(pair, KERNEL, 3, base, ft).arrays

  for name in "abcab":
    alone = run(Extractor(krylov, np.float32, None, on_host=True), name)
    for one, two in zip(run(step, name).values(), alone.values(), strict=True):
      np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("piece", [1, 100, 2**19])
def test_tensors_of_files_read_into_memory_used_again(
  tmp_path, monkeypatch, piece
):
  """By rows, and of two dtypes: the same as tensors that were read anew."""
  monkeypatch.setattr("jlora.pairs._PIECE", piece)
  rng = np.random.default_rng(0)
  shapes = {"a": (M, N), "b": (7, 5), "c": (N, M)}
  sides = []
  for dtype in (ml_dtypes.bfloat16, np.float32):
    w = {n: rng.normal(size=s).astype(dtype) for n, s in shapes.items()}
    write_safetensors(tmp_path / f"{dtype.__name__}.safetensors", w)
    file = open_checkpoint(tmp_path / f"{dtype.__name__}.safetensors")
    sides.append((w, file))
  step = Extractor(krylov, np.float32, None, on_host=True)
  for name in "abcab":
    pair = Pair(name, shapes[name], Part(name), Part(name))
    new, again = (
      step(pair, KERNEL, 3, base, ft) for base, ft in zip(*sides, strict=True)
    )
    for key in ("a", "b"):
      np.testing.assert_array_equal(new.arrays[key], again.arrays[key])
    assert new.figures == again.figures


def compiled(name, shape, view, device=None):
  """A pair's outcome on one device, from arrays."""
  left, right = sides_of(shape)
  step = Extractor(svd, np.float32, jax.random.key(3), on_host=False)
  if device is not None:
    step.use(device)
  pair = Pair(name, shape, Part(name), Part(name))
  return step(pair, view, 4, {name: left}, {name: right})


def sides_of(shape):
  base = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  delta = np.asarray(matrix(SPECTRA["power_law"](min(M, N)), M, N))
  return base, base + np.resize(delta, shape)


def test_every_device_gives_the_same():
  first = compiled("w", (M, N), KERNEL)
  for device in jax.local_devices()[::7]:
    other = compiled("w", (M, N), KERNEL, device)
    np.testing.assert_array_equal(first.arrays["a"], other.arrays["a"])
    assert first.figures == other.figures


@pytest.mark.parametrize(
  ("shape", "view", "parts"),
  [
    ((M, N), KERNEL, 8),
    ((M - 1, N), KERNEL, 8),  # along its other axis
    ((21, 25), LINEAR, 7),  # not over all devices
    ((4, M, N), STACKED, 8),  # the experts' rows
  ],
)
def test_a_tensor_on_many_devices_gives_the_same(shape, view, parts):
  left, right = sides_of(shape)
  sharding = share_out(shape)
  assert len(sharding.mesh.devices) == parts
  sides = [place(shape, sharding, side.__getitem__) for side in (left, right)]
  assert not sides[0].sharding.is_fully_replicated
  pair = Pair("w", shape, Part("w"), Part("w"))
  step = Extractor(svd, np.float32, jax.random.key(3))
  split = step.split(pair, view, 4, sides, np.dtype(np.float32))
  whole = compiled("w", shape, view)
  assert split.status == whole.status == "extracted"
  for name in ("a", "b"):
    np.testing.assert_allclose(
      split.arrays[name], whole.arrays[name], rtol=2e-4, atol=2e-5
    )
  for name in ("norm", "errors", "singular_values", "noise_floor"):
    np.testing.assert_allclose(
      split.figures[name], whole.figures[name], rtol=1e-4, atol=1e-5
    )


def test_damage_is_found_on_many_devices():
  left, right = sides_of((M, N))
  right[M - 1, 0] = np.nan
  sharding = share_out((M, N))
  sides = [place((M, N), sharding, side.__getitem__) for side in (left, right)]
  step = Extractor(svd, np.float32, None)
  pair = Pair("w", (M, N), Part("w"), Part("w"))
  with pytest.raises(ValueError, match="w: 1 of 960 values of the finetuned"):
    step.split(pair, KERNEL, 4, sides, np.dtype(np.float32))
