# SPDX-License-Identifier: Apache-2.0
"""A merge killed at any of its steps, then resumed: the same bytes."""

import functools
import pathlib
import signal
import subprocess
import sys

import pytest

import jlora
from jlora.merging.arrays.sparsifiers import match_l1
from jlora.merging.checkpoints import merger
from jlora.merging.checkpoints import run as merge_runs
from jlora.merging.checkpoints.recipes import Recipe
from jlora.merging.checkpoints.report import MERGE
from jlora.runs.journal import FOLDER
from jlora.runs.pool import open_pool
from tests.helpers.kills import Killed, count_operations, killed_at
from tests.helpers.small_merges import linear, run, whole, write_models
from tests.helpers.small_pairs import files_of

ROOT = pathlib.Path(__file__).parents[4]


@pytest.fixture
def models(tmp_path):
  return write_models(tmp_path)


@pytest.fixture
def one_thread(monkeypatch):
  """Operations come in the same order each time."""
  one = functools.partial(open_pool, 1)
  monkeypatch.setattr(merge_runs, "open_pool", one)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("over", [False, True], ids=["new", "overwriting"])
def test_a_merge_killed_at_any_operation_resumes(
  models, tmp_path, one_thread, over, after
):
  """In a new folder, and over another merge's result, which never passes.

  Before each second operation, and after it: what lies between is every state.
  """
  recipe = linear(models)

  def prepare(name):
    if over:
      old = Recipe(jlora.merging.passthrough, whole(models[0]))
      run(old, tmp_path / name)
    return tmp_path / name

  out = prepare("whole")
  count = count_operations(lambda: run(recipe, out, overwrite=over))
  expected = files_of(out)
  assert sum(name.startswith("model-") for name in expected) == 2
  assert count > 60
  for at in range(1, count, 2):
    out = prepare(f"out{at}")
    with pytest.raises(Killed), killed_at(at, after=after):
      run(recipe, out, overwrite=over)
    refused = ""
    try:
      run(recipe, out, resume=True)
    except ValueError as error:
      refused = str(error)
    if refused:  # killed before it began
      assert over
      assert not (out / FOLDER).exists()
      assert "Use overwrite=True" in refused or "method was" in refused
      run(recipe, out, overwrite=True)
    assert files_of(out) == expected, at


KILLED = """
import functools, io, os, signal, sys
import jlora
from jlora.merging.checkpoints import merger
from jlora.merging.checkpoints.run import merge_checkpoints
from jlora.merging.arrays.sparsifiers import match_l1
from jlora.merging.checkpoints.recipes import Input, Recipe, Slice
merger._PIECE, merger._SMALL, merger._ROW = 64, 32, 8
count, base, one, two, out = sys.argv[1:]
real, calls = os.replace, []
def counted(*args):
  calls.append(args)
  if len(calls) == int(count):
    os.kill(os.getpid(), signal.SIGKILL)
  return real(*args)
os.replace = counted
method = functools.partial(jlora.merging.dare, density=0.5, rescale=match_l1)
recipe = Recipe(method, (Slice((Input(one), Input(two))),), base=base)
merge_checkpoints(
  recipe, out, max_shard_bytes=800, overwrite=True, log=io.StringIO()
)
"""


def test_a_merge_that_was_killed_goes_on(models, tmp_path, monkeypatch):
  """At the second file's rename, and at the report's.

  What is dropped by chance, in pieces, is the same after it.
  """
  for name, value in (("_PIECE", 64), ("_SMALL", 32), ("_ROW", 8)):
    monkeypatch.setattr(merger, name, value)
  method = functools.partial(jlora.merging.dare, density=0.5, rescale=match_l1)
  recipe = Recipe(method, whole(*models[1:]), base=models[0])
  run(recipe, tmp_path / "whole")
  # The journal's header, two files with an entry each, both moved, the index,
  # tokenizer, configuration and report.
  for count in (4, 1 + 2 * 2 + 2 + 4):
    out = tmp_path / f"out{count}"
    run(Recipe(jlora.merging.passthrough, whole(models[0])), out)
    done = subprocess.run(
      [sys.executable, "-c", KILLED, str(count), *models, str(out)], cwd=ROOT
    )
    assert done.returncode == -signal.SIGKILL
    assert (out / FOLDER).exists()
    assert not (out / MERGE).exists()
    run(recipe, out, resume=True)
    assert files_of(out) == files_of(tmp_path / "whole")
