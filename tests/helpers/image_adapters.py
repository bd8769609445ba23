# SPDX-License-Identifier: Apache-2.0
"""Small adapters of image and video models, by diffusers' names of modules."""

import numpy as np

from jlora.loras import Lora

D = 8


def spread(prefix, sides):
  return {f"{prefix}{name}": shape for name, shape in sides.items()}


def attended(prefix, conv=False):
  """A transformer inside a UNet, with its projections."""
  ones = (1, 1) if conv else ()
  inner = {
    f"transformer_blocks.0.attn{i}.{name}": (D, D)
    for i in (1, 2)
    for name in ("to_q", "to_k", "to_v", "to_out.0")
  }
  inner |= {
    "transformer_blocks.0.ff.net.0.proj": (4 * D, D),
    "transformer_blocks.0.ff.net.2": (D, 2 * D),
    "proj_in": (D, D, *ones),
    "proj_out": (D, D, *ones),
  }
  return spread(prefix, inner)


def resnet(prefix):
  inner = {
    "conv1": (D, D, 3, 3),
    "conv2": (D, D, 3, 3),
    "time_emb_proj": (D, 6),
    "conv_shortcut": (D, D, 1, 1),
  }
  return spread(prefix, inner)


def clip(component):
  inner = {
    f"self_attn.{name}": (D, D)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj")
  } | {"mlp.fc1": (2 * D, D), "mlp.fc2": (D, 2 * D)}
  return spread(f"{component}.text_model.encoder.layers.0.", inner)


def sd1():
  unet = {"conv_in": (D, 4, 3, 3), "time_embedding.linear_1": (D, 6)}
  unet |= attended("down_blocks.0.attentions.1.", conv=True)
  unet |= resnet("down_blocks.1.resnets.0.")
  unet["down_blocks.0.downsamplers.0.conv"] = (D, D, 3, 3)
  unet |= resnet("mid_block.resnets.1.")
  unet |= attended("mid_block.attentions.0.", conv=True)
  unet |= attended("up_blocks.1.attentions.2.", conv=True)
  unet["up_blocks.0.upsamplers.0.conv"] = (D, D, 3, 3)
  unet["up_blocks.1.upsamplers.0.conv"] = (D, D, 3, 3)
  return spread("unet.", unet) | clip("text_encoder")


def sdxl():
  unet = {"add_embedding.linear_2": (D, D), "conv_out": (4, D, 3, 3)}
  unet |= attended("down_blocks.2.attentions.0.")
  unet |= attended("up_blocks.0.attentions.1.")
  unet |= resnet("up_blocks.2.resnets.2.")
  unet["up_blocks.0.upsamplers.0.conv"] = (D, D, 3, 3)
  unet["down_blocks.1.downsamplers.0.conv"] = (D, D, 3, 3)
  both = clip("text_encoder") | clip("text_encoder_2")
  return spread("unet.", unet) | both


def doubles(block, size=D):
  attn = ("to_q", "to_k", "to_v", "to_out.0", "to_add_out", "add_q_proj",
          "add_k_proj", "add_v_proj")  # fmt: skip
  inner = {f"attn.{name}": (size, size) for name in attn}
  for ff in ("ff", "ff_context"):
    inner[f"{ff}.net.0.proj"] = (4 * size, size)
    inner[f"{ff}.net.2"] = (size, 4 * size)
  inner["norm1.linear"] = (6 * size, size)
  inner["norm1_context.linear"] = (6 * size, size)
  return spread(f"transformer_blocks.{block}.", inner)


def flux():
  single = {
    "attn.to_q": (D, D), "attn.to_k": (D, D), "attn.to_v": (D, D),
    "proj_mlp": (4 * D, D), "proj_out": (D, 5 * D), "norm.linear": (3 * D, D),
  }  # fmt: skip
  top = {
    "x_embedder": (D, 4), "context_embedder": (D, 6), "proj_out": (4, D),
    "norm_out.linear": (2 * D, D),
    "time_text_embed.guidance_embedder.linear_2": (D, D),
  }  # fmt: skip
  whole = doubles(1) | spread("single_transformer_blocks.3.", single) | top
  return spread("transformer.", whole) | clip("text_encoder")


def sd3():
  last = doubles(1) | {
    "transformer_blocks.1.norm1_context.linear": (2 * D, D),
    "transformer_blocks.0.attn2.to_q": (D, D),
    "transformer_blocks.0.attn2.to_k": (D, D),
    "transformer_blocks.0.attn2.to_v": (D, D),
  }
  top = {"pos_embed.proj": (D, 4, 2, 2), "norm_out.linear": (2 * D, D)}
  return spread("transformer.", doubles(0) | last | top)


def wan():
  inner = {
    f"attn{i}.{name}": (D, D)
    for i in (1, 2)
    for name in ("to_q", "to_k", "to_v", "to_out.0")
  } | {"ffn.net.0.proj": (2 * D, D), "ffn.net.2": (D, 2 * D)}
  top = {"patch_embedding": (D, 4, 1, 2, 2), "proj_out": (16, D)}
  return spread("transformer.", spread("blocks.2.", inner) | top)


def qwen_image():
  inner = {
    "attn.to_q": (D, D), "attn.add_k_proj": (D, D),
    "img_mlp.net.0.proj": (D, D), "txt_mod.1": (6 * D, D),
  }  # fmt: skip
  return spread("transformer.transformer_blocks.5.", inner)


def flux2():
  attn = ("to_q", "to_k", "to_v", "to_out.0", "to_add_out", "add_q_proj",
          "add_k_proj", "add_v_proj")  # fmt: skip
  double = {f"attn.{name}": (D, D) for name in attn}
  double |= {"ff.linear_in": (6 * D, D), "ff_context.linear_out": (D, 3 * D)}
  single = {"attn.to_qkv_mlp_proj": (9 * D, D), "attn.to_out": (D, 4 * D)}
  top = {
    "double_stream_modulation_txt.linear": (6 * D, D),
    "single_stream_modulation.linear": (3 * D, D),
    "time_guidance_embed.guidance_embedder.linear_2": (D, D),
    "norm_out.linear": (2 * D, D),
  }
  whole = spread("transformer_blocks.2.", double) | top
  whole |= spread("single_transformer_blocks.0.", single)
  return spread("transformer.", whole)


def hunyuan_video():
  refiner = {"attn.to_q": (D, D), "attn.to_k": (D, D), "attn.to_v": (D, D),
             "ff.net.2": (D, 4 * D), "norm_out.linear": (2 * D, D)}  # fmt: skip
  single = {"attn.to_q": (D, D), "attn.to_k": (D, D), "attn.to_v": (D, D),
            "proj_mlp": (4 * D, D), "proj_out": (D, 5 * D)}  # fmt: skip
  top = {
    "x_embedder.proj": (D, 4, 1, 2, 2),
    "context_embedder.proj_in": (D, 6),
    "context_embedder.time_text_embed.text_embedder.linear_1": (D, 6),
    "time_text_embed.guidance_embedder.linear_2": (D, D),
    "norm_out.linear": (2 * D, D),
  }
  whole = doubles(1) | spread("single_transformer_blocks.3.", single) | top
  blocks = "context_embedder.token_refiner.refiner_blocks.1."
  return spread("transformer.", whole | spread(blocks, refiner))


def z_image():
  inner = {f"attention.{name}": (D, D)
           for name in ("to_q", "to_k", "to_v", "to_out.0")}  # fmt: skip
  inner |= {"feed_forward.w1": (3 * D, D), "feed_forward.w2": (D, 3 * D)}
  whole = spread("layers.4.", inner | {"adaLN_modulation.0": (4 * D, D)})
  whole |= spread("context_refiner.1.", inner)
  whole |= {"all_x_embedder.2-1": (D, 16), "cap_embedder.1": (D, 6),
            "all_final_layer.2-1.linear": (16, D)}  # fmt: skip
  return spread("transformer.", whole)


def ltx():
  inner = {
    f"attn{i}.{name}": (D, D)
    for i in (1, 2)
    for name in ("to_q", "to_k", "to_v", "to_out.0")
  } | {"ff.net.0.proj": (4 * D, D), "ff.net.2": (D, 4 * D)}
  top = {"proj_in": (D, 4), "time_embed.linear": (6 * D, D),
         "caption_projection.linear_1": (D, 6), "proj_out": (4, D)}  # fmt: skip
  return spread("transformer.", spread("transformer_blocks.2.", inner) | top)


#: Family -> {module: shape of its weight}.
FAMILIES = {
  "sd1": sd1(),
  "sdxl": sdxl(),
  "flux": flux(),
  "sd3": sd3(),
  "wan": wan(),
  "qwen-image": qwen_image(),
  "flux2": flux2(),
  "hunyuan-video": hunyuan_video(),
  "z-image": z_image(),
  "ltx": ltx(),
}


def draw(shapes, ranks=(2, 3), seed=0, dtype=np.float32, scale=1.0):
  """Loras of some shapes, of the given ranks in turn."""
  rng = np.random.default_rng(seed)
  found = {}
  for at, (module, shape) in enumerate(shapes.items()):
    rank = ranks[at % len(ranks)]
    n_in = int(np.prod(shape[1:]))
    sides = (rng.standard_normal((rank, n)) for n in (n_in, shape[0]))
    a, b = (x.astype(dtype) for x in sides)
    found[module] = Lora(a, b, np.float32(scale))
  return found


def product(lora):
  """The change (out, in) in float64."""
  a, b = (np.asarray(x, np.float64) for x in (lora.a, lora.b))
  return float(lora.scale) * (b.T @ a)
