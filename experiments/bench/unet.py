# SPDX-License-Identifier: Apache-2.0
"""How much of a UNet's change is kept, beside extractors that clamp?

  python -m experiments.bench.unet [--rank=32] [--width=96] [--folder=DIR]

Writes two UNets of Stable Diffusion 1.5's plan at a width of 96 in place of
320, 77.5 million weights, that differ by changes of a power law; extracts
one from the other, and does what the extractors of kohya-ss and ComfyUI do: the
whole singular value decomposition of every matrix and kernel in float32, both
factors clamped at a quantile of their entries, 0.99 as they have it by default.
Errors are of all modules together; seconds of this run, files included, and all
clampings in one.

Takes half a minute on two cores. Expect the best error of the rank from `jlora
extract`, 1.2 times that where entries are clamped.
"""

import json
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import app, flags

import jlora
from jlora.checkpoints import open_checkpoint, write_safetensors

Shapes = dict[str, tuple[int, ...]]
FILE = "diffusion_pytorch_model.safetensors"
#: The share of entries that is not clamped; 1 is none.
QUANTILES = (1.0, 0.999, 0.99)


def list_shapes(width: int, context: int = 256) -> Shapes:
  """Lists the matrices and kernels of Stable Diffusion 1.5's UNet.

  Args:
    width: channels of the outermost block; 320 there.
    context: numbers of a token of the text; 768 there.

  Returns:
    diffusers' name -> shape.

  Example:
    >>> len(list_shapes(96)), list_shapes(96)["conv_out.weight"]
    (282, (4, 96, 3, 3))
  """
  widths, wide = [width, 2 * width, 4 * width, 4 * width], 4 * width
  found: Shapes = {
    "conv_in": (width, 4, 3, 3),
    "time_embedding.linear_1": (wide, width),
    "time_embedding.linear_2": (wide, wide),
    "conv_out": (4, width, 3, 3),
  }
  size = width
  for at, out in enumerate(widths):
    block = f"down_blocks.{at}"
    for turn in range(2):
      found |= _resnet(f"{block}.resnets.{turn}", size, out, wide)
      size = out
      if at < 3:
        found |= _attention(f"{block}.attentions.{turn}", out, context)
    if at < 3:
      found[f"{block}.downsamplers.0.conv"] = (out, out, 3, 3)
  for turn in range(2):
    found |= _resnet(f"mid_block.resnets.{turn}", wide, wide, wide)
  found |= _attention("mid_block.attentions.0", wide, context)
  turned = widths[::-1]
  for at, out in enumerate(turned):
    block, below = f"up_blocks.{at}", turned[min(at + 1, 3)]
    for turn in range(3):
      beside = below if turn == 2 else out
      found |= _resnet(f"{block}.resnets.{turn}", size + beside, out, wide)
      size = out
      if at:
        found |= _attention(f"{block}.attentions.{turn}", out, context)
    if at < 3:
      found[f"{block}.upsamplers.0.conv"] = (out, out, 3, 3)
  return {f"{name}.weight": shape for name, shape in found.items()}


def _resnet(name: str, size: int, out: int, wide: int) -> Shapes:
  """Lists those of a residual block."""
  found: Shapes = {
    f"{name}.conv1": (out, size, 3, 3),
    f"{name}.time_emb_proj": (out, wide),
    f"{name}.conv2": (out, out, 3, 3),
  }
  return found | (
    {f"{name}.conv_shortcut": (out, size, 1, 1)} if size != out else {}
  )


def _attention(name: str, size: int, context: int) -> Shapes:
  """Lists those of a transformer block and of the convolutions around it."""
  block = f"{name}.transformer_blocks.0"
  found: Shapes = {
    f"{name}.proj_in": (size, size, 1, 1),
    f"{name}.proj_out": (size, size, 1, 1),
    f"{block}.ff.net.0.proj": (8 * size, size),
    f"{block}.ff.net.2": (size, 4 * size),
  }
  for part, read in (("attn1", size), ("attn2", context)):
    found[f"{block}.{part}.to_q"] = found[f"{block}.{part}.to_out.0"] = (
      size,
      size,
    )
    found[f"{block}.{part}.to_k"] = found[f"{block}.{part}.to_v"] = (size, read)
  return found


def write_pair(folder: pathlib.Path, shapes: Mapping[str, tuple]) -> list[str]:
  """Writes a UNet and one that differs from it by changes of a power law.

  Args:
    folder: gets the folders `base` and `finetuned`.
    shapes: of `list_shapes`.

  Returns:
    Both folders' paths.
  """
  rng, sides = np.random.default_rng(0), ({}, {})
  for name, shape in shapes.items():
    size, fan = shape[0], int(np.prod(shape[1:]))
    k = min(size, fan)
    base = rng.standard_normal((size, fan), np.float32) / np.float32(fan**0.5)
    u = rng.standard_normal((size, k), np.float32) / np.float32(size**0.5)
    v = rng.standard_normal((k, fan), np.float32) / np.float32(fan**0.5)
    s = np.arange(1, k + 1, dtype=np.float32) ** np.float32(-0.9)
    sides[0][name] = base.reshape(shape)
    sides[1][name] = (base + (np.float32(0.05) * u * s) @ v).reshape(shape)
  places = []
  for name, tensors in zip(("base", "finetuned"), sides, strict=True):
    place = folder / name
    place.mkdir(parents=True)
    write_safetensors(place / FILE, tensors)
    config = {"_class_name": "UNet2DConditionModel"}
    (place / "config.json").write_text(json.dumps(config))
    places.append(str(place))
  return places


def clamped_errors(
  base: str, finetuned: str, rank: int, quantiles: Sequence[float]
) -> tuple[dict[float, float], float]:
  """Factors every change whole, and clamps the factors.

  Args:
    base: a folder of `write_pair`.
    finetuned: the other.
    rank: of every module.
    quantiles: above which entries are clamped.

  Returns:
    quantile -> relative error of all modules together, and seconds.

  References:
    kohya-ss/sd-scripts, `networks/extract_lora_from_models.py`.
  """
  began, lost, norm = time.monotonic(), dict.fromkeys(quantiles, 0.0), 0.0
  for change in _changes(base, finetuned):
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    up, down = u[:, :rank] * s[:rank], vt[:rank]
    entries = np.concatenate([up.ravel(), down.ravel()])
    norm += float(np.linalg.norm(change) ** 2)
    for share in quantiles:
      most = np.quantile(entries, share) if share < 1 else np.inf
      kept = np.clip(up, -most, most) @ np.clip(down, -most, most)
      lost[share] += float(np.linalg.norm(change - kept) ** 2)
  seconds = time.monotonic() - began
  return {share: (x / norm) ** 0.5 for share, x in lost.items()}, seconds


def _changes(base: str, finetuned: str) -> Iterator[np.ndarray]:
  """Yields the changes as matrices (out, all else)."""
  before, after = (open_checkpoint(x) for x in (base, finetuned))
  for name in before:
    change = np.asarray(after[name]) - np.asarray(before[name])
    yield change.reshape(len(change), -1)


def measure(folder: pathlib.Path, width: int, rank: int) -> list[str]:
  """Measures both, and returns a Markdown table.

  Args:
    folder: of the pair and the adapter, empty.
    width: of the UNet.
    rank: of every module.

  Returns:
    Its lines.
  """
  shapes = list_shapes(width)
  base, finetuned = write_pair(folder, shapes)
  began = time.monotonic()
  report = jlora.extract_checkpoint(
    base, finetuned, folder / "adapter", rank=rank
  )
  seconds = time.monotonic() - began
  errors, taken = clamped_errors(base, finetuned, rank, QUANTILES)
  count = sum(int(np.prod(shape)) for shape in shapes.values()) / 1e6
  best = errors[1.0]
  rows = {
    "the whole decomposition, cut": (best, taken),
    "`jlora extract`": (report.totals["relative_error"], seconds),
  } | {
    f"the whole decomposition, clamped at {share}": (errors[share], taken)
    for share in QUANTILES[1:]
  }
  return [
    f"| {len(shapes)} modules, {count:.1f} million, rank {rank} | error "
    "| x the best | seconds |",
    "|---|---|---|---|",
    *(
      f"| {name} | {error:.4f} | {error / best:.3f} | {spent:.1f} |"
      for name, (error, spent) in rows.items()
    ),
  ]


def main(_: list[str]) -> None:
  """Prints the table."""
  values = flags.FLAGS
  with tempfile.TemporaryDirectory(dir=values.folder) as work:
    lines = measure(pathlib.Path(work), values.width, values.rank)
  print("\n".join(lines))


if __name__ == "__main__":
  flags.DEFINE_integer("rank", 32, "Of every module.", lower_bound=1)
  flags.DEFINE_integer("width", 96, "Channels of the outermost block.")
  flags.DEFINE_string("folder", None, "For 0.7 GB; a temporary one without it.")
  app.run(main)
