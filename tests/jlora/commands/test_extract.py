# SPDX-License-Identifier: Apache-2.0
"""The command: what it writes, what its card says, how it fails."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from jlora.commands import entry, extract
from jlora.extraction.card import CARD
from tests.helpers.small_pairs import draw, files_of, write_pair

ROOT = pathlib.Path(__file__).parents[3]
NAMES = [f"model.layers.{at}.self_attn.q_proj.weight" for at in range(2)]
BASE = {name: draw(12, 8, seed=at) for at, name in enumerate(NAMES)}
TUNED = {name: draw(12, 8, seed=9 + at) for at, name in enumerate(NAMES)}
LARGE = {"model.layers.0.self_attn.q_proj.weight": draw(200, 200)}


@pytest.fixture
def pair(tmp_path):
  return write_pair(tmp_path / "secret", BASE, TUNED)


@pytest.fixture
def run(pair, capsys, monkeypatch):
  """The command on a pair: its exit code, and what it said."""
  monkeypatch.setattr(extract, "keep_compilations", lambda cache: None)

  def start(*words):
    both = [f"--base={pair[0]}", f"--finetuned={pair[1]}", "--rank=2"]
    code = entry.run(extract.COMMAND, [*both, *map(str, words)])
    return code, capsys.readouterr()

  return start


def start(words, folder, before=()):
  """A command line in a process of its own; `jlora` is this clone's."""
  program = [sys.executable, "-m", "jlora.commands"]
  environment = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)}
  return subprocess.run(
    [*before, *program, *words[1:]],
    cwd=folder,
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )


def blocks(card):
  return re.findall(r"^```\w+\n(.*?)\n```$", card, re.M | re.S)


def test_the_cards_command_makes_the_adapter_again(run, pair, tmp_path):
  first, place = tmp_path / "deep" / "adapter", pair[0].parent
  code, said = run(f"--out={first}", "--exclude=.*[.]1[.].*", "--json")
  assert code == 0, said.err
  assert json.loads(said.out)["totals"]["modules"] == 1
  (command,) = [b for b in blocks((first / CARD).read_text()) if "jlora e" in b]
  words = shlex.split(command)
  assert words[:2] == ["jlora", "extract"]
  assert {"--base=base", "--finetuned=finetuned", "--out=adapter"} < set(words)
  assert "--json" not in words
  done = start(words, place)
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith("written: adapter\n")
  assert "Unable to initialize" not in done.stderr
  again, before = files_of(place / "adapter"), files_of(first)
  for name in ("adapter_model.safetensors", "adapter_config.json", CARD):
    assert again[name] == before[name], name


@pytest.mark.parametrize(
  ("profile", "loads"),
  [
    ("peft", 'PeftModel.from_pretrained(base, "adapter")'),
    (
      "vllm",
      "vllm serve base --enable-lora --max-lora-rank 8 --lora-modules "
      "adapter=adapter",
    ),
  ],
)
def test_what_is_published_has_no_private_path(run, tmp_path, profile, loads):
  out = tmp_path / "secret" / "adapter"
  code, said = run(f"--out={out}", f"--profile={profile}")
  assert code == 0, said.err
  card = (out / CARD).read_text()
  assert loads in card
  for name in (CARD, "adapter_config.json"):
    text = (out / name).read_text()
    assert str(tmp_path) not in text
    assert "secret" not in text
  config = json.loads((out / "adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == "base"
  assert 'base_model: "base"' in card.splitlines()


def test_the_base_has_the_name_that_it_is_given(run, tmp_path):
  out = tmp_path / "x"
  assert run(f"--out={out}", "--base_model=org/name")[0] == 0
  card = (out / CARD).read_text()
  assert 'base_model: "org/name"' in card.splitlines()
  assert 'AutoModelForCausalLM.from_pretrained("org/name")' in card
  assert "--base=base" in card


def test_a_hub_id_is_found_in_the_cache_and_stays_in_the_card(
  run, pair, tmp_path, monkeypatch
):
  snapshots = tmp_path / "hub" / "models--org--small" / "snapshots"
  snapshots.mkdir(parents=True)
  (snapshots / "abc").symlink_to(pair[0])
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
  out = tmp_path / "x"
  code, said = run("--base=org/small", f"--out={out}")
  assert code == 0, said.err
  card = (out / CARD).read_text()
  assert 'base_model: "org/small"' in card.splitlines()
  assert "--base=org/small" in card
  code, said = run("--base=org/other", f"--out={tmp_path / 'y'}")
  assert code == 1
  assert said.err == (
    "error: org/other does not exist: no local file or folder; if it is a Hub "
    "id: `hf download org/other --local-dir DIR`\n"
  )


def test_what_has_no_partner_stops_the_run_or_leads_its_figures(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(extract, "keep_compilations", lambda cache: None)
  more = BASE | {"vision.proj.weight": draw(12, 8)}
  base, tuned = write_pair(tmp_path, more, TUNED)
  words = [f"--base={base}", f"--finetuned={tuned}", "--rank=2"]
  words.append(f"--out={tmp_path / 'out'}")
  assert entry.run(extract.COMMAND, words) == 1
  said = capsys.readouterr().err
  assert "33% of the floating bytes of " in said
  assert "--allow_unmatched" in said
  assert entry.run(extract.COMMAND, [*words, "--allow_unmatched"]) == 0
  first = capsys.readouterr().out.splitlines()[0]
  assert first.startswith("not compared: 33.3% of the base's floating bytes")
  card = (tmp_path / "out" / CARD).read_text()
  assert "--allow_unmatched" in card
  assert card.index("**Not compared: 33.3%") < card.index("it misses")


def test_a_folder_that_is_not_empty_is_told_in_flags(run, tmp_path):
  out = tmp_path / "x"
  assert run(f"--out={out}")[0] == 0
  code, said = run(f"--out={out}")
  assert code == 1
  assert said.err.endswith(
    "Use --resume to continue, --overwrite to replace, or another --out.\n"
  )
  assert run(f"--out={out}", "--resume")[0] == 0
  assert run(f"--out={out}", "--overwrite")[0] == 0
  (tmp_path / "y").mkdir()
  (tmp_path / "y" / "notes").touch()
  said = run(f"--out={tmp_path / 'y'}", "--resume")[1]
  assert "(notes) and has no run to resume. Use --overwrite to" in said.err


def test_what_cannot_be_verified_is_said_before_the_work(run, tmp_path):
  out = tmp_path / "out"
  code, said = run(f"--out={out}", "--verify")
  assert code == 1
  assert "has no config.json, from which transformers" in said.err
  assert not out.exists()


def test_a_file_where_a_folder_should_be_is_one_line(run, tmp_path):
  (tmp_path / "file").touch()
  code, said = run(f"--out={tmp_path / 'file' / 'x'}")
  assert code == 1
  (line,) = said.err.splitlines()
  assert line.startswith(f"error: {tmp_path / 'file' / 'x'}")
  assert line.endswith(": Not a directory")


def test_a_disk_that_is_full_is_one_line_with_the_file(tmp_path):
  """A limit on a file's size stops writing as a full disk does."""
  base, tuned = write_pair(
    tmp_path, LARGE, {name: -array for name, array in LARGE.items()}
  )
  words = [f"--base={base}", f"--finetuned={tuned}", "--out=x", "--rank=64"]
  limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash"]
  done = start(["jlora", "extract", *words], tmp_path, limited)
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  line = done.stderr.splitlines()[-1]
  assert re.fullmatch(r"error: x/\S+\.safetensors\S*: File too large", line)


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (["--policy=budget"], "--policy=budget needs --budget_mib."),
    (["--policy=energy", "--budget_mib=1"], "--budget_mib does not go with"),
    (["more"], "only flags are taken, got more"),
    (["--process_id=1"], "need --coordinator=HOST:PORT"),
  ],
)
def test_flags_that_do_not_go_together(run, tmp_path, flags, says):
  code, said = run(f"--out={tmp_path / 'x'}", *flags)
  assert code == 1
  (line,) = said.err.splitlines()
  assert says in line
