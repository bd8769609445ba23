# SPDX-License-Identifier: Apache-2.0
"""Extraction from disk to disk: streaming, bounded in memory, resumable.

open ─► pair ─► read, factor, certify, journal (threads) ─► ranks ─► folder
"""

import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from jlora.checkpoints import Checkpoint, open_checkpoint
from jlora.deltas import is_matrix
from jlora.exporting import save_peft
from jlora.extraction import Select
from jlora.factoring import Factoriser, krylov
from jlora.journal import FOLDER, Journal, open_journal
from jlora.ledgers import keep_ledger
from jlora.loras import Lora, name_some
from jlora.measurements import at_rank
from jlora.modules import Extractor, Outcome, read_pair
from jlora.pairing import (
  Pair,
  Pairing,
  Vocabulary,
  keep_whole,
  names_of,
  pair_up,
)
from jlora.peft_files import PEFT, Profile
from jlora.progress import Progress
from jlora.reporting import REPORT, Report, read_report, total_up, write_report
from jlora.views import MatrixView, table_for, view_of

_THREADS = 3  # two factor, one reads ahead
_MEMORY = 640 * 2**20  # of tensors and their float32 copies in work at a time


class Spectra(NamedTuple):
  """What a rank policy sees of a run; all mappings are by module path.

  Attributes:
    values: (r,) singular values.
    norms: Frobenius norms of the whole deltas.
    floors: the singular value that rounding noise alone would reach.
    unit_bytes: bytes of one unit of rank.
  """

  values: dict[str, np.ndarray]
  norms: dict[str, float]
  floors: dict[str, float]
  unit_bytes: dict[str, int]


Policy = Callable[[Spectra], Mapping[str, int]]


class _Plan(NamedTuple):
  """What is to be done, known before any tensor is read."""

  base: Checkpoint
  finetuned: Checkpoint
  pairing: Pairing
  views: dict[str, MatrixView | None]
  refused: set[str]  # matrices that were not selected
  model_type: str | None


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
      `out`; a finished one gives its report.
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
  if resume and not (out / FOLDER).exists() and (out / REPORT).exists():
    return read_report(out)
  plan = _plan(base, finetuned, select, vocabulary)
  _check_folder(out, resume=resume, overwrite=overwrite)
  options = {
    "rank": rank,
    "dtype": jnp.dtype(dtype).name,
    "factor": _name(factor),
  }
  journal = open_journal(out, _fingerprint(plan, key, options), resume=resume)
  extractor = Extractor(factor, dtype, key)
  _factor_all(plan, journal, extractor, rank, log)
  ranks = _choose_ranks(journal, policy, jnp.dtype(dtype).itemsize)
  named = str(base) if base_model is None else base_model
  settings = {
    "jlora": metadata.version("jlora"),
    "base": str(base),
    "finetuned": str(finetuned),
    "profile": profile.name,
    "vocabulary": vocabulary.__name__,
    **options,
  }
  report = _write(plan, journal, ranks, out, profile, named, settings)
  journal.close()
  return report


def _plan(base, finetuned, select, vocabulary) -> _Plan:
  left, right = open_checkpoint(base), open_checkpoint(finetuned)
  pairing = pair_up(left.spec, right.spec, vocabulary=vocabulary)
  if not pairing.pairs:
    raise ValueError(
      f"No tensor of {base} is in {finetuned}: {name_some(left.spec)} against "
      f"{name_some(right.spec)}. Is this the base of that finetune?"
    )
  model_type = _model_type(left.path) or _model_type(right.path)
  table = table_for(left.spec, model_type)
  views = {
    pair.path: view_of(pair.path, pair.shape, table) for pair in pairing.pairs
  }
  refused = {
    pair.path
    for pair in pairing.pairs
    if views[pair.path] and not select(pair.path, left.spec[pair.base.name])
  }
  if refused == {path for path, view in views.items() if view}:
    raise ValueError(
      f"No matrix of {base} is selected: there are {name_some(left.spec)}."
    )
  return _Plan(left, right, pairing, views, refused, model_type)


def _model_type(folder: Path) -> str | None:
  file = folder / "config.json"
  if not file.exists():
    return None
  try:
    config = json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f"{file} is no JSON: {error}; mend it.") from error
  return config.get("model_type") if isinstance(config, dict) else None


def _check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
  if out.exists() and not out.is_dir():
    raise ValueError(f"{out} is a file; give a folder.")
  if resume or not out.exists():
    return
  if overwrite:
    journal = out / FOLDER
    if journal.exists():
      Journal(journal).close()
    (out / REPORT).unlink(missing_ok=True)
    return
  found = sorted(file.name for file in out.iterdir())
  if found:
    raise ValueError(
      f"{out} is not empty ({name_some(found)}). Resume the run that wrote it, "
      "allow overwriting, or give another folder."
    )


def _name(factor: Factoriser) -> str:
  """A factoriser with its options, as text."""
  if isinstance(factor, functools.partial):
    options = ", ".join(f"{k}={v}" for k, v in sorted(factor.keywords.items()))
    return f"{_name(factor.func)}({options})"
  return getattr(factor, "__name__", type(factor).__name__)


def _fingerprint(
  plan: _Plan, key, options: Mapping[str, Any]
) -> dict[str, Any]:
  """What determines the journal's contents."""
  seed = jax.random.key(0) if key is None else key
  return {
    **options,
    "jlora": metadata.version("jlora"),
    "jax": jax.__version__,
    "key": np.asarray(jax.random.key_data(seed)).tolist(),
    "base": _digest(plan.base),
    "finetuned": _digest(plan.finetuned),
    "modules": _hash([repr(item) for item in plan.views.items()]),
    "refused": _hash(sorted(plan.refused)),
    "pairs": _hash(map(repr, plan.pairing.pairs)),
  }


def _digest(checkpoint: Checkpoint) -> str:
  """A checkpoint's headers and its files' sizes and times, in one hash."""
  files = sorted({spec.file for spec in checkpoint.spec.values() if spec.file})
  stats = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
  entries = [
    (name, spec.shape, spec.dtype.name, spec.start, spec.end)
    for name, spec in checkpoint.spec.items()
  ]
  return _hash([repr(stats), *map(repr, entries)])


def _hash(lines: Iterable[str]) -> str:
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class _Room:
  """Bytes that may be in work at a time; what is larger is let in alone."""

  def __init__(self, limit: int):
    self._limit, self._used = limit, 0
    self._changed = threading.Condition()

  def enter(self, nbytes: int) -> None:
    with self._changed:
      self._changed.wait_for(
        lambda: self._used == 0 or self._used + nbytes <= self._limit
      )
      self._used += nbytes

  def leave(self, nbytes: int) -> None:
    with self._changed:
      self._used -= nbytes
      self._changed.notify_all()


def _factor_all(plan, journal, extractor, rank, log) -> None:
  """Brings every pair into the journal, a few at a time."""
  pairs = plan.pairing.pairs
  total = sum(_bytes_on_disk(plan, pair) for pair in pairs)
  room, saying = _Room(_MEMORY), threading.Lock()

  def work(pair: Pair) -> None:
    nbytes = _bytes_on_disk(plan, pair)
    size = nbytes + 12 * int(np.prod(pair.shape))
    room.enter(size)
    try:
      given = 0 if pair.path in plan.refused else rank
      outcome = extractor(
        pair, plan.views[pair.path], given, plan.base, plan.finetuned
      )
      with saying:
        record = _record(outcome)
        journal.put(pair.path, outcome.arrays, record)
        _say(progress, pair.path, nbytes, record)
    finally:
      room.leave(size)

  # LAPACK's own threads fight with XLA's over the same cores.
  with (
    Progress(total, log) as progress,
    threadpool_limits(1, user_api="blas"),
    ThreadPoolExecutor(_THREADS) as pool,
  ):
    for pair in pairs:
      if pair.path in journal:
        _say(
          progress, pair.path, _bytes_on_disk(plan, pair), journal[pair.path]
        )
    waiting = [
      pool.submit(work, pair) for pair in pairs if pair.path not in journal
    ]
    try:
      for future in wait(waiting, return_when=FIRST_EXCEPTION).done:
        future.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _bytes_on_disk(plan: _Plan, pair: Pair) -> int:
  """Bytes of both tensors; a part of a fused one counts as its own size."""
  itemsize = plan.finetuned.spec[names_of(pair.finetuned)[0]].dtype.itemsize
  own = plan.base.spec[pair.base.name].nbytes
  return own + int(np.prod(pair.shape)) * itemsize


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


def _choose_ranks(
  journal: Journal, policy: Policy | None, itemsize: int
) -> dict[str, int]:
  """{path: rank} of the extracted modules."""
  figures = {
    path: record["figures"]
    for path, record in sorted(journal.items())
    if record["status"] == "extracted"
  }
  if not figures:
    raise ValueError(
      "Nothing to extract: no selected matrix changed. Are base and finetune "
      "the same checkpoint?"
    )
  caps = {path: len(row["singular_values"]) for path, row in figures.items()}
  if policy is None:
    return caps
  spectra = Spectra(
    values={
      p: np.asarray(row["singular_values"]) for p, row in figures.items()
    },
    norms={path: row["norm"] for path, row in figures.items()},
    floors={path: row["noise_floor"] for path, row in figures.items()},
    unit_bytes={
      path: _unit_size(row["shape"]) * itemsize for path, row in figures.items()
    },
  )
  chosen = dict(policy(spectra))
  wrong = [
    f"{path}: {chosen.get(path)} of {cap}"
    for path, cap in caps.items()
    if not 0 <= chosen.get(path, -1) <= cap
  ]
  if wrong:
    raise ValueError(
      f"The policy gave {len(wrong)} modules no rank or one outside 0..cap: "
      f"{name_some(wrong)}."
    )
  return chosen


def _unit_size(shape: list[int]) -> int:
  return int(np.prod(shape[:-2])) * (shape[-2] + shape[-1])


class _Lazy(Mapping[str, Any]):
  """A mapping whose values are made when asked for, and not kept."""

  def __init__(self, paths: Iterable[str], make: Callable[[str], Any]):
    self._paths, self._make = dict.fromkeys(paths), make

  def __getitem__(self, path: str) -> Any:
    if path not in self._paths:
      raise KeyError(path)
    return self._make(path)

  def __iter__(self) -> Iterator[str]:
    return iter(self._paths)

  def __len__(self) -> int:
    return len(self._paths)


def _write(plan, journal, ranks, out, profile, base_model, settings) -> Report:
  """The adapter folder and its report, from a journal that is complete."""
  pairs = {pair.path: pair for pair in plan.pairing.pairs}

  def lora(path: str) -> Lora:
    arrays = journal.arrays(path)
    a, b = (jnp.asarray(arrays[side]) for side in ("a", "b"))
    k = ranks[path]
    return Lora(a[..., :k, :], b[..., :k, :], jnp.ones(a.shape[:-2]))

  def change(path: str) -> np.ndarray:
    left, right = read_pair(pairs[path], plan.base, plan.finetuned)
    return right.astype(np.float32) - left.astype(np.float32)

  def whole(path: str) -> np.ndarray:
    return read_pair(pairs[path], plan.base, plan.finetuned)[1]

  kept = [p for p in pairs if journal[p]["status"] == "kept whole"]
  biases, full = _sort_kept(kept, pairs, ranks)
  left = save_peft(
    out,
    _Lazy([path for path in pairs if path in ranks], lora),
    like=plan.base.spec,
    biases=_Lazy(biases, change),
    full=_Lazy(full, whole),
    profile=profile,
    base_model=base_model,
    model_type=plan.model_type,
    overwrite=True,
  )
  outcomes = {
    path: ("not representable", left[path])
    if path in left and record["status"] != "unchanged"
    else (record["status"], record["why"])
    for path, record in journal.items()
  }
  modules = [
    _module_row(path, journal[path]["figures"], ranks[path], plan, journal)
    for path in pairs
    if path in ranks and path not in left
  ]
  scales = [
    (side, name)
    for side, checkpoint in (("base", plan.base), ("finetuned", plan.finetuned))
    for name in checkpoint.companions
  ]
  ledger = keep_ledger(plan.pairing, outcomes, scales)
  report = Report(settings, modules, total_up(modules, ledger), ledger)
  write_report(out, report)
  return report


def _sort_kept(
  kept: list[str], pairs: Mapping[str, Pair], ranks: Mapping[str, int]
) -> tuple[list[str], list[str]]:
  """Biases of extracted modules, and parameters of modules kept whole."""
  biases = [
    path
    for path in kept
    if path.endswith(".bias") and path.removesuffix("bias") + "weight" in ranks
  ]
  owners = {path.rpartition(".")[0] for path in kept if path not in biases}
  # A consumer replaces whole modules, so their unchanged parameters come too.
  full = [path for path in pairs if path.rpartition(".")[0] in owners]
  return biases, [path for path in full if path not in ranks]


def _module_row(path, figures, rank, plan, journal) -> dict[str, Any]:
  """A module's row of the report at the rank it got."""
  size = int(np.prod(figures["shape"]))
  norm = figures["norm"]
  itemsize = journal.arrays(path).spec["a"].dtype.itemsize
  stored = plan.base.spec
  name = next(p.base.name for p in plan.pairing.pairs if p.path == path)
  return {
    "path": path,
    "shape": figures["shape"],
    "rank": rank,
    **at_rank(figures, rank, size),
    **{
      name: figures[name]
      for name in (
        "mean_abs_delta",
        "relative_change",
        "stable_rank",
        "effective_rank",
        "noise_floor",
        "noise_floor_rank",
        "norm",
      )
    },
    "error": figures["errors"][rank],
    "bytes": rank * _unit_size(figures["shape"]) * itemsize,
    "parameter_bytes": size * stored[name].dtype.itemsize,
    "singular_values": figures["singular_values"],
    "relative_errors": [error / norm for error in figures["errors"]],
  }
