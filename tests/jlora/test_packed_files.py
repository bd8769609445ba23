# SPDX-License-Identifier: Apache-2.0
"""Packed Loras on disk come back as they were, and damage is found."""

import numpy as np
import pytest

from jlora.loras import Lora
from jlora.packed_files import load_packed, save_packed
from jlora.packing import pack
from jlora.safetensors_files import write_safetensors


def draw(rank, m, n, seed=0):
  rng = np.random.default_rng(seed)
  a, b = (rng.standard_normal((rank, k), np.float32) for k in (m, n))
  return Lora(a, b, np.float32(1))


@pytest.fixture
def packed():
  bits = np.array([8, 3, 3, 1, 0])
  return {"m.q": pack(draw(5, 7, 9), bits), "m.up": pack(draw(2, 4, 4), 4)}


def test_what_is_saved_is_loaded(tmp_path, packed):
  save_packed(tmp_path / "x.safetensors", packed)
  found = load_packed(tmp_path / "x.safetensors")
  assert found.keys() == packed.keys()
  for name, one in packed.items():
    assert found[name].shape == one.shape
    for part in ("bits", "steps", "codes"):
      np.testing.assert_array_equal(
        getattr(found[name], part), getattr(one, part)
      )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"bits": np.array([9, 3, 3, 1], np.uint8)}, "codes of m.q do not fit"),
    ({"bits": np.array([8, 3, 3, 2], np.uint8)}, "codes of m.q do not fit"),
    ({"codes": np.zeros(3, np.uint8)}, "codes of m.q do not fit"),
    ({"steps": np.zeros((2, 3), np.float32)}, "codes of m.q do not fit"),
    ({"shape": (7, 10)}, "codes of m.q do not fit"),
  ],
)
def test_damage_is_found(tmp_path, packed, change, message):
  packed["m.q"] = packed["m.q"]._replace(**change)
  save_packed(tmp_path / "x.safetensors", packed)
  with pytest.raises(ValueError, match=message):
    load_packed(tmp_path / "x.safetensors")


def test_other_files_are_refused(tmp_path, packed):
  file = tmp_path / "x.safetensors"
  write_safetensors(file, {"w": np.ones(2)})
  with pytest.raises(ValueError, match="holds no packed Loras"):
    load_packed(file)
  metadata = {"jlora_packed_shapes": '{"w": [2, 2]}'}
  write_safetensors(file, {"w.bits": np.ones(2, np.uint8)}, metadata)
  with pytest.raises(
    ValueError, match="missing or left over: w.codes, w.steps"
  ):
    load_packed(file)
  with pytest.raises(ValueError, match="no packed Lora to save"):
    save_packed(file, {})
