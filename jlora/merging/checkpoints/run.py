# SPDX-License-Identifier: Apache-2.0
"""Merges checkpoints from disk to disk: streaming, bounded, resumable.

recipe ─► plan ─► read, merge (threads) ─► shards, one after the other ─► folder
"""

import functools
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.huggingface import plan_shards, write_index
from jlora.checkpoints.merged import copy_companions
from jlora.checkpoints.safetensors import stream_safetensors
from jlora.formats.adapted import files_of
from jlora.formats.peft.layouts import TENSORS
from jlora.merging.checkpoints.adapter_folders import (
  is_adapter,
  plan_adapters,
  write_adapters,
)
from jlora.merging.checkpoints.companions import place_companions
from jlora.merging.checkpoints.merger import Merger
from jlora.merging.checkpoints.planning import Job, MergePlan, plan_merge
from jlora.merging.checkpoints.reading import Piece
from jlora.merging.checkpoints.recipes import Recipe
from jlora.numerics.backends import words_of
from jlora.runs.fingerprints import digest, name_of, replace_text
from jlora.runs.journal import (
  FOLDER,
  check_fingerprint,
  check_folder,
  open_journal,
  remove_closed,
)
from jlora.runs.pool import Task, finish_in_order, open_pool
from jlora.runs.progress import Progress

MERGE = "merge.json"


class MergeReport(NamedTuple):
  """What a merge did; stored as `merge.json`.

  Attributes:
    settings: the recipe and versions.
    tensors: how many were written.
    nbytes: their bytes.
    notes: what was unusual, by name of the tensor or model.
  """

  settings: dict[str, Any]
  tensors: int
  nbytes: int
  notes: list[str]


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
  stored in. The folder holds safetensors files (with an index if there are
  several), the reference's config.json, adapted to the result's layers and
  dtype, its tokenizer, and `merge.json`.

  Args:
    recipe: what to merge; `read_recipe` reads one.
    out: output folder, new or empty.
    key: PRNG key, or its two words of NumPy; each tensor uses
      `key_for(key, name)`.
    max_shard_bytes: largest size of a file. A killed run keeps its finished
      files.
    resume: go on with an unfinished run of the same inputs and recipe in `out`,
      or return the report of a finished one.
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
    ValueError: models that cannot be read or do not belong together, layers
      that do not exist, settings that the method refuses, a folder that is not
      empty, or a journal of another run.

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
    **_describe(recipe),
    "jlora": metadata.version("jlora"),
    "key": words_of(key).tolist(),
    "max_shard_bytes": max_shard_bytes,
  }
  if any(is_adapter(one.model) for p in recipe.slices for one in p.inputs):
    return _merge_adapters(recipe, out, key, settings, overwrite)
  if resume or overwrite:
    remove_closed(out)
  if resume and not (out / FOLDER).exists() and (out / MERGE).exists():
    report = MergeReport(**json.loads((out / MERGE).read_text()))
    check_fingerprint(out / MERGE, report.settings, settings)
    return report
  plan = plan_merge(recipe)
  merger = Merger(recipe.method, plan.models, key, plan.jobs)
  for job in {(j.settings, len(j.sources)): j for j in plan.jobs}.values():
    merger.check(job)
  check_folder(out, MERGE, resume=resume, overwrite=overwrite)
  inputs = {
    f"model {name}": [digest(file) for file in files_of(model)]
    for name, model in plan.models.items()
  }
  journal = open_journal(
    out, {**settings, **inputs, **_versions()}, resume=resume
  )
  _write_shards(plan, merger, out, max_shard_bytes, log)
  report = MergeReport(
    settings,
    len(plan.jobs),
    sum(_size(job) for job in plan.jobs),
    plan.notes + [f"{job.name}: {job.note}" for job in plan.jobs if job.note],
  )
  _finish(plan, out, max_shard_bytes, report)
  journal.close()
  return report


def _merge_adapters(recipe, out: Path, key, settings, overwrite) -> MergeReport:
  """Merges folders of adapters into one; it is there whole or not at all."""
  plan = plan_adapters(recipe)
  check_folder(out, MERGE, resume=False, overwrite=overwrite)
  notes = plan.notes + write_adapters(plan, out, key)
  spec = open_checkpoint(out / TENSORS).spec
  nbytes = sum(one.nbytes for one in spec.values())
  report = MergeReport(settings, len(spec), nbytes, notes)
  replace_text(out / MERGE, json.dumps(report._asdict(), indent=2) + "\n")
  return report


def _versions() -> dict[str, str]:
  """Returns the versions of what computes, whose roundings may differ."""
  return {"jax": jax.__version__, "numpy": np.__version__}


def _describe(recipe: Recipe) -> dict[str, Any]:
  """Returns a recipe as values that JSON can hold."""
  slices = [
    {
      "inputs": [
        {**one._asdict(), "settings": dict(one.settings)} for one in part.inputs
      ],
      "settings": dict(part.settings),
      "base": part.base,
    }
    for part in recipe.slices
  ]
  plain = {
    **recipe._asdict(),
    "method": name_of(recipe.method),
    "vocabulary": name_of(recipe.vocabulary),
    "settings": dict(recipe.settings),
    "slices": slices,
  }
  return json.loads(json.dumps(plain))


_SHARDS = "shards"


def _write_shards(plan: MergePlan, merger, out: Path, limit, log) -> None:
  """Writes the missing files of the result into the journal's folder."""
  folder = out / FOLDER / _SHARDS
  folder.mkdir(exist_ok=True)
  for file in folder.glob(".*.tmp"):
    file.unlink()
  jobs = {job.name: job for job in plan.jobs}
  spec = {name: (job.shape, job.dtype) for name, job in jobs.items()}
  total = sum(_size(job) for job in plan.jobs)
  with (
    Progress(total, log, errors=False) as progress,
    open_pool() as pool,
  ):
    for path, shard in plan_shards(folder, spec, limit, plan.stem).items():
      todo = [jobs[name] for name in shard]
      if path.exists():
        for job in todo:
          progress.update(_size(job), job.name)
        continue
      arrays = merge_all(merger, todo, pool, progress)
      stream_safetensors(path, shard, arrays, {"format": "pt"})


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


def _size(job: Job) -> int:
  """Counts the bytes of a tensor of the result."""
  return int(np.prod(job.shape)) * job.dtype.itemsize


def _finish(
  plan: MergePlan, out: Path, limit: int, report: MergeReport
) -> None:
  """Moves all files into place; `merge.json` last, which marks the end."""
  source = plan.models[plan.reference].path
  for file in out.glob("*.safetensors.index.json"):
    file.unlink()
  folder = out / FOLDER / _SHARDS
  spec = {job.name: (job.shape, job.dtype) for job in plan.jobs}
  shards = plan_shards(out, spec, limit, plan.stem)
  for path in shards:
    if (folder / path.name).exists():
      os.replace(folder / path.name, path)
  if len(shards) > 1:
    write_index(out, shards)
  for file in set(out.glob("*.safetensors")) - set(shards):
    file.unlink()
  copy_companions(source, out)
  place_companions(plan.companions, out)
  replace_text(out / MERGE, json.dumps(report._asdict(), indent=2) + "\n")
