# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint with an adapter on it as if they had been merged."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.merged import changed, check_changes
from jlora.checkpoints.safetensors import TensorSpec
from jlora.formats.fingerprints import check_fingerprint, read_fingerprint
from jlora.formats.peft.parts import describe_base, kind_of
from jlora.formats.peft.reading import load_peft
from jlora.numerics.backends import wide_dtype


class AdaptedCheckpoint(Mapping[str, np.ndarray]):
  """A base and an adapter folder as one lazy mapping, name -> tensor.

  A tensor that the adapter changes is computed on access, in float32, or
  float64 where the base has that; it is not rounded to the base's dtype. The
  adapter is held in memory.

  Args:
    base: an open checkpoint.
    adapter: a folder that `load_peft` reads.

  Attributes:
    base: the base.
    spec: name -> TensorSpec.
    path: the base's, with config.json and tokenizer.
    places: the base's.
    model_type: the base's.
    config: the base's.

  Warns:
    OtherBaseWarning: the adapter says that it was made on another base.
  """

  def __init__(self, base: Checkpoint, adapter: str | os.PathLike):
    model_type = base.model_type
    self.base, self.path, self.model_type = base, base.path, model_type
    self.adapter, self.places = Path(adapter), base.places
    self.config = config = base.config
    found = load_peft(
      adapter, like=base.spec, model_type=model_type, config=config
    )
    check_fingerprint(read_fingerprint(adapter), base, name=str(adapter))
    about = describe_base(base.spec, model_type, "auto", None, config)
    views = {p: kind_of(p, base.spec[p].shape, about).view for p in found.loras}
    check_changes(base, found.loras, views, found.biases, found.full)
    self._changes = (found.loras, views, found.biases, found.full)
    self.spec = dict(base.spec)
    for name in {*found.loras, *found.biases, *found.full}:
      shape = tuple(found.full.get(name, base.spec[name]).shape)
      dtype = np.dtype(wide_dtype(base.spec[name]))
      nbytes = dtype.itemsize * int(np.prod(shape))
      self.spec[name] = TensorSpec(shape, dtype, nbytes)

  def __getitem__(self, name: str) -> np.ndarray:
    array = changed(name, self.base, *self._changes)
    return array.astype(self.spec[name].dtype, copy=False)

  def __iter__(self) -> Iterator[str]:
    return iter(self.spec)

  def __len__(self) -> int:
    return len(self.spec)

  def __repr__(self) -> str:
    return f"AdaptedCheckpoint({self.base!r}, {str(self.adapter)!r})"


def open_model(name: str) -> Any:
  """Opens a checkpoint, or a checkpoint with an adapter on it.

  Args:
    name: a path, or `base+adapter`.

  Returns:
    Checkpoint or AdaptedCheckpoint.

  Raises:
    ValueError: as `open_checkpoint` and `load_peft`.

  Example:
    >>> open_model("/nowhere")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere does not exist
  """
  base, plus, adapter = name.rpartition("+")
  if not plus or Path(name).exists():
    return open_checkpoint(name)
  return AdaptedCheckpoint(open_checkpoint(base), adapter)


def files_of(model: Any) -> list[Checkpoint]:
  """Returns the checkpoints that a model from `open_model` is read from.

  Returns:
    The checkpoint alone, or the base's and the adapter's.

  Example:
    >>> import tempfile
    >>> from jlora.checkpoints import write_safetensors
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   write_safetensors(f"{tmp}/m.safetensors", {"w": np.ones(2)})
    ...   len(files_of(open_model(tmp)))
    1
  """
  if isinstance(model, AdaptedCheckpoint):
    return [model.base, open_checkpoint(model.adapter)]
  return [model]
