# SPDX-License-Identifier: Apache-2.0
"""What is written, in diffusers' own loaders, fused into small models.

Needs the extra `formats`.
"""

import io
import json
import re
import warnings

import numpy as np
import pytest

from jlora.checkpoints import write_safetensors
from jlora.extraction import extract_checkpoint
from jlora.formats import (
  open_adapter,
  open_components,
  save_comfy,
  save_diffusers,
  save_kohya,
)
from jlora.loras import Lora
from jlora.paths import matching
from tests.helpers.image_adapters import product
from tests.helpers.single_files import PREFIX, as_original

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  diffusers = pytest.importorskip("diffusers")
  single_files = pytest.importorskip("diffusers.loaders.single_file_utils")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


def sd1():
  return diffusers.UNet2DConditionModel(
    sample_size=8, block_out_channels=(16, 32), layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=12, attention_head_dim=8, norm_num_groups=8,
  )  # fmt: skip


def sdxl():
  return diffusers.UNet2DConditionModel(
    sample_size=8, block_out_channels=(16, 32, 32), layers_per_block=2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D",
                      "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 2), cross_attention_dim=12,
    attention_head_dim=(2, 4, 4), norm_num_groups=8,
    use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
  )  # fmt: skip


def sd3():
  return diffusers.SD3Transformer2DModel(
    sample_size=8, patch_size=1, in_channels=4, num_layers=2,
    attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
    joint_attention_dim=16, pooled_projection_dim=32, out_channels=4,
  )  # fmt: skip


def flux():
  return diffusers.FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
    attention_head_dim=16, num_attention_heads=1, joint_attention_dim=16,
    pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
  )  # fmt: skip


def wan():
  return diffusers.WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
    in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=24,
    num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    rope_max_seq_len=32,
  )  # fmt: skip


def qwen_image():
  return diffusers.QwenImageTransformer2DModel(
    patch_size=2, in_channels=16, out_channels=4, num_layers=2,
    attention_head_dim=16, num_attention_heads=1, joint_attention_dim=16,
    axes_dims_rope=(4, 6, 6),
  )  # fmt: skip


def flux2():
  return diffusers.Flux2Transformer2DModel(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
    attention_head_dim=16, num_attention_heads=1, joint_attention_dim=12,
    timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
  )  # fmt: skip


def hunyuan_video():
  return diffusers.HunyuanVideoTransformer3DModel(
    in_channels=4, out_channels=4, num_attention_heads=1,
    attention_head_dim=16, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=12,
    pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
  )  # fmt: skip


def z_image():
  return diffusers.ZImageTransformer2DModel(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=16,
    n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
    axes_dims=[2, 2, 4], axes_lens=[8, 8, 8],
  )  # fmt: skip


def ltx():
  return diffusers.LTXVideoTransformer3DModel(
    in_channels=4, out_channels=4, num_attention_heads=2,
    attention_head_dim=8, cross_attention_dim=16, num_layers=1,
    caption_channels=12,
  )  # fmt: skip


def clip():
  return transformers.CLIPTextModel(
    transformers.CLIPTextConfig(
      vocab_size=20,
      hidden_size=16,
      intermediate_size=24,
      projection_dim=16,
      num_hidden_layers=2,
      num_attention_heads=2,
      max_position_embeddings=8,
    )  # fmt: skip
  )


MODELS = {"sd1": sd1, "sdxl": sdxl, "sd3": sd3, "flux": flux, "wan": wan,
          "qwen-image": qwen_image, "flux2": flux2, "z-image": z_image,
          "hunyuan-video": hunyuan_video, "ltx": ltx}  # fmt: skip


def arrays(model):
  return {name: x.numpy().copy() for name, x in model.state_dict().items()}


def draw(base, ranks=(2, 3)):
  """A Lora for every matrix and kernel but tables of tokens."""
  rng, found = np.random.default_rng(0), {}
  for name, x in base.items():
    if x.ndim > 1 and name.endswith(".weight") and "_embedding.w" not in name:
      rank = ranks[len(found) % len(ranks)]
      sides = (rng.standard_normal((rank, n)) for n in (x[0].size, len(x)))
      a, b = (0.1 * side.astype(np.float32) for side in sides)
      found[name] = Lora(a, b, np.float32(0.5))
  return found


def worst(model, base, loras):
  """The largest relative error of a change that was fused."""
  fused, errors = arrays(model), {}
  for name, lora in loras.items():
    want = product(lora)
    change = (fused[name] - base[name]).reshape(want.shape)
    errors[name] = np.linalg.norm(change - want) / np.linalg.norm(want)
  return max(errors.values())


def tensors(path):
  from safetensors.torch import load_file

  return load_file(path)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("with_metadata", [False, True])
def test_diffusers_loads_and_fuses_every_module(
  family, with_metadata, tmp_path
):
  model = MODELS[family]()
  base = arrays(model)
  loras = draw(base)
  prefix = (
    "unet" if family.startswith("sd") and family != "sd3" else "transformer"
  )
  path = tmp_path / "x.safetensors"
  left = save_diffusers(path, loras, like=base, dtype=np.float32)
  assert left == {}
  more = {}
  if with_metadata:
    from safetensors import safe_open

    text = safe_open(path, "np").metadata()["lora_adapter_metadata"]
    more["metadata"] = json.loads(text)
  model.load_lora_adapter(tensors(path), prefix=prefix, **more)
  model.fuse_lora()
  model.unload_lora()
  assert worst(model, base, loras) < 1e-5


def pipeline(family, unet, text):
  rest = {"vae": None, "tokenizer": None, "scheduler": None, "unet": unet,
          "text_encoder": text}  # fmt: skip
  if family == "sdxl":
    more = {"text_encoder_2": None, "tokenizer_2": None}
    return diffusers.StableDiffusionXLPipeline(**rest, **more)
  return diffusers.StableDiffusionPipeline(
    **rest, safety_checker=None, feature_extractor=None,
    requires_safety_checker=False)  # fmt: skip


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("ranks", [(3,), (2, 3)])
def test_kohya_files_are_loaded_by_pipelines(family, ranks, tmp_path):
  unet, text = MODELS[family](), clip()
  models = {"unet": unet, "text_encoder": text}
  bases = {name: arrays(model) for name, model in models.items()}
  loras = {name: draw(base, ranks) for name, base in bases.items()}
  named = {f"{c}.{m}": x for c, own in loras.items() for m, x in own.items()}
  like = {f"{c}.{m}": x for c, own in bases.items() for m, x in own.items()}
  path = tmp_path / "x.safetensors"
  assert save_kohya(path, named, like=like, dtype=np.float32) == {}
  pipe = pipeline(family, unet, text)
  pipe.load_lora_weights(str(path))
  pipe.fuse_lora(components=["unet", "text_encoder"])
  pipe.unload_lora_weights()
  for name, model in models.items():
    assert worst(model, bases[name], loras[name]) < 1e-5


def test_alphas_of_their_own_are_misread_in_attention(tmp_path):
  """Why kohya files have one alpha; a new diffusers may read them rightly."""
  unet, text = sd1(), clip()
  base = arrays(unet)
  loras, path = draw(base, (3, 4)), tmp_path / "x.safetensors"
  save_kohya(path, loras, like=base, dtype=np.float32, one_alpha=False)
  pipe = pipeline("sd1", unet, text)
  pipe.load_lora_weights(str(path))
  pipe.fuse_lora(components=["unet"])
  pipe.unload_lora_weights()
  errors = {n: worst(unet, base, {n: lora}) for n, lora in loras.items()}
  wrong = {name: error for name, error in errors.items() if error > 1e-5}
  assert (len(wrong), len(errors)) == (24, 121)
  np.testing.assert_allclose(list(wrong.values()), 0.25, rtol=1e-4)
  assert all(".attn" in name for name in wrong)


@pytest.mark.parametrize(
  ("family", "save"),
  [("wan", save_comfy), ("qwen-image", save_comfy), ("qwen-image", save_kohya)],
)
def test_files_of_video_models_are_converted_and_loaded(family, save, tmp_path):
  model = MODELS[family]()
  base = arrays(model)
  # diffusers 0.42.1 converts a Wan file unless it has the patch embedding.
  loras = {n: x for n, x in draw(base).items() if "patch_embedding" not in n}
  path = tmp_path / "x.safetensors"
  assert save(path, loras, like=base, dtype=np.float32) == {}
  kind = {"wan": diffusers.WanPipeline,
          "qwen-image": diffusers.QwenImagePipeline}[family]  # fmt: skip
  found = kind.lora_state_dict(tensors(path))
  found = found[0] if isinstance(found, tuple) else found
  model.load_lora_adapter(dict(found), prefix="transformer")
  model.fuse_lora()
  model.unload_lora()
  assert worst(model, base, loras) < 1e-5


def test_flux_is_split_as_diffusers_splits_it(tmp_path):
  """Its widths are constants there; those outside of blocks lack a prefix."""
  wide, rng = 3072, np.random.default_rng(0)
  block = "transformer.transformer_blocks.0.attn"
  single = "transformer.single_transformer_blocks.0"
  shapes = {f"{block}.{x}": (wide, wide) for x in
            ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj",
             "add_v_proj")}  # fmt: skip
  shapes |= {
    f"{single}.attn.{x}": (wide, wide) for x in ("to_q", "to_k", "to_v")
  }
  shapes |= {f"{single}.proj_mlp": (4 * wide, wide)}
  loras = {
    name: Lora(*(rng.standard_normal((2, n), np.float32) for n in shape[::-1]),
               np.float32(1)) for name, shape in shapes.items()}  # fmt: skip
  path = tmp_path / "x.safetensors"
  assert save_kohya(path, loras, like=shapes, dtype=np.float32) == {}
  found = diffusers.FluxPipeline.lora_state_dict(tensors(path))
  found = found[0] if isinstance(found, tuple) else found
  for name, lora in loras.items():
    probe = rng.standard_normal(wide, np.float32)
    down, up = (found[f"{name}.lora_{x}.weight"].numpy() for x in "AB")
    want = lora.b.T @ (lora.a @ probe)
    np.testing.assert_allclose(up @ (down @ probe), want, rtol=1e-3, atol=1e-2)


CONVERTERS = {
  "sd1": "convert_ldm_unet_checkpoint",
  "sdxl": "convert_ldm_unet_checkpoint",
  "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
  "flux": "convert_flux_transformer_checkpoint_to_diffusers",
  "wan": "convert_wan_transformer_to_diffusers",
  "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
  "hunyuan-video": "convert_hunyuan_video_transformer_to_diffusers",
  "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
  "ltx": "convert_ltx_transformer_checkpoint_to_diffusers",
}
# Converters that leave the prefix.
BARE = ("flux2", "hunyuan-video")


def widened(base):
  """A model with the widths that diffusers' converter has as constants."""
  rng = np.random.default_rng(0)
  for name, x in base.items():
    if "single_" in name and name.split(".")[-2] in ("to_q", "to_k", "to_v"):
      base[name] = rng.standard_normal((3072, *x.shape[1:]), np.float32)
    if "proj_mlp" in name:
      base[name] = rng.standard_normal((12288, *x.shape[1:]), np.float32)
  return base


@pytest.mark.parametrize("family", CONVERTERS)
def test_single_files_are_turned_as_diffusers_turns_them(family, tmp_path):
  model = MODELS[family]()
  is_wide = family in ("flux", "hunyuan-video")
  base = widened(arrays(model)) if is_wide else arrays(model)
  component = "unet" if family in ("sd1", "sdxl") else "transformer"
  named = {f"{component}.{name}": x for name, x in base.items()}
  prefixes = {"transformer": ""} if family in BARE else PREFIX
  stored = as_original(named, family, prefixes)
  path = tmp_path / "x.safetensors"
  write_safetensors(path, stored)
  convert = getattr(single_files, CONVERTERS[family])
  told = {n: torch.from_numpy(x) for n, x in stored.items()}
  want = convert(told, config=dict(model.config))
  assert {*want} == {*base}
  found = open_components(path, names="diffusers")
  own = "" if family in BARE else f"{component}."
  assert {*found} == {own + name for name in base}
  for name, x in want.items():
    np.testing.assert_array_equal(found[own + name], x.numpy())
    np.testing.assert_array_equal(base[name], x.numpy())


def test_openclip_is_turned_as_diffusers_turns_it(tmp_path):
  model = transformers.CLIPTextModelWithProjection(clip().config)
  base = {
    name: x for name, x in arrays(model).items() if "position_ids" not in name
  }
  named = {f"text_encoder_2.{name}": x for name, x in base.items()}
  stored = as_original(named, "sdxl")
  path = tmp_path / "x.safetensors"
  write_safetensors(path, stored)
  want = single_files.convert_open_clip_checkpoint(
    model,
    {n: torch.from_numpy(np.ascontiguousarray(x)) for n, x in stored.items()},
    prefix="conditioner.embedders.1.model.",
  )
  found = open_components(path, names="diffusers")
  assert {*found} == {*named}
  assert {*want} == {*base}
  for name, x in want.items():
    np.testing.assert_array_equal(found[f"text_encoder_2.{name}"], x.numpy())


def two_and_three(spectra):
  """Ranks that differ, as a policy gives them."""
  return {path: 2 + at % 2 for at, path in enumerate(spectra.values)}


@pytest.mark.parametrize("save", [save_kohya, save_diffusers])
def test_what_two_single_files_differ_by_is_loaded(save, tmp_path):
  models = {"unet": sd1(), "text_encoder": clip()}
  bases = {name: arrays(model) for name, model in models.items()}
  rng, paths, tuned = np.random.default_rng(0), [], {}
  for side in ("base", "tuned"):
    named = {}
    for component, own in bases.items():
      for name, x in own.items():
        is_text = component == "text_encoder" and "text_model" not in name
        full = f"text_model.{name}" if is_text else name
        if side == "tuned":
          x = x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype)
          tuned[component, name] = x
        named[f"{component}.{full}"] = x
    paths.append(tmp_path / f"{side}.safetensors")
    write_safetensors(paths[-1], as_original(named, "sd1"))
  report = extract_checkpoint(
    *paths, tmp_path / "out", rank=3, policy=two_and_three, names="diffusers",
    log=io.StringIO(),
    select=matching(".*[.]weight", ".*embeddings.*|.*norm.*"),
  )  # fmt: skip
  adapter = open_adapter(tmp_path / "out", paths[0])
  path = tmp_path / "x.safetensors"
  save(path, adapter, like=paths[0], dtype=np.float32)
  pipe = pipeline("sd1", *models.values())
  pipe.load_lora_weights(str(path))
  pipe.fuse_lora(components=[*models])
  pipe.unload_lora_weights()
  fused = {name: arrays(model) for name, model in models.items()}
  assert len(report.modules) == 121 + 12
  for row in report.modules:
    component, _, name = row["path"].partition(".")
    if name not in bases[component]:
      name = name.removeprefix("text_model.")
    want = tuned[component, name]
    error = np.linalg.norm(fused[component][name] - want)
    change = np.linalg.norm(want - bases[component][name])
    np.testing.assert_allclose(error / change, row["relative_error"], atol=1e-5)


# Family, writer, pipeline, modules that diffusers 0.42.1 turns wrongly or not.
# Of HunyuanVideo it cuts A of the text's attention, and swaps halves of A; of
# Flux 2 it leaves the halves, and in kohya's files modulations; of LTX it
# leaves the names outside of blocks.
READ = (
  ("flux2", save_comfy, "Flux2Pipeline", "norm_out"),
  ("flux2", save_kohya, "Flux2Pipeline",
   "norm_out|_modulation|guidance_embedder"),
  ("hunyuan-video", save_comfy, "HunyuanVideoPipeline",
   "norm_out|refiner_blocks.*to_[qkv]"),
  ("z-image", save_comfy, "ZImagePipeline", "$^"),
  ("z-image", save_kohya, "ZImagePipeline", "$^"),
  ("ltx", save_comfy, "LTXPipeline", "^proj_in|^time_embed"),
)  # fmt: skip


@pytest.mark.parametrize(("family", "save", "pipe", "wrong"), READ)
def test_files_of_newer_models_are_converted(
  family, save, pipe, wrong, tmp_path
):
  model = MODELS[family]()
  base = arrays(model)
  if family == "hunyuan-video":
    base = widened(base)
  loras = {n: x for n, x in draw(base).items() if not re.search(wrong, n)}
  path = tmp_path / "x.safetensors"
  assert save(path, loras, like=base, family=family, dtype=np.float32) == {}
  found = getattr(diffusers, pipe).lora_state_dict(tensors(path))
  found = found[0] if isinstance(found, tuple) else found
  modules = {name.removesuffix(".weight") for name in loras}
  stems = {key.rpartition(".lora_")[0] for key in found}
  assert stems == {f"transformer.{name}" for name in modules}
  for name in modules:
    down, up = (found[f"transformer.{name}.lora_{x}.weight"].numpy()
                for x in "AB")  # fmt: skip
    want = product(loras[f"{name}.weight"])
    got = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
