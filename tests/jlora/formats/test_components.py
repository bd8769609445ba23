# SPDX-License-Identifier: Apache-2.0
"""Pipelines' folders and single files, opened as one checkpoint."""

import io
import json

import numpy as np
import pytest

from jlora.checkpoints import write_safetensors
from jlora.extraction import extract_checkpoint
from jlora.formats import open_components, open_pair
from jlora.formats.bases import base_of
from tests.helpers.single_files import (
  as_original,
  split_components,
  tensors_of,
)


def write_single(path, tensors):
  write_safetensors(path, tensors)
  return path


def write_pipeline(folder, tensors):
  """A folder as diffusers' `save_pretrained` leaves it."""
  folder.mkdir(parents=True)
  index = {"_class_name": "Any", "scheduler": ["diffusers", "Any"]}
  for component, own in split_components(tensors).items():
    (folder / component).mkdir()
    write_safetensors(folder / component / "model.safetensors", own)
    (folder / component / "config.json").write_text("{}")
    index[component] = ["diffusers", "Any"]
  (folder / "model_index.json").write_text(json.dumps(index))
  return folder


SINGLE = ("sd1", "flux", "sd3", "wan", "flux2", "hunyuan-video", "z-image",
          "ltx")  # fmt: skip


@pytest.mark.parametrize("family", SINGLE)
def test_a_single_file_has_the_tensors_of_the_folder(family, tmp_path):
  tensors = tensors_of(family)
  single = write_single(
    tmp_path / "x.safetensors", as_original(tensors, family)
  )
  folder = write_pipeline(tmp_path / "pipeline", tensors)
  one = open_components(single, names="diffusers")
  two = open_components(folder)
  assert {*one} == {*two} == {*tensors}
  for name, array in tensors.items():
    assert one.spec[name].shape == array.shape, name
    np.testing.assert_array_equal(one[name], array, name)
    np.testing.assert_array_equal(two[name], array, name)
    part = one.read(name, (slice(1, None, 2),))
    np.testing.assert_array_equal(part, array[1::2], name)
  assert base_of(single).shapes == base_of(folder).shapes


def test_openclip_gets_the_names_of_transformers(tmp_path):
  d, rng = 4, np.random.default_rng(0)
  block = "conditioner.embedders.1.model.transformer.resblocks.3."
  qkv, bias = rng.standard_normal((3 * d, d)), rng.standard_normal(3 * d)
  stored = {
    f"{block}attn.in_proj_weight": qkv,
    f"{block}attn.in_proj_bias": bias,
    f"{block}mlp.c_fc.weight": rng.standard_normal((2 * d, d)),
    f"{block}mlp.c_proj.weight": rng.standard_normal((d, 2 * d)),
    f"{block}ln_1.bias": bias[:d],
    "conditioner.embedders.1.model.ln_final.weight": bias[:d],
    "conditioner.embedders.1.model.text_projection": qkv[:d, :2],
    "conditioner.embedders.1.model.positional_embedding": qkv[:5],
    "conditioner.embedders.1.model.logit_scale": np.float64(4.6),
    "model.diffusion_model.label_emb.0.2.weight": qkv,
  }
  found = open_components(
    write_single(tmp_path / "x.safetensors", stored), names="diffusers"
  )
  layer = "text_encoder_2.text_model.encoder.layers.3."
  want = {
    f"{layer}self_attn.q_proj.weight": qkv[:d],
    f"{layer}self_attn.k_proj.weight": qkv[d : 2 * d],
    f"{layer}self_attn.v_proj.bias": bias[2 * d :],
    f"{layer}mlp.fc1.weight": stored[f"{block}mlp.c_fc.weight"],
    f"{layer}layer_norm1.bias": bias[:d],
    "text_encoder_2.text_model.final_layer_norm.weight": bias[:d],
    "text_encoder_2.text_projection.weight": qkv[:d, :2].T,
    "text_encoder_2.text_model.embeddings.position_embedding.weight": qkv[:5],
    "text_encoder_2.logit_scale": np.float64(4.6),
    "unet.add_embedding.linear_2.weight": qkv,
  }
  for name, array in want.items():
    assert found.spec[name].shape == array.shape, name
    np.testing.assert_array_equal(found[name], array, name)
  assert len(found) == len(stored) + 4
  projection = "text_encoder_2.text_projection.weight"
  np.testing.assert_array_equal(
    found.read(projection, (0, slice(1, 3))), qkv[1:3, 0]
  )


BESIDE = {
  "first_stage_model.decoder.conv_in.weight": np.ones((4, 4, 3, 3), "f4"),
  "first_stage_model.quant_conv.bias": np.ones(4, "f4"),
  "vae.encoder.conv_out.bias": np.ones(4, "f4"),
  "model_ema.diffusion_modelinput_blocks00weight": np.ones(4, "f4"),
  "alphas_cumprod": np.ones(10, "f4"),
  "betas": np.ones(10, "f4"),
  "cond_stage_model.transformer.text_model.embeddings.position_ids":
    np.arange(7)[None],
}  # fmt: skip


@pytest.fixture
def sides(tmp_path):
  """A base as a single file, its finetune as a single file and a folder."""
  base, tuned = tensors_of("wan"), tensors_of("wan", seed=1)
  return [
    write_single(tmp_path / "base.safetensors",
                 as_original(base, "wan") | BESIDE),
    write_single(tmp_path / "tuned.safetensors",
                 as_original(tuned, "wan", {"transformer": ""})),
    write_pipeline(tmp_path / "pipeline", tuned),
  ]  # fmt: skip


def extracted(base, tuned, out, **more):
  return extract_checkpoint(base, tuned, out, rank=2, log=io.StringIO(), **more)


def test_original_names_beside_those_of_diffusers_need_a_word(sides, tmp_path):
  base, _, folder = sides
  words = (
    r"base.safetensors has the original's names \(model.diffusion_model.*"
    r"pipeline those of diffusers \(\S+\): say --names=diffusers "
  )
  with pytest.raises(ValueError, match=words):
    extracted(base, folder, tmp_path / "out")
  report = extracted(base, folder, tmp_path / "out", names="diffusers")
  names = {row["path"] for row in report.modules}
  assert "transformer.blocks.2.attn2.to_out.0.weight" in names
  assert len(names) == len(tensors_of("wan")) // 2
  assert report.settings["names"] == "diffusers"
  assert report.totals["unmatched_bytes"]["base"] == 0


def test_prefixes_are_components_and_what_is_left_out_is_told(sides, tmp_path):
  base, tuned, _ = sides
  report = extracted(base, tuned, tmp_path / "out")
  names = {row["path"] for row in report.modules}
  assert "transformer.blocks.2.cross_attn.o.weight" in names
  rows = {
    name: (row["status"], row["why"])
    for row in report.ledger
    for name in row["base"]
  }
  assert {*BESIDE} - {*rows} == {
    "cond_stage_model.transformer.text_model.embeddings.position_ids"
  }
  lost = ("not representable", "left out: the component vae was not asked for "
          "(--components)")  # fmt: skip
  assert rows["first_stage_model.quant_conv.bias"] == lost
  assert rows["vae.encoder.conv_out.bias"] == lost
  averages = rows["model_ema.diffusion_modelinput_blocks00weight"]
  assert averages[1] == "left out: moving averages of the weights"
  for name in ("betas", "alphas_cumprod"):
    assert rows[name] == ("no parameter", "no parameter: the noise schedule")
  one = [r for r in report.ledger if "vae was" in r["why"]]
  assert [len(row["base"]) for row in one] == [3]


def test_the_autoencoder_is_opened_where_it_is_asked_for(sides):
  base, tuned, folder = sides
  found = open_components(base, components=["vae"])
  assert "vae.quant_conv.bias" in found
  assert not [name for name in found if name.startswith("transformer.")]
  with pytest.raises(ValueError, match="has no component unet; there are tra"):
    open_components(folder, components=["unet"])
  with pytest.raises(ValueError, match="has no component unet; there are tra"):
    open_components(tuned, components=["unet"])


def test_a_pipelines_folder_tells_what_was_not_opened(sides):
  _, _, folder = sides
  (folder / "vae").mkdir()
  write_safetensors(folder / "vae" / "x.safetensors", {"w": np.ones(2)})
  index = json.loads((folder / "model_index.json").read_text())
  index["vae"] = ["diffusers", "AutoencoderKL"]
  (folder / "model_index.json").write_text(json.dumps(index))
  found = open_components(folder)
  assert {name.partition(".")[0] for name in found} == {"transformer"}
  assert [*found.left_out] == ["vae/"]
  assert "vae.w" in open_components(folder, components=["vae", "transformer"])


def test_a_component_alone_gets_its_name_beside_a_pipeline(sides):
  _, tuned, folder = sides
  alone, whole = open_pair(folder / "transformer", folder)
  assert {*alone} == {*whole}
  alone, whole = open_pair(tuned, folder, names="diffusers")
  assert {*alone} == {*whole}
  alone, _ = open_pair(folder / "transformer", folder / "transformer")
  assert "proj_out.weight" in alone


def test_two_models_in_one_file_are_refused(tmp_path):
  stored = {
    "model.diffusion_model.out.2.weight": np.ones((4, 2)),
    "diffusion_model.out.2.weight": np.ones((4, 2)),
  }
  path = write_single(tmp_path / "x.safetensors", stored)
  with pytest.raises(ValueError, match="are both out.2.weight of one comp"):
    open_components(path)


def test_outputs_that_cannot_be_cut_are_refused(tmp_path):
  stored = {"double_blocks.0.img_attn.qkv.weight": np.ones((7, 2))}
  path = write_single(tmp_path / "x.safetensors", stored)
  with pytest.raises(ValueError, match="7 outputs cannot be cut into parts"):
    open_components(path, names="diffusers")


def test_names_of_no_table_are_refused_where_they_should_be_turned(tmp_path):
  path = write_single(tmp_path / "x.safetensors", {"q.weight": np.ones((2, 2))})
  with pytest.raises(ValueError, match="no table has the names of .*q.weight"):
    open_pair(path, path, names="diffusers")
  with pytest.raises(ValueError, match="names must be 'diffusers' or None"):
    open_components(path, names="kohya")
