# SPDX-License-Identifier: Apache-2.0
"""Adapters of every tool, found by their keys; and what is refused, by name."""

import json

import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints import write_safetensors
from jlora.formats import open_adapter, save_peft
from jlora.loras import Lora
from tests.helpers.image_adapters import D, draw, product

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
RNG = np.random.default_rng(0)
A = RNG.standard_normal((2, D), np.float32)
B = RNG.standard_normal((D, 2), np.float32)


def write(folder, tensors, metadata=None):
  path = folder / "x.safetensors"
  arrays = {key: np.asarray(x) for key, x in tensors.items()}
  write_safetensors(path, arrays, metadata)
  return path


def pair(stem, down=".lora_down.weight", up=".lora_up.weight", a=A, b=B):
  return {stem + down: a, stem + up: b}


FLAT = Q.replace(".", "_")
SGM = "input_blocks_1_1_transformer_blocks_0_attn1_to_q"
OLD = Q.replace("attn1.to_q", "attn1.processor.to_q")
TEXT = "text_model.encoder.layers.3.self_attn.q_proj"
# Name -> (tensors of one module, format, its name here).
TOOLS = {
  "kohya": (pair(f"lora_unet_{FLAT}"), "kohya", f"unet.{Q}"),
  "kohya, original names": (pair(f"lora_unet_{SGM}"), "kohya", f"unet.{Q}"),
  "kohya, text": (
    pair("lora_te2_" + TEXT.replace(".", "_")), "kohya",
    f"text_encoder_2.{TEXT}"),
  "kohya, T5 of Flux": (
    pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q")
    | pair("lora_unet_double_blocks_0_img_attn_proj"),
    "kohya", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"),
  "dots": (pair("diffusion_model.blocks.0.self_attn.q"), "kohya with dots",
           "transformer.blocks.0.attn1.to_q"),
  "no prefix": (pair("blocks.0.self_attn.q"), "kohya with dots",
                "transformer.blocks.0.attn1.to_q"),
  "comfy": (
    pair("diffusion_model.joint_blocks.0.x_block.attn.proj",
         ".lora_A.weight", ".lora_B.weight"),
    "comfy", "transformer.transformer_blocks.0.attn.to_out.0"),
  "comfy, text": (
    pair(f"text_encoders.clip_l.transformer.{TEXT}",
         ".lora_A.weight", ".lora_B.weight"),
    "comfy", f"text_encoder.{TEXT}"),
  "diffusers": (
    pair(f"unet.{Q}", ".lora_A.weight", ".lora_B.weight"), "diffusers",
    f"unet.{Q}"),
  "diffusers, default": (
    pair(f"unet.{Q}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers", f"unet.{Q}"),
  "PEFT without configuration": (
    pair("base_model.model.layers.0.q_proj", ".lora_A.weight",
         ".lora_B.weight"),
    "PEFT without its configuration", "layers.0.q_proj"),
  "old diffusers": (
    pair(f"unet.{OLD}", "_lora.down.weight", "_lora.up.weight"),
    "old diffusers", f"unet.{Q}"),
  "old diffusers, out": (
    pair(f"unet.{OLD.replace('to_q', 'to_out')}", "_lora.down.weight",
         "_lora.up.weight"),
    "old diffusers", f"unet.{Q.replace('to_q', 'to_out.0')}"),
  "old diffusers, lora": (
    pair(f"unet.{Q}", ".lora.down.weight", ".lora.up.weight"),
    "old diffusers", f"unet.{Q}"),
  "old diffusers, text": (
    pair(f"text_encoder.{TEXT}", ".lora_linear_layer.down.weight",
         ".lora_linear_layer.up.weight"),
    "old diffusers", f"text_encoder.{TEXT}"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
def test_the_format_is_found_by_the_keys(name, tmp_path):
  tensors, tool, module = TOOLS[name]
  adapter = open_adapter(write(tmp_path, tensors))
  assert adapter.format == tool
  assert module in adapter
  assert adapter.shapes[module] == (D, D)
  assert adapter.notes == ["no alpha: the scale is 1"]
  np.testing.assert_array_equal(adapter[module].a, A)
  np.testing.assert_array_equal(adapter[module].b, B.T)
  assert float(adapter[module].scale) == 1.0


def test_a_peft_folder_is_opened_as_well(tmp_path):
  lora = Lora(A, B.T, np.float32(0.5))
  like = {"h.0.q.weight": np.empty((D, D)), "h.0.k.weight": np.empty((D, D))}
  save_peft(tmp_path, {"h.0.q.weight": lora}, like=like)
  adapter = open_adapter(tmp_path, like)
  assert (adapter.format, list(adapter)) == ("PEFT", ["h.0.q"])
  assert adapter.ranks == {"h.0.q": 2}
  np.testing.assert_allclose(product(adapter["h.0.q"]), product(lora), 1e-6)
  assert list(adapter.by_parameter()) == ["h.0.q.weight"]
  with pytest.raises(ValueError, match="no module for 1 names .*h.0.q"):
    open_adapter(tmp_path, {"h.0.k.weight": np.empty((D, D))})


@pytest.mark.parametrize(("alpha", "scale"), [(4, 2.0), (1, 0.5), (0, 0.0)])
def test_alpha_is_divided_by_the_rank_of_down(alpha, scale, tmp_path):
  stem = f"lora_unet_{FLAT}"
  for stored in (np.float16(alpha), np.full((1,), alpha, ml_dtypes.bfloat16)):
    path = write(tmp_path, pair(stem) | {f"{stem}.alpha": stored})
    adapter = open_adapter(path)
    assert float(adapter[f"unet.{Q}"].scale) == scale
    assert adapter.alphas == {f"unet.{Q}": alpha}
    assert adapter.notes == []


def test_the_metadata_of_diffusers_tells_alphas(tmp_path):
  other = Q.replace("to_q", "to_k")
  config = {
    "unet.r": 2,
    "unet.lora_alpha": 8,
    "unet.rank_pattern": {},
    "unet.alpha_pattern": {f"^{other}": 1, "attn9.to_q": 3},
    "text_encoder.r": 2,
    "text_encoder.lora_alpha": 3,
  }
  suffixes = (".lora_A.weight", ".lora_B.weight")
  tensors = {}
  for name in (f"unet.{Q}", f"unet.{other}", f"text_encoder.{TEXT}"):
    tensors |= pair(name, *suffixes)
  text = {"lora_adapter_metadata": json.dumps(config)}
  adapter = open_adapter(write(tmp_path, tensors, text))
  scales = [float(lora.scale) for lora in adapter.values()]
  names = list(adapter)
  assert dict(zip(names, scales, strict=True)) == {
    f"unet.{Q}": 4.0, f"unet.{other}": 0.5, f"text_encoder.{TEXT}": 1.5,
  }  # fmt: skip


def test_a_base_names_the_modules_and_is_told_apart_by_component(tmp_path):
  tensors = pair(f"lora_unet_{FLAT}") | pair(
    "lora_te_" + TEXT.replace(".", "_")
  )
  path = write(tmp_path, tensors)
  unet = {f"{Q}.weight": (D, D), "conv_in.weight": (D, 4, 3, 3)}
  with pytest.raises(ValueError, match="no module for 1 names .*lora_te_text"):
    open_adapter(path, unet)
  adapter = open_adapter(path, unet, allow_missing=True)
  assert list(adapter) == [Q]
  assert list(adapter.left_out) == ["lora_te_" + TEXT.replace(".", "_")]
  bare = TEXT.removeprefix("text_model.")  # as transformers 5 names it
  both = {f"unet.{Q}": (D, D), f"text_encoder.{bare}": (D, D)}
  assert sorted(open_adapter(path, both)) == sorted(both)


def test_any_base_tells_the_dots_of_flattened_names(tmp_path):
  path = write(tmp_path, pair("lora_unet_my_block_0_to_q"))
  with pytest.raises(ValueError, match="1 flattened names are in no table"):
    open_adapter(path)
  found = open_adapter(path, {"my_block.0.to_q.weight": (D, D)})
  assert list(found) == ["my_block.0.to_q"]
  alike = {"my_block.0.to_q.weight": (D, D), "my.block.0.to_q.weight": (D, D)}
  with pytest.raises(ValueError, match="can be my_block.0.to_q, my.block.0.to"):
    open_adapter(path, alike)


def test_a_base_of_other_shapes_is_refused(tmp_path):
  path = write(tmp_path, pair(f"unet.{Q}"))
  with pytest.raises(ValueError, match=r"weight \(8, 8\), the base has \(9, 8"):
    open_adapter(path, {f"{Q}.weight": (9, D)})


def test_a_pipelines_folder_is_a_base(tmp_path):
  pipe = tmp_path / "pipe"
  for name, module in (("unet", Q), ("text_encoder", TEXT), ("vae", "x")):
    (pipe / name).mkdir(parents=True)
    write_safetensors(
      pipe / name / "model.safetensors", {f"{module}.weight": np.ones((D, D))}
    )
  (pipe / "model_index.json").write_text(
    json.dumps({"_class_name": "P", "unet": ["a", "b"], "vae": ["a", "b"],
                "text_encoder": ["a", "b"]})
  )  # fmt: skip
  path = write(tmp_path, pair(f"lora_unet_{FLAT}"))
  assert list(open_adapter(path, pipe)) == [f"unet.{Q}"]
  (pipe / "model_index.json").write_text("{}")
  with pytest.raises(ValueError, match="no component with weights"):
    open_adapter(path, pipe)


def test_whole_changes_and_biases_are_shifts(tmp_path):
  stem = "lora_unet_down_blocks_0_resnets_0_norm1"
  tensors = {
    f"{stem}.w_norm": A[0],
    f"{stem}.b_norm": A[1],
    **pair(f"lora_unet_{FLAT}"),
    f"lora_unet_{FLAT}.diff_b": B[:, 0],
  }
  adapter = open_adapter(write(tmp_path, tensors))
  norm = "unet.down_blocks.0.resnets.0.norm1"
  want = {
    f"{norm}.weight": A[0],
    f"{norm}.bias": A[1],
    f"unet.{Q}.bias": B[:, 0],
  }
  assert set(adapter.shifts) == set(want)
  for name, change in want.items():
    np.testing.assert_array_equal(adapter.shifts[name], change)


K = f"lora_unet_{FLAT}"
SPELT_IN_TWO_WAYS = pair(K) | pair(f"lora_unet_{SGM}")
# Reason -> (tensors, what the error says).
REFUSED = {
  "a factor missing": ({f"{K}.lora_down.weight": A}, "lacks lora_up.weight"),
  "an alpha alone": ({f"{K}.alpha": np.float32(1)}, "has alpha alone"),
  "ranks": (pair(K, b=B[:, :1]), r"different ranks: down \(2, 8\), up \(8, 1"),
  "ranks, Tucker": (
    pair(K, a=A.reshape(2, D, 1, 1), b=B.reshape(D, 2, 1, 1))
    | {f"{K}.lora_mid.weight": np.ones((3, 2, 3, 3))}, "different ranks"),
  "alpha": (
    pair(K) | {f"{K}.alpha": np.float16(np.inf)}, "not one finite number"),
  "OFT": ({f"{K}.oft_blocks": A}, "is OFT"),
  "BOFT": ({f"{K}.boft_R": A}, "is BOFT"),
  "GLoRA": ({f"{K}.a1.weight": A, f"{K}.b1.weight": A}, "is GLoRA"),
  "IA3": ({f"base_model.model.{Q}.ia3_l": A}, "is IA3"),
  "an optimizer": (
    {"state.0.exp_avg": A}, "is the state of an optimizer"),
  "two spellings": (
    SPELT_IN_TWO_WAYS,
    "blocks of a UNet in two ways, as lora_unet_down.* and as lora_unet_input"),
  "keys of no tool": ({f"{Q}.weight": A}, "are of no adapter format"),
  "a part twice": (
    pair(Q) | pair(Q, ".lora_A.weight", ".lora_B.weight"), "the part .* twice"),
  "odd parts": (
    pair(K) | {f"{K}.hada_w1_a": A}, "has hada_w1_a too"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_in_one_line(reason, tmp_path):
  tensors, said = REFUSED[reason]
  with pytest.raises(ValueError, match=said) as refused:
    open_adapter(write(tmp_path, tensors))
  assert "\n" not in str(refused.value)


def test_nan_is_refused_when_it_is_read(tmp_path):
  broken = A.copy()
  broken[0, 0] = np.nan
  adapter = open_adapter(write(tmp_path, pair(K, a=broken)))
  with pytest.raises(ValueError, match="1 of 16 values are NaN or infinite"):
    adapter[f"unet.{Q}"]


def test_one_name_for_two_modules_of_the_file_is_refused(tmp_path):
  tensors = pair(f"unet.{Q}") | pair(f"lora_unet_{FLAT}")
  with pytest.raises(ValueError, match="is there twice"):
    open_adapter(write(tmp_path, tensors))


def test_only_what_is_asked_for_is_read(tmp_path):
  loras = draw({f"lora_unet_{FLAT.replace('to_q', x)}": (D, D)
                for x in ("to_q", "to_k", "to_v")})  # fmt: skip
  tensors = {}
  for stem, lora in loras.items():
    tensors |= pair(stem, a=lora.a, b=lora.b.T)
  adapter = open_adapter(write(tmp_path, tensors))
  file = adapter.readers[f"unet.{Q}"].file
  before = file.bytes_read
  lora = adapter[f"unet.{Q}"]
  assert file.bytes_read - before == lora.nbytes
