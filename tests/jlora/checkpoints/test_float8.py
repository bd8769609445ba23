# SPDX-License-Identifier: Apache-2.0
"""float8 values against plain loops and torch, for every kind of scale."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.checkpoints.float8 import (
  FLOAT8,
  dequantise,
  pair_other_scales,
  pair_scales,
)

E4M3, E5M2 = FLOAT8
SHAPES = {
  "tensor": ((5, 7), ()),
  "tensor of one": ((5, 7), (1,)),
  "vector": ((7,), (7,)),
  "rows": ((300, 7), (300, 1)),
  "rows without axis": ((300, 7), (300,)),
  "columns": ((5, 7), (1, 7)),
  "blocks": ((256, 384), (2, 3)),
  "blocks with edges": ((300, 130), (3, 2)),
  "one row of blocks": ((100, 130), (1, 2)),
  "experts by blocks": ((2, 130, 5), (2, 2, 1)),
  "experts": ((3, 4, 5), (3,)),
}


def expand(scale, shape):
  """Every scale repeated over its block, then cut to the shape."""
  scale = scale.reshape(scale.shape + (1,) * (len(shape) - scale.ndim))
  for axis, n in enumerate(shape):
    if scale.shape[axis] not in (1, n):
      scale = np.repeat(scale, 128, axis).take(range(n), axis)
  return np.broadcast_to(scale, shape)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("case", SHAPES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_region_of_codes_times_scales(dtype, case, data):
  shape, scale_shape = SHAPES[case]
  rng = np.random.default_rng(0)
  codes = rng.standard_normal(shape).astype(dtype)
  scale = rng.uniform(0.5, 2, scale_shape).astype(np.float32)
  expected = codes.astype(np.float32) * expand(scale, shape)
  region = []
  for n in shape:
    start = data.draw(st.integers(0, n))
    region.append(range(n)[start : data.draw(st.integers(start, n))])
  pick = np.ix_(*region)
  read = dequantise(codes[pick], scale, shape, region)
  assert read.dtype == np.float32
  np.testing.assert_array_equal(read, expected[pick])


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_every_code_is_torchs(dtype):
  codes = np.arange(256, dtype=np.uint8)
  kind = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}[dtype]
  expected = torch.tensor(codes).view(kind).float().numpy()
  ones = np.ones((), np.float32)
  read = dequantise(codes.view(dtype), ones, (256,), (range(256),))
  np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_scales_are_paired_and_others_left(suffix):
  tensors = {
    "q.weight": ((200, 300), E4M3),
    f"q.weight{suffix}": ((2, 3), "bfloat16"),
    "q.input_scale": ((), "float32"),
    "q.k_scale": ((), "float32"),
    "int8.weight": ((2, 2), np.dtype(np.int8)),
    "int8.weight_scale": ((2, 1), "float32"),
  }
  found = pair_scales(tensors)
  assert found == {f"q.weight{suffix}": "q.weight"}
  others = pair_other_scales(tensors, found)
  assert others == {"q.input_scale": "q.weight", "q.k_scale": "q.weight"}


def test_scales_of_every_name_belong_to_their_weight():
  """As written by vLLM's tools, by ComfyUI, and for fused experts."""
  number, e4m3 = ((), np.dtype(np.float32)), ((4, 4), E4M3)
  tensors = {
    "a.q_proj.weight": e4m3,
    "a.q_proj.weight_scale": number,
    "a.q_proj.input_scale_ub": number,
    "a.q_proj.output_scale": number,
    "a.k_scale": number,
    "b.weight": e4m3,
    "b.scale_weight": number,
    "b.scale_input": number,
    "scaled_fp8": ((2,), E4M3),
    "experts.gate_up_proj": e4m3,
    "experts.gate_up_proj_scale_inv": number,
    "experts.gate_up_proj_input_scale": number,
  }
  scales = pair_scales(tensors)
  others = pair_other_scales(tensors, scales)
  weights = {"a.q_proj.weight", "b.weight", "experts.gate_up_proj"}
  assert {*scales.values()} == weights
  assert {*scales, *others, *weights} == {*tensors}
  assert others["scaled_fp8"] in weights
  assert others["experts.gate_up_proj_input_scale"] == "experts.gate_up_proj"
  # Without a float8 weight, and of a layer that has none, they may be anything.
  strange = {"c.input_scale": number, "a.q_scale": ((4,), "float32")}
  assert pair_other_scales(strange, {}) == {}
  assert pair_other_scales(strange, scales) == {}


@pytest.mark.parametrize(
  ("scales", "words"),
  [
    ({}, "'w' is float8_e4m3fn with 0 scales"),
    ({"w_scale": ((), "f4"), "w_scale_inv": ((), "f4")}, "with 2 scales"),
    ({"w_scale": ((2, 2), "f4")}, r"\(2, 2\) fits 'w' of shape \(300, 7\)"),
    ({"w_scale": ((1, 1, 3), "f4")}, "neither"),
    ({"w_scale": ((3,), "f4")}, "neither"),
    ({"w_scale": ((), "i4")}, "not floating"),
  ],
)
def test_unfit_scales_are_refused_by_name(scales, words):
  with pytest.raises(ValueError, match=words):
    pair_scales({"w": ((300, 7), E4M3)} | scales)


def test_dequantise_checks_the_scale():
  with pytest.raises(ValueError, match="do not fit"):
    dequantise(np.ones(3, E4M3), np.ones(2, "f4"), (3,), (range(3),))


CODES = np.array([[1.5, -448.0], [0.015625, 2.0]], E4M3)


def test_codes_without_any_scale_are_values_and_that_is_told(tmp_path):
  path = tmp_path / "x.safetensors"
  write_safetensors(path, {"q.weight": CODES, "q.bias": np.ones(2, "f4")})
  words = r"no float8 tensor has a scale.* of 1 are read as the values: q.weig"
  with pytest.warns(UserWarning, match=words):
    found = open_checkpoint(path)
  assert found.casts == {"q.weight"}
  assert found.spec["q.weight"].dtype == E4M3
  for checkpoint in (found, open_checkpoint(path, float8="cast")):
    array = checkpoint.read("q.weight", (slice(1, 2),))
    np.testing.assert_array_equal(array, CODES[1:].astype(np.float32))
    assert array.dtype == np.float32


@pytest.mark.parametrize(
  "sign",
  [
    {"k.weight": CODES, "k.weight_scale": np.float32(2)},
    {"scaled_fp8": np.zeros(2, E4M3)},
    {},
  ],
  ids=["scale", "marker", "metadata"],
)
def test_codes_without_a_scale_beside_others_need_a_word(sign, tmp_path):
  path = tmp_path / "x.safetensors"
  metadata = {} if sign else {"_quantization_metadata": '{"layers": {}}'}
  write_safetensors(path, {"q.weight": CODES} | sign, metadata)
  words = r"'q.weight' is float8_e4m3fn with 0 scales.* say --float8=cast"
  with pytest.raises(ValueError, match=words):
    open_checkpoint(path)
  found = open_checkpoint(path, float8="cast")
  np.testing.assert_array_equal(found["q.weight"], CODES.astype(np.float32))
  if "k.weight" in found:
    np.testing.assert_array_equal(found["k.weight"], 2 * CODES.astype("f4"))
  with pytest.raises(ValueError, match="float8 must be 'cast' or None"):
    open_checkpoint(path, float8="scaled")


def test_what_comfyui_writes_beside_its_weights_is_left_out(tmp_path):
  path = tmp_path / "x.safetensors"
  tensors = {
    "q.weight": CODES,
    "q.weight_scale": np.float32(2),
    "q.input_scale": np.float32(3),
    "q.comfy_quant": np.zeros(28, np.uint8),
    "k.weight": CODES,
    "k.scale_weight": np.full(1, 4, np.float32),
    "k.scale_input": np.float32(5),
  }
  write_safetensors(path, tensors, {"_quantization_metadata": "{}"})
  found = open_checkpoint(path)
  assert {*found} == {"q.weight", "k.weight"}
  assert {*found.companions} == {*tensors} - {*found}
  for name, scale in (("q.weight", 2), ("k.weight", 4)):
    np.testing.assert_array_equal(found[name], scale * CODES.astype("f4"))


def test_a_configuration_that_says_quantised_is_believed(tmp_path):
  write_safetensors(tmp_path / "model.safetensors", {"q.weight": CODES})
  config = '{"quantization_config": {"quant_method": "fp8"}}'
  (tmp_path / "config.json").write_text(config)
  with pytest.raises(ValueError, match="quantised, but no float8 .*q.weight"):
    open_checkpoint(tmp_path)
  assert open_checkpoint(tmp_path, float8="cast").casts == {"q.weight"}
