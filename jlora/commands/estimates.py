# SPDX-License-Identifier: Apache-2.0
"""Plans of extractions: what a model's matrices cost on a machine, added up."""

import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.documents import read_config, shortened
from jlora.commands.costs import (
  Bound,
  Cost,
  Module,
  bound_of,
  bytes_read,
  cost_of,
)
from jlora.commands.machines import GB, Machine
from jlora.formats.components import open_components
from jlora.models.networks import init
from jlora.paths import flatten
from jlora.tree_views import table_for
from jlora.views import views_of


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


def list_modules(
  model: str,
  unchanged: str | None,
  opening: Mapping[str, Any] = MappingProxyType({}),
) -> list[Module]:
  """Lists the parameters of a model that are matrices, and their dtypes.

  Args:
    model: a config.json or a checkpoint.
    unchanged: regex of whole names.
    opening: how a checkpoint is opened, arguments of `open_components`.

  Returns:
    Modules. What is no matrix is small, and left out.

  Raises:
    ValueError: a file that is neither, or a family that is not known.
  """
  file = pathlib.Path(model)
  is_config = file.suffix == ".json"
  spec, model_type = _shapes(file) if is_config else _headers(file, opening)
  shapes = {path: shape for path, (shape, _) in spec.items()}
  views = views_of(shapes, table_for(shapes, model_type))
  return [
    Module(
      path,
      view.shape(shapes[path]),
      spec[path][1],
      unchanged is None or not re.fullmatch(unchanged, path),
    )
    for path, view in views.items()
  ]


Spec = dict[str, tuple[tuple[int, ...], int]]


def _shapes(file: pathlib.Path) -> tuple[Spec, None]:
  """Returns the parameters that a config.json asks for, none of them made."""
  config = read_config(file)
  said = config.get("torch_dtype") or config.get("dtype") or "float32"
  try:
    dtype = jnp.dtype(said)
  except (TypeError, SyntaxError, ValueError) as error:  # NumPy's, of texts
    raise ValueError(
      f"{file}: dtype {shortened(said)} is not known."
    ) from error
  make = lambda key: init(config, key, dtype=dtype)[1]  # noqa: E731
  try:
    made = jax.eval_shape(make, jax.random.key(0))
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  leaves = flatten(made)
  return {p: (leaf.shape, dtype.itemsize) for p, leaf in leaves.items()}, None


def _headers(
  folder: pathlib.Path, opening: Mapping[str, Any]
) -> tuple[Spec, str | None]:
  """Returns the parameters of a checkpoint, whatever it is."""
  checkpoint = open_components(folder, **opening)
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
  """Estimates what an extraction costs.

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
  """Formats a plan as a Markdown table.

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
