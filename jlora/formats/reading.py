# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of one module of an adapter, when they are asked for."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.formats.bases import Split
from jlora.formats.forms import (
  MAGNITUDES,
  Form,
  Pair,
  dora_change,
  flat,
  magnitude_axis,
  within,
)
from jlora.formats.joining import cut, halves_exchanged
from jlora.formats.keys import StoredModule
from jlora.formats.peft.reading import StoredLora, read_stored
from jlora.loras import Lora
from jlora.numerics.finite import is_finite, not_finite


class ReadLora(NamedTuple):
  """Reads one module's Lora.

  Attributes:
    file: the tensors.
    read_weight: (component, module) -> the base's weight, for DoRA.
    module: its keys.
    at: where the weight is in the base.
    scale: alpha / r.
    cutting: first output and one past the last, if it is cut from a larger one.
    exchanged: whether the halves of its outputs change places.
  """

  file: Checkpoint
  read_weight: Callable[[Split], np.ndarray]
  module: StoredModule
  at: Split
  scale: float
  cutting: tuple[int, int] | None
  exchanged: bool

  @property
  def rank(self) -> int:
    """Returns the rank that the stored tensors have together."""
    shape = {r: self.file.spec[k].shape for r, k in self.module.keys.items()}
    if "down" in shape:
      return shape["up"][1]
    if "hada_w1_b" in shape:
      return shape["hada_w1_b"][0] * shape["hada_w2_b"][0]
    sides = [
      shape[name] for name in ("lokr_w1_a", "lokr_w1_b") if name in shape
    ]
    left = shape.get("lokr_w1") or (sides[0][0], *sides[1])
    if "lokr_w2" in shape:
      right = shape["lokr_w2"]
      return min(left) * min(right[0], int(np.prod(right[1:])))
    return min(left) * shape["lokr_w2_b"][0]

  def __call__(self) -> Lora:
    """Reads it."""
    tensors = {role: self.file[key] for role, key in self.module.keys.items()}
    tensors.pop("alpha", None)
    scale = np.float32(self.scale)
    a, b = self._pair(self.module.form, tensors)
    if role := next((r for r in MAGNITUDES if r in tensors), None):
      a, b = self._dora(a, b, role, tensors[role])
      scale = np.float32(1)
    if self.exchanged:
      b = halves_exchanged(b)
    if self.cutting is not None:
      a, b = cut(a, b, *self.cutting)
    return Lora(a, np.ascontiguousarray(b.T), scale)  # type: ignore[arg-type]

  def _pair(self, form: Form, tensors: Mapping[str, np.ndarray]) -> Pair:
    """Returns A and B; a plain LoRA's as they are stored."""
    if form.name == "LoRA" and "mid" not in tensors:
      return form.pair(tensors)
    kinds = {x.dtype for x in tensors.values()}
    wide = np.float64 if np.dtype(np.float64) in kinds else np.float32
    pair = form.pair({role: x.astype(wide) for role, x in tensors.items()})
    return within(pair, min(pair[0].shape[1], len(pair[1])))

  def _dora(self, a, b, role: str, magnitude: np.ndarray) -> Pair:
    """Returns the change of DoRA as factors of full rank."""
    weight = self.read_weight(self.at)
    if self.exchanged:  # as the file has it; the caller turns the change back
      weight = halves_exchanged(weight)
    change = self.scale * (b.astype(np.float64) @ a.astype(np.float64))
    for name, x in (("A", a), ("B", b), (role, magnitude)):
      if not is_finite(x):
        where = f"{self.file.path}: {self.module.stem}, {name}"
        raise not_finite(where, x, x.dtype)
    axis = magnitude_axis(role, magnitude.shape, weight.shape)
    dense = dora_change(weight, change.reshape(weight.shape), magnitude, axis)
    u, s, vt = np.linalg.svd(flat(dense), full_matrices=False)
    root = np.sqrt(s)
    return (
      (root[:, None] * vt).astype(np.float32),
      (u * root).astype(np.float32),
    )


class ReadWhole(NamedTuple):
  """Reads one tensor, of which the model may keep a part.

  Attributes:
    file: the tensors.
    key: of the tensor.
    bounds: first and one past the last of its first axis, or None for all.
    scale: by which it is multiplied.
    exchanged: whether the halves of its first axis change places.
  """

  file: Checkpoint
  key: str
  bounds: tuple[int, int] | None
  scale: float
  exchanged: bool

  def __call__(self) -> np.ndarray:
    """Reads it."""
    found = self.file[self.key]
    if self.exchanged:
      found = halves_exchanged(found)
    if self.bounds is not None:
      found = found[slice(*self.bounds)]
    if self.scale != 1:
      found = np.float32(self.scale) * found.astype(np.float32)
    return found


class ReadPeft(NamedTuple):
  """Reads one layer of a PEFT folder.

  Attributes:
    layer: what.
    file: the tensors.
  """

  layer: StoredLora
  file: Checkpoint

  def __call__(self) -> Lora:
    """Reads it."""
    found = read_stored(self.layer, self.file)
    if found.a.ndim > 2 and len(found.a) == 1:
      return Lora(found.a[0], found.b[0], found.scale[0])
    b: Any = np.ascontiguousarray(found.b)
    return Lora(found.a, b, found.scale)


class ReadChange(NamedTuple):
  """Reads a new value and the base's, for their difference.

  Attributes:
    read: reads the new value.
    base: parameter -> value.
    name: of the parameter.
  """

  read: ReadWhole
  base: Mapping[str, Any]
  name: str

  def __call__(self) -> np.ndarray:
    """Reads both, in float32."""
    new, old = (
      np.asarray(x).astype(np.float32)
      for x in (self.read(), self.base[self.name])
    )
    if new.shape != old.shape:
      raise ValueError(
        f"{self.name} is {new.shape} in the adapter, {old.shape} in the base; "
        "a change of shape is no sum. Merge it into a checkpoint."
      )
    return new - old
