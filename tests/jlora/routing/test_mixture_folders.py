# SPDX-License-Identifier: Apache-2.0
"""What no Mixtral can be made of is refused by name, and nothing is written."""

import json

import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.formats.adapted import open_model
from jlora.formats.peft.writing import save_peft
from jlora.loras import Lora
from jlora.routing.mixture_folders import save_mixture
from tests.helpers.small_pairs import draw

GATE = "model.layers.0.mlp.gate_proj.weight"
NORM = "model.norm.weight"
SHAPES = {
  GATE: (6, 4),
  "model.layers.0.mlp.up_proj.weight": (6, 4),
  "model.layers.0.mlp.down_proj.weight": (4, 6),
  "model.layers.0.self_attn.q_proj.weight": (4, 4),
  NORM: (4,),
}
CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4}
ROUTERS = np.zeros((2, 4), np.float32)
LORA = Lora(draw(2, 4), draw(2, 6), np.float32(1))


def write(folder, config=None, more=None):
  """An open model of one layer, with a tokenizer."""
  folder.mkdir()
  tensors = {name: draw(*shape) for name, shape in SHAPES.items()}
  write_safetensors(folder / "model.safetensors", tensors | (more or {}))
  text = json.dumps(CONFIG if config is None else config)
  (folder / "config.json").write_text(text)
  (folder / "tokenizer.json").write_text("{}")
  return open_checkpoint(folder)


# What is wrong with the base: its config.json, tensors -> what is said.
BASES = {
  "family": (
    {**CONFIG, "model_type": "gpt2"},
    {},
    "is of type gpt2; a Mixtral",
  ),
  "no config": ({}, {}, "is of type None"),
  "no size": ({**CONFIG, "hidden_size": "4"}, {}, "hidden_size is '4', needed"),
  "layers": (
    {**CONFIG, "num_hidden_layers": 2},
    {},
    "missing are model.layers.1",
  ),
  "biases": (
    CONFIG,
    {"model.layers.0.mlp.up_proj.bias": draw(6)},
    "biases model.layers.0.mlp.up_proj.bias",
  ),
  "integers": (CONFIG, {GATE: np.ones((6, 4), "i1")}, "floating, not .*int8"),
}


@pytest.mark.parametrize(("config", "more", "said"), BASES.values(), ids=BASES)
def test_a_base_that_is_no_mixtral(config, more, said, tmp_path):
  base = write(tmp_path / "base", config, more)
  with pytest.raises(ValueError, match=f"base.*{said}"):
    save_mixture(tmp_path / "out", base, [base, base], ROUTERS)
  assert [file.name for file in tmp_path.iterdir()] == ["base"]


# Experts, by the base and a folder -> what is said.
EXPERTS = {
  "none": (lambda base, root: [], "needs at least one expert"),
  "shape": (
    lambda base, root: [base, write(root / "x", more={GATE: draw(7, 4)})],
    r"expert 1 does not fit the base: .*gate_proj.weight: \(7, 4\), base",
  ),
  "kind": (
    lambda base, root: [
      base, write(root / "x", more={GATE: np.ones((6, 4), "i1")})
    ],
    "expert 1 does not fit the base: .*gate_proj.weight: int8",
  ),
  "no change": (
    lambda base, root: [base, {NORM: LORA}],
    "expert 1 does not fit the base: it has no change of an MLP",
  ),
  "Lora's shape": (
    lambda base, root: [base, {GATE: Lora(LORA.b, LORA.a, LORA.scale)}],
    r"gate_proj.weight: \(4, 6\), base \(6, 4\)",
  ),
  "no Lora": (
    lambda base, root: [base, {GATE: draw(6, 4)}],
    "an expert holds ndarray: give an open checkpoint",
  ),
  "not finite": (
    lambda base, root: [
      base, write(root / "x", more={GATE: np.full((6, 4), np.nan, "f4")})
    ],
    r"experts.1.w1.*24 of 24 values are NaN",
  ),
}  # fmt: skip


@pytest.mark.parametrize(("experts", "said"), EXPERTS.values(), ids=EXPERTS)
def test_experts_that_do_not_fit(experts, said, tmp_path):
  base = write(tmp_path / "base")
  given = experts(base, tmp_path)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(ValueError, match=said):
    save_mixture(tmp_path / "out", base, given, ROUTERS)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
  ("routers", "chosen", "said"),
  [
    (np.zeros((3, 4)), 2, r"layer 0: \(3, 4\)"),
    (np.full((2, 4), np.inf), 2, "must be finite"),
    ({}, 2, "layer 0: none"),
    ({0: ROUTERS, 3: ROUTERS}, 2, "no layer 3 is there"),
    (ROUTERS, 0, "chosen is 0; of 2 experts take 1 to 2"),
    (ROUTERS, 3, "chosen is 3"),
  ],
)
def test_routers_that_do_not_fit(routers, chosen, said, tmp_path):
  base = write(tmp_path / "base")
  with pytest.raises(ValueError, match=said):
    save_mixture(tmp_path / "out", base, [base, base], routers, chosen=chosen)
  assert [file.name for file in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("out", ["base", ".", "base/model.safetensors"])
def test_nothing_that_is_there_is_replaced(out, tmp_path):
  base = write(tmp_path / "base")
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(ValueError, match="exists; remove it"):
    save_mixture(tmp_path / out, base, [base, base], ROUTERS)
  assert sorted(tmp_path.rglob("*")) == before


def test_files_beside_the_weights_that_lead_elsewhere(tmp_path):
  base = write(tmp_path / "base")
  (tmp_path / "secret").write_text("mine")
  (tmp_path / "base" / "notes.txt").symlink_to(tmp_path / "secret")
  with pytest.raises(ValueError, match="notes.txt leads to .*secret"):
    save_mixture(tmp_path / "out", base, [base, base], ROUTERS)
  assert not (tmp_path / "out").exists()


def test_a_model_with_an_adapter_on_it_is_an_expert(tmp_path):
  base = write(tmp_path / "base")
  save_peft(tmp_path / "adapter", {GATE: LORA}, like=base.spec)
  adapted = open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
  for name, expert in (("one", adapted), ("two", {GATE: LORA})):
    save_mixture(tmp_path / name, base, [base, expert], ROUTERS)
  one, two = (open_checkpoint(tmp_path / name) for name in ("one", "two"))
  assert one.keys() == two.keys()
  for name, array in one.items():
    np.testing.assert_array_equal(array, two[name])


def test_float8_becomes_bfloat16(tmp_path):
  """Without their scales the codes would be other numbers."""
  codes = np.full((6, 4), 3, ml_dtypes.float8_e4m3fn)
  scale = {f"{GATE}_scale_inv": np.full((1, 1), 2**-12, np.float32)}
  config = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
  base = write(tmp_path / "base", config, {GATE: codes} | scale)
  save_mixture(tmp_path / "out", base, [base, base], ROUTERS)
  mixed = open_checkpoint(tmp_path / "out")
  name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
  assert mixed[name].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(mixed[name].astype("f4"), 3 * 2.0**-12)
  assert "quantization_config" not in mixed.config
