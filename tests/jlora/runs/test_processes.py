# SPDX-License-Identifier: Apache-2.0
"""What processes say to each other at the start; real ones are elsewhere."""

import pytest

from jlora.runs import fingerprints, processes

AGAIN = "It went well on "


@pytest.mark.parametrize(
  ("errors", "said"),
  [
    (["same", "same"], "same"),
    ([None, "x."], f"process 1: x. {AGAIN}process 0: all must see the same"),
    (["x", None, "x", None], f"processes 0 and 2: x. {AGAIN}processes 1 and 3"),
    (["x", "y"], "process 0: x; process 1: y."),
  ],
)
def test_errors_name_where_they_are(errors, said):
  assert processes.tell_errors(errors).startswith(said)


def test_differences_name_values_and_whose():
  facts = [{"rank": 64, "key": [0]}, {"rank": 32, "key": [0]}, {"key": [0]}]
  assert processes.tell_differences(facts) == [
    "rank is 64 on process 0, 32 on process 1, None on process 2"
  ]
  assert processes.tell_differences([{"a": [1, 2]}, {"a": [1, 2]}]) == []


def test_many_processes_are_counted():
  assert processes.name_processes(range(64)) == "processes 0, 1, 2 and 61 more"


@pytest.fixture
def pretend(monkeypatch):
  """Three processes, of whom the others have what is given."""

  def others(index, *values):
    monkeypatch.setattr(processes, "process_count", lambda: 1 + len(values))
    monkeypatch.setattr(processes, "process_index", lambda: index)
    monkeypatch.setattr(processes, "gather", lambda mine: [*values, mine])

  return others


def test_an_error_of_another_process_is_raised(pretend):
  pretend(2, None, "/ft does not exist")
  with pytest.raises(ValueError, match="process 1: /ft does not exist"):
    processes.everywhere(lambda: 3)


def test_any_error_is_told(pretend):
  pretend(2, None, None)
  with pytest.raises(ValueError, match="process 2: OSError: gone") as caught:
    processes.everywhere(lambda: (_ for _ in ()).throw(OSError("gone")))
  assert isinstance(caught.value.__cause__, OSError)


def test_only_the_first_does_what_the_first_must(pretend):
  pretend(1, None)
  asked = []
  processes.from_first(lambda: asked.append(1))
  assert not asked


def test_versions_change_with_a_file(monkeypatch, tmp_path):
  """Of any package of the library."""
  found = []
  for text in ("one", "other"):
    (tmp_path / text / "some").mkdir(parents=True)
    (tmp_path / text / "some" / "package.py").write_text(text)
    file = tmp_path / text / "runs" / "x.py"
    monkeypatch.setattr(fingerprints, "__file__", str(file))
    found.append(processes.versions())
  before, after = found
  assert {name for name in before if before[name] != after[name]} == {
    "jlora files"
  }
