# SPDX-License-Identifier: Apache-2.0
"""The command: a comparison from folder to page, and its refusals."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments.lib.data import texts
from experiments.lib.models import finetunes
from jlora import models

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = finetunes.TINY | {"num_hidden_layers": 1}


def compare(*flags):
  command = [sys.executable, "-m", "experiments.compare", *map(str, flags)]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pair")
  for number, name in enumerate(("base", "finetuned")):
    _, params = models.init(CONFIG, jax.random.key(number))
    models.save(folder / name, params, CONFIG)
  return folder / "base", folder / "finetuned"


def test_a_comparison_is_one_command(pair, tmp_path):
  base, tuned = pair
  out = tmp_path / "out"
  done = compare(
    f"--base={base}", f"--finetuned={tuned}", f"--out={out}", "--rank=16",
    "--chosen=8", "--ranks=4", "--texts=pydoc", "--sequences=2",
    "--length=16", "--generate=2", "--steps=4", f"--cache={tmp_path}",
    f"--study_json={tmp_path / 'study.json'}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  study = json.loads((tmp_path / "study.json").read_text())
  report = json.loads((out / "report.json").read_text())
  assert study.keys() == {row["path"] for row in report["modules"]}
  for row in report["modules"]:  # of the shown rank, not of the highest
    found = study[row["path"]]
    assert found.keys() == {"loss", "mean_diff_value", "diff_rank"}
    size = math.prod(row["shape"])
    shown = (row["norm"] * row["relative_errors"][8]) ** 2 / size
    assert found["loss"]["mse"] == pytest.approx(shown, rel=1e-4)
    assert 0 <= found["loss"]["cosine_distance"] < 1
  results = json.loads((out / "results.json").read_text())
  rows = results["kl"][texts.pydoc_source()]["ranks"]
  assert [row["rank"] for row in rows] == [0, 4, 8]
  assert rows[0]["tokens"] == 2 * 16
  assert min(row["kl"] for row in rows) > 0
  cold, warm = results["generation"]["temperatures"]
  assert cold["rows"][0]["cosine"] == 1.0
  assert (cold["temperature"], warm["temperature"]) == (0, 1)
  names = {path.name for path in out.iterdir()}
  assert {
    "adapter_model.safetensors", "adapter_config.json", "README.md",
    "report.json", "results.json", "report.html", "kl_by_rank.png",
    "relative_error.png", "tfidf_0.png", "tfidf_1.png",
  } <= names  # fmt: skip
  for said in ("worst modules", "down_proj", texts.pydoc_source(),
               "nats per token", "finetuned / extracted", "ledger: ",
               "At rank 8"):  # fmt: skip
    assert said in done.stdout


@pytest.mark.long
def test_the_studys_file_does_not_replace_our_own(tmp_path):
  done = compare(
    f"--redraw={tmp_path}", f"--study_json={tmp_path}/results.json"
  )
  assert done.returncode == 1
  assert "is this comparison's own file; name another" in done.stderr


def test_a_rank_that_is_not_extracted_is_refused_at_once(pair, tmp_path):
  base, tuned = pair
  done = compare(
    f"--base={base}", f"--finetuned={tuned}", f"--out={tmp_path / 'out'}",
    "--rank=16", "--ranks=8,32", f"--cache={tmp_path}",
  )  # fmt: skip
  assert done.returncode == 1
  assert "rank 32 was asked for, ranks are 1 to --rank=16" in done.stderr
  assert not (tmp_path / "out").exists()
