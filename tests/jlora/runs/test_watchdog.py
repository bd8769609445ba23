# SPDX-License-Identifier: Apache-2.0
"""A process's watch of the others, which here are files and threads."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jlora.runs import watchdog, watchdog_process
from jlora.runs.processes import LostProcess
from jlora.runs.watchdog import Watch

TURN = 0.05


def meet_one(folder, index, count, work):
  """What the work of one of several processes gives or raises."""
  try:
    with Watch(folder, index, count, TURN) as watch:
      return work(watch)
  except BaseException as error:
    return error


def meet(folder, *works):
  """What each of several processes' works gives or raises, in threads."""
  with ThreadPoolExecutor(len(works)) as pool:
    found = [
      pool.submit(meet_one, folder, index, len(works), work)
      for index, work in enumerate(works)
    ]
    return [each.result() for each in found]


def share(watch):
  watch.done()
  watch.wait()
  return "went"


def first(watch):
  watch.wait()
  watch.done()
  return "wrote"


def failing(error):
  def work(watch):
    raise error

  return work


def test_the_first_writes_when_all_are_done(tmp_path):
  assert meet(tmp_path, first, share, share) == ["wrote", "went", "went"]
  states = [
    watchdog_process.read_state(str(tmp_path / f"{i}.json")) for i in range(3)
  ]
  assert {state["is"] for state in states} == {"left"}


def test_the_first_leaves_last(tmp_path):
  """JAX's coordinator ends with it, and would take the others along."""
  left = []

  def slow(watch):
    share(watch)
    time.sleep(6 * TURN)
    left.append(time.monotonic())

  with ThreadPoolExecutor(1) as pool:
    others = pool.submit(meet_one, tmp_path, 1, 2, slow)
    meet_one(tmp_path, 0, 2, first)
    ended = time.monotonic()
    others.result()
  assert left[0] < ended


@pytest.mark.parametrize(
  ("error", "kind", "said"),
  [
    (ValueError("NaN in w"), ValueError, "process 1: NaN in w"),
    (OSError("disk full"), LostProcess, "process 1 ended by OSError disk full"),
    (
      KeyboardInterrupt(),
      LostProcess,
      "process 1 ended by KeyboardInterrupt",
    ),
    (LostProcess("process 7 ended"), LostProcess, "process 7 ended"),
  ],
)
def test_what_one_raises_comes_out_of_all(tmp_path, error, kind, said):
  results = meet(tmp_path, first, failing(error), share)
  assert results[1] is error
  for other in (results[0], results[2]):
    assert type(other) is kind
    assert str(other).startswith(said)


def test_what_the_first_raises_comes_out_of_all(tmp_path):
  error = ValueError("Nothing to extract")
  results = meet(tmp_path, failing(error), share, share)
  assert [str(result) for result in results[1:]] == [
    "process 0: Nothing to extract"
  ] * 2


def other_is(folder, state):
  watchdog_process.write_state(
    str(folder / "1.json"), {"is": state}, os.O_CREAT
  )


def test_a_failure_of_jax_is_explained_by_who_was_lost(tmp_path):
  other_is(tmp_path, "lost")
  of_jax = RuntimeError("Connection closed by peer")
  error = meet_one(tmp_path, 0, 2, lambda watch: watch.explain(of_jax))
  assert isinstance(error, LostProcess)
  assert str(error).startswith("process 1 ended")
  assert error.__cause__ is of_jax


def test_a_failure_of_jax_that_nobody_explains_stays(tmp_path, monkeypatch):
  monkeypatch.setattr(watchdog, "_LINGER", 0.1)
  other_is(tmp_path, "done")
  of_jax = RuntimeError("out of memory")
  assert meet_one(tmp_path, 0, 2, lambda watch: watch.explain(of_jax)) is of_jax


def test_without_its_guard_a_process_stops(tmp_path):
  def work(watch):
    watch._guard.kill()
    watch.wait()

  error = meet_one(tmp_path, 0, 2, work)
  assert isinstance(error, LostProcess)
  assert "guard of process 0 has ended" in str(error)


def test_one_process_has_no_guard(tmp_path):
  with Watch(tmp_path / "nowhere", 0, 1) as watch:
    watch.check()
    watch.done()
    watch.wait()
  assert not list(tmp_path.iterdir())
