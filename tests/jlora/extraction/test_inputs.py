# SPDX-License-Identifier: Apache-2.0
"""What an extraction does with the inputs of image models: ranks, variants."""

import io
import json
import warnings

import ml_dtypes
import numpy as np
import pytest

from jlora.checkpoints import write_safetensors
from jlora.commands import entry, extract
from jlora.extraction import extract_checkpoint
from jlora.formats import open_adapter
from tests.helpers.single_files import as_original, tensors_of
from tests.helpers.small_pairs import draw

KERNELS = {
  "conv_in.weight": (6, 4, 3, 3),
  "down_blocks.0.attentions.0.proj_in.weight": (8, 6, 1, 1),
  "time_embedding.linear_1.weight": (6, 8),
}


def write_sides(tmp_path, dtype=np.float32, variant=""):
  """Two folders as diffusers has a UNet's."""
  for seed, side in enumerate(("base", "tuned")):
    folder = tmp_path / side
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"layers_per_block": 1}')
    tensors = {
      name: draw(*shape, seed=9 * seed + at).astype(dtype)
      for at, (name, shape) in enumerate(KERNELS.items())
    }
    name = f"diffusion_pytorch_model{variant}.safetensors"
    write_safetensors(folder / name, tensors)
  return tmp_path / "base", tmp_path / "tuned"


def run(sides, out, **more):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    return extract_checkpoint(*sides, out, rank=3, log=io.StringIO(), **more)


def test_kernels_over_1x1_have_a_rank_of_their_own(tmp_path):
  report = run(write_sides(tmp_path), tmp_path / "out", conv_rank=2)
  ranks = [row["rank"] for row in report.modules]
  assert dict(zip(sorted(KERNELS), ranks, strict=True)) == {
    "conv_in.weight": 2,
    "down_blocks.0.attentions.0.proj_in.weight": 3,
    "time_embedding.linear_1.weight": 3,
  }
  assert report.settings["conv_rank"] == 2
  with pytest.raises(ValueError, match="conv_rank must be at least 1, got 0"):
    run((tmp_path / "base", tmp_path / "tuned"), tmp_path / "x", conv_rank=0)


def test_a_variant_is_taken_on_both_sides(tmp_path):
  write_sides(tmp_path)
  sides = write_sides(tmp_path, np.float16, ".fp16")
  report = run(sides, tmp_path / "out", variant="fp16")
  assert report.settings["variant"] == "fp16"
  assert {row["parameter_bytes"] for row in report.modules} == {432, 96}
  with pytest.raises(ValueError, match="holds 0 checkpoints of the variant"):
    run(sides, tmp_path / "x", variant="bf16")


def test_float8_that_was_cast_is_compared_by_its_values(tmp_path):
  sides = write_sides(tmp_path, ml_dtypes.float8_e4m3fn)
  report = run(sides, tmp_path / "out", float8="cast")
  deltas = {}
  for at, (name, shape) in enumerate(KERNELS.items()):
    two, one = (
      draw(*shape, seed=seed + at).astype(ml_dtypes.float8_e4m3fn)
      for seed in (9, 0)
    )
    deltas[name] = np.linalg.norm(two.astype("f8") - one.astype("f8"))
  for row in report.modules:
    np.testing.assert_allclose(row["norm"], deltas[row["path"]], rtol=1e-6)
  with pytest.raises(UserWarning, match="no float8 tensor has a scale"):
    run(sides, tmp_path / "x")


@pytest.fixture
def singles(tmp_path, monkeypatch):
  """The command on a pair of single files."""
  monkeypatch.setattr(extract, "keep_compilations", lambda cache: None)
  words = []
  for seed, side in enumerate(("base", "finetuned")):
    tensors = {
      name: array
      for name, array in tensors_of("sd1", seed).items()
      if name.startswith(("unet.mid", "unet.down_blocks.0.a", "text_encoder"))
    }
    path = tmp_path / f"{side}.safetensors"
    write_safetensors(path, as_original(tensors, "sd1"))
    words.append(f"--{side}={path}")

  def start(out, *more):
    both = [*words, "--rank=2", f"--out={out}", *more]
    return entry.run(extract.COMMAND, both)

  return start


def test_single_files_become_a_kohya_file(singles, tmp_path, capsys):
  out = tmp_path / "out"
  assert singles(out, "--format=kohya") == 1
  words = "has the original's names, and the format kohya is made from those"
  assert words in capsys.readouterr().err
  more = ["--format=kohya", "--conv_rank=1", "--names=diffusers"]
  assert singles(out, *more, "--components=unet") == 0, capsys.readouterr().err
  adapter = open_adapter(out / "formats" / "kohya.safetensors")
  assert adapter.ranks["unet.mid_block.resnets.1.conv1"] == 1
  assert adapter.ranks["unet.mid_block.attentions.0.proj_in"] == 2
  assert not [name for name in adapter if name.startswith("text_encoder")]
  report = json.loads((out / "report.json").read_text())
  errors = {row["path"]: row["relative_error"] for row in report["modules"]}
  base, tuned = (tensors_of("sd1", seed) for seed in (0, 1))
  for name in ("mid_block.resnets.1.conv1", "mid_block.attentions.0.proj_in"):
    key = f"unet.{name}.weight"
    delta = (tuned[key] - base[key]).reshape(len(base[key]), -1)
    lora = adapter[f"unet.{name}"]
    left = delta - lora.scale * (lora.b.T.astype("f8") @ lora.a.astype("f8"))
    error = np.linalg.norm(left) / np.linalg.norm(delta)
    np.testing.assert_allclose(error, errors[key], rtol=1e-3)
