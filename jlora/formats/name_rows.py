# SPDX-License-Identifier: Apache-2.0
"""The tables of names: rows for each family of image and video models.

A row says that some modules of diffusers, joined along their outputs, are one
module of the original. `#` stands for a number.

References:
  huggingface/diffusers 0.42.1, `loaders/lora_conversion_utils.py`,
  `loaders/single_file_utils.py` and `scripts/convert_*_to_diffusers.py`;
  kohya-ss/sd-scripts and kohya-ss/musubi-tuner, `networks/`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Numbers = tuple[int, ...]


class Plan(NamedTuple):
  """What of a UNet's plan its original names depend on.

  Attributes:
    layers: of a block, `layers_per_block`.
    attended: numbers of the upward blocks that have attention.
  """

  layers: int = 2
  attended: frozenset[int] = frozenset()


class Row(NamedTuple):
  """Modules of diffusers, and the one module of the original they make up.

  Attributes:
    ours: diffusers' names, in the order of the original's outputs.
    theirs: the original's name.
    shares: of the original's outputs that each of ours has.
    exchanged: whether the halves of the outputs change places.
    transposed: whether the original keeps its matrix as (in, out).
    to: (numbers of ours, plan) -> numbers of theirs.
    back: (numbers of theirs, plan) -> numbers of ours; None if that is another
      row's.
  """

  ours: tuple[str, ...]
  theirs: str
  shares: tuple[int, ...] = (1,)
  exchanged: bool = False
  transposed: bool = False
  to: Callable[[Numbers, Plan], Numbers] = lambda numbers, plan: numbers
  back: Callable[[Numbers, Plan], Numbers | None] = lambda numbers, plan: (
    numbers
  )


def spell(pattern: str) -> Iterator[str]:
  """Yields what a pattern with alternatives in braces stands for.

  Args:
    pattern: such as `attn{1,2}.to_{q,k}`.
  """
  head, brace, rest = pattern.partition("{")
  if not brace:
    yield pattern
    return
  inner, _, tail = rest.partition("}")
  for one in inner.split(","):
    yield from spell(head + one + tail)


def _rows(ours: str, theirs: str, **more) -> list[Row]:
  """Returns a row for each alternative of two patterns, pairwise."""
  pairs = zip(spell(ours), spell(theirs), strict=True)
  return [Row((one,), other, **more) for one, other in pairs]


def _joined(prefix: str, ours: str, theirs: str) -> Row:
  """Returns a row of several modules of diffusers that make up one."""
  names = tuple(spell(prefix + ours))
  return Row(names, theirs, (1,) * len(names))


_ATTENTION = (
  "norm", "proj_in", "proj_out",
  *spell("transformer_blocks.#.attn{1,2}.to_{q,k,v,out.0}"),
  *spell("transformer_blocks.#.ff.net.{0.proj,2}"),
  *spell("transformer_blocks.#.norm{1,2,3}"),
)  # fmt: skip
_RESNET = (
  ("norm1", "in_layers.0"), ("conv1", "in_layers.2"),
  ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
  ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
)  # fmt: skip


def _down(numbers: Numbers, plan: Plan) -> Numbers:
  """Numbers a downward layer by the layers before it."""
  block, layer, *rest = numbers
  return ((plan.layers + 1) * block + layer + 1, *rest)


def _down_back(numbers: Numbers, plan: Plan) -> Numbers | None:
  """Reverts `_down`; None for a downsampler and the first convolution."""
  at, *rest = numbers
  block, layer = divmod(at - 1, plan.layers + 1)
  return None if at < 1 or layer == plan.layers else (block, layer, *rest)


def _up(numbers: Numbers, plan: Plan) -> Numbers:
  """Numbers an upward layer by the layers before it."""
  block, layer, *rest = numbers
  return ((plan.layers + 1) * block + layer, *rest)


def _up_back(numbers: Numbers, plan: Plan) -> Numbers:
  """Reverts `_up`."""
  at, *rest = numbers
  return (*divmod(at, plan.layers + 1), *rest)


def _smaller(numbers: Numbers, plan: Plan) -> Numbers:
  """Numbers the convolution that ends a downward block."""
  return ((plan.layers + 1) * (numbers[0] + 1),)


def _smaller_back(numbers: Numbers, plan: Plan) -> Numbers | None:
  """Reverts `_smaller`."""
  block, rest = divmod(numbers[0], plan.layers + 1)
  return None if rest or not block else (block - 1,)


def _larger(numbers: Numbers, plan: Plan) -> Numbers:
  """Numbers the convolution that ends an upward block, after its attention."""
  block = numbers[0]
  place = 2 if block in plan.attended else 1
  return ((plan.layers + 1) * block + plan.layers, place)


def _larger_back(numbers: Numbers, plan: Plan) -> Numbers | None:
  """Reverts `_larger`."""
  block, layer = divmod(numbers[0], plan.layers + 1)
  return (block,) if layer == plan.layers and numbers[1] in (1, 2) else None


def _unet() -> Iterator[Row]:
  """Yields the rows of a UNet."""
  yield from _rows("conv_{in,norm_out,out}", "{input_blocks.0.0,out.0,out.2}")
  yield from _rows("time_embedding.linear_{1,2}", "time_embed.{0,2}")
  yield from _rows("add_embedding.linear_{1,2}", "label_emb.0.{0,2}")
  down: dict[str, Any] = {"to": _down, "back": _down_back}
  up: dict[str, Any] = {"to": _up, "back": _up_back}
  for one in _ATTENTION:
    place = f"attentions.#.{one}"
    yield Row((f"down_blocks.#.{place}",), f"input_blocks.#.1.{one}", **down)
    yield Row((f"up_blocks.#.{place}",), f"output_blocks.#.1.{one}", **up)
    yield Row((f"mid_block.attentions.0.{one}",), f"middle_block.1.{one}")
  for one, other in _RESNET:
    place = f"resnets.#.{one}"
    yield Row((f"down_blocks.#.{place}",), f"input_blocks.#.0.{other}", **down)
    yield Row((f"up_blocks.#.{place}",), f"output_blocks.#.0.{other}", **up)
    yield from _rows(
      f"mid_block.resnets.{{0,1}}.{one}", f"middle_block.{{0,2}}.{other}"
    )
  yield Row(
    ("down_blocks.#.downsamplers.0.conv",),
    "input_blocks.#.0.op",
    to=_smaller,
    back=_smaller_back,
  )
  yield Row(
    ("up_blocks.#.upsamplers.0.conv",),
    "output_blocks.#.#.conv",
    to=_larger,
    back=_larger_back,
  )


def _single_blocks(modulation: str) -> Iterator[Row]:
  """Yields the rows of blocks of one stream, as Flux and HunyuanVideo have."""
  ours, theirs = "single_transformer_blocks.#.", "single_blocks.#."
  yield Row(
    (*spell(ours + "attn.to_{q,k,v}"), ours + "proj_mlp"),
    theirs + "linear1",
    (1, 1, 1, 4),
  )
  yield from _rows(
    ours + "{proj_out,norm.linear}",
    theirs + "{linear2,modulation." + modulation + "}",
  )


def _flux() -> Iterator[Row]:
  """Yields the rows of Flux."""
  ours, theirs = "transformer_blocks.#.", "double_blocks.#."
  yield _joined(ours + "attn.", "to_{q,k,v}", theirs + "img_attn.qkv")
  yield _joined(ours + "attn.", "add_{q,k,v}_proj", theirs + "txt_attn.qkv")
  yield from _rows(
    ours + "attn.{to_out.0,to_add_out}", theirs + "{img,txt}_attn.proj"
  )
  yield from _rows(
    ours + "ff{,_context}.net.{0.proj,2}", theirs + "{img,txt}_mlp.{0,2}"
  )
  yield from _rows(
    ours + "norm1{,_context}.linear", theirs + "{img,txt}_mod.lin"
  )
  yield from _single_blocks("lin")
  yield from _rows(
    "{x_embedder,context_embedder,proj_out}",
    "{img_in,txt_in,final_layer.linear}",
  )
  yield from _rows(
    "time_text_embed.{timestep,text,guidance}_embedder.linear_{1,2}",
    "{time,vector,guidance}_in.{in,out}_layer",
  )
  yield Row(
    ("norm_out.linear",), "final_layer.adaLN_modulation.1", exchanged=True
  )


def _flux_parameters() -> Iterator[Row]:
  """Yields the rows of Flux' norms, which the original gives a scale."""
  yield from _rows(
    "transformer_blocks.#.attn.norm_{q,k,added_q,added_k}.weight",
    "double_blocks.#.{img_attn.norm.query_norm,img_attn.norm.key_norm,"
    "txt_attn.norm.query_norm,txt_attn.norm.key_norm}.scale",
  )
  yield from _rows(
    "single_transformer_blocks.#.attn.norm_{q,k}.weight",
    "single_blocks.#.norm.{query,key}_norm.scale",
  )


def _sd3() -> Iterator[Row]:
  """Yields the rows of Stable Diffusion 3, but for the last block's context."""
  ours, theirs = "transformer_blocks.#.", "joint_blocks.#."
  yield _joined(ours + "attn.", "to_{q,k,v}", theirs + "x_block.attn.qkv")
  yield _joined(
    ours + "attn.", "add_{q,k,v}_proj", theirs + "context_block.attn.qkv"
  )
  yield _joined(ours + "attn2.", "to_{q,k,v}", theirs + "x_block.attn2.qkv")
  yield from _rows(
    ours + "{attn.to_out.0,attn.to_add_out,attn2.to_out.0}",
    theirs + "{x_block.attn,context_block.attn,x_block.attn2}.proj",
  )
  yield from _rows(
    ours + "ff{,_context}.net.{0.proj,2}",
    theirs + "{x,context}_block.mlp.fc{1,2}",
  )
  yield from _rows(
    ours + "norm1{,_context}.linear",
    theirs + "{x,context}_block.adaLN_modulation.1",
  )
  yield from _rows(
    "{pos_embed.proj,context_embedder,proj_out}",
    "{x_embedder.proj,context_embedder,final_layer.linear}",
  )
  yield from _rows(
    "time_text_embed.{timestep,text}_embedder.linear_{1,2}",
    "{t,y}_embedder.mlp.{0,2}",
  )
  yield Row(
    ("norm_out.linear",), "final_layer.adaLN_modulation.1", exchanged=True
  )


def _sd3_parameters() -> Iterator[Row]:
  """Yields the rows of Stable Diffusion 3's norms and positions."""
  yield from _rows(
    "transformer_blocks.#.{attn.norm_q,attn.norm_k,attn.norm_added_q,"
    "attn.norm_added_k,attn2.norm_q,attn2.norm_k}.weight",
    "joint_blocks.#.{x_block.attn.ln_q,x_block.attn.ln_k,"
    "context_block.attn.ln_q,context_block.attn.ln_k,x_block.attn2.ln_q,"
    "x_block.attn2.ln_k}.weight",
  )
  yield Row(("pos_embed.pos_embed",), "pos_embed")


def _wan() -> Iterator[Row]:
  """Yields the rows of Wan."""
  ours = theirs = "blocks.#."
  yield from _rows(
    ours + "attn{1,2}.to_{q,k,v,out.0}",
    theirs + "{self,cross}_attn.{q,k,v,o}",
  )
  yield from _rows(
    ours + "attn2.add_{k,v}_proj", theirs + "cross_attn.{k,v}_img"
  )
  yield from _rows(ours + "ffn.net.{0.proj,2}", theirs + "ffn.{0,2}")
  yield from _rows(
    "condition_embedder.{time,text}_embedder.linear_{1,2}",
    "{time,text}_embedding.{0,2}",
  )
  yield from _rows(
    "condition_embedder.{time_proj,image_embedder.ff.net.0.proj,"
    "image_embedder.ff.net.2}",
    "{time_projection.1,img_emb.proj.1,img_emb.proj.3}",
  )
  yield from _rows("{proj_out,patch_embedding}", "{head.head,patch_embedding}")


def _wan_parameters() -> Iterator[Row]:
  """Yields the rows of Wan's norms and modulations."""
  yield from _rows(
    "blocks.#.attn{1,2}.norm_{q,k,added_k}.weight",
    "blocks.#.{self,cross}_attn.norm_{q,k,k_img}.weight",
  )
  yield from _rows(
    "blocks.#.norm2.{weight,bias}", "blocks.#.norm3.{weight,bias}"
  )
  yield from _rows(
    "condition_embedder.image_embedder.norm{1,2}.{weight,bias}",
    "img_emb.proj.{0,4}.{weight,bias}",
  )
  yield from _rows(
    "{blocks.#.scale_shift_table,scale_shift_table}",
    "{blocks.#.modulation,head.modulation}",
  )


def _same(*patterns: str) -> tuple[Row, ...]:
  """Returns rows of names that are the same on both sides."""
  names = [name for pattern in patterns for name in spell(pattern)]
  return tuple(Row((name,), name) for name in names)


def _flux2() -> Iterator[Row]:
  """Yields the rows of Flux 2."""
  ours, theirs = "transformer_blocks.#.", "double_blocks.#."
  yield _joined(ours + "attn.", "to_{q,k,v}", theirs + "img_attn.qkv")
  yield _joined(ours + "attn.", "add_{q,k,v}_proj", theirs + "txt_attn.qkv")
  yield from _rows(
    ours + "attn.{to_out.0,to_add_out}", theirs + "{img,txt}_attn.proj"
  )
  yield from _rows(
    ours + "ff{,_context}.linear_{in,out}", theirs + "{img,txt}_mlp.{0,2}"
  )
  yield from _rows(
    "single_transformer_blocks.#.attn.{to_qkv_mlp_proj,to_out}",
    "single_blocks.#.{linear1,linear2}",
  )
  yield from _rows(
    "{double_stream_modulation_img,double_stream_modulation_txt,"
    "single_stream_modulation}.linear",
    "{double_stream_modulation_img,double_stream_modulation_txt,"
    "single_stream_modulation}.lin",
  )
  yield from _rows(
    "{x_embedder,context_embedder,proj_out}",
    "{img_in,txt_in,final_layer.linear}",
  )
  yield from _rows(
    "time_guidance_embed.{timestep,guidance}_embedder.linear_{1,2}",
    "{time,guidance}_in.{in,out}_layer",
  )
  yield Row(
    ("norm_out.linear",), "final_layer.adaLN_modulation.1", exchanged=True
  )


def _hunyuan_video() -> Iterator[Row]:
  """Yields the rows of HunyuanVideo."""
  ours, theirs = "transformer_blocks.#.", "double_blocks.#."
  yield _joined(ours + "attn.", "to_{q,k,v}", theirs + "img_attn_qkv")
  yield _joined(ours + "attn.", "add_{q,k,v}_proj", theirs + "txt_attn_qkv")
  yield from _rows(
    ours + "attn.{to_out.0,to_add_out}", theirs + "{img,txt}_attn_proj"
  )
  yield from _rows(
    ours + "ff{,_context}.net.{0.proj,2}", theirs + "{img,txt}_mlp.fc{1,2}"
  )
  yield from _rows(
    ours + "norm1{,_context}.linear", theirs + "{img,txt}_mod.linear"
  )
  yield from _single_blocks("linear")
  yield from _rows(
    "{x_embedder.proj,proj_out}", "{img_in.proj,final_layer.linear}"
  )
  yield from _rows(
    "time_text_embed.{timestep,guidance}_embedder.linear_{1,2}",
    "{time,guidance}_in.mlp.{0,2}",
  )
  yield from _rows(
    "time_text_embed.text_embedder.linear_{1,2}", "vector_in.{in,out}_layer"
  )
  yield from _token_refiner()
  yield Row(
    ("norm_out.linear",), "final_layer.adaLN_modulation.1", exchanged=True
  )


def _token_refiner() -> Iterator[Row]:
  """Yields the rows of what HunyuanVideo reads text by."""
  ours, theirs = "context_embedder.", "txt_in."
  yield from _rows(
    ours + "time_text_embed.{timestep,text}_embedder.linear_{1,2}",
    theirs + "{t_embedder.mlp.0,t_embedder.mlp.2,c_embedder.linear_1,"
    "c_embedder.linear_2}",
  )
  yield Row((ours + "proj_in",), theirs + "input_embedder")
  ours += "token_refiner.refiner_blocks.#."
  theirs += "individual_token_refiner.blocks.#."
  yield _joined(ours + "attn.", "to_{q,k,v}", theirs + "self_attn_qkv")
  yield from _rows(
    ours + "{attn.to_out.0,ff.net.0.proj,ff.net.2,norm_out.linear,norm1,norm2}",
    theirs + "{self_attn_proj,mlp.fc1,mlp.fc2,adaLN_modulation.1,norm1,norm2}",
  )


def _hunyuan_video_parameters() -> Iterator[Row]:
  """Yields the rows of HunyuanVideo's norms."""
  yield from _rows(
    "transformer_blocks.#.attn.norm_{q,k,added_q,added_k}.weight",
    "double_blocks.#.{img_attn_q,img_attn_k,txt_attn_q,txt_attn_k}_norm.weight",
  )
  yield from _rows(
    "single_transformer_blocks.#.attn.norm_{q,k}.weight",
    "single_blocks.#.{q,k}_norm.weight",
  )


_Z_BLOCKS = "{layers,noise_refiner,context_refiner}.#."


def _z_image() -> Iterator[Row]:
  """Yields the rows of Z-Image."""
  for block in spell(_Z_BLOCKS):
    attention = block + "attention."
    yield _joined(attention, "to_{q,k,v}", attention + "qkv")
    yield Row((attention + "to_out.0",), attention + "out")
    yield from _same(
      block + "{feed_forward.w1,feed_forward.w2,feed_forward.w3,"
      "adaLN_modulation.0}"
    )
  yield from _rows(
    "{all_x_embedder.2-1,all_final_layer.2-1.linear,"
    "all_final_layer.2-1.adaLN_modulation.1}",
    "{x_embedder,final_layer.linear,final_layer.adaLN_modulation.1}",
  )
  yield from _same("t_embedder.mlp.{0,2}", "cap_embedder.1")


def _z_image_parameters() -> Iterator[Row]:
  """Yields the rows of Z-Image's norms that have other names."""
  yield from _rows(
    _Z_BLOCKS + "attention.norm_{q,k}.weight",
    _Z_BLOCKS + "attention.{q,k}_norm.weight",
  )


def _ltx() -> Iterator[Row]:
  """Yields the rows of LTX-Video."""
  yield from _same(
    "transformer_blocks.#.attn{1,2}.to_{q,k,v,out.0}",
    "transformer_blocks.#.ff.net.{0.proj,2}",
    "caption_projection.linear_{1,2}",
    "proj_out",
  )
  yield Row(("proj_in",), "patchify_proj")
  yield from _rows(
    "time_embed.{emb.timestep_embedder.linear_1,emb.timestep_embedder.linear_2,"
    "linear}",
    "adaln_single.{emb.timestep_embedder.linear_1,"
    "emb.timestep_embedder.linear_2,linear}",
  )


def _ltx_parameters() -> Iterator[Row]:
  """Yields the rows of LTX-Video's norms."""
  yield from _rows(
    "transformer_blocks.#.attn{1,2}.norm_{q,k}.weight",
    "transformer_blocks.#.attn{1,2}.{q,k}_norm.weight",
  )


def _open_clip() -> Iterator[Row]:
  """Yields the rows of OpenCLIP's text encoders, against transformers'."""
  ours, theirs = "text_model.encoder.layers.#.", "transformer.resblocks.#."
  yield _joined(ours + "self_attn.", "{q,k,v}_proj", theirs + "attn.in_proj")
  yield from _rows(
    ours + "{self_attn.out_proj,mlp.fc1,mlp.fc2,layer_norm1,layer_norm2}",
    theirs + "{attn.out_proj,mlp.c_fc,mlp.c_proj,ln_1,ln_2}",
  )
  yield from _rows(
    "text_model.{final_layer_norm,embeddings.token_embedding}",
    "{ln_final,token_embedding}",
  )


QWEN_IMAGE = _same(
  "transformer_blocks.#.attn.to_{q,k,v,out.0,add_out}",
  "transformer_blocks.#.attn.add_{q,k,v}_proj",
  "transformer_blocks.#.{img,txt}_mlp.net.{0.proj,2}",
  "transformer_blocks.#.{img,txt}_mod.1",
  "{img_in,txt_in,proj_out,norm_out.linear}",
  "time_text_embed.timestep_embedder.linear_{1,2}",
)
#: Names of text encoders, the same for every tool.
TEXT_ROWS = _same(
  "text_model.encoder.layers.#.self_attn.{q,k,v,out}_proj",
  "text_model.encoder.layers.#.mlp.fc{1,2}",
  "text_model.encoder.layers.#.layer_norm{1,2}",
  "text_model.final_layer_norm",
  "text_projection",
  "encoder.block.#.layer.0.SelfAttention.{q,k,v,o}",
  "encoder.block.#.layer.1.DenseReluDense.{wi,wi_0,wi_1,wo}",
)

#: Names of OpenCLIP's text encoders, and of its parameters without a module.
OPEN_CLIP = tuple(_open_clip())
OPEN_CLIP_PARAMETERS = (
  Row(
    ("text_model.embeddings.position_embedding.weight",),
    "positional_embedding",
  ),
  Row(("text_projection.weight",), "text_projection", transposed=True),
)

UNET = tuple(_unet())
FLUX, FLUX_PARAMETERS = tuple(_flux()), tuple(_flux_parameters())
FLUX2 = tuple(_flux2())
SD3, SD3_PARAMETERS = tuple(_sd3()), tuple(_sd3_parameters())
WAN, WAN_PARAMETERS = tuple(_wan()), tuple(_wan_parameters())
HUNYUAN_VIDEO = tuple(_hunyuan_video())
HUNYUAN_VIDEO_PARAMETERS = tuple(_hunyuan_video_parameters())
Z_IMAGE, Z_IMAGE_PARAMETERS = tuple(_z_image()), tuple(_z_image_parameters())
LTX, LTX_PARAMETERS = tuple(_ltx()), tuple(_ltx_parameters())
