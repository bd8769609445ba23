# SPDX-License-Identifier: Apache-2.0
"""Ports that would keep, drop or mix up in silence what nobody asked for."""

import io
import json

import numpy as np
import pytest

from jlora.checkpoints import write_safetensors
from jlora.extraction import port_adapter, project
from jlora.extraction.port_run import port_checkpoint
from jlora.formats import load_peft, save_peft
from jlora.loras import Lora
from tests.helpers.small_pairs import draw

Q = [f"model.layers.{at}.self_attn.q_proj.weight" for at in range(2)]
BIASES = [path.replace("weight", "bias") for path in Q]
EMBED = "model.embed_tokens.weight"
CONFIG = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def write(folder, seed, tokens):
  folder.mkdir()
  shapes = {EMBED: (4, 6), **dict.fromkeys(Q, (6, 6))}
  shapes |= dict.fromkeys(BIASES, (6,))
  tensors = {
    name: draw(*shape, seed=seed + at)
    for at, (name, shape) in enumerate(shapes.items())
  }
  # The second layer reads and writes along one direction alone.
  tensors[Q[1]] = np.diag(np.float32([9, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]))
  write_safetensors(folder / "model.safetensors", tensors)
  (folder / "config.json").write_text(json.dumps(CONFIG))
  vocabulary = {token: number for number, token in enumerate(tokens)}
  text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []})
  (folder / "tokenizer.json").write_text(text)
  return tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("made")
  old = write(folder / "old", 0, "abcd")
  write(folder / "new", 20, "wxyz")
  # Its change lies across that direction.
  along, across = np.eye(6, dtype=np.float32)[:1], np.ones((1, 6), np.float32)
  across[:, 0] = 0
  loras = {Q[0]: Lora(along, along, np.float32(1)),
           Q[1]: Lora(across, across, np.float32(1))}  # fmt: skip
  biases = {path: np.ones(6, np.float32) for path in BIASES}
  save_peft(folder / "adapter", loras, like=old, biases=biases)
  table = Lora(draw(1, 4, seed=1), draw(1, 6, seed=2), np.float32(1))
  save_peft(folder / "table", {EMBED: table}, like=old)
  return folder


def port(made, out, adapter="adapter", **options):
  return port_checkpoint(
    made / adapter, made / "old", made / "new", out, log=io.StringIO(),
    **options,
  )  # fmt: skip


@pytest.mark.parametrize("keep", [float("nan"), -0.1, 1.5])
def test_a_share_that_is_none_is_refused(keep, made, tmp_path):
  with pytest.raises(ValueError, match="a share is in"):
    port(made, tmp_path / "out", keep=keep)
  lora = Lora(np.ones((1, 2)), np.ones((1, 2)), np.float32(1))
  with pytest.raises(ValueError, match="a share is in"):
    port_adapter({"w": lora}, {"w": np.eye(2)}, {"w": np.eye(2)}, keep=keep)


def test_a_map_that_leaves_out_all_is_told_so(made, tmp_path):
  with pytest.raises(ValueError, match="The map leaves out all 2 modules"):
    port(made, tmp_path / "out", paths={"model.layers.": None})


def test_vocabularies_without_a_common_token_are_refused(made, tmp_path):
  with pytest.raises(ValueError, match="have no token in common"):
    port(made, tmp_path / "out", "table")


def test_a_bias_is_left_out_with_its_matrix(made, tmp_path):
  out = tmp_path / "out"
  report = port(made, out, method=project, k=1, keep=1e-3)
  assert report["left_out"] == [Q[1], BIASES[1]]
  found = load_peft(out, like={path: np.empty((6, 6)) for path in Q}
                    | {path: np.empty(6) for path in BIASES})  # fmt: skip
  assert (list(found.loras), list(found.biases)) == ([Q[0]], [BIASES[0]])
