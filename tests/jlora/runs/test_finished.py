# SPDX-License-Identifier: Apache-2.0
"""A finished run is known again by what made it and what it wrote, or not."""

import json

import pytest

from jlora.checkpoints.new_files import noted, replace_text
from jlora.runs.finished import check_run, describe_run

MARKS = {"rank": 8, "shape": (1, 2)}
TOLD = {"modules": [1.5, None]}


@pytest.fixture
def made(tmp_path):
  """The report's file and what it has, of a run that wrote two files."""
  with noted() as files:
    for name in "xy":
      replace_text(tmp_path / name, name)
  found = describe_run(tmp_path, MARKS, files, TOLD)
  assert found["files"].keys() == {"x", "y"}
  return tmp_path / "report.json", json.loads(json.dumps(found))


def test_the_same_run_is_known_again(made):
  check_run(*made, MARKS, TOLD)


@pytest.mark.parametrize("described", [
  None, [], "x", {}, {"fingerprint": {}}, {"fingerprint": {}, "files": {}},
  {"fingerprint": [], "files": {}, "told": ""},
])  # fmt: skip
def test_a_report_that_says_nothing_of_it_is_refused(made, described):
  with pytest.raises(ValueError, match="does not say what made it. Use over"):
    check_run(made[0], described, MARKS, TOLD)


def test_what_differs_is_named(made):
  with pytest.raises(ValueError, match="rank was 8, is 9"):
    check_run(*made, MARKS | {"rank": 9}, TOLD)
  with pytest.raises(ValueError, match="report.json is not as it was written"):
    check_run(*made, MARKS, TOLD | {"modules": [1.5]})


@pytest.mark.parametrize("happens", ["gone", "changed", "a folder"])
def test_a_file_that_is_not_as_it_was_is_named(made, happens):
  file = made[0].parent / "y"
  file.unlink()
  if happens == "a folder":
    file.mkdir()
  elif happens == "changed":
    file.write_text("Y")
  said = "y was changed" if happens == "changed" else "y is gone"
  with pytest.raises(ValueError, match=f"{said}. Use overwrite=True"):
    check_run(*made, MARKS, TOLD)


@pytest.mark.parametrize("name", ["/etc/hostname", "../x", "a/x"])
def test_no_file_elsewhere_is_looked_at(made, name):
  report, described = made
  described["files"][name] = "00000000"
  with pytest.raises(ValueError, match="is no name of a file"):
    check_run(report, described, MARKS, TOLD)
