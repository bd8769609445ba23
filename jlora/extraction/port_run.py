# SPDX-License-Identifier: Apache-2.0
"""Carries an adapter over from disk to disk: a module at a time, resumable.

open ─► plan ─► port (read, carry, measure, journal) ─► write ─► port.json
"""

import functools
import json
import math
import os
import warnings
from collections.abc import Container, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.documents import (
  LIST,
  NUMBER,
  OBJECT,
  TEXT,
  check_fields,
  read_object,
)
from jlora.checkpoints.new_files import noted, replace_text
from jlora.checkpoints.packed_formats import check_dequantised
from jlora.checkpoints.sources import check_apart
from jlora.extraction.port_planning import PortPlan, expand_map, plan_port
from jlora.extraction.ported_adapters import (
  check_keep,
  port_module,
  warn_of_lengths,
)
from jlora.extraction.porting import Port, add
from jlora.factoring.factorisers import krylov, svd
from jlora.formats.fingerprints import (
  check_fingerprint,
  describe_weight,
  read_fingerprint,
)
from jlora.formats.lazy import Lazy
from jlora.formats.peft.parts import HEAD
from jlora.formats.peft.reading import PeftAdapter, load_peft
from jlora.formats.peft.writing import save_peft
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.pairing.match import is_table
from jlora.runs.fingerprints import (
  check_unchanged,
  describe_input,
  describe_versions,
  identify,
  name_of,
  stamp_inputs,
)
from jlora.runs.finished import check_run, describe_run
from jlora.runs.journal import (
  FOLDER,
  Journal,
  check_folder,
  check_settings,
  open_journal,
  remove_leftovers,
)
from jlora.runs.lock import hold_folder
from jlora.runs.pool import Task, finish_in_order, open_pool
from jlora.runs.progress import Progress

PORT = "port.json"
# Spaces that only figures need: three blocks, of at most six.
_FIGURES = functools.partial(krylov, passes=3)
_LARGEST = 2**28  # bytes of a report


class _Inputs(NamedTuple):
  """What a port reads: the adapter, its base, and the base it is for."""

  folder: str
  adapter: PeftAdapter
  files: dict[str, Checkpoint]
  plan: PortPlan

  @property
  def target(self) -> Checkpoint:
    """Returns the base that the adapter is for."""
    return self.files["target"]


def port_checkpoint(
  adapter: str | os.PathLike,
  source: str | os.PathLike,
  target: str | os.PathLike,
  out: str | os.PathLike,
  *,
  method: Port = add,
  k: int | None = None,
  keep: float = 0.0,
  paths: Mapping[str, str | None] | None = None,
  base_model: str | None = None,
  resume: bool = False,
  overwrite: bool = False,
  log: IO[str] | None = None,
) -> dict[str, Any]:
  """Carries a PEFT adapter folder to another base; returns the report.

      loras_t[path] = method(loras_s[path], source[path], target[path])

  Embeddings and heads are matched row by row, by the tokens of both tokenizers
  (see `match_rows`). What the target's own fingerprint is goes with the result.

  Args:
    adapter: a PEFT folder.
    source: the base it was made on.
    target: the base it is for.
    out: output folder, new or empty. One run at a time writes to it.
    method: `add`, `project`, `both_parts` or `rotate`.
    k: leading singular vectors of a space; None is all for the method, and a
      quarter of them, 1 to 16, for the figures.
    keep: modules of which less is kept are left out.
    paths: name in the source -> name in the target, or None, as for
      `expand_map`: parameters, or parts of the model such as layers.
    base_model: name of the target in the adapter's configuration; None is its
      path.
    resume: go on with an unfinished run of the same inputs and options in
      `out`, or return the report of a finished one, if all that made it is the
      same and all that it wrote is as it was.
    overwrite: allow a folder that is not empty; an adapter, report or journal
      in it is replaced, other files stay.
    log: where progress goes; None is standard error.

  Returns:
    The contents of `port.json`: options; `modules`, path in the target -> the
    figures of `Ported.rows`; `left_out`, paths in the source of which too
    little is kept; `unmapped`, those that the map leaves out;
    `not_representable`; `run`, by which a resumed run knows it again. The
    result is the same bytes whether or not the run was interrupted. Memory: the
    adapter, and modules of both bases with their float32 copies, within 512 MiB
    or a single larger one. Disk: the adapter twice while it is written.

  Raises:
    ValueError: as `port_adapter` and `load_peft`; an adapter that stores whole
      tensors; nothing is left to write; inputs that change meanwhile; or a
      folder that is not empty, in use, an input's, or another run's.

  Warns:
    OtherBaseWarning: the adapter says that it was made on another base.
    UserWarning: as `port_adapter`.

  Example:
    >>> port_checkpoint("/nowhere", "/nowhere", "/nowhere", "/tmp/out")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere does not exist
  """
  check_keep(keep)
  out = Path(out)
  settings = {
    "jlora": metadata.version("jlora"),
    "adapter": str(adapter),
    "source": str(source),
    "target": str(target),
    "method": name_of(method),
    "k": k,
    "keep": keep,
    "paths": None if paths is None else dict(paths),
  }
  inputs, stamps = _open(adapter, source, target, paths, out)
  _check_k(k, inputs)
  marks = _marks_of(settings, method, base_model, inputs.files)
  with hold_folder(out):
    if resume or overwrite:
      remove_leftovers(out)
    if resume and not (out / FOLDER).exists() and (out / PORT).exists():
      return _finished(out / PORT, settings, marks)
    check_folder(out, PORT, resume=resume, overwrite=overwrite)
    journal = open_journal(out, marks, resume=resume)
    _port_missing(inputs, journal, method, k, keep, log)
    check_unchanged(inputs.files, stamps)
    report = _write(inputs, journal, out, settings, marks, base_model)
    check_unchanged(inputs.files, stamps)
    replace_text(out / PORT, json.dumps(report, indent=2) + "\n")
    journal.close()
  warn_of_lengths(report["modules"])
  return report


def _open(adapter, source, target, paths, out) -> tuple[_Inputs, dict]:
  """Opens all inputs and plans the port; also returns their stamps."""
  bases = {
    name: open_checkpoint(path)
    for name, path in (("source", source), ("target", target))
  }
  for base in bases.values():
    check_dequantised(base)
  files = bases | {"adapter": open_checkpoint(adapter)}
  stamps = stamp_inputs(files)
  check_apart(out, files.values())
  old = bases["source"]
  found = load_peft(adapter, like=old.spec, config=old.config, on_host=True)
  _check_whole(str(adapter), found, old)
  check_fingerprint(read_fingerprint(adapter), old)
  mapped = None if paths is None else expand_map(paths, found.loras)
  plan = plan_port(found.loras, old, bases["target"], paths=mapped)
  if not plan.places:
    raise ValueError(
      f"The map leaves out all {len(plan.unmapped)} modules of {adapter}; map "
      "one at least to a name in the target."
    )
  _warn_of_heads(plan, old, bases["target"])
  return _Inputs(str(adapter), found, files, plan), stamps


def _check_whole(folder: str, adapter: PeftAdapter, source: Checkpoint) -> None:
  """Raises if an adapter holds what is no change of its base."""
  own = [  # PEFT stores an embedding's table beside its Lora
    path
    for path, value in adapter.full.items()
    if path not in source or not np.array_equal(source[path], value)
  ]
  if own:
    raise ValueError(
      f"{folder} stores {len(own)} whole tensors (modules_to_save): "
      f"{name_some(own)}; on another base they would undo its update. Extract "
      "the adapter anew, without them."
    )
  if not adapter.loras:
    raise ValueError(f"{folder} holds no Loras.")


def _warn_of_heads(
  plan: PortPlan, source: Checkpoint, target: Checkpoint
) -> None:
  """Warns where a head that was tied to a changed embedding no more is."""
  is_tied = target.config.get("tie_word_embeddings", False)
  if HEAD in source or HEAD not in target or is_tied:
    return
  if tables := [path for path in plan.places if is_table(path)]:
    warnings.warn(
      f"The source's head is tied to {tables[0]}, and the target has one of "
      "its own: the head does not get the change that the embedding has.",
      stacklevel=4,
    )


def _check_k(k: int | None, inputs: _Inputs) -> None:
  """Raises unless every weight has as many singular vectors."""
  if k is None:
    return
  wrong = []
  for path in inputs.plan.places:
    lora, rows = inputs.adapter.loras[path], inputs.plan.rows.get(path)
    sides = [lora.a.shape[-1], lora.b.shape[-1]]
    if rows is not None:
      sides[inputs.plan.axes[path]] = int(np.sum(rows >= 0))
    if not 1 <= k <= min(sides):
      wrong.append(f"{path} has {min(sides)}")
  if wrong:
    raise ValueError(
      f"k is {k}; {len(wrong)} weights have fewer singular vectors, or it is "
      f"below 1: {name_some(wrong)}."
    )


def _marks_of(settings, method: Port, base_model, files) -> dict[str, Any]:
  """Returns all that determines a result."""
  marks = {**settings, **describe_versions(), "base_model": base_model}
  marks["method code"] = identify(method)
  for name, checkpoint in files.items():
    marks |= describe_input(name, checkpoint)
  return marks


def _port_missing(
  inputs: _Inputs, journal: Journal, method: Port, k, keep: float, log
) -> None:
  """Carries the modules that are not in the journal yet."""
  plan, bases = inputs.plan, inputs.files
  # All directions of a weight are found exactly, or none are needed.
  factor = svd if k is None and method is not add else krylov
  work = functools.partial(
    port_module, plan, method=method, k=k, keep=keep, factor=factor,
    figures=_FIGURES,
  )  # fmt: skip
  sizes = {
    path: bases["source"].spec[path].nbytes + bases["target"].spec[to].nbytes
    for path, to in plan.places.items()
  }

  def task(path: str) -> Task:
    """Returns the work on one module: both weights, and float32 of them."""
    copies = 12 * math.prod(plan.old.shapes[path])
    lora = inputs.adapter.loras[path]
    begin = lambda: pool.submit(work, path, lora)  # noqa: E731
    return Task(path, sizes[path] + copies, begin)

  with (
    Progress(sum(sizes.values()), log, errors=False) as progress,
    open_pool() as pool,
  ):
    missing = []
    for path, to in plan.places.items():
      if to in journal:
        progress.update(sizes[path], to)
      else:
        missing.append(path)
    for one, ported in finish_in_order(map(task, missing)):
      to = plan.places[one.name]
      _keep(journal, to, ported)
      progress.update(sizes[one.name], to)


def _keep(journal: Journal, to: str, one) -> None:
  """Puts a module into the journal; one that is left out without its Lora."""
  record = {"row": one.row}
  arrays = {}
  if one.row["is_kept"]:
    record["fingerprint"] = describe_weight(to, one.target)
    lora = one.lora
    arrays = {
      "a": np.asarray(lora.a),
      "b": np.asarray(lora.b),
      "scale": np.asarray(lora.scale, np.float32),
    }
  journal.put(to, arrays, record)


def _write(
  inputs: _Inputs, journal: Journal, out: Path, settings, marks, base_model
) -> dict[str, Any]:
  """Writes the adapter from a complete journal; returns the report."""
  plan = inputs.plan
  # In one order: the journal has another for modules of a run before.
  modules = {
    to: dict(sorted(journal[to]["row"].items())) for to in plan.places.values()
  }
  kept = [to for to, row in modules.items() if row["is_kept"]]
  if not kept:
    journal.close()
    raise ValueError(
      f"Of no module a share of {settings['keep']} is kept, so that nothing is "
      "left to write; lower --keep."
    )
  dropped = [p for p, to in plan.places.items() if not modules[to]["is_kept"]]
  biases, unmapped, left_out = _biases(inputs, kept)
  with noted() as files:
    left = _save(inputs, journal, out, kept, biases, base_model)
  report = {
    **settings,
    "modules": modules,
    "left_out": dropped + left_out,
    "unmapped": plan.unmapped + unmapped,
    "not_representable": dict(left),
  }
  return report | {"run": describe_run(out, marks, files, report)}


def _save(
  inputs: _Inputs, journal: Journal, out: Path, kept, biases, base_model
) -> dict[str, str]:
  """Writes the PEFT folder, a module at a time; returns what it cannot hold."""
  target = inputs.target

  def lora(to: str) -> Lora:
    arrays: Mapping[str, Any] = journal.arrays(to)
    return Lora(arrays["a"], arrays["b"], arrays["scale"])

  first = next(iter(inputs.adapter.loras.values()))
  return save_peft(
    out,
    Lazy({to: functools.partial(lora, to) for to in kept}),
    like=target.spec,
    biases=biases,
    dtype=first.a.dtype,
    base_model=base_model or str(target.path),
    task_type="auto",
    config=target.config,
    fingerprint={to: journal[to]["fingerprint"] for to in kept},
    overwrite=True,
  )


def _biases(
  inputs: _Inputs, kept: Container[str]
) -> tuple[dict[str, Any], list[str], list[str]]:
  """Returns changes of biases by their names in the target.

  A bias goes where its matrix goes, and is left out with it: also returned are
  the names of those whose matrix the map leaves out, and of those of whose
  matrix too little is kept.

  Args:
    inputs: what is ported.
    kept: paths in the target of the matrices that are written.
  """
  places, ignored = inputs.plan.places, set(inputs.plan.unmapped)
  found, unmapped, left_out = {}, [], []
  for path, change in inputs.adapter.biases.items():
    matrix = path.removesuffix("bias") + "weight"
    to = places.get(matrix, matrix)
    if matrix in ignored:
      unmapped.append(path)
    elif matrix in places and to not in kept:
      left_out.append(path)
    else:
      found[to.removesuffix("weight") + "bias"] = change
  return found, unmapped, left_out


_FIELDS = {
  "method": TEXT,
  "keep": NUMBER,
  "modules": OBJECT,
  "left_out": LIST,
  "unmapped": LIST,
  "not_representable": OBJECT,
}


def _finished(file: Path, settings, marks) -> dict[str, Any]:
  """Returns the report of a finished run if it is the one asked for."""
  report = read_object(file, largest=_LARGEST)
  check_fields(report, _FIELDS, str(file), required=_FIELDS)
  said = {name: report.get(name) for name in settings}
  check_settings(file, said, json.loads(json.dumps(settings)))
  told = {name: value for name, value in report.items() if name != "run"}
  check_run(file, report.get("run"), marks, told)
  return report
