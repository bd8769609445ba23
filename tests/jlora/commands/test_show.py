# SPDX-License-Identifier: Apache-2.0
"""Everything that can be shown, and that no tensor is read for it."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints import byte_ranges
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.orbax import save_orbax
from jlora.checkpoints.safetensors import write_safetensors
from jlora.commands import entry, show
from jlora.formats.packed import pack, save_packed
from jlora.formats.peft.layouts import PEFT, VLLM
from jlora.formats.peft.writing import save_peft
from jlora.loras import Lora
from tests.helpers.small_pairs import draw, write_pair

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
BASE = {Q: draw(6, 4), NORM: draw(4, seed=1).astype(ml_dtypes.bfloat16)}
TUNED = BASE | {Q: draw(6, 4, seed=2)}


@pytest.fixture
def pair(tmp_path):
  return write_pair(tmp_path, BASE, TUNED, {"model_type": "llama"})


@pytest.fixture
def shown(capsys, monkeypatch):
  """What `jlora show` prints, as text or parsed; reading a tensor fails."""

  def refuse(*args, **kwargs):
    raise AssertionError("a tensor was read")

  def start(*words, json_too=False):
    with monkeypatch.context() as patch:
      patch.setattr(Checkpoint, "read", refuse)
      patch.setattr(byte_ranges, "read_region", refuse)
      words = [*map(str, words), *(["--json"] if json_too else [])]
      assert entry.run(show.COMMAND, words) == 0
    out = capsys.readouterr().out
    return json.loads(out) if json_too else out

  return start


def lora(rank=2):
  return Lora(draw(rank, 4), draw(rank, 6), np.float32(1))


def test_a_folder_and_its_file(pair, shown):
  said = shown(pair[0])
  assert "huggingface checkpoint, llama" in said
  assert "2 tensors, 28 parameters" in said
  assert "bfloat16: 1 tensors, 4 parameters" in said
  assert f"  {Q}  6x4  float32" in said
  found = shown(pair[0] / "model.safetensors", json_too=True)
  assert (found["format"], found["model_type"]) == ("safetensors", None)
  assert found["bytes"] == 6 * 4 * 4 + 4 * 2
  assert found["dtypes"]["float32"]["tensors"] == 1
  assert found["largest"][0] == {
    "name": Q, "shape": [6, 4], "dtype": "float32", "bytes": 96
  }  # fmt: skip


def test_an_orbax_directory(tmp_path, shown):
  save_orbax(tmp_path / "x", {"a": {"w": jnp.ones((2, 3))}})
  found = shown(tmp_path / "x", json_too=True)
  assert (found["kind"], found["format"]) == ("checkpoint", "orbax")
  assert (found["parameters"], found["bytes"]) == (6, 24)


def test_a_hub_id_of_the_cache(pair, tmp_path, monkeypatch, shown):
  snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
  snapshot.parent.mkdir(parents=True)
  pair[0].rename(snapshot)
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
  assert "2 tensors, 28 parameters" in shown("org/name")


@pytest.mark.parametrize(
  ("profile", "more", "says"),
  [
    (VLLM, {}, "loads in PEFT and in vLLM"),
    (PEFT, {"full": {NORM: BASE[NORM]}}, "not in vLLM (vLLM refuses modules_"),
  ],
)
def test_an_adapter(tmp_path, shown, profile, more, says):
  save_peft(
    tmp_path, {Q: lora()}, like=BASE, base_model="org/x", profile=profile,
    **more,
  )  # fmt: skip
  said = shown(tmp_path)
  for line in ("base: org/x", "rank: 2", "targets: q_proj"):
    assert line in said.splitlines()
  assert says in said
  assert ("kept whole: model.norm" in said) == bool(more)


def test_an_adapter_of_many_ranks_and_one_that_is_too_large(tmp_path, shown):
  other = Q.replace("q_proj", "k_proj")
  like = {Q: np.ones((600, 600)), other: BASE[Q]}
  big = Lora(draw(513, 600), draw(513, 600), np.float32(1))
  save_peft(tmp_path, {Q: big, other: lora()}, like=like)
  said = shown(tmp_path)
  assert "rank: 2 to 513" in said
  assert "rank 513 is over vLLM's 512" in said
  assert "base: not said" in said


def test_a_run_with_its_report(pair, tmp_path, shown):
  out = tmp_path / "out"
  report = jlora.extract_checkpoint(*pair, out, rank=1)
  said = shown(out)
  for part in ("type_table", "rounding_line", "ledger_lines"):
    assert getattr(jlora.extraction, part)(report) in said
  assert "; written for PEFT" in said
  found = shown(out, json_too=True)
  assert found["report"]["totals"] == report.totals
  alone = shown(out / "report.json")
  assert jlora.extraction.ledger_lines(report) in alone
  (out / "adapter_config.json").unlink()
  assert "report of an extraction" in shown(out)


def test_packed_loras(tmp_path, shown):
  file = tmp_path / "x.safetensors"
  save_packed(file, {Q: pack(lora(), 3), NORM: pack(lora(1), 4)})
  said = shown(file)
  assert "packed Loras, 2 modules" in said
  assert f"  {NORM}  4x6  rank 1  4.0 bits an entry" in said
  found = shown(file, json_too=True)
  assert [(one["rank"], one["shape"]) for one in found["modules"]] == [
    (2, [4, 6]), (1, [4, 6])
  ]  # fmt: skip


def test_a_merged_model(pair, tmp_path, shown):
  slices = (jlora.merging.Slice(tuple(map(_input, pair))),)
  recipe = jlora.merging.Recipe(jlora.merging.linear, slices)
  jlora.merge_checkpoints(recipe, tmp_path / "out")
  said = shown(tmp_path / "out")
  assert "huggingface checkpoint, llama" in said
  assert f"merged by linear from {pair[0]}, {pair[1]}" in said
  assert "report of a merge" in shown(tmp_path / "out" / "merge.json")


def _input(path):
  return jlora.merging.Input(str(path))


def test_several_paths_are_shown_in_turn(pair, shown):
  assert shown(*pair).count("huggingface checkpoint") == 2
  assert [one["path"] for one in shown(*pair, json_too=True)] == [
    str(path) for path in pair
  ]


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("nowhere", "does not exist"),
    ("empty", "holds neither safetensors files nor"),
    ("other.json", "is no report.json or merge.json"),
    ("broken", "is no JSON"),
  ],
)
def test_what_cannot_be_shown(tmp_path, capsys, name, says):
  (tmp_path / "empty").mkdir()
  (tmp_path / "other.json").write_text("{}")
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken" / "adapter_config.json").write_text("{")
  assert entry.run(show.COMMAND, [str(tmp_path / name)]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert says in line


def test_a_packed_file_that_lacks_codes_is_damaged(tmp_path, capsys):
  file = tmp_path / "x.safetensors"
  write_safetensors(
    file,
    {"w.bits": np.ones(1, np.uint8)},
    {"jlora_packed_shapes": '{"w":[1,1]}'},
  )
  assert entry.run(show.COMMAND, [str(file)]) == 1
  assert "w lacks codes; the file is damaged" in capsys.readouterr().err
