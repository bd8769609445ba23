# SPDX-License-Identifier: Apache-2.0
"""One model type through `jlora`, PEFT and transformers, and what came out.

base, finetune ─► extract_checkpoint ─► PEFT    ─┐
               └► loras, save_merged ─► loaded   ┴► distance to the finetune

A distance is |got - finetune| / |base - finetune|, of outputs and of each
parameter of the merged model: 1 is an adapter that does nothing.
"""

import collections
import contextlib
import copy
import io
import json
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from numpy.linalg import LinAlgError
from safetensors.torch import load_file, save_file

import jlora
from jlora.extraction import read_report, whole_of
from jlora.factoring.factorisers import svd
from jlora.loras import Lora, exchange, from_factors
from jlora.selection import is_matrix
from jlora.tree_views import table_for
from jlora.views import in_stored_order, view_of
from tests.families.build import NotBuilt, build, inputs_of

RIGHT, WITH_WHOLE = "right", "right with --whole"
ACCOUNTED, REFUSED = "accounted", "refused"
WRONG, PEFT_ERROR, NOT_BUILT = "WRONG", "PEFT error", "not built"
VERDICTS = (RIGHT, WITH_WHOLE, ACCOUNTED, REFUSED, PEFT_ERROR, WRONG, NOT_BUILT)

# Tensors of a checkpoint that hold several matrices need more than the first.
RANKS = (4, 8, 16)
CLOSE, EXPLAINED = 1e-5, 1e-4
MISSING = "not representable"
# Merged, all parameters are right; before, the layers' adapters are passed by.
READ_OTHERWISE = "outputs: a weight is read otherwise than by its module's call"


def walk(model_type: str, folder: Path) -> dict[str, Any]:
  """Everything that is known of a type, as JSON.

  Args:
    model_type: as transformers names it.
    folder: an empty folder, filled with checkpoints.

  Returns:
    type, kind, model (its class), parameters, inputs (None if no forward pass
    could be arranged), verdict, why, distance (of outputs), parameter and
    parameter_distance (the worst), carried (as Loras), whole (tensors carried
    whole), missing ({why: how many}), with_whole (carried and whole, where
    `--whole` makes it right), merged (verdict), merged_why,
    merged_distance, seconds.
  """
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return _walk(model_type, folder)


def _walk(model_type, folder):
  started, stage = time.monotonic(), folder / "stage"
  stage.write_text("building")
  row: dict[str, Any] = {"type": model_type}
  try:
    case = Case(model_type, folder)
  except NotBuilt as error:
    return row | {"verdict": NOT_BUILT, "why": str(error)}
  row |= {
    "kind": case.kind,
    "model": case.made.__name__,
    "parameters": sum(p.numel() for p in case.base.parameters()),
    "inputs": None if case.inputs is None else sorted(case.inputs),
  }
  stage.write_text("extracting")
  row |= through_peft(case, folder) | through_merged(case, folder)
  return row | {"seconds": round(time.monotonic() - started, 1)}


class Case:
  """A base and its finetune, on disk and as transformers loads them."""

  def __init__(self, model_type: str, folder: Path):
    model, self.kind = build(model_type)
    self.made = type(model)
    self.folders = folder / "base", folder / "finetuned"
    try:
      model.save_pretrained(self.folders[0])
      change_matrices(model)
      model.save_pretrained(self.folders[1])
      self.base, self.finetuned = map(self.load, self.folders)
    except Exception as error:
      reason = f"saved or loaded: {summary(error)}"
      raise NotBuilt(reason) from error
    self.tensors = tensors_of(self.base), tensors_of(self.finetuned)
    before, after = self.tensors
    if all(torch.equal(before[name], after[name]) for name in before):
      raise NotBuilt("no change came back from disk")
    self.inputs = self._arranged()

  def load(self, folder: Path) -> torch.nn.Module:
    """The model of a folder, as transformers loads it."""
    torch.manual_seed(0)
    return self.made.from_pretrained(folder, dtype=torch.float32).eval()

  def _arranged(self):
    """Inputs on which base and finetune differ, or None."""
    for inputs in inputs_of(self.base):
      try:
        both = [outputs_of(m, inputs) for m in (self.base, self.finetuned)]
      except Exception:
        continue
      before, after = both
      if before.shape == after.shape and (before - after).norm() > 0:
        return inputs
    return None

  def _of_outputs(self, model, want, dtype):
    """The distance of outputs, computed in a dtype."""
    three = self.base, self.finetuned, want or self.finetuned
    before, after, goal = (outputs_of(m, self.inputs, dtype) for m in three)
    return ratio(outputs_of(model, self.inputs, dtype) - goal, before - after)

  def _of_rounding(self, want):
    """The distance of outputs when weights change by a rounding of float32.

    It is that of a model that says something else after any rounding.
    """
    other = copy.deepcopy(want or self.finetuned)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
      for parameter in other.parameters():
        if parameter.is_floating_point():
          drawn = torch.randn(parameter.shape, generator=generator)
          parameter.mul_(1 + 2.0**-24 * drawn)
    return self._of_outputs(other, want, torch.float32)

  def distances(self, model: torch.nn.Module, want=None, limit=CLOSE):
    """Distances of a model to the finetune, or to a model wanted instead.

    Returns:
      (of outputs or None, the worst parameter's name, its own, how many
      parameters are over the limit).
    """
    of_outputs = None
    if self.inputs is not None:
      of_outputs = self._of_outputs(model, want, torch.float32)
      if of_outputs > limit:  # rounding, or a fault
        with contextlib.suppress(RuntimeError):
          of_outputs = self._of_outputs(model, want, torch.float64)
      if of_outputs > limit and of_outputs <= 3 * self._of_rounding(want):
        of_outputs = limit
    before, after = self.tensors
    goal = after if want is None else tensors_of(want)
    got, found = tensors_of(merged_by_peft(model)), {}
    for name in after:
      if name not in got:
        found[name] = float("inf")
        continue
      changed = before[name] - after[name]
      scale = changed if changed.any() else after[name]
      found[name] = ratio(got[name] - goal[name], scale)
    worst = max(found, key=lambda name: found[name])
    over = sum(value > limit for value in found.values())
    return of_outputs, worst, found[worst], over


def through_peft(case: Case, folder: Path) -> dict[str, Any]:
  """What PEFT makes of the adapter that jlora writes.

  Where the report says that `--whole` carries what is left out, once more so.
  """
  row = _through_peft(case, folder)
  if row["verdict"] != ACCOUNTED:
    return row
  whole = whole_of(read_report(folder / "adapter"))
  if whole is None:
    return row
  again = _through_peft(case, folder, whole)
  if again["verdict"] == ACCOUNTED:
    return row
  verdict = WITH_WHOLE if again["verdict"] == RIGHT else again["verdict"]
  why = again["why"] and f"with --whole: {again['why']}"
  counts = again.get("carried"), again.get("whole")
  return row | {"verdict": verdict, "why": why, "with_whole": counts}


def _through_peft(
  case: Case, folder: Path, whole: str | None = None
) -> dict[str, Any]:
  """One extraction through PEFT, with tensors that are stored whole."""
  out = folder / "adapter"
  shutil.rmtree(out, ignore_errors=True)
  try:
    for rank in RANKS:
      report = jlora.extract_checkpoint(
        *case.folders,
        out,
        rank=rank,
        whole=whole,
        log=io.StringIO(),
        overwrite=True,
      )
      if report.totals["relative_error"] < CLOSE:
        break
  except LinAlgError as error:  # a ValueError to NumPy, to a user none
    return {"verdict": WRONG, "why": f"crashed: {summary(error)}"}
  except ValueError as error:
    if (out / "adapter_config.json").exists():
      return {"verdict": WRONG, "why": f"half written: {summary(error)}"}
    return {"verdict": REFUSED, "why": summary(error)}
  except Exception as error:
    return {"verdict": WRONG, "why": f"crashed: {summary(error)}"}
  missing = [row for row in report.ledger if row["status"] == MISSING]
  row = {
    "missing": dict(collections.Counter(r["why"] for r in missing)),
    "carried": len(report.modules),
    "whole": sum(r["status"] == "kept whole" for r in report.ledger),
    "rank": rank,
  }
  try:
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      adapted = peft.PeftModel.from_pretrained(case.load(case.folders[0]), out)
    row["said"] = [text for w in caught if "adapter keys" in (text := said(w))]
    outputs, name, worst, over = case.distances(adapted.eval())
  except Exception as error:
    return row | {"verdict": PEFT_ERROR, "why": summary(error)}
  row |= {
    "distance": outputs,
    "parameter": name,
    "parameter_distance": worst,
    "parameters_over": over,
  }
  if max(outputs or 0, worst) <= CLOSE:
    return row | {"verdict": RIGHT, "why": ""}
  if not missing:
    where = name if worst > CLOSE else READ_OTHERWISE
    return row | {"verdict": WRONG, "why": f"the ledger is silent on {where}"}
  # What the ledger calls missing, put back: nothing else may be missing.
  try:
    names = [name for r in missing for name in r["finetuned"] or r["base"]]
    shutil.rmtree(folder / "explained", ignore_errors=True)
    explained = case.load(put_back(case.folders, names, folder / "explained"))
    adapted = peft.PeftModel.from_pretrained(case.load(case.folders[0]), out)
    left = case.distances(adapted.eval(), explained, limit=EXPLAINED)
  except Exception as error:
    return row | {"verdict": WRONG, "why": f"unexplained: {summary(error)}"}
  if max(left[0] or 0, left[2]) <= EXPLAINED:
    return row | {"verdict": ACCOUNTED, "why": ""}
  where = left[1] if left[2] > EXPLAINED else READ_OTHERWISE
  why = f"{max(left[0] or 0, left[2]):.1e} beyond the ledger: {where}"
  return row | {"verdict": WRONG, "why": why, "parameter": left[1]}


def through_merged(case: Case, folder: Path) -> dict[str, Any]:
  """What transformers makes of the folder that `save_merged` writes."""
  merged = folder / "merged"
  try:
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      base, finetuned = map(jlora.open_checkpoint, case.folders)
      loras = loras_of(base, finetuned)
      # What is no matrix to jlora is given whole.
      whole = {
        name: finetuned[name]
        for name in base
        if name not in loras and name in finetuned
        if not np.array_equal(base[name], finetuned[name])
      }
      jlora.save_merged(merged, base, loras, full=whole)
    told = any("left out" in said(w) for w in caught)
  except ValueError as error:
    verdict = WRONG if merged.exists() else REFUSED
    return {"merged": verdict, "merged_why": summary(error)}
  except Exception as error:
    reason = f"crashed: {summary(error)}"
    return {"merged": WRONG, "merged_why": reason}
  try:
    outputs, name, worst, _ = case.distances(case.load(merged))
  except Exception as error:
    reason = f"transformers does not load it: {summary(error)}"
    return {"merged": WRONG, "merged_why": reason}
  row = {
    "merged_distance": outputs,
    "merged_parameter_distance": worst,
    "merged_whole": len(whole),
  }
  if max(outputs or 0, worst) <= CLOSE:
    return row | {"merged": RIGHT, "merged_why": ""}
  verdict = ACCOUNTED if told else WRONG
  return row | {"merged": verdict, "merged_why": f"{worst:.1e} at {name}"}


def loras_of(base: Any, finetuned: Any) -> dict[str, Lora]:
  """`jlora.extract` of two open checkpoints of the same names, in NumPy.

  Nothing is compiled, which would be most of a walk.
  """
  table, loras = table_for(base.spec, base.model_type), {}
  for name, spec in base.spec.items():
    view = view_of(name, spec.shape, table)
    if view is None or not is_matrix(name, spec):
      continue
    change = np.float32(finetuned[name]) - np.float32(base[name])
    change, is_exchanged = in_stored_order(change, view)
    factors = svd(change, RANKS[-1])
    missed = np.square(change, dtype=float).sum() - np.square(factors.s).sum()
    if missed > 1e-6 * np.square(change, dtype=float).sum():
      continue  # of a higher rank than this: given whole
    lora = from_factors(factors)
    loras[name] = exchange(lora) if is_exchanged else lora
  return loras


def change_matrices(model: torch.nn.Module) -> None:
  """Adds a change of rank 2 to every matrix; stacks change slice by slice."""
  generator = torch.Generator().manual_seed(1)
  owners = dict(model.named_modules())
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.dim() < 2:
        continue
      owner = owners[name.rpartition(".")[0]]
      shape = stacked_shape(parameter, owner)
      left = torch.randn(shape[0], shape[1], 2, generator=generator)
      right = torch.randn(shape[0], 2, shape[2], generator=generator)
      drawn = left @ right
      if getattr(owner, "padding_idx", None) is not None:
        drawn[0, owner.padding_idx] = 0  # transformers loads that row as zeros
      size = parameter.norm() / drawn.norm() * 0.5
      parameter.add_((drawn * size).reshape(parameter.shape))


def stacked_shape(parameter, owner):
  """(stacked, out, in) of a parameter; a kernel is one matrix."""
  kernel = isinstance(owner, torch.nn.modules.conv._ConvNd)
  kernel |= type(owner).__name__ == "ParametrizationList"
  if parameter.dim() == 3 and not kernel:
    return tuple(parameter.shape)
  return 1, parameter.shape[0], parameter[0].numel()


def put_back(folders, names, out):
  """The finetune's folder with some of the base's tensors."""
  shutil.copytree(folders[1], out)
  for file in out.glob("*.safetensors"):
    tensors = load_file(file)
    old = load_file(folders[0] / file.name)
    unknown = [name for name in names if name not in old]
    if unknown:
      raise ValueError(f"the ledger names {unknown[:3]}, which no file has")
    for name in names:
      tensors[name] = old[name]
    save_file(tensors, file, {"format": "pt"})
  return out


def merged_by_peft(model: torch.nn.Module) -> torch.nn.Module:
  """A model with its adapter in its weights; any other as it is.

  Tied parameters are parted first: PEFT would add the change of each of them to
  the one that they are.
  """
  if not isinstance(model, peft.PeftModel):
    return model
  seen = set()
  for name, parameter in list(model.named_parameters(remove_duplicate=False)):
    if id(parameter) in seen:
      owner, _, last = name.rpartition(".")
      copy = torch.nn.Parameter(parameter.detach().clone(), False)
      model.get_submodule(owner).register_parameter(last, copy)
    seen.add(id(parameter))
  return model.merge_and_unload()


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
  """Parameters by name, those that are one under each of their names."""
  found = model.named_parameters(remove_duplicate=False)
  return {name: p.detach().clone() for name, p in found}


def outputs_of(
  model: torch.nn.Module,
  inputs: Mapping[str, torch.Tensor],
  dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
  """All floating values of a model's output as one vector."""
  if dtype != torch.float32:
    model = copy.deepcopy(model).to(dtype)
  torch.manual_seed(0)
  with torch.no_grad():
    given = {
      n: v.to(dtype) if v.is_floating_point() else v.clone()
      for n, v in inputs.items()
    }
    found = list(_leaves(model(**given)))
  vector = torch.cat([x.to(dtype).flatten() for x in found])
  return torch.nan_to_num(vector, posinf=0.0, neginf=0.0)


def _leaves(value, name=""):
  if "past_key_values" in name or "cache" in name:
    return
  if isinstance(value, torch.Tensor):
    if value.is_floating_point():
      yield value
  elif isinstance(value, Mapping):
    for key, inner in value.items():
      yield from _leaves(inner, str(key))
  elif isinstance(value, (list, tuple)):
    for inner in value:
      yield from _leaves(inner)


def ratio(error: torch.Tensor, scale: torch.Tensor) -> float:
  """|error| / |scale|; infinite where it is no number."""
  off, whole = error.double().norm().item(), scale.double().norm().item()
  if off == 0:
    return 0.0
  return off / whole if whole and off == off else float("inf")


def said(warning) -> str:
  """A warning's text, short."""
  return " ".join(str(warning.message).split())[:160]


def summary(error: BaseException) -> str:
  """An error in a line."""
  text = " ".join(str(error).split())
  text = re.sub(r"(/\w+)+/(base|finetuned|adapter|merged)\b", r"\2", text)
  if len(text) > 240:
    text = f"{text[:140]} [...] {text[-90:]}"
  return f"{type(error).__name__}: {text}"


def as_json(row: Mapping[str, Any]) -> str:
  """A row in a line of JSON."""
  return json.dumps(row, default=str)
