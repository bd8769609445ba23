# SPDX-License-Identifier: Apache-2.0
"""One of several processes: runs scenarios in turn and writes what came out.

  python host_workers.py PORT COUNT INDEX DEVICES SCENARIOS RESULTS

Also the other end: how a test starts such processes and waits for them.
"""

import contextlib
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
from unittest import mock

import jax

from jlora.commands import clusters, entry, extract, keep_compilations
from jlora.extraction import run
from jlora.runs import processes as hosts
from jlora.runs import shared_journal, watchdog_process

ROOT = pathlib.Path(__file__).parents[2]


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def start(command, folder, **environment):
  """A process on this machine's processor, its output in pipes."""
  return subprocess.Popen(
    [sys.executable, *map(str, command)],
    cwd=folder,
    env=os.environ
    | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests"}
    | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(processes):
  """(exit status, standard output, standard error) of each."""
  ended = []
  try:
    for process in processes:
      out, err = process.communicate(timeout=240)
      ended.append((process.returncode, out, err))
  finally:
    for process in processes:
      process.kill()
  return ended


def run_scenarios(folder, count, devices, scenarios):
  """Results by scenario, of each of `count` processes."""
  (folder / "scenarios.json").write_text(json.dumps(scenarios))
  port = free_port()
  ended = finish(
    [
      start(
        [__file__, port, count, index, devices, "scenarios.json", folder],
        folder,
        JAX_NUM_CPU_DEVICES=str(devices),
      )
      for index in range(count)
    ]
  )
  assert [status for status, *_ in ended] == [0] * count, ended
  results = [
    json.loads((folder / f"{index}.json").read_text()) for index in range(count)
  ]
  return list(zip(*results, strict=True))


class Readings:
  """What a run has read of each tensor, in bytes, of either checkpoint."""

  def __init__(self):
    self.nbytes, self.total = {}, 0
    self._lock, self._plan = threading.Lock(), run.plan_jobs

  def plan_jobs(self, *args):
    """The plan of a run, its checkpoints counting."""
    plan = self._plan(*args)
    for side in (plan.base, plan.finetuned):
      side.read = self._counting(side.read, side.path.name)
    return plan

  def _counting(self, read, side):
    def counted(name, index=()):
      array = read(name, index)
      with self._lock:
        key = f"{side} {name}"
        self.nbytes[key] = self.nbytes.get(key, 0) + array.nbytes
      return array

    return counted


def attempt(scenario, index):
  """What a scenario comes to on this process."""
  mine = scenario | scenario.get("only", {}).get(str(index), {})
  if "flags" in mine:
    return command(mine["flags"])
  readings, log = Readings(), io.StringIO()
  result = {"error": None}
  versions = hosts.versions() | mine.get("versions", {})
  with (
    mock.patch.object(run, "plan_jobs", readings.plan_jobs),
    mock.patch.object(hosts, "versions", return_value=versions),
  ):
    try:
      report = run.extract_checkpoint(
        mine["base"],
        mine["finetuned"],
        mine["out"],
        log=log,
        **mine.get("options", {}),
      )
      result["totals"] = report.totals
    except ValueError as error:
      result["error"] = str(error)
  return result | {"read": readings.nbytes, "log": log.getvalue()}


def command(words):
  """What the script says under these flags."""
  out, err = io.StringIO(), io.StringIO()
  with (
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    mock.patch.object(clusters, "join", return_value=jax.process_index()),
  ):
    status = entry.run(extract.COMMAND, words)
  return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def main(port, count, index, devices, scenarios, results):
  """Initialises JAX's runtime and goes through the scenarios."""
  del devices  # in the environment, where JAX reads it
  keep_compilations(results)
  jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
  watchdog_process.TURN, shared_journal._SECONDS_TO_SEE = 0.3, 6
  found = [
    attempt(scenario, int(index))
    for scenario in json.loads(pathlib.Path(scenarios).read_text())
  ]
  pathlib.Path(results, f"{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
