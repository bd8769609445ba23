# SPDX-License-Identifier: Apache-2.0
"""Merges of checkpoints from disk to disk: streaming, bounded, resumable.

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

from jlora.checkpoints.hub import without_paths
from jlora.checkpoints.huggingface import plan_shards, write_index
from jlora.checkpoints.merged import copy_companions
from jlora.checkpoints.safetensors import stream_safetensors
from jlora.formats.adapted import files_of
from jlora.merging.checkpoints.merger import Merger
from jlora.merging.checkpoints.planning import Job, MergePlan, plan_merge
from jlora.merging.checkpoints.reading import Piece
from jlora.merging.checkpoints.recipes import Recipe
from jlora.numerics.backends import words_of
from jlora.pairing.layers import configure_layers
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


def merge_all(
  merger: Merger,
  jobs: Sequence[Job],
  pool: ThreadPoolExecutor,
  progress: Progress,
) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
  """Tensors in turn, the largest first, each as an iterator of its parts.

  Args:
    merger: makes them.
    jobs: what they are made of.
    pool: that works. It takes up what is asked of it in order.
    progress: told of every part once it has been taken.

  Yields:
    (name, parts); what is in work is within 512 MiB, or one task.

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
  """Yields (name, part), each told to the progress once it has been taken."""
  for task, array in made:
    yield task.name, array
    progress.update(array.nbytes, task.name)
    del array


def _cost(job: Job, piece: Piece | None = None) -> int:
  """Bytes in work: of all inputs, and of float32 copies of them."""
  size = math.prod(job.shape) if piece is None else piece.size
  return (4 + 8) * size * (len(job.sources) + (job.base is not None))


def _tasks(
  merger: Merger, job: Job, pool: ThreadPoolExecutor
) -> Iterator[Task]:
  """A tensor's pieces; what they must be told is begun before the first."""
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


def _make(merger, job, piece, measured) -> np.ndarray:
  # The pool has begun them all, so the wait is short and ends.
  return merger(job, piece, [future.result() for future in measured])


MERGE = "merge.json"
_SHARDS = "shards"


class MergeReport(NamedTuple):
  """What a merge did; `merge.json` is its fields.

  Attributes:
    settings: the recipe and versions.
    tensors: how many were written.
    nbytes: their bytes.
    notes: what is not as usual, each tensor or model by name.
  """

  settings: dict[str, Any]
  tensors: int
  nbytes: int
  notes: list[str]


def merge_checkpoints(
  recipe: Recipe,
  out: str | os.PathLike,
  *,
  key: jax.Array | None = None,
  max_shard_bytes: int = 2**30,
  resume: bool = False,
  overwrite: bool = False,
  log: IO[str] | None = None,
) -> MergeReport:
  """The report of a merge, whose model is then in a checkpoint folder.

      out[name] = round(method([model[name], ...], weights, base[name]))

  Computed in float32 and rounded once, whatever the models are stored in. The
  folder holds safetensors files (with an index if several), the reference's
  config.json, changed where layers or dtypes are, its tokenizer, and
  `merge.json`.

  Args:
    recipe: what to merge; `read_recipe` reads one.
    out: output folder, new or empty.
    key: PRNG key; each tensor uses `key_for(key, name)`.
    max_shard_bytes: a new file begins before this size is passed. A file is
      what a killed run keeps.
    resume: go on with an unfinished run of the same inputs and recipe in `out`;
      a finished one gives its report.
    overwrite: allow a folder that is not empty; a checkpoint in it is replaced,
      other files stay.
    log: where progress goes, None is standard error.

  Returns:
    MergeReport. The result is the same bytes whether or not the run was
    interrupted. Memory: methods of `PIECEWISE` take a few MiB of each tensor
    at a time; of the others, parameters with the method's float32 copies of
    them, within 512 MiB, or one that is larger; not the model. By what XLA
    says of its programs, two models and their base in float32 take 3.7 times
    their tensors by DELLA, 3 at the most by others; in bfloat16 DELLA 6.7,
    `karcher`, `sce` and `breadcrumbs` 4.7, others below 3. Disk: the result
    once.

  Raises:
    ValueError: as `plan_merge`, settings that the method refuses, a folder that
      is not empty, or a journal of another run.

  Example:
    >>> import io, tempfile
    >>> from jlora.checkpoints import open_checkpoint
    >>> from jlora.checkpoints import write_safetensors
    >>> from jlora.merging import linear
    >>> from jlora.merging import Input, Slice
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
  if resume or overwrite:
    remove_closed(out)
  if resume and not (out / FOLDER).exists() and (out / MERGE).exists():
    report = MergeReport(**json.loads((out / MERGE).read_text()))
    check_fingerprint(out / MERGE, report.settings, settings)
    return report
  plan = plan_merge(recipe)
  merger = Merger(recipe.method, plan.models, key)
  for job in {(j.settings, len(j.sources)): j for j in plan.jobs}.values():
    merger.check(job)
  check_folder(out, MERGE, resume=resume, overwrite=overwrite)
  inputs = {
    f"model {name}": [digest(file) for file in files_of(model)]
    for name, model in plan.models.items()
  }
  journal = open_journal(
    out, {**settings, **inputs, "jax": jax.__version__}, resume=resume
  )
  _write_shards(plan, merger, out, max_shard_bytes, log)
  report = MergeReport(
    settings,
    len(plan.jobs),
    sum(_size(job) for job in plan.jobs),
    plan.notes + [f"{job.name}: {job.note}" for job in plan.jobs if job.note],
  )
  _finish(plan, recipe, out, max_shard_bytes, report)
  journal.close()
  return report


def _describe(recipe: Recipe) -> dict[str, Any]:
  """A recipe as JSON holds it."""
  slices = [
    {
      "inputs": [
        {**one._asdict(), "settings": dict(one.settings)} for one in part.inputs
      ],
      "settings": dict(part.settings),
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


def _size(job: Job) -> int:
  return int(np.prod(job.shape)) * job.dtype.itemsize


def _write_shards(plan: MergePlan, merger, out: Path, limit, log) -> None:
  """The files of the result in the journal's folder, those that lack."""
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
    for path, shard in plan_shards(folder, spec, limit).items():
      todo = [jobs[name] for name in shard]
      if path.exists():
        for job in todo:
          progress.update(_size(job), job.name)
        continue
      arrays = merge_all(merger, todo, pool, progress)
      stream_safetensors(path, shard, arrays, {"format": "pt"})


def _finish(
  plan: MergePlan, recipe: Recipe, out: Path, limit: int, report: MergeReport
) -> None:
  """Puts all in its place; `merge.json` last, which says that it is whole."""
  source = plan.models[plan.reference].path
  for file in out.glob("*.safetensors.index.json"):
    file.unlink()
  folder = out / FOLDER / _SHARDS
  spec = {job.name: (job.shape, job.dtype) for job in plan.jobs}
  shards = plan_shards(out, spec, limit)
  for path in shards:
    if (folder / path.name).exists():
      os.replace(folder / path.name, path)
  if len(shards) > 1:
    write_index(out, shards)
  for file in set(out.glob("*.safetensors")) - set(shards):
    file.unlink()
  copy_companions(source, out)
  if plan.config:
    text = json.dumps(_configure(plan, recipe), indent=2, sort_keys=True)
    replace_text(out / "config.json", text + "\n")
  replace_text(out / MERGE, json.dumps(report._asdict(), indent=2) + "\n")


def _configure(plan: MergePlan, recipe: Recipe) -> dict[str, Any]:
  """config.json after layers, dtypes or a tied head changed."""
  config = without_paths(plan.config)
  if plan.taken:
    config = configure_layers(config, plan.taken)
  spec = plan.models[plan.reference].spec
  if any(entry.dtype.itemsize == 1 for entry in spec.values()):
    config.pop("quantization_config", None)
  if recipe.dtype is not None:
    for name in ("dtype", "torch_dtype"):
      if name in config:
        config[name] = recipe.dtype
  heads = {"lm_head.weight"} & {job.name for job in plan.jobs}
  if heads and config.get("tie_word_embeddings") and not heads & set(spec):
    config["tie_word_embeddings"] = False
  return config
