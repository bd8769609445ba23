# SPDX-License-Identifier: Apache-2.0
"""Saves and loads a training run's state, so that it continues exactly."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.orbax import save_orbax
from jlora.messages import name_some
from jlora.paths import flatten, unflatten


class Snapshot(NamedTuple):
  """The complete state of a training run.

  Attributes:
    programs: path -> program.
    state: of the optimiser.
    key: the run's PRNG key.
    step: updates done.
  """

  programs: Any
  state: Any
  key: Any
  step: int


def save_snapshot(folder: str | os.PathLike, snapshot: Snapshot) -> Path:
  """Writes a snapshot of a run as the orbax checkpoint `folder/step`.

  The new one gets its name once it is complete, so a run that is killed while
  writing still has its older snapshots.

  Args:
    folder: of all snapshots of the run.
    snapshot: the state to save.

  Returns:
    The snapshot's path.

  Raises:
    ValueError: a snapshot of this step exists.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   run = Snapshot({}, jnp.zeros(3), jax.random.key(0), 7)
    ...   save_snapshot(folder, run).name
    '7'
  """
  path = Path(folder) / str(int(snapshot.step))
  save_orbax(path, _as_leaves(snapshot))
  return path


def load_snapshot(folder: str | os.PathLike, like: Snapshot) -> Snapshot:
  """Reads the newest finished snapshot of a run, exactly as it was saved.

  Args:
    folder: as for `save_snapshot`, or the folder of one step.
    like: a Snapshot of the same structure, shapes and dtypes, such as that of a
      fresh run.

  Returns:
    Snapshot.

  Raises:
    ValueError: there is none, or its leaves differ from `like` in name, shape
      or dtype; names up to three.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   run = Snapshot({}, jnp.zeros(3), jax.random.key(0), 7)
    ...   _ = save_snapshot(folder, run)
    ...   load_snapshot(folder, run._replace(step=0)).step
    7
  """
  wanted = _as_leaves(like)
  stored = dict(open_checkpoint(folder))
  wrong = [
    f"{name}: {leaf.dtype} {leaf.shape} stored, {wanted[name].dtype} "
    f"{wanted[name].shape} wanted"
    for name, leaf in stored.items()
    if name in wanted
    and (leaf.shape, leaf.dtype) != (wanted[name].shape, wanted[name].dtype)
  ]
  if wrong:
    raise ValueError(
      f"{folder} is of another run: {name_some(wrong)}; give the ranks and the "
      "optimiser that it was made with."
    )
  impl = jax.random.key_impl(like.key)
  tree = unflatten(stored, _as_tree(like))
  key = jax.random.wrap_key_data(jnp.asarray(tree.key), impl=impl)
  arrays = jax.tree.map(jnp.asarray, tree._replace(key=None, step=None))
  return arrays._replace(key=key, step=int(tree.step))


def _as_tree(snapshot: Snapshot) -> Snapshot:
  """Converts a snapshot's key and step to arrays."""
  return snapshot._replace(
    key=jax.random.key_data(snapshot.key), step=np.asarray(snapshot.step)
  )


def _as_leaves(snapshot: Snapshot) -> dict[str, Any]:
  """Flattens a snapshot to {path: array}."""
  return {
    name: jnp.asarray(leaf) if isinstance(leaf, float) else leaf
    for name, leaf in flatten(_as_tree(snapshot)).items()
  }
