# SPDX-License-Identifier: Apache-2.0
"""Extraction from disk to disk: streaming, bounded in memory, resumable.

open ─► pair ─► read, factor, certify, journal (threads) ─► ranks ─► folder
"""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from jlora.assembly import Policy, choose_ranks, write_adapter
from jlora.deltas import is_matrix
from jlora.extraction import Select
from jlora.factoring import Factoriser, krylov
from jlora.journal import (
  FOLDER,
  check_fingerprint,
  check_folder,
  open_journal,
  remove_closed,
)
from jlora.modules import Extractor, Outcome, is_same
from jlora.pairing import Vocabulary, keep_whole
from jlora.pairs import Pair
from jlora.peft_files import PEFT, Profile
from jlora.plans import bytes_on_disk, fingerprint, plan_run
from jlora.progress import Progress, Room
from jlora.reporting import REPORT, Report, read_report

_THREADS = 3  # two factor, one reads ahead
_MEMORY = 512 * 2**20  # of tensors and their float32 copies in work at a time


def extract_checkpoint(
  base: str | os.PathLike,
  finetuned: str | os.PathLike,
  out: str | os.PathLike,
  *,
  rank: int = 64,
  policy: Policy | None = None,
  factor: Factoriser = krylov,
  select: Select = is_matrix,
  vocabulary: Vocabulary = keep_whole,
  profile: Profile = PEFT,
  dtype: Any = jnp.float32,
  key: jax.Array | None = None,
  base_model: str | None = None,
  resume: bool = False,
  overwrite: bool = False,
  log: IO[str] | None = None,
) -> Report:
  """The report of an extraction, whose adapter is then in a PEFT folder.

  Every matrix is factored at `rank`, certified and put in a journal; then
  `policy` chooses ranks up to that from all spectra and the folder is written.
  What is no matrix and changed (norms, biases) is kept whole where the profile
  carries it.

  Args:
    base: a checkpoint that `open_checkpoint` opens.
    finetuned: the finetune; names may differ as `pair_up` says.
    out: output folder, new or empty.
    rank: of every module, and the most that a policy may give.
    policy: from all Spectra to {path: rank}; None keeps `rank` everywhere.
    factor: the factoriser.
    select: `(path, spec) -> bool`, which matrices are factored; others that
      changed are reported as not representable.
    vocabulary: what happens to an embedding whose number of rows changed.
    profile: the consumer, `PEFT` or `VLLM`.
    dtype: storage dtype of the factors.
    key: PRNG key; None is `key(0)`.
    base_model: name of the base in the adapter's configuration; None is the
      path given.
    resume: go on with an unfinished run of the same inputs and options in
      `out`; a finished one gives its report, if its settings are the same.
    overwrite: allow a folder that is not empty; an adapter, report or journal
      in it is replaced, other files stay.
    log: where progress goes, None is standard error.

  Returns:
    Report. The result is the same bytes whether or not the run was
    interrupted. Memory: the tensors of up to three modules and their float32
    copies, not the model; disk: the adapter twice while it is written.

  Raises:
    ValueError: inputs that cannot be read or do not belong together, NaN or
      infinity in a tensor, a folder that is not empty, a journal of another
      run, or nothing to extract.

  Example:
    >>> import io, tempfile
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
  if rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}.")
  options = {
    "rank": rank,
    "dtype": jnp.dtype(dtype).name,
    "factor": name_of(factor),
  }
  settings = {
    "jlora": metadata.version("jlora"),
    "base": str(base),
    "finetuned": str(finetuned),
    "profile": profile.name,
    "vocabulary": name_of(vocabulary),
    **options,
  }
  if resume or overwrite:
    _remove_leftovers(out)
  if resume and not (out / FOLDER).exists() and (out / REPORT).exists():
    report = read_report(out)
    check_fingerprint(out / REPORT, report.settings, settings)
    return report
  plan = plan_run(base, finetuned, select, vocabulary)
  check_folder(out, REPORT, resume=resume, overwrite=overwrite)
  journal = open_journal(out, fingerprint(plan, key, options), resume=resume)
  extractor = Extractor(factor, dtype, key)
  _factor_all(plan, journal, extractor, rank, log)
  ranks = choose_ranks(journal, policy, jnp.dtype(dtype).itemsize)
  named = str(base) if base_model is None else base_model
  report = write_adapter(
    plan,
    journal,
    ranks,
    out,
    profile=profile,
    base_model=named,
    settings=settings,
  )
  journal.close()
  return report


def _remove_leftovers(out: Path) -> None:
  """Removes what a killed run left half written or half removed."""
  remove_closed(out)
  for file in out.glob(".*adapter_*.tmp"):
    file.unlink()


def name_of(function: Callable[..., Any]) -> str:
  """A function with the options that `functools.partial` set, as text.

  Args:
    function: any callable.

  Returns:
    Its name, options in brackets.

  Example:
    >>> name_of(functools.partial(krylov, passes=3))
    'krylov(passes=3)'
  """
  if isinstance(function, functools.partial):
    options = ", ".join(
      f"{k}={v}" for k, v in sorted(function.keywords.items())
    )
    return f"{name_of(function.func)}({options})"
  return getattr(function, "__name__", type(function).__name__)


def _factor_all(plan, journal, extractor, rank, log) -> None:
  """Brings every pair into the journal, a few at a time."""
  pairs = plan.pairing.pairs
  total = sum(bytes_on_disk(plan, pair) for pair in pairs)
  room, saying = Room(_MEMORY), threading.Lock()

  def work(pair: Pair) -> None:
    nbytes = bytes_on_disk(plan, pair)
    if is_same(pair, plan.base, plan.finetuned):
      outcome = Outcome("unchanged")
    else:
      given = 0 if pair.path in plan.refused else rank
      with room.taken(nbytes + 12 * int(np.prod(pair.shape))):
        outcome = extractor(
          pair, plan.views[pair.path], given, plan.base, plan.finetuned
        )
    record = _record(outcome)
    journal.put(pair.path, outcome.arrays, record)
    with saying:
      _say(progress, pair.path, nbytes, record)

  # A module a thread: BLAS's own threads would fight over the same cores.
  with (
    Progress(total, log) as progress,
    threadpool_limits(1, user_api="blas"),
    ThreadPoolExecutor(_THREADS) as pool,
  ):
    for pair in pairs:
      if pair.path in journal:
        _say(progress, pair.path, bytes_on_disk(plan, pair), journal[pair.path])
    missing = [pair for pair in pairs if pair.path not in journal]
    # The largest first: at the end no thread waits long for another's.
    missing.sort(key=lambda pair: -bytes_on_disk(plan, pair))
    waiting = [pool.submit(work, pair) for pair in missing]
    try:
      for future in wait(waiting, return_when=FIRST_EXCEPTION).done:
        future.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _record(outcome: Outcome) -> dict[str, Any]:
  return {
    "status": outcome.status,
    "why": outcome.why,
    "figures": dict(outcome.figures),
  }


def _say(progress, path, nbytes, record) -> None:
  figures = record["figures"]
  if not figures:
    progress.update(nbytes, path)
    return
  errors = figures["errors"]
  progress.update(
    nbytes, path, len(errors) - 1, error=errors[-1], norm=figures["norm"]
  )
