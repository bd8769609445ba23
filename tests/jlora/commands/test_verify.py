# SPDX-License-Identifier: Apache-2.0
"""A check against PEFT finds what is wrong, and nothing else."""

import importlib.util
import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.safetensors import write_safetensors
from jlora.commands import entry, extract, show, verdicts, verify
from jlora.commands.verdicts import check
from jlora.extraction.card import CARD
from jlora.extraction.report import read_report
from jlora.extraction.run import extract_checkpoint
from jlora.pairing.match import common_rows
from tests.helpers.tiny_models import write_model

HEAD = "lm_head.weight"
ATTENTION = "model.layers.{}.self_attn.{}"


def tune(folder, tuned, *, chosen=lambda name, array: array.ndim > 1, rank=2):
  """A finetune of a checkpoint: changes of some rank in what is chosen."""
  shutil.copytree(folder, tuned)
  file = tuned / "model.safetensors"
  source = open_checkpoint(file)
  tensors = {name: np.array(source[name]) for name in source}
  random = np.random.default_rng(1)
  for name, array in tensors.items():
    if not chosen(name, array):
      continue
    if array.ndim < 2:
      array += random.standard_normal(array.shape).astype(np.float32) * 0.1
      continue
    lead, (rows, columns) = array.shape[:-2], array.shape[-2:]
    left = random.standard_normal((*lead, rows, rank))
    array += (left @ random.standard_normal((rank, columns)) * 0.05).astype(
      "f4"
    )
  write_safetensors(file, tensors, {"format": "pt"})
  return tuned


def make(tmp_path, case="llama", *, rank=4, renamed=(), chosen=None, **options):
  """(adapter, base, finetune) of a family of tiny models."""
  base, tuned = tmp_path / "base", tmp_path / "tuned"
  write_model(base, case)
  if renamed:
    source = open_checkpoint(base / "model.safetensors")
    tensors = {name.replace(*renamed): np.array(source[name])
               for name in source}  # fmt: skip
    write_safetensors(base / "model.safetensors", tensors, {"format": "pt"})
  tune(base, tuned, **({"chosen": chosen} if chosen else {}))
  out = tmp_path / "adapter"
  extract_checkpoint(base, tuned, out, rank=rank, log=io.StringIO(), **options)
  return out, base, tuned


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  return make(tmp_path_factory.mktemp("llama"), rank=1)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  """Norms are kept whole too."""
  every = lambda name, array: True  # noqa: E731
  return make(tmp_path_factory.mktemp("kept"), chosen=every)


@pytest.fixture
def edited(tmp_path):
  """A copy of an adapter, changed by a function of its parts."""

  def edit(adapter, work):
    copy = tmp_path / "edited"
    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    report = json.loads((copy / "report.json").read_text())
    source = open_checkpoint(copy / "adapter_model.safetensors")
    tensors = {name: np.array(source[name]) for name in source}
    work(config, tensors, report)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    (copy / "report.json").write_text(json.dumps(report))
    write_safetensors(copy / "adapter_model.safetensors", tensors)
    return copy

  return edit


RIGHT = {
  "llama": {"case": "llama"},
  "a tied head": {"case": "llama-tied"},
  "biases": {
    "case": "llama-biases",
    "chosen": lambda name, array: "proj" in name,
  },
  "in 16 bits": {"dtype": jnp.dtype("bfloat16"), "rank": 1},
  "Conv1D": {"case": "gpt2"},
  "experts that are fused": {"case": "mixtral"},
  "some experts alone": {
    "case": "mixtral",
    "select": lambda path, leaf: ".experts.1." in path,
  },
  "matrices that were not selected": {
    "select": lambda path, leaf: "q_proj" in path
  },
}


@pytest.mark.parametrize("options", RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_found_right(tmp_path, options):
  adapter, base, tuned = make(tmp_path, **options)
  verdict = check(adapter, base, tuned)
  assert verdict.offenders == {}
  assert verdict.by == "PEFT"
  assert verdict.modules == len(read_report(adapter).modules)
  assert verdict.worst < 1e-5
  assert check(adapter, base) == verdict._replace(worst=None)


def test_a_longer_vocabulary_is_made_room_for(tmp_path):
  base = tmp_path / "base"
  write_model(base, "llama")
  model = transformers.AutoModelForCausalLM.from_pretrained(base)
  with torch.no_grad():
    model.model.layers[0].mlp.up_proj.weight[0] += 1
  model.resize_token_embeddings(70, mean_resizing=False)
  model.save_pretrained(tmp_path / "tuned")
  for at, more in enumerate(({}, {"vocabulary": common_rows})):
    pair = base, tmp_path / "tuned"
    out = tmp_path / f"{at}"
    extract_checkpoint(*pair, out, rank=2, log=io.StringIO(), **more)
    assert check(out, *pair).offenders == {}


def test_kept_tensors_are_compared_number_by_number(kept, edited):
  assert check(*kept).offenders == {}
  norm = "base_model.model.model.norm.weight"

  def other(config, tensors, report):
    tensors[norm][0] += 1

  found = check(edited(kept[0], other), *kept[1:])
  assert [*found.offenders] == ["model.norm"]
  assert "kept whole, and off by" in found.offenders["model.norm"]


def doubled(config, tensors, report):
  config["lora_alpha"] *= 2


def swapped(config, tensors, report):
  for letter in "AB":
    first, second = (
      f"base_model.model.{ATTENTION.format(at, 'q_proj')}.lora_{letter}.weight"
      for at in (0, 1)
    )
    tensors[first], tensors[second] = tensors[second], tensors[first]


def removed(config, tensors, report):
  del tensors[f"base_model.model.{ATTENTION.format(1, 'k_proj')}.lora_B.weight"]


def untargeted(config, tensors, report):
  config["target_modules"].remove("v_proj")


def named_as_on_disk(config, tensors, report):
  """As where a checkpoint lacks the prefix that its model has."""
  for name in list(tensors):
    tensors[name.replace("model.layers.0.", "layers.0.")] = tensors.pop(name)


def misshapen(config, tensors, report):
  name = f"base_model.model.{ATTENTION.format(0, 'o_proj')}.lora_A.weight"
  tensors[name] = tensors[name][:, 1:]


def lost(config, tensors, report):
  """As where nobody noticed that it changed."""
  config["target_modules"].remove("q_proj")
  for name in [name for name in tensors if "q_proj" in name]:
    del tensors[name]
  report["modules"] = [
    row for row in report["modules"] if "q_proj" not in row["path"]
  ]
  for row in report["ledger"]:
    if "q_proj" in row["base"][0]:
      row["status"] = "unchanged"


def both(leaf):
  return {ATTENTION.format(at, leaf) for at in (0, 1)}


LAYER_0 = {
  *(ATTENTION.format(0, f"{letter}_proj") for letter in "qkvo"),
  *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
}
WRONG = [
  (doubled, None, "relative error 1 in PEFT"),
  (swapped, both("q_proj"), "relative error"),
  (removed, {ATTENTION.format(1, "k_proj")}, "the file has no tensors for it"),
  (untargeted, both("v_proj"), "PEFT loads its tensors nowhere"),
  (
    named_as_on_disk,
    LAYER_0 | {name.removeprefix("model.") for name in LAYER_0},
    "PEFT",
  ),
  (misshapen, {ATTENTION.format(0, "o_proj")}, "PEFT refuses its shape"),
  (lost, both("q_proj"), "changed, not carried, and not in the ledger"),
]


@pytest.mark.parametrize(("work", "names", "says"), WRONG)
def test_what_is_wrong_is_named(llama, edited, work, names, says):
  adapter, base, tuned = llama
  copy = edited(adapter, work)
  found = check(copy, base, tuned).offenders
  if names is None:
    names = {row["path"].removesuffix(".weight")
             for row in read_report(adapter).modules}  # fmt: skip
  assert {*found} == names
  assert all(says in why for why in found.values())
  if work is not lost:  # only the finetune tells
    assert {*check(copy, base).offenders} == names


def test_a_head_without_its_tables_change_is_wrong(tmp_path, edited):
  adapter, base, tuned = make(tmp_path / "x", "llama-tied")

  def headless(config, tensors, report):
    del config["ensure_weight_tying"]
    config["target_modules"].remove("lm_head")
    for letter in "AB":
      del tensors[f"base_model.model.lm_head.lora_{letter}.weight"]

  copy = edited(adapter, headless)
  for finetuned in (tuned, None):
    (name,) = check(copy, base, finetuned).offenders
    assert name == "lm_head.weight (tied to model.embed_tokens.weight)"


def test_experts_in_each_others_place_are_wrong(tmp_path, edited):
  adapter, base, tuned = make(tmp_path / "x", "mixtral")

  def exchanged(config, tensors, report):
    for name in [name for name in tensors if ".w1." in name]:
      other = name.replace(".w1.", ".w3.")
      tensors[name], tensors[other] = tensors[other], tensors[name]

  found = check(edited(adapter, exchanged), base, tuned).offenders
  stacks = "model.layers.{}.mlp.experts.gate_up_proj (of 8 modules)"
  assert [*found] == [stacks.format(0), stacks.format(1)]


def test_without_a_report_what_is_not_carried_is_wrong(llama, tmp_path):
  adapter, base, tuned = llama
  bare = tmp_path / "bare"
  shutil.copytree(adapter, bare)
  (bare / "report.json").unlink()
  verdict = check(bare, base, tuned)
  assert verdict.offenders == {}
  worst = max(row["relative_error"] for row in read_report(adapter).modules)
  assert verdict.worst == pytest.approx(worst, rel=1e-4)
  other = tune(
    base, tmp_path / "other", chosen=lambda name, array: array.ndim == 1
  )
  found = check(bare, base, other).offenders
  assert found["model.norm"] == "changed, and not in the adapter"


def test_a_base_without_an_architecture_is_built_for_its_task(llama, tmp_path):
  adapter, base, tuned = llama
  nameless = tmp_path / "base"
  shutil.copytree(base, nameless)
  config = json.loads((base / "config.json").read_text())
  del config["architectures"]
  (nameless / "config.json").write_text(json.dumps(config))
  assert check(adapter, nameless, tuned) == check(adapter, base, tuned)
  config["model_type"] = "nobody's"
  (nameless / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="transformers does not build"):
    check(adapter, nameless, tuned)


@pytest.fixture
def run(capsys, monkeypatch):
  """A command in this process: its exit code, and what it said."""
  monkeypatch.setattr(extract, "keep_compilations", lambda cache: None)

  def start(command, *words):
    code = entry.run(command.COMMAND, [*map(str, words)])
    return code, capsys.readouterr()

  return start


def test_the_command_prints_a_line_or_names_three(llama, edited, run):
  adapter, base, tuned = llama
  pair = f"--base={base}", f"--finetuned={tuned}"
  code, said = run(verify, adapter, *pair)
  assert (code, said.err) == (0, "")
  assert said.out.startswith("verified: PEFT ")
  assert " loads 16 modules, worst difference " in said.out
  code, said = run(verify, adapter, pair[0])
  assert said.out.endswith(" modules, not compared with a finetune\n")
  code, said = run(verify, edited(adapter, doubled), *pair)
  assert (code, said.out) == (1, "")
  (line,) = said.err.splitlines()
  assert "16 offenders: " in line
  assert line.count("relative error 1 in PEFT") == 3
  assert line.endswith(" and 13 more.")


def test_an_extraction_says_that_it_was_verified(llama, tmp_path, run):
  _, base, tuned = llama
  out = tmp_path / "x"
  words = [f"--base={base}", f"--finetuned={tuned}", f"--out={out}", "--rank=1"]
  code, said = run(extract, *words)
  assert code == 0, said.err
  assert "\nnot verified\n" in said.out
  assert "\nnot verified\n" in (out / CARD).read_text()
  assert read_report(out).verified is None
  code, said = run(extract, *words, "--resume", "--verify")
  assert code == 0, said.err
  found = read_report(out).verified
  assert [*found] == ["by", "version", "modules", "worst_difference"]
  assert (found["by"], found["modules"]) == ("PEFT", 16)
  for text in (
    said.out,
    (out / CARD).read_text(),
    run(show, out)[1].out,
    run(extract, *words, "--resume")[1].out,
  ):
    assert "\nverified: PEFT " in text
  assert "--verify" not in (out / CARD).read_text()


def test_an_extraction_that_peft_reads_otherwise_fails(
  llama, tmp_path, run, monkeypatch
):
  _, base, tuned = llama
  out = tmp_path / "x"
  whole = verdicts.check

  def spoilt(adapter, *pair):
    file = adapter / "adapter_config.json"
    file.write_text(
      json.dumps(json.loads(file.read_text()) | {"lora_alpha": 3})
    )
    return whole(adapter, *pair)

  monkeypatch.setattr(verdicts, "check", lambda a, *b: spoilt(out, *b))
  words = [f"--base={base}", f"--finetuned={tuned}", f"--out={out}", "--rank=1"]
  code, said = run(extract, *words, "--verify")
  assert code == 1
  assert "16 offenders" in said.err
  assert "\nnot verified\n" in said.out
  assert read_report(out).verified is None


def test_what_cannot_be_checked_is_told(llama, tmp_path, run, monkeypatch):
  adapter, base, tuned = llama
  code, said = run(verify, adapter, f"--base={base / 'model.safetensors'}")
  assert code == 1
  assert "has no config.json" in said.err
  code, said = run(verify, f"--base={base}")
  assert "one adapter must be given: jlora verify" in said.err
  there = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name, *more: None if name == "peft" else there(name, *more),
  )
  out = tmp_path / "x"
  pair = f"--base={base}", f"--finetuned={tuned}"
  for words in (
    (verify, adapter, *pair),
    (extract, *pair, f"--out={out}", "--verify"),
  ):
    code, said = run(*words)
    assert code == 1
    assert said.err.startswith("error: not verified: peft is not installed")
  assert not out.exists()
