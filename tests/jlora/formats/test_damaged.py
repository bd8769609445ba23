# SPDX-License-Identifier: Apache-2.0
"""Odd and damaged files of adapters: what is read is right, or is refused."""

import json

import numpy as np
import pytest

from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.formats import (
  open_adapter,
  save_comfy,
  save_diffusers,
  save_gguf,
  save_kohya,
)
from jlora.loras import Lora

D = 8
RNG = np.random.default_rng(0)
FLAT = "lora_unet_double_blocks_0_img_attn_proj"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
LAST = "diffusion_model.final_layer.adaLN_modulation.1"
BASE = {
  **{f"transformer_blocks.0.attn.to_{x}.weight": (D, D) for x in "qkv"},
  **{f"transformer_blocks.0.attn.to_{x}.bias": (D,) for x in "qkv"},
  "norm_out.linear.weight": (2 * D, D),
  "norm_out.linear.bias": (2 * D,),
  "x_embedder.weight": (D, D),
}


def draw(*shape):
  return RNG.standard_normal(shape, np.float32)


def pair(stem, rank=2, out=D, n_in=D):
  return {
    f"{stem}.lora_A.weight": draw(rank, n_in),
    f"{stem}.lora_B.weight": draw(out, rank),
  }


def write(folder, tensors, metadata=None):
  path = folder / "x.safetensors"
  arrays = {key: np.asarray(x) for key, x in tensors.items()}
  write_safetensors(path, arrays, metadata)
  return path


@pytest.mark.parametrize("base", [None, BASE])
def test_biases_of_joined_modules_are_cut_and_exchanged(base, tmp_path):
  qkv, last = draw(3 * D), draw(2 * D)
  tensors = pair(QKV, out=3 * D) | {f"{QKV}.lora_B.bias": qkv}
  tensors |= pair(LAST, out=2 * D) | {f"{LAST}.lora_B.bias": last}
  adapter = open_adapter(write(tmp_path, tensors), base)
  found = {name.removeprefix("transformer."): adapter.shifts[name]
           for name in adapter.shifts}  # fmt: skip
  for i, x in enumerate("qkv"):
    part = found.pop(f"transformer_blocks.0.attn.to_{x}.bias")
    np.testing.assert_array_equal(part, qkv[D * i : D * (i + 1)])
  moved = found.pop("norm_out.linear.bias")
  np.testing.assert_array_equal(moved, np.roll(last, D))
  assert not found


IN = "diffusion_model.img_in"
# Name -> (tensors, what the error says).
REFUSED = {
  "a number": ({f"{IN}.diff": np.float32(1)}, "is a number, no change"),
  "a weight's shape": ({f"{IN}.diff": draw(D + 1, D)},
                       r"is \(9, 8\), the base has \(8, 8\)"),
  "a bias's shape": ({f"{QKV}.diff_b": draw(3 * D + 1)},
                     r"is \(25,\), the base has \(24,\)"),
  "twice, two spellings": (
    {f"{IN}.diff": draw(D, D), "x_embedder.diff": draw(D, D)},
    "x_embedder.weight is there twice"),
  "twice, two kinds": (
    pair(IN) | {f"{IN}.lora_B.bias": draw(D), f"{IN}.diff_b": draw(D)},
    "x_embedder.bias is there twice"),
  "LoHa's ranks": (
    {f"{FLAT}.hada_w1_a": draw(D, 2), f"{FLAT}.hada_w1_b": draw(3, D),
     f"{FLAT}.hada_w2_a": draw(D, 2), f"{FLAT}.hada_w2_b": draw(2, D)},
    r"different ranks: hada_w1_a \(8, 2\), hada_w1_b \(3, 8\)"),
  "LoHa's sides": (
    {f"{FLAT}.hada_w1_a": draw(D, 2), f"{FLAT}.hada_w1_b": draw(2, D),
     f"{FLAT}.hada_w2_a": draw(D, 2), f"{FLAT}.hada_w2_b": draw(2, 9)},
    r"hada_w1_b \(2, 8\), hada_w2_b \(2, 9\)"),
  "LoKr's ranks": (
    {f"{FLAT}.lokr_w1": draw(2, 2), f"{FLAT}.lokr_w2_a": draw(4, 2),
     f"{FLAT}.lokr_w2_b": draw(3, 4)},
    r"lokr_w2_a \(4, 2\), lokr_w2_b \(3, 4\)"),
  "a number as a factor": (
    {f"{IN}.lora_A.weight": np.float32(1), f"{IN}.lora_B.weight": draw(D, 2)},
    "is no LoRA, its tensors are"),
  "nothing": ({}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_files_are_refused_by_name(name, tmp_path):
  tensors, words = REFUSED[name]
  with pytest.raises(ValueError, match=words):
    open_adapter(write(tmp_path, tensors), BASE)


@pytest.mark.parametrize("alpha", [{}, {f"{IN}.alpha": np.float32(1)}])
def test_a_module_of_rank_0_is_left_out_with_a_reason(alpha, tmp_path):
  tensors = pair(IN, rank=0) | pair(LAST, out=2 * D) | alpha
  adapter = open_adapter(write(tmp_path, tensors), BASE)
  assert list(adapter) == ["norm_out.linear"]
  assert adapter.left_out == {IN: "rank 0: no change"}


@pytest.mark.parametrize(
  ("entries", "words"),
  [
    ({"lora_alpha": "x"}, "no finite alpha: unet.lora_alpha: 'x'"),
    ({"lora_alpha": None}, "unet.lora_alpha: None"),
    ({"lora_alpha": float("nan")}, "unet.lora_alpha: nan"),
    ({"alpha_pattern": {"to_q": float("inf")}}, "to_q: inf"),
    ({"alpha_pattern": [1]}, r"unet.alpha_pattern: \[1\]"),
    ({"rank_pattern": {"to_q": 0}}, "to_q: 0"),
    ({"r": 4}, "rank of unet.mid_block.to_q is 4, its tensors have 2"),
  ],
)
def test_metadata_that_gives_no_scale_is_refused(entries, words, tmp_path):
  config = {"r": 2, "lora_alpha": 4} | entries
  text = json.dumps({f"unet.{key}": value for key, value in config.items()})
  tensors = pair("unet.mid_block.to_q")
  with pytest.raises(ValueError, match=words):
    open_adapter(write(tmp_path, tensors, {"lora_adapter_metadata": text}))


def peft_folder(folder, modules):
  tensors = {}
  for module, (out, n_in) in modules.items():
    tensors |= pair(f"base_model.model.{module}", out=out, n_in=n_in)
  write_safetensors(folder / "adapter_model.safetensors", tensors)
  config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
  config["target_modules"] = list(modules)
  (folder / "adapter_config.json").write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize(
  ("modules", "words"),
  [
    ({"double_blocks.0.img_attn.qkv": (3 * D, D)}, "in another order"),
    ({"final_layer.adaLN_modulation.1": (2 * D, D)}, "in another order"),
    ({"x_embedder": (D, D), "img_in": (D, D)}, "one module of the base"),
    ({"x_embedder": (D + 1, D)}, r"is for a weight \(9, 8\), the base has"),
  ],
)
def test_peft_folders_of_another_model_are_refused(modules, words, tmp_path):
  with pytest.raises(ValueError, match=words):
    open_adapter(peft_folder(tmp_path, modules), BASE)


def test_dora_of_exchanged_halves_is_computed_in_the_order_of_the_file(
  tmp_path,
):
  weight, tensors = draw(2 * D, D), pair(LAST, out=2 * D)
  m = np.abs(draw(2 * D, 1)) + 1
  tensors |= {f"{LAST}.dora_scale": m, f"{LAST}.alpha": np.float32(3)}
  base = {"norm_out.linear.weight": weight, "x_embedder.weight": draw(D, D)}
  lora = open_adapter(write(tmp_path, tensors), base)["norm_out.linear"]
  a, b = (tensors[f"{LAST}.lora_{side}.weight"] for side in "AB")
  old = np.roll(np.float64(weight), D, 0)
  new = old + 1.5 * np.matmul(b, a, dtype=np.float64)
  new *= m / np.linalg.norm(new, axis=1, keepdims=True)
  found = lora.scale * np.float64(lora.a).T @ np.float64(lora.b)
  np.testing.assert_allclose(found.T, np.roll(new - old, D, 0), atol=1e-5)


def lora(rank=2, out=D, b_rank=None):
  return Lora(draw(rank, D), draw(b_rank or rank, out), np.float32(1))


X, Y = "transformer.x_embedder", "transformer.context_embedder"
# Name -> (writer, Loras, other arguments, what the error says).
UNWRITTEN = {
  "flattened alike": (
    save_kohya, {"unet.a.b_c": lora(), "unet.a_b.c": lora()},
    {"family": "sd1"}, "unet.a.b_c and unet.a_b.c have one name"),
  "a module and its parameter": (
    save_diffusers, {X: lora(), f"{X}.weight": lora()}, {}, "are one module"),
  "two ranks": (save_diffusers, {X: lora(b_rank=3)}, {}, "different ranks"),
  "one component for two": (
    save_diffusers, {"unet.conv_in": lora(), "text_encoder.x": lora()},
    {"component": "unet"}, "of text_encoder, unet, component='unet' names one"),
  "a bias of another length": (
    save_kohya, {X: lora()},
    {"family": "flux", "shifts": {f"{X}.bias": draw(D + 1)}},
    r"x_embedder.bias is \(9,\), needed is \(8,\)"),
  "the same for diffusers": (
    save_diffusers, {X: lora()}, {"shifts": {f"{X}.bias": draw(D + 1)}},
    r"x_embedder.bias is \(9,\), needed is \(8,\)"),
  "whole numbers": (
    save_diffusers, {X: lora()}, {"dtype": np.int8}, "got int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNWRITTEN)
def test_what_a_file_would_lose_is_refused(name, tmp_path):
  save, loras, more, words = UNWRITTEN[name]
  path = tmp_path / "x.safetensors"
  with pytest.raises(ValueError, match=words):
    save(path, loras, **more)
  assert not path.exists()


def test_a_bias_of_a_module_of_rank_0_is_left_with_it(tmp_path):
  path, shifts = tmp_path / "x.safetensors", {}
  shifts = {f"{X}.bias": draw(D), f"{Y}.bias": draw(D)}
  left = save_diffusers(path, {X: lora(0), Y: lora()}, shifts=shifts)
  assert left.keys() == {X, f"{X}.bias"}
  assert list(open_adapter(path).shifts) == [f"{Y}.bias"]


def test_changes_keep_their_component_and_need_no_shape(tmp_path):
  path = tmp_path / "x.safetensors"
  norm, bias = "text_encoder.text_model.final_layer_norm.weight", draw(D)
  save_kohya(path, {"unet.conv_in": lora()}, family="sd1",
             shifts={norm: draw(D)})  # fmt: skip
  assert list(open_adapter(path).shifts) == [norm]
  key = "transformer.transformer_blocks.0.attn.to_k.bias"
  save_kohya(path, {X: lora()}, family="flux", shifts={key: bias})
  found = open_adapter(path).shifts[key]
  np.testing.assert_array_equal(found, bias.astype(np.float16))


@pytest.mark.parametrize(
  ("family", "block", "place"), [("sdxl", 0, 2), ("sdxl", 2, 1), ("sd1", 3, 2)]
)
def test_an_upsampler_alone_is_numbered_by_its_family(
  family, block, place, tmp_path
):
  path = tmp_path / "x.safetensors"
  name = f"unet.up_blocks.{block}.upsamplers.0.conv"
  save_comfy(path, {name: lora()}, family=family)
  stem = f"diffusion_model.output_blocks.{3 * block + 2}.{place}.conv"
  assert f"{stem}.lora_A.weight" in open_checkpoint(path)


def test_a_config_without_layers_is_refused_for_gguf(tmp_path):
  pytest.importorskip("gguf")
  config = {"architectures": ["Qwen2ForCausalLM"]}
  with pytest.raises(ValueError, match="no number as num_hidden_layers"):
    save_gguf(tmp_path / "x.gguf", {"h": lora()}, config=config)


def test_magnitudes_of_dora_are_one_and_finite(tmp_path):
  base = {"x_embedder.weight": draw(D, D)}
  both = {
    f"{IN}.dora_scale": draw(D, 1),
    f"{IN}.lora_magnitude_vector": draw(D),
  }
  with pytest.raises(ValueError, match="has two magnitudes"):
    open_adapter(write(tmp_path, pair(IN) | both), base)
  odd = {f"{IN}.dora_scale": np.full((D, 1), np.nan, np.float32)}
  adapter = open_adapter(write(tmp_path, pair(IN) | odd), base)
  with pytest.raises(ValueError, match="img_in, dora_scale: 8 of 8 values"):
    adapter["x_embedder"]


HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | HEADS
QUERY = "model.layers.0.self_attn.q_proj"


def test_modules_are_written_to_gguf_as_their_parameters(tmp_path):
  pytest.importorskip("gguf")
  one, files = lora(), [tmp_path / f"{i}.gguf" for i in range(2)]
  save_gguf(files[0], {QUERY: one}, config=LLAMA)
  save_gguf(files[1], {f"{QUERY}.weight": one}, config=LLAMA)
  found = [open_adapter(file)["blk.0.attn_q"].b for file in files]
  np.testing.assert_array_equal(*found)
  assert not np.array_equal(found[0], np.asarray(one.b, np.float16))


def test_what_llamacpp_would_misread_is_refused(tmp_path):
  pytest.importorskip("gguf")
  path = tmp_path / "x.gguf"
  with pytest.raises(ValueError, match="are of one tensor"):
    save_gguf(path, {QUERY: lora(), f"{QUERY}.weight": lora()}, config=LLAMA)
  with pytest.raises(ValueError, match="different ranks"):
    save_gguf(path, {QUERY: lora(b_rank=3)}, config=LLAMA)
  with pytest.raises(ValueError, match="no number as num_attention_heads"):
    save_gguf(path, {QUERY: lora()}, config=LLAMA | {"num_attention_heads": 0})
  with pytest.raises(ValueError, match="is a folder"):
    save_gguf(tmp_path, {QUERY: lora()}, config=LLAMA)
  save_gguf(path, {QUERY: lora(out=2 * D)}, config=LLAMA)
  (tmp_path / "base").mkdir()
  (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
  write_safetensors(
    tmp_path / "base" / "model.safetensors", {f"{QUERY}.weight": draw(D, D)}
  )
  with pytest.raises(ValueError, match=r"a weight \(16, 8\), the base has"):
    open_adapter(path, tmp_path / "base")
