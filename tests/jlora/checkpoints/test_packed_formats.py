# SPDX-License-Identifier: Apache-2.0
"""Codes that are not read are refused by the name of their format."""

import json

import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.packed_formats import check_dequantised
from jlora.checkpoints.safetensors import write_safetensors

WORDS = np.zeros((4, 2), np.int32)
BYTES = np.zeros((4, 2), np.uint8)
SCALES = np.ones((4, 1), np.float32)
E4M3 = SCALES.astype(ml_dtypes.float8_e4m3fn)

PACKED = {
  "GPTQ": {"qweight": WORDS, "qzeros": WORDS, "scales": SCALES, "g_idx": WORDS},
  "AWQ": {"qweight": WORDS, "qzeros": WORDS, "scales": SCALES},
  "compressed-tensors": {"weight_packed": WORDS, "weight_scale": SCALES},
  "NVFP4": {"weight": BYTES, "weight_scale": E4M3, "weight_scale_2": SCALES},
  "torchao": {"_weight_qdata": BYTES, "_weight_scale": SCALES},
  "MLX": {"weight": BYTES, "scales": SCALES, "biases": SCALES},
  "quanto": {"weight._data": BYTES, "weight._scale": SCALES},
  "HQQ": {"W_q": BYTES, "scale": SCALES, "zero": SCALES},
  "bitsandbytes": {"weight": BYTES, "weight.absmax": SCALES},
}


def opened(folder, tensors, config=None):
  write_safetensors(folder / "model.safetensors", tensors)
  if config is not None:
    (folder / "config.json").write_text(json.dumps(config))
  return open_checkpoint(folder)


@pytest.mark.parametrize("format", PACKED)
def test_a_format_is_told_by_what_lies_beside_its_codes(format, tmp_path):
  tensors = {f"layers.0.q.{end}": one for end, one in PACKED[format].items()}
  checkpoint = opened(tmp_path, tensors | {"norm.weight": np.ones(3)})
  with pytest.raises(ValueError, match=f"is quantised \\({format}") as raised:
    check_dequantised(checkpoint)
  assert "1 tensors are packed in integers, layers.0.q." in str(raised.value)
  assert "dequantise it first with" in str(raised.value)


@pytest.mark.parametrize(
  ("method", "tool"),
  [
    ("gptq", "gptqmodel"),
    ("awq", "gptqmodel"),
    ("compressed-tensors", "CompressedTensorsConfig"),
    ("bitsandbytes", r"\.dequantize\(\)"),
    ("strange", "the tool that quantised it"),
  ],
)
def test_the_configuration_names_the_method_and_a_tool(method, tool, tmp_path):
  config = {"quantization_config": {"quant_method": method}}
  checkpoint = opened(tmp_path, {"q.weight": BYTES}, config)
  with pytest.raises(ValueError, match=f"quantised \\({method}\\).*{tool}"):
    check_dequantised(checkpoint)


def test_what_is_not_packed_passes(tmp_path):
  """Whatever a configuration left from before says; counters are no codes."""
  tensors = {
    "q.weight": SCALES,
    "embeddings.position_ids": np.zeros((1, 8), np.int64),
    "q.weight_scale": SCALES,
  }
  config = {"quantization_config": {"quant_method": "gptq"}}
  check_dequantised(opened(tmp_path, tensors, config))
  check_dequantised(opened(tmp_path, {"q.weight": BYTES}, {}))
