# SPDX-License-Identifier: Apache-2.0
"""From a complete journal to the adapter folder: ranks, tensors, report."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from jlora.exporting import save_peft
from jlora.journal import Journal
from jlora.ledgers import keep_ledger
from jlora.loras import Lora
from jlora.measurements import row_of
from jlora.messages import name_some
from jlora.pairs import Pair
from jlora.peft_files import Profile
from jlora.plans import Plan
from jlora.ranks import Spectra
from jlora.readings import read_pair
from jlora.reporting import Report, total_up, write_report

Policy = Callable[[Spectra], Mapping[str, int]]


def choose_ranks(
  journal: Journal, policy: Policy | None, itemsize: int
) -> dict[str, int]:
  """The rank of every extracted module.

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


def write_adapter(
  plan: Plan,
  journal: Journal,
  ranks: Mapping[str, int],
  out: Path,
  *,
  profile: Profile,
  base_model: str,
  settings: dict[str, Any],
) -> Report:
  """The report of a run; its adapter folder is then written.

  Args:
    plan: the run's plan.
    journal: complete.
    ranks: from `choose_ranks`.
    out: the folder; an adapter in it is replaced.
    profile: the consumer.
    base_model: name of the base in the adapter's configuration.
    settings: for the report.

  Returns:
    Report, also written as `report.json`. One module is in memory at a time.

  Example:
    See `extract_checkpoint`, which calls it last.

    >>> write_adapter.__name__
    'write_adapter'
  """
  pairs = {pair.path: pair for pair in plan.pairing.pairs}

  def lora(path: str) -> Lora:
    arrays: Mapping[str, Any] = journal.arrays(path)
    # NumPy's, as they come: JAX would copy each, and start its backend.
    a, b = arrays["a"], arrays["b"]
    scale: Any = np.ones(a.shape[:-2], np.float32)
    return Lora(a[..., : ranks[path], :], b[..., : ranks[path], :], scale)

  def change(path: str) -> np.ndarray:
    left, right = read_pair(pairs[path], plan.base, plan.finetuned)
    return right.astype(np.float32) - left.astype(np.float32)

  def whole(path: str) -> np.ndarray:
    return read_pair(pairs[path], plan.base, plan.finetuned)[1]

  # The finetune's own head, where the base ties it, is in no file of the base.
  shapes = {
    path: plan.base.spec[pair.base.name]
    for path, pair in pairs.items()
    if path not in plan.base.spec
  }
  kept = [p for p in pairs if journal[p]["status"] == "kept whole"]
  biases, full = _sort_kept(kept, pairs, ranks.keys() | plan.refused)
  left = save_peft(
    out,
    _Lazy([path for path in pairs if path in ranks], lora),
    like=plan.base.spec | shapes,
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
  kept: list[str], pairs: Mapping[str, Pair], matrices: Set[str]
) -> tuple[list[str], list[str]]:
  """Biases of factored or refused matrices, and parameters of whole modules."""
  biases = [
    path
    for path in kept
    if path.endswith(".bias")
    and path.removesuffix("bias") + "weight" in matrices
  ]
  owners = {path.rpartition(".")[0] for path in kept if path not in biases}
  # A consumer replaces whole modules, so their unchanged parameters come too.
  full = [path for path in pairs if path.rpartition(".")[0] in owners]
  return biases, [path for path in full if path not in matrices | {*biases}]


def _module_row(path, figures, rank, plan, journal) -> dict[str, Any]:
  """A module's row of the report at the rank it got."""
  shape = figures["shape"]
  itemsize = journal.arrays(path).spec["a"].dtype.itemsize
  stored = plan.base.spec
  name = next(p.base.name for p in plan.pairing.pairs if p.path == path)
  return {
    "path": path,
    **row_of(figures, rank),
    "bytes": rank * _unit_size(shape) * itemsize,
    "parameter_bytes": int(np.prod(shape)) * stored[name].dtype.itemsize,
  }
