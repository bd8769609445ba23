# SPDX-License-Identifier: Apache-2.0
"""The benchmark meets its goal for errors and computes its ratios rightly."""

import json
import pathlib
import sys

import numpy as np
import pytest

from experiments.bench import arrays, extract, processes
from experiments.lib.data import pairs
from experiments.lib.machines.processes import Usage, measure
from jlora import factoring
from jlora.checkpoints.checkpoint import open_checkpoint

_SIZES = extract.QUICK


@pytest.fixture
def real_pair(tmp_path):
  config = {**_SIZES.config, "num_hidden_layers": 2}
  return tuple(map(str, pairs.write_pair(tmp_path / "real", config)))


def test_errors_reach_the_goal_on_every_kind_of_matrix(real_pair, tmp_path):
  rows = list(
    extract.measure_parts(["errors"], _SIZES, tmp_path, real=real_pair)
  )
  assert len(rows) == 2 * (3 + 7)  # seven types, embeddings did not change
  assert {row.goal for row in rows} == {"<= 1.001"}
  for row in rows:
    assert 0.9999 <= row.value <= 1.001, row


def test_an_error_above_the_optimum_is_seen(monkeypatch):
  def poor(delta, rank):
    u, s, vt = factoring.svd(delta, rank)
    return u, s * 0.9, vt

  monkeypatch.setattr(factoring, "gram", poor)
  monkeypatch.setattr(arrays, "_cached_pair", lambda: None)
  rows = arrays.measure_errors((20, 30), 4, None)
  assert next(row for row in rows if "poor" in row.what).value > 1.001


def test_factoring_is_timed_against_its_products():
  full, early, compiled = arrays.measure_factoring((192, 256), 2, 1)
  assert full.value > 0
  assert full.goal == early.goal == "<= 1.6"
  assert "11 products of width 18" in full.note
  assert "6 products of width 18" in early.note
  assert "11 products" in compiled.note


def test_products_are_counted():
  """2 passes - 1 of them where nothing is asked."""
  delta = np.random.default_rng(0).standard_normal((384, 512), np.float32)
  for passes in (1, 2, 4):
    count = arrays.count_products(
      delta,
      lambda x, n=passes: factoring.krylov(x, 4, passes=n, tol=0.0),
    )
    assert count == 2 * passes - 1


def _layers(command):
  """Of the model that a command extracts, ours or mergekit's."""
  base = next(
    part.removeprefix("--base=") for part in command if part.endswith("/base")
  )
  return json.loads((pathlib.Path(base) / "config.json").read_text())[
    "num_hidden_layers"
  ]


def _pretend(command, environment=None):
  """Ours: 2 s and 1 s a layer; mergekit: 10 s and 40 s a layer."""
  if "mergekit" in command[0]:
    count = _layers(command)
    return Usage(10.0 + 40.0 * count, 20.0 + 80.0 * count, 2**30)
  if "jlora.commands.extract" in command:
    if "in_proj" in str(command) or command[3].endswith("safetensors"):
      return Usage(4.0, 4.0, 2**30)
    count = _layers(command)
    return Usage(2.0 + count, 4.0 + 2 * count, 2**30 + count * 2**26)
  return Usage(8.0, 8.0, 2**28)


@pytest.fixture
def pretended(monkeypatch):
  monkeypatch.setattr(processes, "measure", _pretend)


def _values(parts, sizes, work, mergekit):
  rows = extract.measure_parts(parts, sizes, work, mergekit=mergekit)
  return {row.what: row.value for row in rows}


def test_mergekit_is_scaled_by_its_further_layer(pretended, tmp_path):
  sizes = _SIZES._replace(layers=8)
  values = _values(["process"], sizes, tmp_path, "mergekit-extract-lora")
  assert values["mergekit, whole, 8 layers"] == pytest.approx(330)
  assert values["ours, per further layer"] == pytest.approx(1)
  assert values["speed-up, per further layer"] == pytest.approx(40)
  assert values["speed-up, whole, 8 layers"] == pytest.approx(33)
  assert not list(tmp_path.iterdir())


def test_without_mergekit_its_rows_say_so(pretended, tmp_path):
  rows = extract.measure_parts(["process", "small"], _SIZES, tmp_path)
  missing = [row for row in rows if row.value is None]
  assert [row.note for row in missing] == ["not run"] * 3
  assert extract.as_line(missing[0]).endswith("| - | >= 15 | not run |")


def test_memory_compares_the_peaks(pretended, tmp_path):
  values = _values(["memory"], _SIZES, tmp_path, None)
  assert values["peak resident, 2 layers"] == pytest.approx(1.125)
  assert values["largest over smallest peak"] == pytest.approx(1.125 / 1.0625)


def test_small_matrices_have_peers(pretended, tmp_path):
  values = _values(["small"], _SIZES, tmp_path, "mergekit-extract-lora")
  numpy = [v for k, v in values.items() if k.startswith("NumPy")]
  assert numpy == [2.0]
  assert sum(k.startswith("mergekit") for k in values) == 1


def test_an_extraction_runs_in_a_process_of_its_own(tmp_path):
  sizes = _SIZES._replace(memory=(1,))
  (row, spread) = extract.measure_parts(["memory"], sizes, tmp_path)
  assert 0.05 < row.value < 1.5
  assert spread.value == 1.0


def test_a_failing_command_is_named():
  with pytest.raises(RuntimeError, match="ended with 3: .*gone wrong"):
    measure(
      [
        sys.executable,
        "-c",
        "import sys; print('gone wrong', file=sys.stderr); sys.exit(3)",
      ]
    )


def test_the_finetune_changes_projections_only(real_pair):
  base, tuned = map(open_checkpoint, real_pair)
  changed = {n for n in base if not np.array_equal(base[n], tuned[n])}
  assert changed == {n for n in base if n.endswith("_proj.weight")}
  assert (
    base.spec.keys()
    == pairs.shapes({**_SIZES.config, "num_hidden_layers": 2}).keys()
  )
