# SPDX-License-Identifier: Apache-2.0
"""Merges checkpoints from disk to disk: streaming, bounded, resumable.

recipe ─► plan ─► read, merge (threads) ─► shards, one after the other ─► folder
"""

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.checksums import checksum_of
from jlora.checkpoints.huggingface import plan_shards, write_index
from jlora.checkpoints.new_files import (
  move,
  noted,
  remove_temporaries,
  sync_folder,
)
from jlora.checkpoints.safetensors import stream_safetensors
from jlora.checkpoints.sources import check_apart, copy_files, list_companions
from jlora.formats.adapted import files_of
from jlora.formats.peft.layouts import TENSORS
from jlora.merging.checkpoints.adapter_folders import (
  is_adapter,
  plan_adapters,
  write_adapters,
)
from jlora.merging.checkpoints.companions import place_companions
from jlora.merging.checkpoints.merger import Merger
from jlora.merging.checkpoints.planning import (
  Job,
  MergePlan,
  open_models,
  plan_merge,
)
from jlora.merging.checkpoints.reading import Piece
from jlora.merging.checkpoints.recipes import Recipe
from jlora.merging.checkpoints.report import (
  MERGE,
  MergeReport,
  describe_recipe,
  finished_merge,
  write_merge,
)
from jlora.messages import name_some
from jlora.numerics.backends import words_of
from jlora.pairing.pairs import names_of
from jlora.runs.fingerprints import (
  check_unchanged,
  describe_input,
  describe_versions,
  hash_lines,
  identify,
  stamp_inputs,
)
from jlora.runs.journal import (
  FOLDER,
  Journal,
  check_folder,
  check_no_link,
  open_journal,
  remove_leftovers,
)
from jlora.runs.lock import hold_folder
from jlora.runs.pool import Task, finish_in_order, open_pool
from jlora.runs.progress import Progress


def merge_checkpoints(
  recipe: Recipe,
  out: str | os.PathLike,
  *,
  key: Any = None,
  max_shard_bytes: int = 2**30,
  resume: bool = False,
  overwrite: bool = False,
  log: IO[str] | None = None,
) -> MergeReport:
  """Merges the checkpoints of a recipe into a folder; returns the report.

      out[name] = round(method([model[name], ...], weights, base[name]))

  Merges are computed in float32 and rounded once, whatever the models are
  stored in; that a model is float64 is a note. The folder holds safetensors
  files (with an index if there are several), the reference's config.json,
  adapted to the result's layers and dtype, its tokenizer, and `merge.json`.

  Args:
    recipe: what to merge; `read_recipe` reads one.
    out: output folder, new or empty; neither a model nor a folder that holds
      one. One run at a time writes to it.
    key: PRNG key, or its two words of NumPy; each tensor uses
      `key_for(key, name)`.
    max_shard_bytes: largest size of a file. A killed run keeps its finished
      files.
    resume: go on with an unfinished run of the same inputs and recipe in `out`,
      or return the report of a finished one, if all that made it is the same
      and all that it wrote is as it was.
    overwrite: allow a folder that is not empty; a checkpoint in it is replaced,
      other files stay.
    log: where progress goes; None is standard error.

  Returns:
    MergeReport. The result is the same bytes whether or not the run was
    interrupted. Memory: methods that work piece by piece (`linear`, `slerp`,
    `nearswap`, `passthrough`, `task_arithmetic`, `dare`) take a few MiB of each
    tensor at a time; the others take whole tensors with their float32 copies,
    within 512 MiB or a single larger one, never the whole model. For two models
    and their base, XLA reports for `della` 3.7 times the size of their tensors
    in float32 and 6.7 times in bfloat16; for `karcher`, `sce` and `breadcrumbs`
    at most 3 and 4.7 times; for others at most 3. Disk: the result once.

  Raises:
    ValueError: models that cannot be read, do not belong together or change
      meanwhile, layers that do not exist, settings that the method refuses, NaN
      or infinity in a parameter, a result larger than its dtype holds, a tensor
      that is an integer in one model and not in another, small files of the
      reference that are links to elsewhere, a folder that is not empty, in use
      by another run, or a model's, or a journal or result of another run or
      that is damaged.

  Example:
    >>> import io, tempfile
    >>> from jlora.checkpoints import open_checkpoint, write_safetensors
    >>> from jlora.merging import Input, Slice, linear
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   inputs = []
    ...   for name, value in (("a", 1.0), ("b", 3.0)):
    ...     inputs.append(Input(f"{tmp}/{name}.safetensors"))
    ...     w = np.full(2, value, np.float32)
    ...     write_safetensors(inputs[-1].model, {"w": w})
    ...   recipe = Recipe(linear, (Slice(tuple(inputs)),))
    ...   _ = merge_checkpoints(recipe, f"{tmp}/out", log=io.StringIO())
    ...   open_checkpoint(f"{tmp}/out")["w"]
    array([2., 2.], dtype=float32)
  """
  out = Path(out)
  settings = {
    **describe_recipe(recipe),
    "jlora": metadata.version("jlora"),
    "key": words_of(key).tolist(),
    "max_shard_bytes": max_shard_bytes,
  }
  if any(is_adapter(one.model) for p in recipe.slices for one in p.inputs):
    return _merge_adapters(
      recipe, out, key, settings, resume=resume, overwrite=overwrite
    )
  models = open_models(recipe)
  inputs = _inputs_of(models)
  stamps = stamp_inputs(inputs)
  plan = plan_merge(recipe, models)
  beside = {file.parent for file in plan.companions.copied}
  check_apart(out, [*inputs.values(), *sorted(beside)])
  small = _companions_of(plan)
  merger = Merger(recipe.method, plan.models, key, plan.jobs)
  _check_jobs(plan, merger)
  shards = plan_shards(out, _spec_of(plan), max_shard_bytes, plan.stem)
  marks = _marks_of(recipe, settings, inputs)
  marks["small files"] = digests = _digests(plan)
  marks["tensors"] = hash_lines(map(repr, plan.jobs))
  with hold_folder(out):
    if resume or overwrite:
      remove_leftovers(out)
    if resume and not (out / FOLDER).exists() and (out / MERGE).exists():
      return finished_merge(out / MERGE, settings, marks)
    check_folder(out, MERGE, resume=resume, overwrite=overwrite)
    journal = open_journal(out, marks, resume=resume)
    _write_shards(plan, merger, journal, shards, log)
    files = _place(plan, out, journal, shards, small)
    check_unchanged(inputs, stamps)
    _check_companions(plan, digests)
    report = _report_of(plan, merger, settings)
    report = write_merge(out, report, marks, files)
    journal.close()
  return report


def _check_jobs(plan: MergePlan, merger: Merger) -> None:
  """Raises unless every tensor can be merged, as far as headers tell."""
  for job in {(j.settings, len(j.sources)): j for j in plan.jobs}.values():
    merger.check(job)
  for job in plan.jobs:
    merger.check_kinds(job)


def _report_of(
  plan: MergePlan, merger: Merger, settings: dict[str, Any]
) -> MergeReport:
  """Returns what a merge tells, without what made it."""
  return MergeReport(
    settings,
    len(plan.jobs),
    sum(_size(job) for job in plan.jobs),
    plan.notes
    + _note_wide(plan, merger)
    + [f"{job.name}: {job.note}" for job in plan.jobs if job.note],
  )


def _merge_adapters(
  recipe: Recipe, out: Path, key, settings, *, resume: bool, overwrite: bool
) -> MergeReport:
  """Merges folders of adapters into one; it is there whole or not at all."""
  inputs = {
    f"model {one.model}": open_checkpoint(one.model)
    for one in recipe.slices[0].inputs
  }
  check_apart(out, inputs.values())
  stamps, plan = stamp_inputs(inputs), plan_adapters(recipe)
  marks = _marks_of(recipe, settings, inputs)
  with hold_folder(out):
    if resume or overwrite:
      remove_leftovers(out)
    if resume and (out / MERGE).exists():
      return finished_merge(out / MERGE, settings, marks)
    check_folder(out, MERGE, resume=resume, overwrite=overwrite)
    with noted() as files:
      notes = plan.notes + write_adapters(plan, out, key)
    check_unchanged(inputs, stamps)
    spec = open_checkpoint(out / TENSORS).spec
    nbytes = sum(one.nbytes for one in spec.values())
    report = MergeReport(settings, len(spec), nbytes, notes)
    return write_merge(out, report, marks, files)


def _marks_of(
  recipe: Recipe,
  settings: Mapping[str, Any],
  inputs: Mapping[str, Checkpoint],
) -> dict[str, Any]:
  """Returns what a result hangs on, by which a resumed run knows its own."""
  marks = {**settings, **describe_versions()}
  marks["method code"] = identify(recipe.method)
  marks["vocabulary code"] = identify(recipe.vocabulary)
  for name, checkpoint in inputs.items():
    marks |= describe_input(name, checkpoint)
  return marks


def _digests(plan: MergePlan) -> dict[str, str]:
  """Returns hashes of the small files that a merge makes or takes elsewhere."""
  found = {file.name: file.read_bytes() for file in plan.companions.copied}
  found |= {name: x.encode() for name, x in plan.companions.texts.items()}
  return {name: _digest(content) for name, content in found.items()}


def _check_companions(plan: MergePlan, digests: Mapping[str, str]) -> None:
  """Raises if small files are not what they were when the merge was planned."""
  changed = [
    str(file)
    for file in plan.companions.copied
    if file.name not in plan.companions.texts
    if not file.is_file() or _digest(file.read_bytes()) != digests[file.name]
  ]
  if changed:
    raise ValueError(
      f"{name_some(changed)} changed while it was read. Begin again with "
      "overwrite=True, when nobody writes there."
    )


def _digest(content: bytes) -> str:
  """Returns a hash of a file's content."""
  return hashlib.sha256(content).hexdigest()


def _inputs_of(models: Mapping[str, Any]) -> dict[str, Checkpoint]:
  """Returns the checkpoints that models are read from, by what they are."""
  parts = ("", " adapter")
  return {
    f"model {name}{part}": file
    for name, model in models.items()
    for part, file in zip(parts, files_of(model), strict=False)
  }


def _companions_of(plan: MergePlan) -> list[Path]:
  """Lists the reference's small files that go along as they are."""
  first = plan.models[plan.reference]
  made = {MERGE, *plan.companions.texts, *plan.companions.left_out}
  found = list_companions(getattr(first, "base", first))
  return [file for file in found if file.name not in made]


def _spec_of(plan: MergePlan) -> dict[str, tuple]:
  """Returns name -> (shape, dtype) of the result."""
  return {job.name: (job.shape, job.dtype) for job in plan.jobs}


_SHARDS = "shards"


def _write_shards(
  plan: MergePlan, merger: Merger, journal: Journal, shards, log
) -> None:
  """Writes the missing files of the result into the journal's folder."""
  folder = journal.folder / _SHARDS
  check_no_link(folder)
  folder.mkdir(exist_ok=True)
  remove_temporaries(folder)
  jobs = {job.name: job for job in plan.jobs}
  total = sum(_size(job) for job in plan.jobs)
  with (
    Progress(total, log, errors=False) as progress,
    open_pool() as pool,
  ):
    for path, shard in shards.items():
      todo = [jobs[name] for name in shard]
      if _is_made(path, journal):
        for job in todo:
          progress.update(_size(job), job.name)
        continue
      arrays = merge_all(merger, todo, pool, progress)
      with noted() as made:
        place = folder / path.name
        stream_safetensors(place, shard, arrays, {"format": "pt"})
      journal.put(path.name, {}, {"checksum": made[place]})


def _is_made(path: Path, journal: Journal) -> bool:
  """Returns whether a file of the result lies in the journal, or in place."""
  if path.name not in journal:
    return False
  checksum = _checksum(path, journal)
  place = journal.folder / _SHARDS / path.name
  if place.is_file():
    if checksum_of(place) != checksum:
      raise ValueError(
        f"{place} was changed since it was written. Remove it to make it again."
      )
    return True
  return path.is_file() and checksum_of(path) == checksum


def _checksum(path: Path, journal: Journal) -> str:
  """Returns what the journal knows of a file of the result."""
  return str(journal[path.name].get("checksum"))


def merge_all(
  merger: Merger,
  jobs: Sequence[Job],
  pool: ThreadPoolExecutor,
  progress: Progress,
) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
  """Merges tensors, the largest first; yields each as an iterator of parts.

  Args:
    merger: makes the tensors.
    jobs: what they are made of.
    pool: the threads that work; it takes up tasks in order.
    progress: counts every part once it has been consumed.

  Yields:
    (name, parts); work in progress takes at most 512 MiB, or is one task.

  Example:
    >>> import io
    >>> from jlora.merging.checkpoints.planning import InputTensor
    >>> from jlora.merging import linear
    >>> from jlora.pairing.pairs import TensorPart
    >>> job = Job("w", (1,), np.dtype(np.float32),
    ...           (InputTensor("a", TensorPart("w")),), None,
    ...           (("weights", (1.0,)),))
    >>> merger = Merger(linear, {"a": {"w": np.ones(1)}}, None)
    >>> with ThreadPoolExecutor(1) as pool, Progress(4, io.StringIO()) as bar:
    ...   for name, parts in merge_all(merger, [job], pool, bar):
    ...     print(name, list(parts))
    w [array([1.], dtype=float32)]
  """
  jobs = sorted(jobs, key=lambda job: -_cost(job))
  tasks = (task for job in jobs for task in _tasks(merger, job, pool))
  parts = _told(finish_in_order(tasks), progress)
  for name, group in itertools.groupby(parts, key=lambda part: part[0]):
    yield name, (array for _, array in group)


def _told(
  made: Iterator[tuple[Task, np.ndarray]], progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, part) and reports each to the progress once consumed."""
  for task, array in made:
    yield task.name, array
    progress.update(array.nbytes, task.name)
    del array


def _tasks(
  merger: Merger, job: Job, pool: ThreadPoolExecutor
) -> Iterator[Task]:
  """Yields a task for each piece; sums that they need are begun before."""
  pieces = merger.pieces(job)
  measured = [
    pool.submit(merger.measure, job, piece)
    for piece in pieces
    if piece is not None and merger.is_measured(job)
  ]
  for piece in pieces:
    make = functools.partial(_make, merger, job, piece, measured)
    yield Task(
      job.name, _cost(job, piece), functools.partial(pool.submit, make)
    )


def _cost(job: Job, piece: Piece | None = None) -> int:
  """Counts the bytes in work: of all inputs and their float32 copies."""
  size = math.prod(job.shape) if piece is None else piece.size
  return (4 + 8) * size * (len(job.sources) + (job.base is not None))


def _make(merger, job, piece, measured) -> np.ndarray:
  """Merges a piece, given the sums over all pieces."""
  # The pool has begun all of them before, so this wait cannot deadlock.
  return merger(job, piece, [future.result() for future in measured])


def _note_wide(plan: MergePlan, merger: Merger) -> list[str]:
  """Describes tensors that are float64 and merged in float32."""
  wide = [
    job.name
    for job in plan.jobs
    if not merger.is_copied(job)
    and any(
      plan.models[one.model].spec[name].dtype == np.float64
      for one in (*job.sources, *filter(None, [job.base]))
      for name in names_of(one.side)
    )
  ]
  return [f"{name_some(wide)}: float64, merged in float32"] if wide else []


def _size(job: Job) -> int:
  """Counts the bytes of a tensor of the result."""
  return int(np.prod(job.shape)) * job.dtype.itemsize


def _place(
  plan: MergePlan,
  out: Path,
  journal: Journal,
  shards: Mapping[Path, Any],
  small: Sequence[Path],
) -> dict[Path, str]:
  """Moves all files into place; returns them with their checksums."""
  for file in out.glob("*.safetensors.index.json"):
    file.unlink()
  for file in set(out.glob("*.safetensors")) - set(shards):
    file.unlink()
  for path in shards:
    if (journal.folder / _SHARDS / path.name).exists():
      move(journal.folder / _SHARDS / path.name, path)
  sync_folder(out)
  with noted() as files:
    if len(shards) > 1:
      write_index(out, shards)
    copy_files(small, out)
    place_companions(plan.companions, out)
  sync_folder(out)
  return files | {path: _checksum(path, journal) for path in shards}
