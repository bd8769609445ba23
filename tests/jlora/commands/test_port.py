# SPDX-License-Identifier: Apache-2.0
"""`jlora port`: PEFT loads what it writes, and adds what was meant."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from jlora.checkpoints import open_checkpoint, write_safetensors
from jlora.commands import entry, port, verdicts
from jlora.extraction import extract_checkpoint, port_adapter, rotate
from jlora.factoring import krylov
from jlora.formats import (
  OtherBaseWarning,
  check_fingerprint,
  load_peft,
  read_fingerprint,
)
from jlora.loras import dense
from tests.helpers.tiny_models import write_model

Q = "model.layers.0.self_attn.q_proj.weight"


def changed(folder, to, seed, size=0.05):
  """A checkpoint whose matrices of layers moved a little."""
  shutil.copytree(folder, to)
  source = open_checkpoint(to / "model.safetensors")
  tensors = {name: np.array(source[name]) for name in source}
  random = np.random.default_rng(seed)
  for name, array in tensors.items():
    if array.ndim > 1 and "layers" in name:
      array += size * random.standard_normal(array.shape).astype(array.dtype)
  write_safetensors(to / "model.safetensors", tensors, {"format": "pt"})


@pytest.fixture
def made(tmp_path):
  """An adapter of a tiny Llama, and an update of its base."""
  write_model(tmp_path / "old", "llama")
  changed(tmp_path / "old", tmp_path / "tuned", 1)
  changed(tmp_path / "old", tmp_path / "new", 2)
  extract_checkpoint(
    tmp_path / "old", tmp_path / "tuned", tmp_path / "adapter", rank=2
  )
  return tmp_path


def run(folder, *more, adapter="adapter"):
  flags = [f"--from={folder / 'old'}", f"--to={folder / 'new'}"]
  flags += [f"--out={folder / 'out'}", f"--cache={folder / 'cache'}", *more]
  return entry.run(port.COMMAND, [str(folder / adapter), *flags])


def in_peft(base, adapter):
  """What PEFT adds to the q projection of the first layer."""
  model = transformers.AutoModelForCausalLM.from_pretrained(base)
  before = model.state_dict()[Q].clone()
  merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
  return (merged.state_dict()[Q] - before).to(torch.float32).numpy().T


# PEFT asks for a name that transformers 5 is about to drop.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_peft_loads_it_and_adds_what_was_meant(made, capsys):
  assert run(made, "--method=rotate", "--k=4") == 0
  said = capsys.readouterr().out
  assert "kept: median 1.000" in said
  assert "drift: median" in said
  old, new = (open_checkpoint(made / name) for name in ("old", "new"))
  loras = load_peft(made / "adapter", like=old.spec, config=old.config).loras
  wanted = port_adapter(loras, old, new, method=rotate, k=4, factor=krylov)
  found = in_peft(made / "new", made / "out")
  np.testing.assert_allclose(found, dense(wanted.loras[Q]), atol=1e-5)
  report = json.loads((made / "out" / "port.json").read_text())
  assert report["modules"].keys() == wanted.rows.keys()
  for name, row in wanted.rows.items():
    assert report["modules"][name] == pytest.approx(row, abs=1e-5)
  known = read_fingerprint(made / "out")
  assert known.keys() == wanted.loras.keys()
  assert check_fingerprint(known, new) == []
  config = json.loads((made / "out" / "adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == str(made / "new")


def test_add_is_the_adapter_as_it_was(made, capsys):
  assert run(made, "--json") == 0
  report = json.loads(capsys.readouterr().out)
  assert report["method"] == "add"
  assert all(row["kept"] == 1 for row in report["modules"].values())
  names = (made / "adapter", made / "out")
  one, two = (open_checkpoint(n / "adapter_model.safetensors") for n in names)
  assert one.keys() == two.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], two[name])


def test_what_cannot_be_carried_is_refused_and_nothing_is_written(made, capsys):
  def refused(*more, adapter="adapter"):
    assert run(made, *more, adapter=adapter) == 1
    assert not (made / "out").exists()
    return capsys.readouterr().err

  assert "nothing is left to write" in refused(
    "--method=project", "--k=1", "--keep=1.0"
  )
  assert "is 99" in refused("--method=project", "--k=99")
  narrow = open_checkpoint(made / "new" / "model.safetensors")
  tensors = {name: np.array(narrow[name]) for name in narrow}
  tensors[Q] = tensors[Q][:-2]
  write_safetensors(made / "new" / "model.safetensors", tensors)
  assert "1 weights have no Lora's shape" in refused()
  assert "one adapter must be given" in _without_adapter(made, capsys)


def test_layers_go_where_a_map_says(made, capsys):
  """The first layer's Loras to the second, and those of the second nowhere."""
  mapped = {"model.layers.0.": "model.layers.1.", "model.layers.1.": None}
  (made / "map.json").write_text(json.dumps(mapped))
  assert run(made, f"--map={made / 'map.json'}", "--json") == 0
  report = json.loads(capsys.readouterr().out)
  to = Q.replace("layers.0", "layers.1")
  assert report["modules"][to]["source"] == Q
  assert to in report["unmapped"]
  assert not any(".0." in name for name in report["modules"])
  (made / "map.json").write_text('{"h.0.": "h.1."}')
  assert run(made, f"--map={made / 'map.json'}", "--overwrite") == 1
  assert "1 names are mapped that the adapter does not" in (
    capsys.readouterr().err
  )


def test_another_base_is_told_by_the_commands(made):
  """Where it is ported from, and where PEFT is asked about it."""
  adapter = str(made / "adapter")
  shutil.copytree(made / "new", made / "other")
  flags = [f"--from={made / 'other'}", f"--to={made / 'new'}"]
  flags += [f"--out={made / 'out'}", f"--cache={made / 'cache'}"]
  with pytest.warns(OtherBaseWarning, match="14 of 14 weights"):
    assert entry.run(port.COMMAND, [adapter, *flags]) == 0
  with pytest.warns(OtherBaseWarning, match="14 of 14 weights"):
    verdicts.check(adapter, made / "new")
  verdicts.check(adapter, made / "old")


def _without_adapter(made, capsys):
  flags = [f"--{n}={made / n}" for n in ("from", "to", "out")]
  assert entry.run(port.COMMAND, flags) == 1
  return capsys.readouterr().err
