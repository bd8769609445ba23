# SPDX-License-Identifier: Apache-2.0
"""The same extraction by 1, 2 and 4 processes, and what goes wrong there."""

import io
import json
import signal
import sys
import time
from unittest import mock

import numpy as np
import pytest

from jlora.commands import clusters
from jlora.extraction import run
from jlora.extraction.report import read_report
from jlora.runs.journal import FOLDER
from tests.experiments.host_workers import (
  Readings,
  finish,
  free_port,
  run_scenarios,
  start,
)
from tests.helpers.small_pairs import (
  adapter_tensors,
  draw,
  files_of,
  write_pair,
)

TABLE, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "norm.weight"
SMALL = [
  f"layers.{at}.{part}.weight" for at in range(5) for part in ("q", "up")
]
OPTIONS = {"rank": 3, "base_model": "base"}
# The table is larger than the one, the head than the other too.
SPLIT, SPLIT_BOTH = ({**OPTIONS, "split_bytes": n} for n in (8192, 4096))


def tensors(seed):
  """Ten matrices, a bias and a norm, an unchanged one, two large ones."""
  made = {
    name: draw(16, 12 + 4 * (at % 2), seed=seed + at)
    for at, name in enumerate(SMALL)
  }
  return made | {
    "layers.0.q.bias": draw(16, seed=seed + 20),
    NORM: draw(16, seed=seed + 21),
    "layers.9.q.weight": draw(16, 16, seed=7),
    TABLE: draw(64, 48, seed=seed + 22),
    HEAD: draw(27, 64, seed=seed + 23),  # over four devices by columns alone
  }


BASE, FINETUNED = tensors(0), tensors(100)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  return write_pair(tmp_path_factory.mktemp("pair"), BASE, FINETUNED)


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
  """The folder of one process that splits nothing, and what it has read."""
  out, readings = tmp_path_factory.mktemp("alone") / "out", Readings()
  with mock.patch.object(run, "plan_jobs", readings.plan_jobs):
    run.extract_checkpoint(*pair, out, **OPTIONS, log=io.StringIO())
  return out, readings.nbytes


def added(results):
  """Bytes by tensor that all processes have read together."""
  total = {}
  for each in results:
    for name, nbytes in each["read"].items():
      total[name] = total.get(name, 0) + nbytes
  return total


def scenario(pair, out, options=OPTIONS, **others):
  base, finetuned = map(str, pair)
  return {
    "base": base, "finetuned": finetuned, "out": str(out), "options": options,
    **others,
  }  # fmt: skip


def check_whole(results, out, alone):
  folder, read = alone
  assert [each["error"] for each in results] == [None] * len(results)
  assert files_of(out) == files_of(folder)
  assert added(results) == read
  for name in SMALL:  # by one process, which has read no other's
    readers = [each for each in results if f"base {name}" in each["read"]]
    assert len(readers) == 1, name
  assert all(each["totals"] == results[0]["totals"] for each in results)
  for index, each in enumerate(results):
    assert each["log"].startswith(f"process {index}: 100%")


def check_split(results, out, alone):
  """To rounding where a tensor was split, the same bytes elsewhere."""
  folder, read = alone
  assert [each["error"] for each in results] == [None] * len(results)
  expected, found = adapter_tensors(folder), adapter_tensors(out)
  assert expected.keys() == found.keys()
  for name, tensor in expected.items():
    exact = not name.startswith(("model.embed_tokens", "lm_head"))
    np.testing.assert_allclose(
      found[name], tensor, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-4
    )
  for one, two in zip(
    read_report(folder).modules, read_report(out).modules, strict=True
  ):
    for key in ("relative_error", "norm", "noise_floor"):
      assert one[key] == pytest.approx(two[key], rel=1e-4)
  # Each has compared its rows and then read its shard: 1/n of both, twice.
  for side in ("base", "finetuned"):
    shares = [each["read"][f"{side} {TABLE}"] for each in results]
    assert shares == [2 * BASE[TABLE].nbytes // len(results)] * len(results)
  large = {
    f"{side} {n}" for side in ("base", "finetuned") for n in (TABLE, HEAD)
  }
  together = added(results)
  assert all(together[name] == read[name] for name in read.keys() - large)


def test_two_processes_of_two_devices(pair, alone, tmp_path):
  outs = [tmp_path / name for name in ("whole", "split")]
  whole, split = run_scenarios(
    tmp_path,
    2,
    2,
    [scenario(pair, outs[0]), scenario(pair, outs[1], SPLIT_BOTH)],
  )
  check_whole(whole, outs[0], alone)
  check_split(split, outs[1], alone)


@pytest.fixture(scope="module")
def four(pair, tmp_path_factory):
  """Scenarios by name, and what they came to on each of four processes."""
  folder = tmp_path_factory.mktemp("four")
  damaged = FINETUNED | {SMALL[3]: np.full((16, 16), np.nan, np.float32)}
  broken = dict(FINETUNED)
  broken[TABLE] = BASE[TABLE].copy()
  broken[TABLE][63, 47] = np.inf
  damage = write_pair(folder / "damaged", BASE, damaged)
  torn = write_pair(folder / "torn", BASE, broken)
  same = write_pair(folder / "same", BASE, FINETUNED | {TABLE: BASE[TABLE]})
  (folder / "full").mkdir()
  (folder / "full" / "notes").touch()
  words = [f"--base={pair[0]}", f"--finetuned={pair[1]}", "--rank=3"]
  words += [f"--cache={folder}", f"--out={folder / 'command'}"]
  asked = {
    "whole": scenario(pair, folder / "whole"),
    "split": scenario(pair, folder / "split", SPLIT),
    "unseen": scenario(
      pair, folder / "x", only={"1": {"finetuned": "/private/ft"}}
    ),
    "another rank": scenario(
      pair, folder / "x", only={"1": {"options": OPTIONS | {"rank": 32}}}
    ),
    "another version": scenario(
      pair, folder / "x", only={"3": {"versions": {"numpy": "0.1"}}}
    ),
    "another finetune": scenario(
      pair, folder / "x", only={"2": {"finetuned": str(same[1])}}
    ),
    "another folder": scenario(
      pair, folder / "y", only={"1": {"out": str(folder / "z")}}
    ),
    "a full folder": scenario(pair, folder / "full"),
    "damage": scenario(damage, folder / "damage"),
    "split damage": scenario(torn, folder / "torn_out", SPLIT),
    "unchanged": scenario(same, folder / "same_out", SPLIT),
    "again": scenario(pair, folder / "whole", OPTIONS | {"resume": True}),
    "command": {"flags": words},
    "other flags": {
      "flags": [*words, "--overwrite", "--policy=energy"],
      "only": {
        "2": {"flags": [*words, "--overwrite", "--policy=energy",
                        "--energy=0.5"]}
      },
    },
    "no flag": {"flags": [*words, "--overwrite", "more"]},
  }  # fmt: skip
  found = run_scenarios(folder, 4, 1, list(asked.values()))
  return folder, dict(zip(asked, found, strict=True))


def test_four_processes(four, alone):
  folder, found = four
  check_whole(found["whole"], folder / "whole", alone)
  check_split(found["split"], folder / "split", alone)
  assert [each["totals"] for each in found["again"]] == [
    each["totals"] for each in found["whole"]
  ]
  assert found["again"][0]["read"] == {}


def test_an_unchanged_tensor_is_unchanged_when_split(four):
  folder, found = four
  assert found["unchanged"][0]["error"] is None
  rows = read_report(folder / "same_out").ledger
  assert [
    (row["status"], row["why"]) for row in rows if TABLE in str(row["base"])
  ] == [("unchanged", "")]
  read = [each["read"][f"base {TABLE}"] for each in found["unchanged"]]
  assert read == [BASE[TABLE].nbytes // 4] * 4


@pytest.mark.parametrize(
  ("name", "message"),
  [
    (
      "unseen",
      "process 1: /private/ft does not exist. It went well on processes 0, 2 "
      "and 3: all must see the same files.",
    ),
    ("another rank", "rank is 3 on processes 0, 2 and 3, 32 on process 1"),
    ("another version", "0.1 on process 3. Start all with the same command"),
    ("another finetune", "differ: finetuned times is "),
    ("another folder", "z is not the folder that process 0 writes to"),
    ("a full folder", "full is not empty (notes)"),
    ("damage", "16 * 16 values"),
    ("split damage", f"{TABLE}: 1 of 3072 values of the finetuned tensor"),
  ],
)
def test_all_end_with_the_same_message(four, name, message):
  _, found = four
  errors = [each["error"] for each in found[name]]
  if name == "damage":  # the one that has it says no number
    message = f"{SMALL[3]}: 256 of 256 values of the finetuned tensor are NaN"
    owner = next(each for each in errors if each.startswith("layers"))
    assert set(errors) == {owner, f"process {errors.index(owner)}: {owner}"}
  else:
    assert len(set(errors)) == 1
  assert all(message in error for error in errors), errors


def test_the_script_on_four_processes(four, alone):
  folder, found = four
  first, *others = found["command"]
  assert "ledger: 12 extracted, 1 unchanged" in first["out"], first
  assert [each["out"] for each in others] == [""] * 3
  expected, made = files_of(alone[0]), files_of(folder / "command")
  name = "adapter_model.safetensors"
  assert made[name] == expected[name]
  for each in found["other flags"]:
    assert each["status"] == 1
    assert "energy is 0.95 on processes 0, 1 and 3, 0.5 on pro" in each["err"]
  assert [e["err"] for e in found["no flag"]] == [
    "error: only flags are taken, got more\n"
  ] * 4


# The script, one of whose processes kills itself: at its n-th module, or where
# the others wait for it.
KILLED = """
import os, runpy, signal, sys, time
from jlora.extraction import module, run
victim, count, where = sys.argv.pop(1).split(",")
victim, count = int(victim), int(count)
index = int(sys.argv[-1].partition("=")[2])
real, calls = module.Extractor.__call__, []
def slow(self, job, *args):
  time.sleep(0.2)
  calls.append(job.pair.path)
  if index == victim and len(calls) >= count:
    stop = signal.SIGSTOP if where == "stopping" else signal.SIGKILL
    os.kill(os.getpid(), stop)
  print("factored", job.pair.path, flush=True)
  return real(self, job, *args)
module.Extractor.__call__ = slow
def die(*args):
  time.sleep(1)
  os.kill(os.getpid(), signal.SIGKILL)
if index == victim and where == "comparing":
  run._plan = die
if index == victim and where == "factoring together":
  module.Extractor.split = die
runpy.run_module("jlora.commands.extract", run_name="__main__", alter_sys=True)
"""


def launch(pair, folder, count, victim, *words, where=""):
  """The script by `count` processes, in a folder of their own."""
  folder.mkdir(exist_ok=True)
  port = free_port()
  return [
    start(
      [
        "-c", KILLED, f"{victim},2,{where}", f"--base={pair[0]}",
        f"--finetuned={pair[1]}", "--out=out", "--rank=3",
        f"--cache={folder}/cache", *words, f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={count}", f"--process_id={index}",
      ],
      folder,
    )
    for index in range(count)
  ]  # fmt: skip


def factored(ended):
  lines = "".join(out for _, out, _ in ended).splitlines()
  return {line.split()[1] for line in lines if line.startswith("factored")}


LOST = (
  "error: process {} ended or was killed before its share was done. Run the "
  "same command with --resume (resume=True): what is finished is kept."
)


def test_a_killed_process_ends_all_and_the_run_resumes(pair, tmp_path):
  folder = tmp_path / "killed"
  killed = launch(pair, folder, 3, 2)
  whole = launch(pair, tmp_path / "whole", 1, -1)
  ended, (one,) = finish(killed), finish(whole)
  assert one[0] == 0, one[2]
  assert [status for status, *_ in ended] == [1, 1, -signal.SIGKILL]
  for _, _, err in ended:
    assert err.count(LOST.format(2)) == 1, err
    assert "Fatal" not in err
  entries = list((folder / "out" / FOLDER).glob("*.safetensors"))
  assert 0 < len(entries) < len(BASE)
  assert not (folder / "out" / "adapter_model.safetensors").exists()
  kept = factored(ended)
  resumed = finish(launch(pair, folder, 2, -1, "--resume", "--json"))
  assert [status for status, *_ in resumed] == [0, 0], resumed
  assert json.loads(resumed[0][1].splitlines()[-1])["settings"]["rank"] == 3
  assert not any("Gloo" in out for _, out, _ in resumed)
  again = factored(resumed)
  assert len(again) < len(kept | again) == len(BASE) - 1
  expected, found = (
    files_of(tmp_path / name / "out") for name in ("whole", "killed")
  )
  assert found == expected


@pytest.mark.long
@pytest.mark.parametrize(
  ("where", "said"),
  [
    ("comparing", "error: Another process ended or was killed while all comp"),
    ("factoring together", LOST.format(2)),
  ],
)
def test_a_process_killed_where_the_others_wait(pair, tmp_path, where, said):
  began = time.monotonic()
  ended = finish(
    launch(pair, tmp_path / "k", 3, 2, "--split_mib=0.005", where=where)
  )
  assert [status for status, *_ in ended] == [1, 1, -signal.SIGKILL]
  for _, _, err in ended[:2]:
    assert said in err
    assert "Fatal" not in err
  # Before JAX would have ended them.
  assert time.monotonic() - began < clusters._HEARTBEAT_SECONDS - 10


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_and_told_from_a_dead_one(
  pair, tmp_path, victim
):
  began = time.monotonic()
  both = launch(pair, tmp_path / "s", 2, victim, where="stopping")
  stopped, other = both[victim], both[1 - victim]
  try:
    ((status, _, err),) = finish([other])
    assert status != 0
    assert f"error: process {victim} is stopped (SIGSTOP or Ctrl-Z; not" in err
    assert f"`kill -KILL {stopped.pid}`" in err
    assert "ended or was killed" not in err
    assert "Fatal" not in err
    assert stopped.poll() is None
  finally:
    stopped.kill()
    stopped.communicate()
  # Before JAX would have ended them.
  assert time.monotonic() - began < clusters._HEARTBEAT_SECONDS - 10


def test_without_the_first_process_the_others_say_so(pair, tmp_path):
  ended = finish(launch(pair, tmp_path / "first", 2, 0))
  assert ended[0][0] == -signal.SIGKILL
  assert ended[1][0] != 0
  assert LOST.format(0) in ended[0][2]
  assert f"{LOST.format(0)} Process 1 was ended with it." in ended[1][2]


def test_nothing_is_initialised_on_import(tmp_path):
  code = """
import jax, jlora, jlora.commands.extract, jlora.extraction.workers
from jlora.runs import processes
from jax._src import xla_bridge
assert not jax.distributed.is_initialized()
assert (processes.process_count(), processes.process_index()) == (1, 0)
assert processes.gather(1) == [1]
assert not xla_bridge.backends_are_initialized()
"""
  ((status, _, err),) = finish([start(["-c", code], tmp_path)])
  assert status == 0, err
  assert "jlora" in sys.modules
