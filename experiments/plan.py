# SPDX-License-Identifier: Apache-2.0
"""What would an extraction take, and what would bound it?

  python -m experiments.plan --model=config.json --chip=v5e --devices=16
  python -m experiments.plan --model=FOLDER --chip=here
  python -m experiments.plan --check

--model is a config.json of a family that `jlora.models` knows, or any
checkpoint. `--chip=here` measures this machine first. --check extracts
synthetic pairs on it, as a user would, and puts the measured seconds beside the
planned.
"""

import json
import math
import os
import pathlib
import sys
import tempfile

from absl import app, flags

from experiments import pairs
from experiments.estimates import describe, list_modules, plan_extraction
from experiments.machines import GB, MACHINES, Here, measure_here
from experiments.processes import measure

_MODEL = flags.DEFINE_string("model", None, "A config.json or a checkpoint.")
_RANK = flags.DEFINE_integer("rank", 64, "Of every module.", lower_bound=1)
_PASSES = flags.DEFINE_integer(
  "passes", 4, "Blocks of the Krylov space: 3 or 4 mostly, 6 at most.", 1, 6
)
_CHIP = flags.DEFINE_enum(
  "chip", "v5e", [*MACHINES, "here"], "What factors; here: this machine's CPU."
)
_DEVICES = flags.DEFINE_integer("devices", 1, "How many.", lower_bound=1)
_HOSTS = flags.DEFINE_integer(
  "hosts", None, "That read from disk; by default one for 4 devices.", 1
)
_DISK = flags.DEFINE_float(
  "disk_gbs", 1.0, "GB a second that one host reads; measured for --chip=here."
)
_SPLIT = flags.DEFINE_float(
  "split_mib", 2048.0, "Float32 size above which all devices share a module."
)
_UNCHANGED = flags.DEFINE_string(
  "unchanged", None, "Regex of whole names that the finetune left as they are."
)
_CHECK = flags.DEFINE_bool("check", False, "Measure small runs beside plans.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")

_ROOT = pathlib.Path(__file__).parents[1]


def main(argv: list[str]) -> None:
  """Prints a plan; bad input is one message and exit code 1."""
  del argv
  try:
    _check() if _CHECK.value else _plan()
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


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
    list_modules(_MODEL.value, _UNCHANGED.value),
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
  """Small runs on this machine: planned, measured, and how far apart."""
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
  config = {
    **pairs.LLAMA,
    "vocab_size": 1024,
    "hidden_size": width,
    "intermediate_size": inner,
    "num_attention_heads": max(1, width // 64),
    "num_key_value_heads": max(1, width // 64),
    "num_hidden_layers": layers,
  }
  with tempfile.TemporaryDirectory() as folder:
    base, finetuned = pairs.write_pair(folder, config)
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
    command = [sys.executable, "-m", "experiments.extract", *words]
    used = measure(
      [*command, f"--rank={_RANK.value}"], {"PYTHONPATH": str(_ROOT)}
    )
  return plan.bound.seconds, used.wall


if __name__ == "__main__":
  app.run(main)
