# SPDX-License-Identifier: Apache-2.0
"""Checks whether an adapter is in PEFT what its report says.

adapter, config.json ─► model without weights, adapter on it (peft_models.py)
  ─► keys, modules, sizes ─► with a finetune: each module's error ─► Verdict

A module that the report calls extracted must be changed by the adapter, by as
much as the report says, and a parameter that the finetune changed must be
carried or stand in the ledger as not representable.
"""

import collections
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.hub import locate
from jlora.commands.openings import OPENING
from jlora.extraction.report import (
  REPORT,
  Report,
  read_report,
  write_report,
)
from jlora.formats.components import Components, open_components, open_pair
from jlora.formats.fingerprints import check_fingerprint, read_fingerprint
from jlora.formats.peft.layouts import CONFIG, PREFIX, TENSORS
from jlora.messages import name_some

# What the check is done with, and what none of jlora depends on.
_NEEDED = ("peft", "transformers", "torch")
# Largest difference between a relative error that is measured here and the
# report's. Both come from the same numbers, in other orders of summation.
_TOLERANCE = 1e-3
# Rounding of one number to a storage dtype of factors and biases.
_ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}
_PIECE = 2**16  # numbers that are summed in float32


class Verdict(NamedTuple):
  """What a check found.

  Attributes:
    by: the library that loaded the adapter.
    version: its version.
    modules: how many the adapter changes: those of the report, else the
      parameters that PEFT changes.
    worst: largest difference between a module's relative error as measured in
      PEFT and in the report (without a report: the largest relative error);
      None without a finetune.
    offenders: {module or parameter: what is wrong with it}; empty if all is
      right.
  """

  by: str
  version: str
  modules: int
  worst: float | None
  offenders: dict[str, str]


def verified(verdict: Verdict) -> dict[str, Any] | None:
  """Returns what a report says of a verdict.

  Args:
    verdict: from `check`.

  Returns:
    {by, version, modules, worst_difference}; None if something is wrong.
  """
  if verdict.offenders:
    return None
  by, version, modules, worst, _ = verdict
  return {
    "by": by,
    "version": version,
    "modules": modules,
    "worst_difference": worst,
  }


def record(
  folder: str | os.PathLike,
  report: Report,
  base: str | os.PathLike,
  finetuned: str | os.PathLike,
) -> tuple[Verdict, Report]:
  """Checks a new adapter; its report.json says so if all is right.

  Args:
    folder: the adapter.
    report: as it is in the folder.
    base: what it was extracted from.
    finetuned: and from.

  Returns:
    The verdict and the report with `verified`, None where something is wrong.

  Raises:
    ValueError: as `check`.
  """
  verdict = check(folder, base, finetuned)
  told = verified(verdict)
  if told != report.verified:
    report = report._replace(verified=told)
    write_report(folder, report)
  return verdict, report


def raise_if_wrong(verdict: Verdict) -> None:
  """Raises with the first three offenders, if there are any.

  Args:
    verdict: from `check`.

  Raises:
    ValueError: something is wrong with the adapter.
  """
  if verdict.offenders:
    some = name_some(
      f"{name}: {why}" for name, why in verdict.offenders.items()
    )
    raise ValueError(
      f"not what the report says in {verdict.by} {verdict.version}, "
      f"{len(verdict.offenders)} offenders: {some}."
    )


class _Unit(NamedTuple):
  """Rows of a report and the parameters of the model that they describe."""

  rows: list[Mapping[str, Any]]
  parameters: list[str]
  is_tied: bool = False

  @property
  def name(self) -> str:
    """Returns what it is called in messages."""
    first, *more = self.rows
    if self.is_tied:
      return f"{self.parameters[0]} (tied to {first['path']})"
    if more:
      return f"{self.parameters[0]} (of {len(self.rows)} modules)"
    return first["path"]


def check_verifiable(
  base: str | os.PathLike, opening: Mapping[str, Any] = MappingProxyType({})
) -> Checkpoint:
  """Raises unless all that a check needs is there, before hours of work.

  Args:
    base: the base.
    opening: how it is opened, arguments of `open_components`.

  Returns:
    It, open.

  Raises:
    ValueError: PEFT, transformers or torch is not installed, or the base is
      neither a folder with a config.json nor a model of images.
  """
  for name in _NEEDED:
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f"not verified: {name} is not installed; pip install peft transformers"
      )
  found = open_components(base, **opening)
  if not (_has_class(found) or isinstance(found, Components)):
    raise ValueError(
      f"not verified: {found.path} has no config.json, from which transformers "
      "would build the base."
    )
  return found


def _has_class(base: Checkpoint) -> bool:
  """Returns whether transformers builds a base: not those of diffusers."""
  if not (base.path / "config.json").is_file():
    return False
  return not isinstance(base, Components) or bool(base.model_type)


def check(
  adapter: str | os.PathLike,
  base: str | os.PathLike,
  finetuned: str | os.PathLike | None = None,
  opening: Mapping[str, Any] = MappingProxyType({}),
) -> Verdict:
  """Puts an adapter on its base in PEFT and compares it with its report.

  The base is built from its config.json without weights. Tensors of the
  checkpoints become parameters by transformers' own rules. Of a model of images
  the base is layers of its names and shapes: linear ones and convolutions.

  Args:
    adapter: a PEFT folder; with a `report.json` each module is held against
      it.
    base: the base's Hugging Face folder, or a model of images that
      `open_components` opens; of its tensors only names, shapes and samples are
      read, unless there is a finetune.
    finetuned: the finetune. With it `W + change` is compared with its weights,
      one parameter at a time.
    opening: how both are opened, arguments of `open_pair`; what is not in it is
      as the report says.

  Returns:
    Verdict. Memory: the adapter, and four float32 copies of the largest
    parameter. Reads both checkpoints once.

  Warns:
    OtherBaseWarning: the adapter says that it was made on another base.

  Raises:
    ValueError: PEFT, transformers or torch is not installed, or there is no
      adapter or no config.json, or one that needs code of its own.
  """
  adapter = locate(adapter)
  report = read_report(adapter) if (adapter / REPORT).exists() else None
  said = report.settings if report else {}
  opening = {name: opening.get(name) or said.get(name) for name in OPENING}
  opened = check_verifiable(base, opening)
  for name in (CONFIG, TENSORS):
    if not (adapter / name).is_file():
      raise ValueError(f"not verified: {adapter} has no {name}.")
  tuned = None
  if finetuned is not None:
    opened, tuned = open_pair(base, finetuned, **opening)
  known = read_fingerprint(adapter)
  if known:
    check_fingerprint(known, opened, name=str(adapter))
  # The one file that imports torch.
  peft_models = importlib.import_module("jlora.commands.peft_models")
  who = peft_models.NAME, peft_models.VERSION
  try:
    shapes = {name: one.shape for name, one in opened.spec.items()}
    adapted = peft_models.Adapted(
      adapter, opened.path, None if _has_class(opened) else shapes
    )
  except peft_models.Refused as error:
    wrong = {_module_of(name): why for name, why in error.offenders.items()}
    wrong = wrong or {str(adapter): f"PEFT does not load it: {error}"}
    return Verdict(*who, 0, None, wrong)
  found = _Check(adapted, report, opened, tuned)
  return Verdict(*who, found.modules, found.worst, found.offenders)


class _Check:
  """One check under way: what was found so far."""

  def __init__(
    self,
    adapted: Any,
    report: Report | None,
    base: Checkpoint,
    finetuned: Checkpoint | None,
  ):
    self.offenders: dict[str, str] = {}
    self.worst: float | None = None
    self._adapted = adapted
    self._base = adapted.loader(base)
    self._finetuned = None
    self._report = report or Report({}, [], {}, [])
    self._has_report = report is not None
    dtype = str(self._report.settings.get("dtype"))
    self._rounding = _ROUNDING.get(dtype, _TOLERANCE)
    self._statuses = {
      side: {name: row["status"] for row in self._report.ledger
             for name in row[side]}
      for side in ("base", "finetuned")
    }  # fmt: skip
    if finetuned is not None:
      self._finetuned = adapted.loader(finetuned)
    self._check_keys()
    units = list(self._units())
    inside = {name for unit in units for name in unit.parameters}
    for unit in units:
      self._check_unit(unit)
    carried = [name for name in adapted.shapes if adapted.carries(name)]
    self.modules = len(self._report.modules) or len(carried)
    self._check_kept()
    if self._finetuned is not None:
      for name in adapted.shapes:
        if name not in inside:
          self._check_other(name)

  def _blame(self, name: str, why: str) -> None:
    """Notes what is wrong with a module; the first reason counts."""
    self.offenders.setdefault(_module_of(name), why)

  def _check_keys(self) -> None:
    """Reports keys of the file that do not arrive, and parts left empty."""
    for key in self._adapted.unused:
      self._blame(key, "PEFT loads its tensors nowhere")
    for key in self._adapted.missing:
      self._blame(key, "PEFT wraps it, and the file has no tensors for it")

  def _units(self) -> Iterable[_Unit]:
    """Groups rows and parameters that share tensors: experts, fused layers."""
    rows_of: dict[str, list[int]] = collections.defaultdict(list)
    places = []
    for at, row in enumerate(self._report.modules):
      found = self._base.parameters_of(row["path"])
      places.append(found)
      for name in found:
        rows_of[name].append(at)
      if not found:
        self._blame(
          row["path"],
          f"extracted, and no parameter of {self._adapted.model_class}",
        )
    seen: set[int] = set()
    for start in range(len(places)):
      if start in seen or not places[start]:
        continue
      rows, parameters, todo = [], [], [start]
      seen.add(start)
      while todo:
        at = todo.pop()
        rows.append(self._report.modules[at])
        for name in places[at]:
          if name not in parameters:
            parameters.append(name)
            new = [one for one in rows_of[name] if one not in seen]
            seen.update(new)
            todo += new
      unit = _Unit(rows, parameters)
      yield unit
      # What is tied to it changes with it.
      for name, owner in self._adapted.owners.items():
        tied = {name, owner} & {*parameters}
        for other in {name, owner} - tied if tied else ():
          if other not in rows_of and not self._base.sources.get(other):
            yield _Unit(rows, [other], is_tied=True)

  def _check_unit(self, unit: _Unit) -> None:
    """Reports parameters that the adapter changes otherwise than reported."""
    lacking = [n for n in unit.parameters if not self._adapted.carries(n)]
    for name in lacking:
      self._blame(
        unit.name if len(unit.parameters) == 1 else name,
        "extracted, and PEFT changes nothing in it",
      )
    if lacking:
      return
    if self._finetuned is None:
      self._check_size(unit)
    else:
      self._check_error(unit)

  def _check_size(self, unit: _Unit) -> None:
    """Reports, without a finetune, a change of another size than was kept."""
    norms = []
    for name in unit.parameters:
      change = self._adapted.change(name)
      if change is None or change.shape != self._adapted.shapes[name]:
        self._blame(unit.name, _misfit(self._adapted.shapes[name], change))
        return
      norms.append(_norm(change))
    found = math.hypot(*norms)
    kept = math.hypot(
      *(row["norm"] * math.sqrt(max(row["energy"], 0)) for row in unit.rows)
    )
    # What is left out is orthogonal to what is kept, but for rounding.
    if not abs(found - kept) <= self._rounding * kept:
      self._blame(
        unit.name,
        f"PEFT changes it by {found:.4g} (norm), the report by {kept:.4g}",
      )

  def _check_error(self, unit: _Unit) -> None:
    """Reports where `W + change` misses the finetune by another error."""
    norm2 = error2 = 0.0
    is_partly = False
    for name in unit.parameters:
      found = self._compare(name)
      if isinstance(found, str):
        self._blame(unit.name, found)
        return
      norm2 += found[0] ** 2
      error2 += found[1] ** 2
      is_partly |= self._is_excused(name)
    told2 = sum(row["norm"] ** 2 for row in unit.rows)
    expected2 = sum(row["error"] ** 2 for row in unit.rows)
    if is_partly:  # some experts of a stack are in the ledger
      expected2 += max(norm2 - told2, 0.0)
    elif not abs(norm2 - told2) <= 1e-2 * told2:
      self._blame(
        unit.name,
        f"the finetune changed it by {math.sqrt(norm2):.4g} (norm), the report "
        f"says {math.sqrt(told2):.4g}",
      )
    error = math.sqrt(error2 / norm2) if norm2 else math.inf
    expected = math.sqrt(expected2 / norm2) if norm2 else 0.0
    difference = abs(error - expected)
    self.worst = max(self.worst or 0.0, difference)
    if not difference <= _TOLERANCE:
      self._blame(
        unit.name,
        f"relative error {error:.4g} in PEFT, {expected:.4g} expected",
      )

  def _check_kept(self) -> None:
    """Reports what is called kept whole and is not in the adapter."""
    for row in self._report.ledger:
      if row["status"] != "kept whole":
        continue
      for tensor in row["base"]:
        names = self._base.parameters_of(tensor)
        if not names or not all(map(self._adapted.carries, names)):
          self._blame(tensor, "kept whole, and PEFT changes nothing in it")

  def _check_other(self, name: str) -> None:
    """Reports a changed parameter that is neither carried nor in the ledger."""
    found = self._compare(name)
    if isinstance(found, str):
      self._blame(name, found)
      return
    norm, error = found
    if not self._adapted.carries(name):
      if norm and not self._is_excused(name):
        self._blame(
          name,
          "changed, not carried, and not in the ledger as not representable"
          if self._has_report
          else "changed, and not in the adapter",
        )
      return
    if not error:
      return
    share = error / norm if norm else math.inf
    if not norm:
      self._blame(name, "changed by the adapter, not by the finetune")
    elif not self._has_report:
      self.worst = max(self.worst or 0.0, share)
    elif not share <= self._rounding:
      self._blame(name, f"kept whole, and off by {share:.4g} in PEFT")

  def _compare(self, name: str) -> tuple[float, float] | str:
    """Norms of a parameter's change and of what the adapter misses of it."""
    loader: Any = self._finetuned
    before, after = self._base.read(name), loader.read(name)
    new = self._adapted.new_value(name)
    change = self._adapted.change(name)
    if after is None:
      is_lost = new is not None or change is not None
      return "only in the adapter" if is_lost else (0.0, 0.0)
    after = after.astype(np.float32, copy=False)
    if new is not None and change is None:
      if new.shape != after.shape:
        return _misfit(after.shape, new)
      error = _norm(after - new)
      if before is None or before.shape != after.shape:
        return _norm(after), error
      return _norm(after - before), error
    if before is None:
      return _norm(after), _norm(after)
    if before.shape != after.shape:  # another vocabulary, rows compared
      if before.shape[1:] != after.shape[1:]:
        return _misfit(before.shape, after)
      rows = min(len(before), len(after))
      before, after = before[:rows], after[:rows]
      change = None if change is None else change[:rows]
    # The difference first: added to the weights a small change is rounded.
    after -= before
    norm = _norm(after)
    if new is not None:
      after += before - new
    if change is not None:
      if change.shape != after.shape:
        return _misfit(after.shape, change)
      after -= change
    return norm, _norm(after)

  def _is_excused(self, name: str) -> bool:
    """Returns whether the ledger lists a parameter's tensors as missing."""
    loader: Any = self._finetuned
    told = [
      self._statuses[side].get(tensor)
      for side, where in (("base", self._base), ("finetuned", loader))
      for tensor in where.source_of(name)
    ]
    return "not representable" in told


def _module_of(name: str) -> str:
  """Returns the module of a parameter or of an adapter's tensor."""
  name = name.removeprefix(PREFIX)
  name = re.sub(r"(\.base_layer)*\.lora_[^.]+(\.\w+){0,2}$", "", name)
  return name.removesuffix(".weight")


def _norm(array: np.ndarray) -> float:
  """Computes the Frobenius norm; pieces of float32 are summed in float64."""
  flat = array.reshape(-1)
  pieces = (flat[at : at + _PIECE] for at in range(0, flat.size, _PIECE))
  return math.sqrt(sum(float(np.dot(piece, piece)) for piece in pieces))


def _misfit(shape: tuple[int, ...], found: np.ndarray | None) -> str:
  """Says what is wrong with a shape."""
  there = "nothing" if found is None else found.shape
  return f"{there} for a parameter of shape {tuple(shape)}"
