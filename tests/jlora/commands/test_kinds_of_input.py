# SPDX-License-Identifier: Apache-2.0
"""Every command with every kind of input: it takes it, or says so in a line."""

import json

import numpy as np
import pytest

from jlora.checkpoints import write_safetensors
from jlora.commands import (
  adapter,
  entry,
  extract,
  merge,
  plan,
  port,
  serve,
  show,
  verify,
)
from jlora.formats import save_diffusers, save_kohya
from jlora.loras import Lora

MODULES = {
  "unet": {"conv_in": (8, 4, 3, 3), "mid_block.attentions.0.proj_in": (8, 8)},
  "text_encoder": {"text_model.encoder.layers.0.mlp.fc1": (12, 8)},
}
ORIGINAL = {
  "input_blocks.0.0": "conv_in",
  "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
}


def draw(seed):
  """Returns a pipeline's weights; those of other seeds are near."""
  base, rng = np.random.default_rng(9), np.random.default_rng(seed)

  def near(shape):
    drawn = base.standard_normal(shape) + 0.1 * rng.standard_normal(shape)
    return drawn.astype(np.float32)

  return {
    part: {name: near(shape) for name, shape in modules.items()}
    for part, modules in MODULES.items()
  }


def weights_of(modules):
  return {f"{name}.weight": x for name, x in modules.items()}


def save_pipeline(folder, seed):
  for part, modules in draw(seed).items():
    (folder / part).mkdir(parents=True)
    file = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    write_safetensors(
      folder / part / f"{file}.safetensors", weights_of(modules)
    )
    config = {"_class_name": "UNet2DConditionModel"} if part == "unet" else {}
    (folder / part / "config.json").write_text(json.dumps(config))
  index = {part: ["diffusers", "x"] for part in MODULES}
  (folder / "model_index.json").write_text(json.dumps(index))


def save_single(file, seed):
  unet = draw(seed)["unet"]
  write_safetensors(
    file,
    {f"model.diffusion_model.{old}.weight": unet[name]
     for old, name in ORIGINAL.items()},
  )  # fmt: skip


def save_gguf_model(file, seed):
  gguf = pytest.importorskip("gguf")
  rng = np.random.default_rng(seed)
  writer = gguf.GGUFWriter(file, "qwen2")
  for key, count in (("block_count", 1), ("embedding_length", 8),
                     ("feed_forward_length", 12), ("head_count", 2),
                     ("head_count_kv", 2), ("context_length", 16)):  # fmt: skip
    getattr(writer, f"add_{key}")(count)
  writer.add_layer_norm_rms_eps(1e-5)
  for name in ("attn_q", "attn_k"):
    values = rng.standard_normal((8, 8), np.float32)
    writer.add_tensor(f"blk.0.{name}.weight", values)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Both sides of each kind of model, adapters of one, and an empty folder."""
  place = tmp_path_factory.mktemp("kinds")
  for side in (0, 1):
    save_pipeline(place / f"pipeline{side}", side)
    save_single(place / f"single{side}", side)
    save_gguf_model(place / f"gguf{side}.gguf", side)
    (place / f"single{side}").rename(place / f"single{side}.safetensors")
  like = {f"unet.{name}": s for name, s in MODULES["unet"].items()}
  rng = np.random.default_rng(0)
  loras = {name: _lora(rng, shape) for name, shape in like.items()}
  for name, save, more in (("kohya", save_kohya, {"family": "sd1"}),
                           ("diffusers", save_diffusers, {})):  # fmt: skip
    save(place / f"{name}.safetensors", loras, like=like, **more)
  (place / "adapters").mkdir()
  for kind in MODELS:
    base, tuned = sides_of(place, kind)
    words = [f"--base={base}", f"--finetuned={tuned}", "--rank=2"]
    more = ["--names=diffusers"] if kind == "single" else []
    out = f"--out={place}/peft-{kind}"
    assert entry.run(extract.COMMAND, [*words, *more, out]) == 0
  return place


def _lora(rng, shape):
  sizes = (int(np.prod(shape[1:])), shape[0])
  a, b = (rng.standard_normal((2, n), np.float32) for n in sizes)
  return Lora(a, b, np.float32(1))


MODELS = {
  "pipeline": "pipeline{}",
  "component": "pipeline{}/unet",
  "single": "single{}.safetensors",
  "gguf": "gguf{}.gguf",
}
COMMANDS = {
  "extract": (extract, "--base={0} --finetuned={1} --out={out} --rank=2"),
  "plan": (plan, "--model={0}"),
  "show": (show, "{0}"),
  "verify": (verify, "{peft} --base={0} --finetuned={1}"),
  "adapter": (adapter, "show {0}"),
  "merge": (merge, "--config={recipe} --out={out}"),
  "port": (port, "{peft} --from={0} --to={1} --out={out}"),
  "serve": (serve, "--base={0} --adapters={place}/adapters"),
}
PIPELINE = "is a pipeline's folder"
ROWS = [
  # command, kind, more flags, what is printed, or what the error says
  ("extract", "pipeline", "", "written: ", ""),
  ("extract", "component", "", "written: ", ""),
  ("extract", "single", "--names=diffusers", "written: ", ""),
  ("extract", "gguf", "", "written: ", ""),
  ("plan", "pipeline", "", "| matrices | 3,", ""),
  ("plan", "pipeline", "--components=unet", "| matrices | 2,", ""),
  ("plan", "component", "", "| matrices | 2,", ""),
  ("plan", "single", "--names=diffusers", "| matrices | 2,", ""),
  ("plan", "gguf", "", "| matrices | 2,", ""),
  ("show", "pipeline", "", "  text_encoder: 1 tensors", ""),
  ("show", "component", "", "conv_in.weight  8x4x3x3", ""),
  ("show", "single", "--names=diffusers", "unet.conv_in.weight", ""),
  ("show", "gguf", "", "q_proj.weight  8x8", ""),
  ("show", "kohya", "", "", "`jlora adapter show` tells of"),
  ("show", "diffusers", "", "", "`jlora adapter show` tells of"),
  ("verify", "pipeline", "", "3 modules, worst difference", ""),
  ("verify", "component", "", "2 modules, worst difference", ""),
  ("verify", "single", "", "2 modules, worst difference", ""),
  ("verify", "gguf", "", "", "no config.json"),
  ("adapter", "kohya", "", "kohya, family sd1", ""),
  ("adapter", "diffusers", "", "diffusers, family", ""),
  ("adapter", "pipeline", "", "", PIPELINE),
  ("merge", "pipeline", "", "", PIPELINE),
  ("merge", "component", "", "written: ", ""),
  ("merge", "single", "", "written: ", ""),
  ("merge", "gguf", "", "written: ", ""),
  ("port", "pipeline", "", "", PIPELINE),
  ("port", "component", "", "2 of 2 modules carried", ""),
  ("port", "single", "", "", "are not in the file"),
  ("port", "gguf", "", "2 of 2 modules carried", ""),
  ("serve", "pipeline", "", "", PIPELINE),
  ("serve", "component", "", "", "model_type"),
  ("serve", "single", "", "", "config.json"),
]


def sides_of(place, kind):
  """Returns the paths of both sides of a kind; of an adapter one, twice."""
  form = MODELS.get(kind, f"{kind}.safetensors")
  return [str(place / form.format(side)) for side in (0, 1)]


@pytest.mark.parametrize(
  ("name", "kind", "more", "told", "refused"),
  ROWS,
  ids=[" ".join(filter(None, row[:3])) for row in ROWS],
)
def test_each_is_taken_or_refused_in_a_line(
  made, tmp_path, capsys, name, kind, more, told, refused
):
  if name == "verify":
    pytest.importorskip("peft")
  sides, out = sides_of(made, kind), tmp_path / "out"
  recipe = tmp_path / "recipe.yml"
  models = [{"model": side, "parameters": {"weight": 0.5}} for side in sides]
  recipe.write_text(json.dumps({"merge_method": "linear", "models": models}))
  module, form = COMMANDS[name]
  peft = made / f"peft-{kind}"
  words = form.format(*sides, out=out, recipe=recipe, peft=peft, place=made)
  code = entry.run(module.COMMAND, [*words.split(), *more.split()])
  said = capsys.readouterr()
  if refused:
    assert code == 1
    assert refused in said.err
    assert said.err.count("\n") == 1
    assert not list(out.glob("*.safetensors"))
  else:
    assert code == 0, said.err
    assert told in said.out
