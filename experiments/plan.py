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
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import jlora
from experiments import pairs
from experiments.costs import Bound, Cost, Module, bound_of, bytes_read, cost_of
from experiments.machines import GB, MACHINES, Here, Machine, measure_here
from experiments.processes import measure
from jlora import models
from jlora.paths import flatten
from jlora.views import table_for, view_of

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


class Plan(NamedTuple):
  """What a run costs.

  Attributes:
    modules: matrices that are factored.
    cut: how many of them all devices share.
    parameters: numbers of the model.
    disk: bytes read, of both checkpoints.
    flops: operations of all devices.
    sent: bytes that each device sends.
    held: bytes of a device's memory, at the most.
    adapter: bytes of the factors in float32.
    bound: seconds.
  """

  modules: int
  cut: int
  parameters: int
  disk: int
  flops: float
  sent: float
  held: float
  adapter: int
  bound: Bound


def list_modules(model: str, unchanged: str | None) -> list[Module]:
  """The parameters of a model that are matrices, and how they are stored.

  Args:
    model: a config.json or a checkpoint.
    unchanged: regex of whole names.

  Returns:
    Modules. What is no matrix is small, and left out.

  Raises:
    ValueError: a file that is neither, or a family that is not known.
  """
  file = pathlib.Path(model)
  is_config = file.suffix == ".json"
  spec, model_type = _shapes(file) if is_config else _headers(file)
  table = table_for(spec, model_type)
  return [
    Module(
      path,
      view.shape(shape),
      itemsize,
      unchanged is None or not re.fullmatch(unchanged, path),
    )
    for path, (shape, itemsize) in spec.items()
    if (view := view_of(path, shape, table))
  ]


Spec = dict[str, tuple[tuple[int, ...], int]]


def _shapes(file: pathlib.Path) -> tuple[Spec, None]:
  """The parameters that a config.json asks for, none of them made."""
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{file} is no config.json: {error}.") from error
  dtype = jnp.dtype(config.get("torch_dtype") or config.get("dtype", "float32"))
  made = jax.eval_shape(
    lambda key: models.init(config, key, dtype=dtype)[1], jax.random.key(0)
  )
  leaves = flatten(made)
  return {p: (leaf.shape, dtype.itemsize) for p, leaf in leaves.items()}, None


def _headers(folder: pathlib.Path) -> tuple[Spec, str | None]:
  checkpoint = jlora.open_checkpoint(folder)
  spec = {
    name: (tuple(one.shape), one.dtype.itemsize)
    for name, one in checkpoint.spec.items()
  }
  return spec, checkpoint.model_type


def plan_extraction(
  modules: list[Module],
  machine: Machine,
  *,
  devices: int,
  rank: int,
  passes: int,
  disk: float,
  split: float = math.inf,
) -> Plan:
  """What an extraction costs.

  Args:
    modules: from `list_modules`.
    machine: each device.
    devices: how many.
    rank: of every module.
    passes: as for `cost_of`.
    disk: bytes a second that all hosts together read.
    split: float32 bytes above which a module is cut over all devices.

  Returns:
    Plan.

  Raises:
    ValueError: no matrix at all.
  """
  if not modules:
    raise ValueError("No parameter of the model is a matrix.")
  whole: list[Cost] = []
  cut: list[Cost] = []
  for module in modules:
    is_cut = devices > 1 and 4 * math.prod(module.shape) > split
    cost = cost_of(module, rank, passes, devices if is_cut else 1)
    (cut if is_cut else whole).append(cost)
  read = sum(map(bytes_read, modules))
  units = [sum(m.shape[-2:]) * math.prod(m.shape[:-2]) for m in modules]
  ranks = [min(rank, *m.shape[-2:]) for m in modules]
  changed = [m.is_changed for m in modules]
  return Plan(
    modules=sum(changed),
    cut=len(cut),
    parameters=sum(math.prod(m.shape) for m in modules),
    disk=read,
    flops=sum(c.flops for c in whole) + devices * sum(c.flops for c in cut),
    sent=sum(c.sent for c in cut),
    held=max(c.held for c in [*whole, *cut]),
    adapter=4 * int(np.dot(np.multiply(units, ranks), changed)),
    bound=bound_of(whole, cut, machine, devices, read / disk),
  )


def describe(plan: Plan, machine: Machine, devices: int) -> Iterator[str]:
  """A plan as a Markdown table.

  Args:
    plan: from `plan_extraction`.
    machine: each device.
    devices: how many.

  Yields:
    Lines.
  """
  bound = plan.bound
  rows = {
    "matrices": f"{plan.modules}, {plan.cut} cut over {devices} devices",
    "parameters in matrices": f"{plan.parameters / 1e9:.2f} billion",
    "read from disk": f"{plan.disk / GB:.1f} GB, {bound.disk:.1f} s",
    "operations": f"{plan.flops / 1e12:.1f} Tflop, {bound.compute:.2f} s",
    "memory traffic": f"{bound.memory:.2f} s",
    "sent by each device": (
      f"{plan.sent / GB:.2f} GB, {bound.interconnect:.2f} s"
    ),
    "held by a device": (
      f"{plan.held / GB:.2f} GB of {machine.memory / GB:.1f} GB"
      + ("" if plan.held <= machine.memory else ": DOES NOT FIT")
    ),
    "adapter": f"{plan.adapter / GB:.2f} GB",
    "at least": f"{bound.seconds:.1f} s, bound by {bound.by}",
  }
  yield "| | |"
  yield "|---|---|"
  for name, said in rows.items():
    yield f"| {name} | {said} |"


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
