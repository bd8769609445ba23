# SPDX-License-Identifier: Apache-2.0
"""A report at a lower rank is an extraction's there; grids are in order."""

import io

import numpy as np
import pytest

import jlora
from experiments.lib.figures import grids, tables
from tests.helpers import comparisons
from tests.helpers.small_pairs import draw, write_pair


def test_a_cut_is_the_extraction_at_that_rank(tmp_path):
  base = {f"m.{i}.q_proj.weight": draw(24, 20, seed=i) for i in range(3)}
  base["m.0.k_proj.weight"] = draw(3, 20)  # has fewer ranks than are asked for
  tuned = {k: w + draw(*w.shape, seed=9) / 8 for k, w in base.items()}
  pair = write_pair(tmp_path, base, tuned)
  reports = {
    rank: jlora.extract_checkpoint(
      *pair, tmp_path / f"{rank}", rank=rank, factor=jlora.factoring.svd,
      log=io.StringIO(),
    )
    for rank in (4, 10)
  }  # fmt: skip
  cut = tables.cut(reports[10], 4)
  for found, expected in zip(cut.modules, reports[4].modules, strict=True):
    for name in ("path", "rank", "bytes"):
      assert found[name] == expected[name]
    for name in (
      "relative_error", "energy", "mse", "cosine_distance", "error",
    ):  # fmt: skip
      assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
  assert cut.settings["rank"] == 4
  assert cut.totals["adapter_bytes"] == reports[4].totals["adapter_bytes"]
  assert cut.totals["relative_error"] == pytest.approx(
    reports[4].totals["relative_error"], rel=1e-5
  )


def test_cosine_distance_is_that_of_the_concatenated_vectors():
  rows = comparisons.report().modules[:2]
  full = [np.arange(1, 13) ** -(0.2 + 0.02 * layer) for layer in (0, 10)]
  whole = np.concatenate(full)
  kept = np.concatenate([np.where(np.arange(12) < 3, x, 0) for x in full])
  cosine = whole @ kept / np.linalg.norm(whole) / np.linalg.norm(kept)
  found = tables.measure(rows, 3)
  assert found["cosine_distance"] == pytest.approx(1 - cosine, rel=1e-9)
  error = np.linalg.norm(whole - kept) / np.linalg.norm(whole)
  assert found["relative_error"] == pytest.approx(error, rel=1e-9)
  assert tables.measure(rows, 0) == {
    "relative_error": 1.0,
    "cosine_distance": 1.0,
  }


def test_grid_has_layers_by_number_and_kinds_by_their_use():
  report = tables.cut(comparisons.report(), 4)
  grid = grids.fill_grid(report, "relative_error")
  assert grid.kinds == ["embed_tokens", "q_proj", "down_proj"]
  assert grid.layers == [None, 0, 2, 10]
  rows = {row["path"]: row["relative_error"] for row in report.modules}
  for j, layer in ((1, 0), (2, 2), (3, 10)):
    down = rows[comparisons.name_of(layer, "mlp.down_proj")]
    assert grid.values[2, j] == down
  assert grid.values[0, 0] == rows["model.embed_tokens.weight"]
  assert np.isnan(grid.values[1, 2])
  assert grid.marks[1, 2] == grids.MARKS["unchanged"]
  missing = np.isnan(grid.values)
  assert missing.sum() == 3 + 1 + 2
  assert not grid.marks[~missing].any()
  assert not grid.marks[0, 1:].any()  # no such module, not one that was left


def test_a_layer_without_any_module_is_a_column():
  report = comparisons.report()
  norm = comparisons.entry("model.layers.1.norm.weight", "kept whole")
  grid = grids.fill_grid(
    report._replace(ledger=[*report.ledger, norm]), "relative_error"
  )
  assert grid.layers == [None, 0, 1, 2, 10]
  assert np.isnan(grid.values[:, 2]).all()


def test_experts_of_a_layer_share_a_cell():
  names = [f"h.0.experts.{e}.w1.weight" for e in range(2)]
  rows = [
    comparisons.module(name, np.arange(1, 13) ** -(power))
    for name, power in zip(names, (0.3, 1.2), strict=True)
  ]
  report = comparisons.report()._replace(
    modules=rows, ledger=list(map(comparisons.entry, names))
  )
  grid = grids.fill_grid(report, "cosine_distance")
  assert grid.values.shape == (1, 1)
  together = tables.measure(rows, comparisons.TOP)["cosine_distance"]
  assert grid.values[0, 0] == pytest.approx(together)


def test_kinds_of_one_name_are_told_apart():
  names = ("encoder.block.0.q.weight", "decoder.block.0.q.weight")
  kinds = tables.by_kind([{"path": name} for name in names])
  assert list(kinds) == ["encoder.block.q.weight", "decoder.block.q.weight"]


@pytest.mark.parametrize("rank", [0, 9])
def test_ranks_that_were_not_extracted_are_refused(rank):
  with pytest.raises(ValueError, match=f"rank {rank} was asked for"):
    tables.cut(comparisons.report(), rank)
