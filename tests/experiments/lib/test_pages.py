# SPDX-License-Identifier: Apache-2.0
"""Figures and the page come from two JSON files, and stand by themselves."""

import html.parser
import json
import re

import numpy as np
import pytest
from matplotlib.colors import LogNorm

from experiments.lib.figures import (
  grids,
  pages,
  plots,
  tables,
)
from jlora.extraction.report import write_report
from tests.helpers import comparisons
from tests.helpers.small_pairs import files_of

WEIGHTS = {
  "relative_error.png",
  "cosine_distance.png",
  "spectra.png",
  "error_by_rank.png",
}
LOGITS = {"kl_by_rank.png", "tfidf_0.png", "tfidf_1.png"}
JSON = {"report.json", "results.json"}


class Reader(html.parser.HTMLParser):
  """Collects tags, what they refer to, and text."""

  def __init__(self, text):
    super().__init__()
    self.references, self.open, self.cells = [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.references += [v for k, v in attrs if k in ("src", "href")]
    assert tag not in ("script", "link", "iframe", "object")
    if tag not in ("meta", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] == ["td"]:
      self.cells.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("comparison")
  write_report(folder, comparisons.report())
  pages.write_results(folder, comparisons.results())
  pages.draw_all(folder)
  return folder


def test_redrawing_makes_every_file_again(folder):
  before = files_of(folder)
  assert before.keys() == WEIGHTS | LOGITS | JSON | {"report.html"}
  for name in before.keys() - JSON:
    (folder / name).unlink()
  _, _, written = pages.draw_all(folder)
  assert {path.name for path in written} == before.keys() - JSON
  assert files_of(folder) == before


def test_figures_are_pictures_with_something_on_them(folder):
  for name in WEIGHTS | LOGITS:
    data = (folder / name).read_bytes()
    assert data.startswith(b"\x89PNG\r\n"), name
    assert len(data) > 5000, name


def test_the_page_refers_to_nothing_outside_itself(folder):
  text = (folder / "report.html").read_text(encoding="utf-8")
  page = Reader(text)
  assert not page.open
  assert len(page.references) == len(WEIGHTS | LOGITS)
  for reference in page.references:
    assert reference.startswith("data:image/png;base64,")
  assert not re.search(r"https?://|url\(|@import|file:", text)


def test_the_page_says_what_was_found(folder):
  page = (folder / "report.html").read_text(encoding="utf-8")
  cells = Reader(page).cells
  assert {"down_proj", "q_proj", "embed_tokens"} <= set(cells)
  assert "0.020 ± 0.003" not in cells  # two figures of the error
  assert "0.0200 ± 0.0025" in cells
  assert "org/<ft>" in cells
  assert "org/&lt;ft&gt;" in page
  assert "model.norm.weight" in cells
  assert "a <norm>" in cells
  assert "At rank 4 the adapter" in page
  assert "92.0% recovered" in page


def test_an_extraction_alone_is_drawn_as_well(tmp_path):
  write_report(tmp_path, comparisons.report())
  report, results, _ = pages.draw_all(tmp_path)
  assert results == {}
  assert report.settings["rank"] == comparisons.TOP
  assert files_of(tmp_path).keys() == WEIGHTS | {"report.json", "report.html"}


def test_the_chosen_rank_is_the_readers(folder, tmp_path):
  write_report(tmp_path, comparisons.report())
  pages.write_results(tmp_path, comparisons.results())
  report, _, _ = pages.draw_all(tmp_path, 2)
  assert {row["rank"] for row in report.modules} == {2}
  assert "At rank 2 the adapter" in (tmp_path / "report.html").read_text()
  with pytest.raises(ValueError, match="the extraction went to rank 8"):
    pages.draw_all(tmp_path, 16)


def test_results_of_another_version_or_none_are_told(tmp_path):
  with pytest.raises(ValueError, match=r"holds no report\.json"):
    pages.draw_all(tmp_path)
  path = tmp_path / "results.json"
  path.write_text(json.dumps({"schema_version": 99}))
  with pytest.raises(ValueError, match="schema version 99"):
    pages.read_results(tmp_path)
  path.write_text("{")
  with pytest.raises(ValueError, match="damaged"):
    pages.read_results(tmp_path)


def map_of(grid):
  figure = grids.draw_grid(grid, "title", "unit")
  axes, bar = figure.axes
  (image,) = axes.get_images()
  return axes, image, bar


def test_the_heat_map_shows_the_grid_and_its_holes():
  grid = grids.fill_grid(tables.cut(comparisons.report(), 4), "relative_error")
  axes, image, bar = map_of(grid)
  shown = image.get_array()
  np.testing.assert_array_equal(shown.mask, np.isnan(grid.values))
  np.testing.assert_array_equal(
    shown.compressed(), grid.values[~np.isnan(grid.values)]
  )
  assert [t.get_text() for t in axes.get_yticklabels()] == grid.kinds
  names = [t.get_text() for t in axes.get_xticklabels()]
  assert names == ["–", "0", "2", "10"]
  assert bar.get_ylabel() == "unit"
  written = {t.get_position(): t.get_text() for t in axes.texts}
  assert written[2, 1] == "="
  assert written[0, 0] == f"{grid.values[0, 0]:.2f}".removeprefix("0")
  assert len(written) == (~np.isnan(grid.values)).sum() + 1


def test_values_far_apart_get_a_logarithmic_scale():
  grid = grids.fill_grid(comparisons.report(), "relative_error")
  wide = grid._replace(values=np.where(grid.values > 0.3, 1e-6, 0.5))
  _, image, _ = map_of(wide)
  assert isinstance(image.norm, LogNorm)
  _, image, _ = map_of(grid)
  assert (image.norm.vmin, image.norm.vmax) == (0, np.nanmax(grid.values))


def test_many_layers_do_not_crowd():
  values = np.full((2, 96), 0.5)
  marks = np.full(values.shape, "", object)
  grid = grids.Grid(["q", "k"], list(range(96)), values, marks)
  axes, _, _ = map_of(grid)
  assert not axes.texts
  assert len(axes.get_xticks()) <= 48


def test_curves_are_the_numbers_of_the_report():
  report = comparisons.report()
  kinds = tables.by_kind(report.modules)
  axes = plots.draw_errors(kinds, 4, lambda k: k * 2**20).axes[0]
  lines = {line.get_label(): line for line in axes.lines}
  assert lines.keys() == kinds.keys() | {"all modules", "chosen rank 4"}
  at = dict(zip(*lines["q_proj"].get_data(), strict=True))
  for rank in (1, 4, 8):
    expected = tables.measure(kinds["q_proj"], rank)["relative_error"]
    assert at[rank] == expected
  assert lines["chosen rank 4"].get_xdata()[0] == 4
  above = axes.child_axes[0]
  assert [t.get_text() for t in above.get_xticklabels()] == list("1248")


def test_spectra_mark_the_rank_and_the_floor():
  report = comparisons.report()
  kinds = tables.by_kind(report.modules)
  near = min(report.modules[0]["singular_values"]) / 2
  kinds["q_proj"] = [row | {"noise_floor": near} for row in kinds["q_proj"]]
  panels = plots.draw_spectra(kinds, 4).axes
  drawn = {axes.get_title(loc="left") or axes.get_title(): axes
           for axes in panels}  # fmt: skip
  assert drawn.keys() == kinds.keys()
  for kind, axes in drawn.items():
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [4, 4] in [list(line.get_xdata()) for line in axes.lines]
    floors = [line for line in axes.lines if line.get_linestyle() == "--"]
    words = axes.get_legend().get_title().get_text()
    if kind == "q_proj":
      assert {line.get_ydata()[0] for line in floors} == {near}
      assert "noise floor" not in words
    else:
      assert not floors
      assert "noise floor 1e-06" in words
