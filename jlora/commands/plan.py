# SPDX-License-Identifier: Apache-2.0
"""What would an extraction take, and what would bound it?

  jlora plan --model=config.json --chip=v5e --devices=16
  jlora plan --model=FOLDER --chip=here
  jlora plan --check

--model is a config.json of a family that `jlora.models` knows, or whatever
`jlora extract` opens. `--chip=here` measures this machine first. --check
extracts synthetic pairs on it, as a user would, and puts the measured seconds
beside the planned.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import flags

from jlora.commands import entry
from jlora.commands.estimates import describe, list_modules, plan_extraction
from jlora.commands.help import Command
from jlora.commands.machines import GB, MACHINES, Here, measure_here
from jlora.commands.openings import OPENING, define_opening, read_opening
from jlora.commands.trials import configure, write_pair

_FLAGS = flags.FlagValues()  # apart from those of other commands

_MODEL = flags.DEFINE_string(
  "model", None, "A config.json or a checkpoint.", flag_values=_FLAGS
)
_RANK = flags.DEFINE_integer(
  "rank", 64, "Of every module.", lower_bound=1, flag_values=_FLAGS
)
_PASSES = flags.DEFINE_integer(
  "passes",
  4,
  "Blocks of the Krylov space: 3 or 4 mostly, 6 at most.",
  1,
  6,
  flag_values=_FLAGS,
)
_CHIP = flags.DEFINE_enum(
  "chip",
  "v5e",
  [*MACHINES, "here"],
  "What factors; here: this machine's CPU.",
  flag_values=_FLAGS,
)
_DEVICES = flags.DEFINE_integer(
  "devices", 1, "How many.", lower_bound=1, flag_values=_FLAGS
)
_HOSTS = flags.DEFINE_integer(
  "hosts",
  None,
  "That read from disk; by default one for 4 devices.",
  1,
  flag_values=_FLAGS,
)
_DISK = flags.DEFINE_float(
  "disk_gbs",
  1.0,
  "GB a second that one host reads; measured for --chip=here.",
  flag_values=_FLAGS,
)
_SPLIT = flags.DEFINE_float(
  "split_mib",
  2048.0,
  "Float32 size above which all devices share a module.",
  flag_values=_FLAGS,
)
_UNCHANGED = flags.DEFINE_string(
  "unchanged",
  None,
  "Regex of whole names that the finetune left as they are.",
  flag_values=_FLAGS,
)
_OPENING = define_opening(_FLAGS)
_CHECK = flags.DEFINE_bool(
  "check", False, "Measure small runs beside plans.", flag_values=_FLAGS
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.", flag_values=_FLAGS)


def main(words: Sequence[str]) -> None:
  """Prints a plan.

  Args:
    words: those that are no flags; there should be none.

  Raises:
    ValueError: bad input.
  """
  if words:
    raise ValueError(f"only flags are taken, got {' '.join(words)}")
  if _CHECK.value:
    _check()
  else:
    _plan()


def _plan() -> None:
  if _MODEL.value is None:
    raise ValueError("--model is needed: a config.json or a checkpoint.")
  devices, disk = _DEVICES.value, _DISK.value * GB
  if _CHIP.value == "here":
    here = measure_here()
    machine, devices, disk = here.machine, here.threads, here.disk
  else:
    machine = MACHINES[_CHIP.value]
    disk *= _HOSTS.value or math.ceil(devices / 4)
  plan = plan_extraction(
    list_modules(_MODEL.value, _UNCHANGED.value, read_opening(_OPENING)),
    machine,
    devices=devices,
    rank=_RANK.value,
    passes=_PASSES.value,
    disk=disk,
    split=_SPLIT.value * 2**20,
  )
  if _JSON.value:
    print(json.dumps({**plan._asdict(), "bound": plan.bound._asdict()}))
    return
  print("\n".join(describe(plan, machine, devices)))


_SIZES = ((1024, 2816, 4), (2048, 5632, 2), (2048, 5632, 4), (4096, 11008, 1))


def _check() -> None:
  """Runs small extractions here; prints planned and measured seconds."""
  here = measure_here()
  print(
    f"A thread: {here.machine.flops / 1e9:.0f} Gflop/s, "
    f"{here.machine.bandwidth / GB:.1f} GB/s; {here.threads} threads; "
    f"disk {here.disk / GB:.1f} GB/s.\n"
  )
  print("| width | MLP | layers | planned | measured | planned / measured |")
  print("|---|---|---|---|---|---|")
  start = _extract((64, 64, 1), here)[1]
  for size in _SIZES:
    planned, measured = _extract(size, here)
    measured -= start
    width, inner, layers = size
    print(
      f"| {width} | {inner} | {layers} | {planned:.1f} s | {measured:.1f} s "
      f"| {planned / measured:.2f} |"
    )
  print(f"\nOf each, {start:.1f} s to start were taken off.")


def _extract(size: tuple[int, int, int], here: Here) -> tuple[float, float]:
  """Seconds planned and measured for a Llama of a size, its tables small."""
  width, inner, layers = size
  with tempfile.TemporaryDirectory() as folder:
    base, finetuned = write_pair(folder, configure(*size))
    os.sync()  # or the disk is still writing when the run begins to read
    plan = plan_extraction(
      list_modules(str(base), r".*(embed_tokens|lm_head)\.weight"),
      here.machine,
      devices=here.threads,
      rank=_RANK.value,
      passes=_PASSES.value,
      disk=here.disk,
    )
    words = [f"--base={base}", f"--finetuned={finetuned}", f"--out={folder}/x"]
    words = [*words, f"--rank={_RANK.value}"]
    began = time.perf_counter()
    done = subprocess.run(
      [sys.executable, "-m", "jlora.commands.extract", *words],
      capture_output=True,
      text=True,
    )
    if done.returncode:
      raise ValueError(f"the extraction failed: {done.stderr[-800:]}")
  return plan.bound.seconds, time.perf_counter() - began


COMMAND = Command(
  "plan",
  main,
  _FLAGS,
  required=(),
  groups={
    "Input": {"model": "PATH", "unchanged": "REGEX", **OPENING},
    "Rank": {"rank": "N", "passes": "N"},
    "Machine": {
      "chip": "",
      "devices": "N",
      "hosts": "N",
      "disk_gbs": "X",
      "split_mib": "X",
    },
    "Output": {"json": ""},
    "Run": {"check": ""},
  },
  more="--chip=here measures this machine first; --check extracts small "
  "synthetic pairs on it and puts the seconds beside the planned.",
)

if __name__ == "__main__":
  sys.exit(entry.run(COMMAND, sys.argv[1:]))
