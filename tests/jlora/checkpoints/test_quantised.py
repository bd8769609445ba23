# SPDX-License-Identifier: Apache-2.0
"""Quantised weights read as others read them, whole and in parts."""

import json
import statistics

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.merged import save_merged
from jlora.checkpoints.quantised import VALUES, describe_companion
from jlora.checkpoints.safetensors import write_safetensors

BF16 = np.dtype(ml_dtypes.bfloat16)
INDICES = (
  (),
  np.s_[1:3],
  np.s_[1],
  np.s_[-1, 3:40],
  np.s_[::2, ..., 1:50:3],
  np.s_[2:2],
  np.s_[..., 5:5],
)


def opened(folder, tensors):
  write_safetensors(folder / "model.safetensors", tensors)
  return open_checkpoint(folder)


def check_regions(checkpoint, name, expected):
  np.testing.assert_array_equal(checkpoint[name], expected)
  assert checkpoint.spec[name].shape == expected.shape
  assert checkpoint.spec[name].dtype == checkpoint[name].dtype
  for index in INDICES:
    read = checkpoint.read(name, index)
    np.testing.assert_array_equal(read, expected[index], err_msg=str(index))


def mxfp4(*shape, seed=0):
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
  return codes, rng.integers(90, 140, shape, dtype=np.uint8)


def test_mxfp4_experts_are_those_of_transformers(tmp_path):
  codes, scales = mxfp4(3, 64, 2)
  name = "model.layers.0.mlp.experts.gate_up_proj"
  bias = np.ones((3, 64), BF16)
  checkpoint = opened(
    tmp_path,
    {
      f"{name}_blocks": codes,
      f"{name}_scales": scales,
      f"{name}_bias": bias,
    },
  )
  theirs = convert_moe_packed_tensors(
    torch.tensor(codes), torch.tensor(scales), dtype=torch.bfloat16
  )
  assert checkpoint.keys() == {name, f"{name}_bias"}
  assert checkpoint.companions == dict.fromkeys(
    (f"{name}_blocks", f"{name}_scales"), name
  )
  assert checkpoint[name].dtype == BF16
  assert checkpoint[name].shape == (3, 64, 64)
  check_regions(checkpoint, name, theirs.float().numpy().astype(BF16))


def test_mxfp4_in_the_order_of_its_codes(tmp_path):
  """OpenAI's own names, and single matrices: nothing is exchanged."""
  codes, scales = mxfp4(4, 6, 3)
  flat, powers = mxfp4(5, 2, seed=1)
  checkpoint = opened(
    tmp_path,
    {
      "block.0.mlp.mlp1_weight.blocks": codes,
      "block.0.mlp.mlp1_weight.scales": scales,
      "q_blocks": flat,
      "q_scales": powers,
    },
  )
  both = {"block.0.mlp.mlp1_weight": (codes, scales), "q": (flat, powers)}
  e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
  table = np.array([*e2m1, *(-x for x in e2m1)])
  for name, (low, power) in both.items():
    nibbles = np.stack([low & 15, low >> 4], -1).reshape(*power.shape, 32)
    values = table[nibbles] * 2.0 ** (power[..., None].astype(int) - 127)
    expected = values.reshape(*power.shape[:-1], -1).astype(BF16)
    check_regions(checkpoint, name, expected)


def test_the_scale_255_is_no_number(tmp_path):
  codes, scales = mxfp4(2, 2)
  scales[1, 0] = 255
  read = opened(tmp_path, {"q_blocks": codes, "q_scales": scales})["q"]
  assert np.isnan(read[1, :32].astype(np.float32)).all()
  assert np.isfinite(read[0].astype(np.float32)).all()


def test_nf4_values_are_quantiles_of_a_normal_distribution():
  """Dettmers et al. (2023), appendix E: 8 above zero, 7 below, and zero."""
  quantile = statistics.NormalDist().inv_cdf
  offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
  above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  expected = np.sort([*above, 0.0, *below]) / max(above)
  np.testing.assert_allclose(VALUES["nf4"], expected, atol=1e-6)


def test_fp4_values_are_those_of_a_sign_two_exponents_and_a_bit():
  """bitsandbytes' own: a code 0b000 is zero, 0b001 the one subnormal."""
  expected = {0: 0, 1: 0.0625, 2: 8, 3: 12, 4: 4, 5: 6, 6: 2, 7: 3}
  for code, value in expected.items():
    np.testing.assert_allclose(VALUES["fp4"][code], value / 12, rtol=1e-6)
    np.testing.assert_allclose(VALUES["fp4"][code + 8], -value / 12, rtol=1e-6)


def quantise(values, kind, block, nested=False):
  """A weight in four bits as bitsandbytes writes it, made by plain loops."""
  table, flat = VALUES[kind].astype(np.float64), values.reshape(-1)
  blocks = [flat[at : at + block] for at in range(0, flat.size, block)]
  absmax = np.array([np.abs(b).max() for b in blocks], np.float32)
  codes = [
    int(np.abs(table - x / m).argmin())
    for b, m in zip(blocks, absmax, strict=True)
    for x in b
  ]
  codes += [0] * (len(codes) % 2)
  data = [16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)]
  state = {
    "quant_type": kind,
    "blocksize": block,
    "dtype": "float32",
    "shape": list(values.shape),
  }
  tensors = {
    "m.weight": np.array(data, np.uint8)[:, None],
    "m.weight.absmax": absmax,
    "m.weight.quant_map": VALUES[kind],
  }
  if nested:
    inner, offset = 4, float(absmax.mean())
    rest = absmax - np.float32(offset)
    outer = [np.abs(rest[i : i + inner]).max() for i in range(0, len(rest), 4)]
    steps = np.linspace(-1, 1, 256).astype(np.float32)
    own = [
      int(np.abs(steps - x / outer[i // inner]).argmin())
      for i, x in enumerate(rest)
    ]
    absmax = np.array(
      [steps[c] * outer[i // inner] + offset for i, c in enumerate(own)]
    )
    state |= {"nested_blocksize": inner, "nested_offset": offset}
    tensors["m.weight.absmax"] = np.array(own, np.uint8)
    tensors["m.weight.nested_absmax"] = np.array(outer, np.float32)
    tensors["m.weight.nested_quant_map"] = steps
  text = json.dumps(state).encode()
  name = f"m.weight.quant_state.bitsandbytes__{kind}"
  tensors[name] = np.frombuffer(text, np.uint8)
  expected = [table[c] * absmax[i // block] for i, c in enumerate(codes)]
  expected = np.array(expected[: flat.size]).reshape(values.shape)
  return tensors, expected


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("shape", [(6, 50), (3, 64), (5, 51)], ids=str)
def test_four_bits_of_bitsandbytes(kind, nested, shape, tmp_path):
  values = np.random.default_rng(0).standard_normal(shape)
  tensors, expected = quantise(values, kind, 16, nested)
  checkpoint = opened(tmp_path, tensors)
  assert checkpoint.keys() == {"m.weight"}
  assert checkpoint.companions.keys() == tensors.keys() - {"m.weight"}
  read = checkpoint["m.weight"]
  np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-6)
  check_regions(checkpoint, "m.weight", read)
  # What was quantised comes back, to the largest distance of two values.
  assert np.abs(read - values).max() < 0.4 * np.abs(values).max()


def test_four_bits_come_in_the_dtype_they_were_made_from(tmp_path):
  values = np.random.default_rng(0).standard_normal((4, 32))
  tensors, expected = quantise(values, "nf4", 64)
  name = next(n for n in tensors if "quant_state" in n)
  text = tensors[name].tobytes().replace(b"float32", b"bfloat16")
  tensors[name] = np.frombuffer(text, np.uint8)
  # Some store their codes as numbers of the model's dtype.
  tensors["m.weight"] = tensors["m.weight"].reshape(-1).view(BF16)[:, None]
  checkpoint = opened(tmp_path, tensors)
  assert checkpoint.spec["m.weight"].dtype == BF16
  check_regions(checkpoint, "m.weight", expected.astype("f4").astype(BF16))


def damaged_text(tensors, name):
  tensors[name] = np.zeros(80, np.uint8)


def damaged_shape(tensors, name):
  text = tensors[name].tobytes().replace(b"[4, 32]", b"[4, 99]")
  tensors[name] = np.frombuffer(text, np.uint8)


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (damaged_text, "'m.weight' is quantised by bitsandbytes.*does not say how"),
    (damaged_shape, "which 64 bytes do not hold"),
    (lambda t, n: t.pop("m.weight.absmax"), r"lacks m\.weight\.absmax"),
    (
      lambda t, n: t.update({"m.weight.absmax": np.ones(3, np.float32)}),
      "one scale for each of 2 blocks",
    ),
    (
      lambda t, n: t.update({"m.weight.quant_map": np.ones(16, np.float32)}),
      "is not the table of nf4",
    ),
  ],
)
def test_what_does_not_fit_is_named(damage, words, tmp_path):
  values = np.random.default_rng(0).standard_normal((4, 32))
  tensors, _ = quantise(values, "nf4", 64)
  damage(tensors, next(n for n in tensors if "quant_state" in n))
  with pytest.raises(ValueError, match=words):
    opened(tmp_path, tensors)


def test_eight_bits_of_bitsandbytes(tmp_path):
  """The largest of a row is 127; its values come back to half a step."""
  values = np.random.default_rng(0).standard_normal((5, 60)).astype(np.float32)
  largest = np.abs(values).max(1)
  codes = np.round(values * 127 / largest[:, None]).astype(np.int8)
  tensors = {
    "m.weight": codes,
    "m.SCB": largest,
    "m.weight_format": np.zeros((), np.uint8),
  }
  checkpoint = opened(tmp_path, tensors)
  assert checkpoint.keys() == {"m.weight"}
  read = checkpoint["m.weight"]
  step = largest[:, None] / 127
  assert (np.abs(read - values) <= 0.5001 * step).all()
  np.testing.assert_allclose(read, codes * step, rtol=1e-6)
  check_regions(checkpoint, "m.weight", read)
  tensors["m.weight_format"] = np.ones((), np.uint8)
  with pytest.raises(ValueError, match="in the tiles of a card"):
    opened(tmp_path, tensors)


def test_a_weight_that_is_there_twice_is_refused(tmp_path):
  codes, scales = mxfp4(2, 2)
  tensors = {"q_blocks": codes, "q_scales": scales, "q": np.ones((2, 64))}
  with pytest.raises(ValueError, match="q is there quantised and as it was"):
    opened(tmp_path, tensors)


def test_what_looks_like_codes_is_left(tmp_path):
  tensors = {
    "a_blocks": np.ones((2, 16), np.float32),
    "a_scales": np.ones(2, np.float32),
    "b_blocks": np.ones((2, 3, 16), np.uint8),
    "SCB": np.ones(2, np.float32),
  }
  checkpoint = opened(tmp_path, tensors)
  assert checkpoint.keys() == tensors.keys()
  assert checkpoint.companions == {}


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("q.weight_scale", "multiplied into its weight"),
    ("m.weight.absmax", "multiplied into its weight"),
    ("q.input_scale", "activations"),
    ("attn.k_scale", "activations"),
    ("experts.gate_up_proj_blocks", "codes"),
    ("m.weight.quant_state.bitsandbytes__nf4", "says how"),
    ("scaled_fp8", "says how"),
  ],
)
def test_companions_are_described(name, words):
  assert words in describe_companion(name)


def test_what_is_merged_into_codes_is_written_as_values(tmp_path):
  codes, scales = mxfp4(2, 2)
  base = tmp_path / "base"
  base.mkdir()
  config = {"model_type": "x", "quantization_config": {"quant_method": "mxfp4"}}
  (base / "config.json").write_text(json.dumps(config))
  base = opened(base, {"q_blocks": codes, "q_scales": scales})
  save_merged(tmp_path / "out", base, {})
  found = open_checkpoint(tmp_path / "out")
  assert found.config == {"model_type": "x"}
  assert found.keys() == {"q"}
  np.testing.assert_array_equal(found["q"], base["q"])
