# SPDX-License-Identifier: Apache-2.0
"""Extracts from disk to disk: streaming, bounded in memory, resumable.

open ─► pair ─► plan ─► factor (read, certify, journal) ─► choose ranks ─► write

Several `jax.distributed` processes share the journal; the first one writes the
folder.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.hub import model_name
from jlora.checkpoints.new_files import noted
from jlora.checkpoints.packed_formats import check_dequantised
from jlora.checkpoints.sources import check_apart
from jlora.extraction.assembly import (
  Policy,
  Save,
  check_policy,
  choose_ranks,
  list_unlisted,
  write_adapter,
)
from jlora.extraction.coverage import check_coverage
from jlora.extraction.module import Extractor
from jlora.extraction.planning import (
  Plan,
  fingerprint,
  plan_jobs,
  without_paths,
)
from jlora.extraction.report import REPORT, Report, read_report, write_report
from jlora.extraction.workers import factor_missing
from jlora.factoring.factorisers import Factoriser, krylov
from jlora.formats.components import open_pair
from jlora.formats.peft.layouts import PEFT, Profile
from jlora.formats.peft.parts import Rename
from jlora.formats.peft.writing import check_consumer, save_peft
from jlora.pairing.match import Vocabulary, is_table, keep_whole, pair_up
from jlora.pairing.vocabularies import read_both_tokens
from jlora.runs import processes
from jlora.runs.fingerprints import (
  check_unchanged,
  hash_lines,
  identify,
  name_of,
  stamp_inputs,
)
from jlora.runs.finished import check_run, describe_run
from jlora.runs.journal import (
  FOLDER,
  Journal,
  check_settings,
  remove_leftovers,
)
from jlora.runs.lock import hold_folder
from jlora.runs.shared_journal import (
  complete_journal,
  share_journal,
  wait_for_files,
)
from jlora.selection import Select, is_matrix


def extract_checkpoint(
  base: str | os.PathLike,
  finetuned: str | os.PathLike,
  out: str | os.PathLike,
  *,
  rank: int = 64,
  conv_rank: int | None = None,
  policy: Policy | None = None,
  factor: Factoriser = krylov,
  select: Select = is_matrix,
  vocabulary: Vocabulary = keep_whole,
  profile: Profile = PEFT,
  dtype: Any = jnp.float32,
  key: jax.Array | None = None,
  base_model: str | None = None,
  task_type: str | None = "auto",
  rename: Rename | Sequence[tuple[str, str]] | None = None,
  whole: str | None = None,
  components: Sequence[str] | None = None,
  variant: str | None = None,
  names: str | None = None,
  float8: str | None = None,
  resume: bool = False,
  overwrite: bool = False,
  split_bytes: int = 2**31,
  allow_unmatched: bool = False,
  save: Save = save_peft,
  log: IO[str] | None = None,
) -> Report:
  """Extracts a finetune into a PEFT adapter folder; returns the report.

      finetuned[path] - base[path]  ≈  scale aᵀ b      read (in, out), scale 1

  Every matrix is factored at `rank`, certified and put in a journal; then
  `policy` chooses ranks up to that from all spectra, and the folder is written.
  Changed parameters that are no matrices (norms, biases) are kept whole where
  the profile can carry them.

  If the caller has initialised `jax.distributed`, all processes make the same
  call, with paths on file systems that they share. They check first that they
  have the same versions, options and inputs. Modules are dealt out to them by
  cost, and each process reads only its own; the first one chooses ranks and
  writes the folder. A tensor over `split_bytes` is cut over all devices, each
  process reading its own part.

  Args:
    base: a checkpoint that `jlora.formats.open_components` opens: what
      `open_checkpoint` does, a pipeline's folder, or a single file.
    finetuned: the finetune; names may differ as `pair_up` says.
    out: output folder, new or empty; neither an input nor a folder that holds
      one. One run at a time writes to it.
    rank: rank of every module, and the most that a policy may give.
    conv_rank: the same of convolutions over 1 x 1, of PyTorch's layout; None is
      `rank`.
    policy: from all Spectra to {path: rank}; None keeps `rank` everywhere.
    factor: the factoriser.
    select: `(path, spec) -> bool`, which matrices are factored; others that
      changed are reported as not representable.
    vocabulary: what happens to an embedding whose number of rows changed. Rows
      are compared by token where both checkpoints have a tokenizer.
    profile: the consumer, `PEFT` or `VLLM`.
    dtype: storage dtype of the factors.
    key: PRNG key; None is `key(0)`.
    base_model: name of the base in the adapter's configuration; None is its
      Hub id if that is known, else the name of its folder.
    task_type: PEFT's task name, or None; "auto" reads it from config.json.
    rename: key on disk -> parameter's name in the model, for models that are
      not in transformers; or (regex, replacement) pairs, applied to the names
      that config.json gives.
    whole: regex of whole names: these tensors are not factored but stored as
      the finetune has them, changed or not. PEFT replaces whole modules, so
      give all of a module: what the ledger leaves out for that reason is
      carried with `jlora.extraction.whole_of(report)`.
    components: of a pipeline's folder or a single file, as for
      `open_components`: None is all but the autoencoder and its like.
    variant: of folders, as `name.fp16.safetensors`, as for `open_checkpoint`.
    names: "diffusers" turns the names of the original's authors into those of
      diffusers on both sides; None leaves them, and refuses a pair of both.
    float8: "cast" reads float8 weights without a scale as values, as for
      `open_checkpoint`.
    resume: go on with an unfinished run of the same inputs and options in
      `out`, or return the report of a finished one, if all that made it is the
      same and all that it wrote is as it was. `policy` and `select` count by
      what they choose; `factor` by its code and options.
    overwrite: allow a folder that is not empty; an adapter, report or journal
      in it is replaced, other files stay.
    split_bytes: a matrix that takes more bytes in float32 is factored on all
      devices together, if there are several and they divide one of its axes.
    allow_unmatched: go on where more than a tenth of the floating bytes of a
      side have no partner on the other.
    save: what writes the adapter, a function with the arguments of `save_peft`
      that returns what it cannot hold: for models that PEFT has no names for,
      such as JAX's.
    log: where progress goes; None is standard error. Each process reports its
      own share.

  Returns:
    Report, on all processes. The result is the same bytes whether or not the
    run was interrupted, and for any number of processes. Split tensors differ
    by rounding from what one device computes; on CPUs, a factoriser that starts
    from random rows draws other rows for them, so they differ by its tolerance.
    Memory: the tensors of up to three modules and their float32 copies, within
    512 MiB or two modules of the usual size, never the whole model. Disk: the
    adapter twice while it is written. Changes are formed in float64 where a
    checkpoint is float64, and rounded once to float32.

  Raises:
    ValueError: inputs that cannot be read, are packed in a way that jlora does
      not read, do not belong together, or change meanwhile, most of them
      unmatched, NaN or infinity in a tensor, factors larger than `dtype` holds,
      a folder that is not empty, in use by another run, or an input's, a
      journal or result of another run or that is damaged, nothing to extract,
      or processes that differ in versions, options or what they see. All
      processes raise it.
    LostProcess: another process ended or was killed. Finished modules stay in
      the journal for `resume`.

  Example:
    >>> import io, tempfile
    >>> import numpy as np
    >>> from jlora.checkpoints import write_safetensors
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   for name, scale in (("base", 0.0), ("ft", 1.0)):
    ...     w = np.full((4, 6), scale, np.float32)
    ...     write_safetensors(f"{tmp}/{name}.safetensors", {"m.q.weight": w})
    ...   report = extract_checkpoint(
    ...     f"{tmp}/base.safetensors", f"{tmp}/ft.safetensors", f"{tmp}/out",
    ...     rank=1, log=io.StringIO())
    >>> round(report.modules[0]["relative_error"], 4)
    0.0
  """
  out = Path(out)
  named = {
    "policy": None if policy is None else name_of(policy),
    "base_model": base_model,
    "split_bytes": split_bytes,
    "resume": resume,
    "overwrite": overwrite,
    "allow_unmatched": allow_unmatched,
  }
  options = {
    "rank": rank,
    "dtype": jnp.dtype(dtype).name,
    "factor": name_of(factor),
  }
  opening = {
    "components": None if components is None else list(components),
    "variant": variant,
    "names": names,
    "float8": float8,
  }
  chosen = opening | {"conv_rank": conv_rank}
  options |= {k: v for k, v in chosen.items() if v is not None}
  settings = _settings_of(
    base, finetuned, profile, vocabulary, options, task_type, rename, whole
  )
  _check_options(settings, named)

  # Open, pair, plan: headers alone, on every process.
  plan, stamps = processes.everywhere(
    lambda: _plan(
      base, finetuned, vocabulary, select, rank, rename, whole,
      allow_unmatched, profile, out, conv_rank, opening,
    )
  )  # fmt: skip
  base_model = model_name(base) if base_model is None else base_model
  coded = options | {
    "factor code": identify(factor),
    "split": hash_lines(_split(plan, split_bytes)),
  }
  marks = processes.everywhere(lambda: fingerprint(plan, key, coded))
  processes.check_same_facts(without_paths(marks))
  all_marks = marks | _marks_of_files(
    plan, base_model, profile, task_type, save
  )
  itemsize = jnp.dtype(dtype).itemsize
  is_same = functools.partial(
    _check_finished, out, settings, all_marks, policy, itemsize
  )
  with contextlib.ExitStack() as held:
    begin = functools.partial(_begin, held, out, resume, overwrite, is_same)
    if processes.from_first(begin):
      return processes.everywhere(lambda: read_report(out))
    journal, watch = share_journal(
      out, REPORT, marks, resume=resume, overwrite=overwrite
    )
    with watch:
      # Factor: each process its share, into the journal.
      factor_missing(
        plan,
        journal,
        _missing(plan, journal),
        Extractor(factor, dtype, key),
        split_bytes=split_bytes,
        watch=watch,
        log=log,
      )
      check_unchanged(_inputs(plan), stamps)
      if processes.process_index():
        watch.done()
        watch.wait()
        return wait_for_files(lambda: read_report(out))
      watch.wait()
      complete_journal(journal, (job.pair.path for job in plan.jobs))

      report = _write(
        plan, journal, out, policy, itemsize, settings, all_marks, stamps,
        profile=profile, base_model=base_model, task_type=task_type,
        rename=rename, save=save,
      )  # fmt: skip
      watch.done()
    journal.close()
  return report


def _write(
  plan, journal, out, policy, itemsize, settings, marks, stamps, **options
) -> Report:
  """Chooses ranks and writes the folder, which the first process does alone."""
  ranks = choose_ranks(journal, policy, itemsize)
  with noted() as files:
    report = write_adapter(
      plan, journal, ranks, out, settings=settings, **options
    )
  check_unchanged(_inputs(plan), stamps)
  report = _describe(report, journal, ranks, out, marks, files)
  write_report(out, report)
  return report


def _settings_of(
  base, finetuned, profile, vocabulary, options, task_type, rename, whole
) -> dict[str, Any]:
  """Returns what a report says of a run's inputs and options."""
  settings = {
    "jlora": metadata.version("jlora"),
    "base": str(base),
    "finetuned": str(finetuned),
    "profile": profile.name,
    "vocabulary": name_of(vocabulary),
    **options,
  }
  if task_type != "auto":
    settings["task_type"] = task_type
  if rename:
    settings["rename"] = (
      name_of(rename) if callable(rename) else [list(pair) for pair in rename]
    )
  if whole:
    settings["whole"] = whole
  return settings


def _marks_of_files(
  plan, base_model, profile, task_type, save
) -> dict[str, Any]:
  """Returns what the files hang on beside what the journal does."""
  return {
    "base_model": base_model,
    "names": hash_lines(_names(plan)),
    "profile": identify(profile),
    "task_type": task_type,
  } | ({} if save is save_peft else {"save": identify(save)})


def _begin(
  held: contextlib.ExitStack,
  out: Path,
  resume: bool,
  overwrite: bool,
  check: Callable[[], None],
) -> bool:
  """Keeps other runs out; returns whether the result is already there."""
  held.enter_context(hold_folder(out))
  if resume or overwrite:
    remove_leftovers(out)
  if not resume or (out / FOLDER).exists() or not (out / REPORT).exists():
    return False
  check()
  return True


def _plan(
  base,
  finetuned,
  vocabulary,
  select,
  rank,
  rename,
  whole,
  allow_unmatched,
  profile,
  out,
  conv_rank,
  opening,
) -> tuple[Plan, dict[str, Any]]:
  """Opens both checkpoints, pairs their tensors and plans what is done.

  Returns the plan, and stamps of the inputs from before it was made.
  """
  left, right = open_pair(base, finetuned, **opening)
  stamps = stamp_inputs({"base": left, "finetuned": right})
  check_apart(out, [left, right])
  check_dequantised(left)
  check_dequantised(right)
  has_table = any(is_table(name) for name in left.spec)
  tokens = read_both_tokens(left.path, right.path) if has_table else None
  pairing = pair_up(left.spec, right.spec, vocabulary=vocabulary, tokens=tokens)
  plan = plan_jobs(left, right, pairing, select, rank, rename, whole, conv_rank)
  if plan.about is not None:
    check_consumer(plan.about, profile)
  if not allow_unmatched:
    check_coverage(left, right, pairing)
  return plan, stamps


def _inputs(plan: Plan) -> dict[str, Checkpoint]:
  """Returns both checkpoints by the names of their arguments."""
  return {"base": plan.base, "finetuned": plan.finetuned}


def _missing(plan: Plan, journal: Journal) -> list[int]:
  """Lists the jobs not in the journal, as the first process sees it."""
  return processes.from_first(
    lambda: [
      at for at, job in enumerate(plan.jobs) if job.pair.path not in journal
    ]
  )


def _check_options(settings: dict[str, Any], others: dict[str, Any]) -> None:
  """Raises unless all processes have the same, valid options."""
  if processes.process_count() > 1:
    paths = ("base", "finetuned")  # may differ; what they hold may not
    options = {k: v for k, v in settings.items() if k not in paths}
    processes.check_same_facts(processes.versions() | options | others)
  for name, value in (settings | others).items():
    if name in ("rank", "conv_rank", "split_bytes") and value < 1:
      raise ValueError(f"{name} must be at least 1, got {value}.")


def _check_finished(
  out: Path,
  settings: dict[str, Any],
  marks: dict[str, Any],
  policy: Policy | None,
  itemsize: int,
) -> None:
  """Raises unless the finished run in a folder is the one that is asked for."""
  report, file = read_report(out), out / REPORT
  check_settings(file, report.settings, settings)
  made = report.run if isinstance(report.run, dict) else {}
  unlisted = made.get("unlisted")
  check_run(file, made, marks, _told(report, unlisted))
  check_policy(report, unlisted or {}, policy, itemsize)


def _describe(report, journal, ranks, out, marks, files) -> Report:
  """Returns a report that says what made it and what lies beside it."""
  unlisted = list_unlisted(report, journal, ranks)
  made = describe_run(out, marks, files, _told(report, unlisted))
  return report._replace(run=made | {"unlisted": unlisted})


def _told(report: Report, unlisted: Any) -> dict[str, Any]:
  """Returns what a report tells of a run, without what comes later."""
  told = report._asdict() | {"unlisted": unlisted}
  return {k: v for k, v in told.items() if k not in ("verified", "run")}


def _names(plan: Plan) -> list[str]:
  """Lists what the modules are called in the adapter, whoever renames them."""
  rename = plan.about.rename if plan.about is not None else str
  return [f"{job.pair.path} {rename(job.pair.path)}" for job in plan.jobs]


def _split(plan: Plan, split_bytes: int) -> list[str]:
  """Lists the tensors that several devices would factor together."""
  return [
    job.pair.path
    for job in plan.jobs
    if job.can_be_split and 4 * math.prod(job.pair.shape) > split_bytes
  ]
