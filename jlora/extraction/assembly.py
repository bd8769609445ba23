# SPDX-License-Identifier: Apache-2.0
"""Turns a complete journal into an adapter: ranks, tensors, and the report.

journal ─► choose_ranks ─► write_adapter (tensors) ─► Report (modules, ledger)
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jlora.checkpoints.quantised import describe_companion
from jlora.extraction.coverage import count_unmatched
from jlora.extraction.planning import Plan
from jlora.extraction.report import (
  NO_PARAMETER,
  Report,
  total_up,
)
from jlora.factoring.deltas import difference
from jlora.factoring.figures import row_of
from jlora.formats.components import Components
from jlora.formats.lazy import Lazy
from jlora.formats.peft.conversions import together
from jlora.formats.peft.layouts import Profile
from jlora.formats.peft.parts import Base, Rename, module_of, tied_beside
from jlora.formats.peft.writing import save_peft
from jlora.loras import Lora
from jlora.messages import name_some
from jlora.pairing.comparison import read_pair
from jlora.pairing.pairs import Pair, Pairing, names_of
from jlora.ranks import Spectra
from jlora.runs.journal import Journal

Policy = Callable[[Spectra], Mapping[str, int]]
# Writes an adapter: arguments and result are those of `save_peft`.
Save = Callable[..., dict[str, str]]


def choose_ranks(
  journal: Mapping[str, Any], policy: Policy | None, itemsize: int
) -> dict[str, int]:
  """Returns the rank of every extracted module, as the policy chooses it.

  Args:
    journal: complete.
    policy: from all spectra to {path: rank}; None keeps what was factored.
    itemsize: bytes of one stored number, for budgets.

  Returns:
    {path: rank}.

  Raises:
    ValueError: nothing was extracted, or the policy left a module out or gave
      it more than it was factored at.

  Example:
    >>> choose_ranks({"w": {"status": "extracted", "figures": {
    ...   "singular_values": [2.0, 1.0]}}}, None, 4)
    {'w': 2}
  """
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
    if not 0 <= chosen.get(path, -1) <= cap or chosen[path] % 1
  ]
  if wrong:
    raise ValueError(
      f"The policy gave {len(wrong)} modules no whole rank in 0..cap: "
      f"{name_some(wrong)}."
    )
  return {path: int(chosen[path]) for path in caps}


def write_adapter(
  plan: Plan,
  journal: Journal,
  ranks: Mapping[str, int],
  out: Path,
  *,
  profile: Profile,
  base_model: str,
  settings: dict[str, Any],
  task_type: str | None = "auto",
  rename: Rename | Sequence[tuple[str, str]] | None = None,
  save: Save = save_peft,
) -> Report:
  """Writes the adapter of a run; returns the run's report.

  Args:
    plan: the run's plan.
    journal: complete.
    ranks: from `choose_ranks`.
    out: the folder; an adapter in it is replaced.
    profile: the consumer.
    base_model: name of the base in the adapter's configuration.
    settings: for the report.
    task_type: of `save_peft`.
    rename: of `save_peft`.
    save: what writes the files.

  Returns:
    Report, which is not written yet. One module is in memory at a time.
  """
  pairs = {pair.path: pair for pair in plan.pairing.pairs}

  def lora(path: str) -> Lora:
    arrays: Mapping[str, Any] = journal.arrays(path)
    # Kept as NumPy arrays: JAX would copy each one and start its backend.
    a, b = arrays["a"], arrays["b"]
    scale: Any = np.ones(a.shape[:-2], np.float32)
    return Lora(a[..., : ranks[path], :], b[..., : ranks[path], :], scale)

  def change(path: str) -> np.ndarray:
    left, right = read_pair(pairs[path], plan.base, plan.finetuned)
    return difference(left, right)

  def whole(path: str) -> np.ndarray:
    if path not in pairs:  # a buffer
      return (plan.finetuned if path in plan.finetuned else plan.base)[path]
    return read_pair(pairs[path], plan.base, plan.finetuned)[1]

  # Where only the base ties its head, no file of the base has the head.
  shapes = {
    path: plan.base.spec[pair.base.name]
    for path, pair in pairs.items()
    if path not in plan.base.spec
  }
  kept = [p for p in pairs if journal[p]["status"] == "kept whole"]
  held = {} if "full" in profile.refused else _held(kept, pairs, plan.about)
  held = {path: why for path, why in held.items() if path not in kept}
  ranks = {path: rank for path, rank in ranks.items() if path not in held}
  refused = {job.pair.path for job in plan.jobs if job.is_refused}
  biases, full = _sort_kept(kept, pairs, ranks.keys() | refused)
  asked = [path for path in pairs if path in plan.whole and path not in biases]
  full += [path for path in (*held, *asked) if path not in full]
  joined = together(plan.about)
  tied = tied_beside(plan.about) if plan.about else {}
  beside = [
    other
    for path in full
    for other in (*joined.get(path, ()), *tied.get(path, ()))
  ]
  known = {*full, *ranks}
  full += [path for path in dict.fromkeys(beside) if path not in known]
  full += _buffers_in({module_of(path) for path in full}, plan.pairing)
  left = save(
    out,
    Lazy({path: partial(lora, path) for path in pairs if path in ranks}),
    like=plan.base.spec | shapes,
    biases=Lazy({path: partial(change, path) for path in biases}),
    full=Lazy({path: partial(whole, path) for path in full}),
    profile=profile,
    base_model=base_model,
    task_type=_task_of(plan, task_type),
    model_type=plan.model_type,
    config=plan.config,
    rename=rename,
    fingerprint={
      path: said
      for path in ranks
      if (said := journal[path]["figures"].get("fingerprint"))
    },
    overwrite=True,
  )
  outcomes = {
    path: ("not representable", left[path])
    if path in left and record["status"] != "unchanged"
    else ("kept whole", held[path])
    if path in held and record["status"] == "extracted"
    else (record["status"], record["why"])
    for path, record in journal.items()
  }
  modules = [
    _module_row(pair, ranks[path], plan, journal)
    for path, pair in pairs.items()
    if path in ranks and path not in left
  ]
  scales = [
    (side, name)
    for side, checkpoint in (("base", plan.base), ("finetuned", plan.finetuned))
    for name in checkpoint.companions
  ]
  left_out = {"base": plan.base.left_out, "finetuned": plan.finetuned.left_out}
  ledger = keep_ledger(plan.pairing, outcomes, scales, left_out)
  totals = total_up(modules, ledger)
  totals |= count_unmatched(plan.base, plan.finetuned, plan.pairing)
  return Report(settings, modules, totals, ledger)


def _task_of(plan: Plan, task_type: str | None) -> str | None:
  """Returns PEFT's task: a model of images has none, whatever else is known.

  With one PEFT wants a text model's methods, and does not load the adapter.
  """
  has_class = plan.about is not None and plan.about.family is not None
  is_image = isinstance(plan.base, Components) and not has_class
  return None if task_type == "auto" and is_image else task_type


# What a policy is told of a module.
_FIGURES = ("shape", "singular_values", "norm", "noise_floor")


def list_unlisted(
  report: Report, journal: Mapping[str, Any], ranks: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
  """Returns what a policy was told of modules that are in no row of a report.

  Args:
    report: of the run.
    journal: complete.
    ranks: from `choose_ranks`.

  Returns:
    {path: {rank, shape, singular_values, norm, noise_floor}}.

  Example:
    >>> list_unlisted(Report({}, [{"path": "q"}], {}, []), {}, {"q": 4})
    {}
  """
  listed = {row["path"] for row in report.modules}
  return {
    path: {"rank": rank}
    | {name: journal[path]["figures"][name] for name in _FIGURES}
    for path, rank in ranks.items()
    if path not in listed
  }


def check_policy(
  report: Report,
  unlisted: Mapping[str, Mapping[str, Any]],
  policy: Policy | None,
  itemsize: int,
) -> None:
  """Raises unless a policy gives the ranks that a finished run was given.

  Args:
    report: of the finished run.
    unlisted: of its other modules, as from `list_unlisted`.
    policy: as for `choose_ranks`.
    itemsize: as for `choose_ranks`.

  Raises:
    ValueError: names up to three modules with both ranks.

  Example:
    >>> row = {"path": "q", "rank": 2, "shape": [4, 4], "norm": 3.0,
    ...        "noise_floor": 0.0, "singular_values": [2.0, 1.0]}
    >>> report = Report({}, [row], {}, [])
    >>> check_policy(report, {}, None, 4)
    >>> check_policy(report, {}, lambda spectra: {"q": 1}, 4)
    Traceback (most recent call last):
    ...
    ValueError: The policy gives other ranks than the finished run has: q 1
    instead of 2. Use overwrite=True to make it anew, or another out.
  """
  rows = {row["path"]: row for row in report.modules} | dict(unlisted)
  records = {
    path: {"status": "extracted", "figures": row} for path, row in rows.items()
  }
  chosen = choose_ranks(records, policy, itemsize)
  differing = [
    f"{path} {rank} instead of {rows[path]['rank']}"
    for path, rank in chosen.items()
    if rank != rows[path]["rank"]
  ]
  if differing:
    raise ValueError(
      "The policy gives other ranks than the finished run has: "
      f"{name_some(differing)}. Use overwrite=True to make it anew, or another "
      "out."
    )


def keep_ledger(
  pairing: Pairing,
  outcomes: Mapping[str, tuple[str, str]],
  scales: Iterable[tuple[str, str]] = (),
  left_out: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
  """Lists what became of every tensor of both checkpoints, each exactly once.

  Pairs that share a tensor (a tied head, fused experts) make one row, and so
  does all that a side leaves out for one reason.

  Args:
    pairing: all pairs and the names without partner.
    outcomes: path -> (status, why) of every pair.
    scales: (side, name) of what lies beside quantised weights.
    left_out: side -> {name: why} of what was not opened.

  Returns:
    Rows {base: [names], finetuned: [names], status, why}.

  Example:
    >>> from jlora.pairing.pairs import TensorPart
    >>> pair = Pair("w", (2,), TensorPart("w"), TensorPart("w"))
    >>> keep_ledger(Pairing([pair], [], ["x"]), {"w": ("unchanged", "")})[1]
    {'base': [], 'finetuned': ['x'], 'status': 'not representable', 'why': 'only
    in the finetuned checkpoint'}
  """
  rows = [_row(group, outcomes) for group in _groups(pairing.pairs)]
  for side, names in (
    ("base", pairing.only_base),
    ("finetuned", pairing.only_finetuned),
  ):
    why = f"only in the {side} checkpoint"
    rows += [_single(side, name, "not representable", why) for name in names]
  rows += [
    _single(side, name, NO_PARAMETER, why)
    for side, name, why in pairing.buffers
  ]
  rows += [
    _single(side, name, "unchanged", describe_companion(name))
    for side, name in scales
  ]
  for side, reasons in left_out.items():
    for why in dict.fromkeys(reasons.values()):
      names = [name for name, own in reasons.items() if own == why]
      row = _single(side, names[0], "not representable", f"left out: {why}")
      rows.append(row | {side: names})
  return rows


def _held(
  kept: Iterable[str], pairs: Mapping[str, Pair], about: Base | None
) -> dict[str, str]:
  """Returns {path: why} of all in modules that are replaced with their parts.

  A parameter that lies beside modules, as a table of positions beside the
  convolution of patches, can only be carried with them. That is done once in a
  model; where every layer has such a module its matrices keep their Loras,
  unless the parameter is larger than all that is beside it.
  """
  if about is None or about.family is None:
    return {}
  names = {path: str(about.rename(path)) for path in pairs}
  held = {}
  for path in kept:
    module = module_of(names[path])
    inside = [p for p in names if module and names[p].startswith(f"{module}.")]
    is_deep = any("." in names[p][len(module) + 1 :] for p in inside)
    in_layers = any(
      part.isdigit() for p in inside for part in names[p].split(".")
    )
    beside = sum(math.prod(pairs[p].shape) for p in inside if p != path)
    is_small = beside < math.prod(pairs[path].shape)
    if is_deep and (is_small or not in_layers):
      why = f"{module} is replaced, because {names[path]} is beside its parts"
      held |= dict.fromkeys(inside, why)
  return held


def _buffers_in(modules: Set[str], pairing: Pairing) -> list[str]:
  """Lists the base's buffers inside modules: a consumer reads these whole."""
  return [
    name
    for side, name, _ in pairing.buffers
    if side == "base"
    if any(name[: dot.start()] in modules for dot in re.finditer(r"\.", name))
  ]


def _sort_kept(
  kept: list[str], pairs: Mapping[str, Pair], matrices: Set[str]
) -> tuple[list[str], list[str]]:
  """Splits the kept parameters into biases and those of whole modules."""
  biases = [
    path
    for path in kept
    if path.endswith(".bias")
    and path.removesuffix("bias") + "weight" in matrices
  ]
  owners = {module_of(path) for path in kept if path not in biases}
  # A consumer replaces whole modules: write their unchanged parameters too.
  full = [path for path in pairs if module_of(path) in owners]
  return biases, [path for path in full if path not in matrices | {*biases}]


def _module_row(pair: Pair, rank: int, plan: Plan, journal) -> dict[str, Any]:
  """Returns the report's row for a module at the rank it was given."""
  figures = journal[pair.path]["figures"]
  shape = figures["shape"]
  itemsize = journal.arrays(pair.path).spec["a"].dtype.itemsize
  stored = plan.base.spec[pair.base.name].dtype.itemsize
  return {
    "path": pair.path,
    **row_of(figures, rank),
    "bytes": rank * _unit_size(shape) * itemsize,
    "parameter_bytes": int(np.prod(shape)) * stored,
  }


def _unit_size(shape: list[int]) -> int:
  """Counts the numbers that one unit of rank takes in a and b."""
  return int(np.prod(shape[:-2])) * (shape[-2] + shape[-1])


# A row of several pairs has the first of these that any pair has.
_ORDER = ("extracted", "kept whole", "not representable", "unchanged")


def _row(
  group: list[Pair], outcomes: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
  """Merges the outcomes of pairs that share tensors into one row."""
  statuses = [outcomes[pair.path][0] for pair in group]
  status = min(statuses, key=_ORDER.index)
  whys = [
    "; ".join(part for part in (outcomes[pair.path][1], pair.note) if part)
    for pair in group
  ]
  if len(set(statuses)) > 1:
    counts = (f"{statuses.count(s)} {s}" for s in _ORDER if s in statuses)
    whys.insert(0, f"of {len(group)} parts {', '.join(counts)}")
  once = dict.fromkeys
  return {
    "base": list(once(n for pair in group for n in names_of(pair.base))),
    "finetuned": list(
      once(n for pair in group for n in names_of(pair.finetuned))
    ),
    "status": status,
    "why": "; ".join(once(why for why in whys if why)),
  }


def _single(side: str, name: str, status: str, why: str) -> dict[str, Any]:
  """Makes the row of a tensor that has no partner."""
  empty = {"base": [], "finetuned": []}
  return {**empty, side: [name], "status": status, "why": why}


def _groups(pairs: Iterable[Pair]) -> list[list[Pair]]:
  """Groups the pairs that share a tensor of either side."""
  groups: dict[int, list[Pair]] = {}
  owner: dict[tuple[str, str], int] = {}
  for place, pair in enumerate(pairs):
    names = [("base", name) for name in names_of(pair.base)]
    names += [("finetuned", name) for name in names_of(pair.finetuned)]
    groups[place] = [pair]
    for other in {owner[name] for name in names if name in owner}:
      groups[place] = groups.pop(other) + groups[place]
    for member in groups[place]:
      owner |= {("base", name): place for name in names_of(member.base)}
      owner |= {
        ("finetuned", name): place for name in names_of(member.finetuned)
      }
  return list(groups.values())
