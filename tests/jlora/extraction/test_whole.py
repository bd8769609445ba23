# SPDX-License-Identifier: Apache-2.0
"""Tensors that are stored whole because the caller says so."""

import io
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.extraction import REPORT, Report, extract_checkpoint, whole_of
from jlora.formats import VLLM
from jlora.formats.peft.layouts import REPLACES

CONFIG = {
  "model_type": "mamba",
  "architectures": ["MambaForCausalLM"],
}
LAYER = "backbone.layers.0.mixer"


@pytest.fixture
def rng():
  """A generator of the same numbers every time."""
  return np.random.default_rng(0)


@pytest.fixture
def pair(tmp_path, rng):
  """A layer of Mamba, whose A_log lies beside its matrices; all changed."""
  shapes = {
    "A_log": (8, 4),
    "D": (8,),
    "in_proj.weight": (16, 6),
    "out_proj.weight": (6, 8),
  }
  for name in ("base", "finetuned"):
    (tmp_path / name).mkdir()
    tensors = {
      f"{LAYER}.{key}": rng.normal(size=shape).astype(np.float32)
      for key, shape in shapes.items()
    }
    other = rng.normal(size=(16, 6)).astype(np.float32)
    tensors["backbone.layers.1.mixer.in_proj.weight"] = other
    save_file(tensors, tmp_path / name / "model.safetensors")
    (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
  return tmp_path / "base", tmp_path / "finetuned"


def run(pair, out, **options):
  """Extracts a pair."""
  log = io.StringIO()
  return extract_checkpoint(*pair, out, rank=2, log=log, **options)


def test_the_report_says_what_carries_a_parameter_beside_matrices(
  pair, tmp_path
):
  report = run(pair, tmp_path / "out")
  lost = {
    name
    for row in report.ledger
    if row["status"] == "not representable"
    for name in row["base"]
  }
  assert lost == {f"{LAYER}.A_log", f"{LAYER}.D"}
  assert whole_of(report) == r"backbone\.layers\.0\.mixer\..*"


def test_all_of_the_module_is_then_the_finetune(pair, tmp_path):
  first = run(pair, tmp_path / "first")
  out = tmp_path / "out"
  report = run(pair, out, whole=whole_of(first))
  assert report.settings["whole"] == whole_of(first)
  assert whole_of(report) is None
  written = load_file(out / "adapter_model.safetensors")
  want = load_file(pair[1] / "model.safetensors")
  inside = {name for name in want if name.startswith(LAYER)}
  assert len(inside) == 4
  for name in inside:
    np.testing.assert_array_equal(
      written[f"base_model.model.{name}"], want[name]
    )
  config = json.loads((out / "adapter_config.json").read_text())
  assert config["modules_to_save"] == [LAYER]


def test_something_is_left_to_be_factored(pair, tmp_path):
  with pytest.raises(ValueError, match="No matrix of .* is selected"):
    run(pair, tmp_path / "out", whole=".*")


@pytest.mark.parametrize("changed", [True, False])
def test_whole_tensors_are_stored_as_the_finetune_has_them(
  tmp_path, rng, changed
):
  drawn = {
    f"h.{at}.{name}.weight": rng.normal(size=(6, 5)).astype(np.float32)
    for at in range(2)
    for name in ("q", "k")
  }
  new = {
    name: w + (1 if changed or ".k." in name else 0)
    for name, w in drawn.items()
  }
  files = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
  for file, tensors in zip(files, (drawn, new), strict=True):
    save_file(tensors, file)
  report = run(files, tmp_path / "out", whole=r"h\.0\.q\.weight")
  written = load_file(tmp_path / "out" / "adapter_model.safetensors")
  key = "base_model.model.h.0.q.weight"
  np.testing.assert_array_equal(written[key], new["h.0.q.weight"])
  assert not [name for name in written if "h.0.q.lora" in name]
  config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
  assert config["modules_to_save"] == ["h.0.q"]
  status = {row["base"][0]: row["status"] for row in report.ledger}
  want = "kept whole" if changed else "unchanged"
  assert status["h.0.q.weight"] == want
  assert status["h.1.k.weight"] == "extracted"


def test_a_regex_that_fits_nothing_is_an_error(pair, tmp_path):
  with pytest.raises(ValueError, match="whole='x' fits no tensor: there are"):
    run(pair, tmp_path / "out", whole="x")
  with pytest.raises(ValueError, match=r"'\(' is no regex: missing \)"):
    run(pair, tmp_path / "out", whole="(")
  assert not (tmp_path / "out" / REPORT).exists()


def test_a_consumer_that_takes_no_whole_tensors_has_them_in_the_ledger(
  tmp_path, rng
):
  files = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
  for file in files:
    drawn = {f"h.{n}.weight": rng.normal(size=(6, 5)) for n in "qk"}
    save_file({k: v.astype(np.float32) for k, v in drawn.items()}, file)
  report = run(files, tmp_path / "out", whole=r"h\.q\.weight", profile=VLLM)
  status = {row["base"][0]: row["status"] for row in report.ledger}
  assert status["h.q.weight"] == "not representable"


def rows(names, lost):
  """A ledger in which some names are lost for want of their module."""
  why = {True: ("not representable", f"{REPLACES}; give also x"),
         False: ("extracted", "")}  # fmt: skip
  return [
    {
      "base": [name],
      "status": why[name in lost][0],
      "why": why[name in lost][1],
    }
    for name in names
  ]


def test_numbers_are_generalised_only_where_all_of_them_are_meant():
  names = [f"h.{at}.{leaf}" for at in range(3) for leaf in ("u", "q.weight")]
  names.append("head.weight")
  some = Report({}, [], {}, rows(names, {"h.0.u", "h.2.u"}))
  assert whole_of(some) == r"(?:h\.0|h\.2)\..*"
  every = Report({}, [], {}, rows(names, {"h.0.u", "h.1.u", "h.2.u"}))
  assert whole_of(every) == r"h\.\d+\..*"
  assert whole_of(Report({}, [], {}, rows(names, {}))) is None
  root = Report({}, [], {}, rows(["u", "q.weight"], {"u"}))
  assert whole_of(root) is None


def test_a_module_with_all_loras_in_it_is_not_named():
  names = ["t.u", "t.h.0.u", "t.h.0.q.weight", "t.h.0.k.v.weight", "t.z.weight"]
  both = Report({}, [], {}, rows(names, {"t.u", "t.h.0.u"}))
  assert whole_of(both) == r"t\.h\.\d+\..*"
  inner = Report(
    {}, [], {}, rows([*names, "t.h.0.k.u"], {"t.h.0.u", "t.h.0.k.u"})
  )
  assert whole_of(inner) == r"t\.h\.\d+\..*"


def test_what_a_module_counts_by_goes_with_it(tmp_path, rng):
  """PEFT looks for every tensor of a module that it replaces."""
  drawn = {
    "h.q.weight": rng.normal(size=(6, 5)).astype(np.float32),
    "h.bn.weight": np.ones(5, np.float32),
    "h.bn.running_mean": np.zeros(5, np.float32),
    "h.bn.num_batches_tracked": np.array(3),
  }
  new = {
    name: np.asarray(w + np.ones((), w.dtype)) for name, w in drawn.items()
  }
  files = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
  for file, tensors in zip(files, (drawn, new), strict=True):
    save_file(tensors, file)
  run(files, tmp_path / "out")
  written = load_file(tmp_path / "out" / "adapter_model.safetensors")
  for name in list(new)[1:]:
    np.testing.assert_array_equal(
      written[f"base_model.model.{name}"], new[name]
    )
