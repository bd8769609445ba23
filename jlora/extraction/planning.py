# SPDX-License-Identifier: Apache-2.0
"""What a run is to do, from headers alone, and what makes it the same run."""

import os
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.messages import name_some
from jlora.numerics.backends import words_of
from jlora.pairing.match import Vocabulary, pair_up
from jlora.pairing.pairs import Pair, Pairing, names_of
from jlora.runs.fingerprints import digest, hash_lines
from jlora.selection import Select
from jlora.views import MatrixView, table_for, view_of


class Plan(NamedTuple):
  """Both checkpoints, their pairs, and how each parameter is read.

  Attributes:
    base: the base, open.
    finetuned: the finetune, open.
    pairing: which tensors belong together.
    views: path -> how it is read as a matrix, None if it is none.
    refused: matrices that were not selected.
    model_type: of config.json, if there is one.
  """

  base: Checkpoint
  finetuned: Checkpoint
  pairing: Pairing
  views: dict[str, MatrixView | None]
  refused: set[str]
  model_type: str | None


def plan_run(
  base: str | os.PathLike,
  finetuned: str | os.PathLike,
  select: Select,
  vocabulary: Vocabulary,
) -> Plan:
  """The plan of an extraction; headers are read, tensors are not.

  Args:
    base: a checkpoint.
    finetuned: the finetune.
    select: `(path, spec) -> bool`, which matrices are factored.
    vocabulary: what happens to a table whose number of rows changed.

  Returns:
    Plan.

  Raises:
    ValueError: inputs that cannot be read or share nothing, or a selection that
      leaves nothing.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints.checkpoint import write_safetensors
    >>> from jlora.pairing import same_rows
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   file = f"{tmp}/m.safetensors"
    ...   write_safetensors(file, {"m.q.weight": np.ones((4, 6))})
    ...   plan_run(file, file, lambda path, spec: True, refuse).views
    {'m.q.weight': MatrixView(batch=(), inputs=(1,), outputs=(0,))}
  """
  left, right = open_checkpoint(base), open_checkpoint(finetuned)
  pairing = pair_up(left.spec, right.spec, vocabulary=vocabulary)
  if not pairing.pairs:
    raise ValueError(
      f"No tensor of {base} is in {finetuned}: {name_some(left.spec)} against "
      f"{name_some(right.spec)}. Is this the base of that finetune?"
    )
  model_type = left.model_type or right.model_type
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
  return Plan(left, right, pairing, views, refused, model_type)


def bytes_on_disk(plan: Plan, pair: Pair) -> int:
  """Bytes of both tensors of a pair; a part of a fused one counts as its own.

  Args:
    plan: the run's plan.
    pair: one of its pairs.

  Returns:
    Bytes.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints.checkpoint import write_safetensors
    >>> from jlora.pairing import same_rows
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   file = f"{tmp}/m.safetensors"
    ...   write_safetensors(file, {"w.weight": np.ones((4, 6), np.float32)})
    ...   plan = plan_run(file, file, lambda path, spec: True, refuse)
    ...   bytes_on_disk(plan, plan.pairing.pairs[0])
    192
  """
  itemsize = plan.finetuned.spec[names_of(pair.finetuned)[0]].dtype.itemsize
  own = plan.base.spec[pair.base.name].nbytes
  return own + int(np.prod(pair.shape)) * itemsize


def fingerprint(
  plan: Plan, key: jax.Array | None, options: Mapping[str, Any]
) -> dict[str, Any]:
  """What determines the results of a run: inputs, options and versions.

  Args:
    plan: the run's plan.
    key: its PRNG key; None is `key(0)`.
    options: what else it was given, for JSON.

  Returns:
    A dict; equal dicts mean equal results, as far as headers, sizes and times
    of the files tell that the inputs are the same.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints.checkpoint import write_safetensors
    >>> from jlora.pairing import same_rows
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   file = f"{tmp}/m.safetensors"
    ...   write_safetensors(file, {"m.q.weight": np.ones((4, 6))})
    ...   plan = plan_run(file, file, lambda path, spec: True, refuse)
    ...   fingerprint(plan, None, {"rank": 8})["rank"]
    8
  """
  return {
    **options,
    "jlora": metadata.version("jlora"),
    "jax": jax.__version__,
    "key": words_of(key).tolist(),
    "base": digest(plan.base),
    "finetuned": digest(plan.finetuned),
    "modules": hash_lines([repr(item) for item in plan.views.items()]),
    "refused": hash_lines(sorted(plan.refused)),
    "pairs": hash_lines(map(repr, plan.pairing.pairs)),
  }
