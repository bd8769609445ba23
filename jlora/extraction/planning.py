# SPDX-License-Identifier: Apache-2.0
"""Plans what an extraction does with each pair, from headers alone."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.formats.peft.parts import Base, Rename, describe_base, kind_of
from jlora.messages import name_some
from jlora.numerics.backends import words_of
from jlora.pairing.pairs import Pair, Pairing, TensorPart, names_of
from jlora.paths import matching
from jlora.runs.fingerprints import (
  describe_input,
  describe_versions,
  hash_lines,
)
from jlora.selection import Select, is_floating
from jlora.views import CONV1D, CONV2D, CONV3D, MatrixView

# `krylov` multiplies a module with 11 blocks of rank + 16 rows each. A matrix
# whose short side is smaller than all of these together is multiplied once.
_PRODUCTS, _OVERSAMPLE = 11, 16
# How many operations of a product take as long as reading an entry of both
# tensors and everything done to it once. Only the rough ratio matters.
_PER_ENTRY = 160

_CONVOLUTIONS = (CONV1D, CONV2D, CONV3D)

AS_ASKED = "as asked for"


class ModuleJob(NamedTuple):
  """A pair of tensors, and what an extraction does with it.

  Attributes:
    pair: which tensors.
    view: how they are read as a matrix; None if they are no matrices.
    rank: triplets to find, clipped to what the matrix has; 0: the matrix was
      not selected and is only compared.
    nbytes: bytes of both tensors on disk; of a fused one only the part used.
    can_be_split: whether all processes can factor it together, each its part.
    why: the reason, where a matrix is not read as one.
  """

  pair: Pair
  view: MatrixView | None
  rank: int
  nbytes: int
  can_be_split: bool = False
  why: str = ""

  @property
  def is_refused(self) -> bool:
    """Returns whether it is a matrix that was not selected."""
    return self.view is not None and self.rank == 0

  @property
  def matrix_view(self) -> MatrixView:
    """Returns how the tensors are read as a matrix; raises if they are none."""
    if self.view is None:
      raise ValueError(f"{self.pair.path} is not read as a matrix.")
    return self.view

  @property
  def bytes_in_work(self) -> int:
    """Counts the bytes of both tensors and of their float32 copies."""
    return self.nbytes + 12 * math.prod(self.pair.shape)

  @property
  def cost(self) -> int:
    """Estimates the job's time, as operations of matrix products."""
    if self.view is None or self.pair.whole:
      return cost_of(self.pair.shape, 0)
    return cost_of(self.view.shape(self.pair.shape), self.rank)


class Plan(NamedTuple):
  """Two open checkpoints, their pairs, and what is done with each.

  Attributes:
    base: the base, open.
    finetuned: the finetune, open.
    pairing: which tensors belong together.
    jobs: one for each pair, in the order of the pairs.
    model_type: what config.json says; None without one.
    config: the contents of config.json; None without one.
    about: what is known of the base's modules.
    whole: paths of what is stored whole because the caller says so.
  """

  base: Checkpoint
  finetuned: Checkpoint
  pairing: Pairing
  jobs: list[ModuleJob]
  model_type: str | None
  config: Mapping[str, Any] | None = None
  about: Base | None = None
  whole: Set[str] = frozenset()


def plan_jobs(
  base: Checkpoint,
  finetuned: Checkpoint,
  pairing: Pairing,
  select: Select,
  rank: int,
  rename: Rename | Sequence[tuple[str, str]] | None = None,
  whole: str | None = None,
  conv_rank: int | None = None,
) -> Plan:
  """Plans what is done with each pair, from headers alone.

  Args:
    base: a checkpoint.
    finetuned: the finetune.
    pairing: of both, from `pair_up`.
    select: `(path, spec) -> bool`, which matrices are factored.
    rank: the rank of every module.
    rename: of `save_peft`.
    whole: regex of whole names of tensors that are not factored, but stored as
      the finetune has them.
    conv_rank: the rank of convolutions over 1 x 1; None is `rank`.

  Returns:
    Plan. No tensor is read.

  Raises:
    ValueError: checkpoints that share nothing, a selection that leaves
      nothing, or `whole` fits no tensor.
  """
  if not pairing.pairs:
    raise ValueError(
      f"No tensor of {base.path} is in {finetuned.path}: "
      f"{name_some(base.spec)} against {name_some(finetuned.spec)}. Is this "
      "the base of that finetune?"
    )
  model_type = base.model_type or finetuned.model_type
  config = base.config or finetuned.config or None
  about = describe_base(base.spec, model_type, "auto", rename, config)
  is_asked = matching(whole)
  asked = {p.path for p in pairing.pairs if whole and is_asked(p.path, None)}
  if whole and not asked:
    raise ValueError(
      f"whole={whole!r} fits no tensor: there are {name_some(base.spec)}."
    )
  jobs = []
  for pair in pairing.pairs:
    kind = kind_of(pair.path, pair.shape, about)
    if pair.path in asked:
      kind = kind._replace(view=None, why=AS_ASKED)
    view = kind.view
    taken = view is not None and select(pair.path, base.spec[pair.base.name])
    is_kernel = view in _CONVOLUTIONS and math.prod(pair.shape[2:]) > 1
    own = rank if conv_rank is None or not is_kernel else conv_rank
    job = ModuleJob(
      pair,
      view,
      own if taken else 0,
      _bytes_on_disk(base, finetuned, pair),
      why=kind.why,
    )
    can_be_split = bool(taken) and _are_whole(base, finetuned, pair)
    jobs.append(job._replace(can_be_split=can_be_split))
  if not any(job.rank for job in jobs):
    raise ValueError(
      f"No matrix of {base.path} is selected: there are {name_some(base.spec)}."
    )
  return Plan(base, finetuned, pairing, jobs, model_type, config, about, asked)


def cost_of(shape: Sequence[int], rank: int) -> int:
  """Estimates what a tensor of a pair costs a run.

  Args:
    shape: (..., in, out) of a module; any shape if it is not factored.
    rank: triplets to find; 0: the tensor is only read.

  Returns:
    Operations of matrix products that would take as long, roughly.
  """
  entries = math.prod(shape)
  if not rank:
    return entries * _PER_ENTRY
  rows = min(_PRODUCTS * (rank + _OVERSAMPLE), *shape[-2:])
  return entries * (_PER_ENTRY + 2 * rows)


def _bytes_on_disk(base: Checkpoint, finetuned: Checkpoint, pair: Pair) -> int:
  """Counts the bytes of both tensors; of a fused one only the part used."""
  itemsize = finetuned.spec[names_of(pair.finetuned)[0]].dtype.itemsize
  own = base.spec[pair.base.name].nbytes
  return own + int(np.prod(pair.shape)) * itemsize


def _are_whole(base: Checkpoint, finetuned: Checkpoint, pair: Pair) -> bool:
  """Returns whether both sides of a pair are whole floating tensors."""
  return not pair.whole and all(
    isinstance(side, TensorPart)
    and not (side.index or side.swap)
    and is_floating(checkpoint.spec[side.name].dtype)
    and checkpoint.spec[side.name].dtype != np.float64  # JAX would round it
    and checkpoint.spec[side.name].shape == pair.shape
    for checkpoint, side in ((base, pair.base), (finetuned, pair.finetuned))
  )


def fingerprint(
  plan: Plan, key: jax.Array | None, options: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns all that determines a run's result: inputs, options, versions.

  Args:
    plan: the run's plan.
    key: its PRNG key; None is `key(0)`.
    options: the other options of the run, as JSON values.

  Returns:
    A dict; equal dicts mean equal results. Inputs count as the same if their
    headers and small files are, and the sizes, times and paths of all files.
  """
  return {
    **options,
    **describe_versions(),
    "key": words_of(key).tolist(),
    **describe_input("base", plan.base),
    **describe_input("finetuned", plan.finetuned),
    "modules": hash_lines(repr((j.pair.path, j.view)) for j in plan.jobs),
    "refused": hash_lines(j.pair.path for j in plan.jobs if j.is_refused),
    "pairs": hash_lines(map(repr, plan.pairing.pairs)),
  }


def without_paths(marks: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a fingerprint without where the inputs lie.

  Processes on several machines may have files of one content elsewhere.

  Args:
    marks: of `fingerprint`.

  Returns:
    The rest.
  """
  return {k: v for k, v in marks.items() if not k.endswith(" paths")}
