# SPDX-License-Identifier: Apache-2.0
"""The tensors of an adapter file: announced first, then one Lora at a time."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.adapter_parts import Part
from jlora.loras import Lora
from jlora.peft_files import BIAS, PREFIX


def spec_of(
  parts: Sequence[Part],
  carried: Mapping[str, str],
  full: Mapping[str, Any],
  kept: Mapping[str, str],
) -> dict[str, tuple]:
  """Key -> (shape, dtype) of every tensor that `arrays_of` gives.

  Args:
    parts: the Loras of the file.
    carried: module -> path of its bias; if any, every part has one.
    full: path -> whole tensor.
    kept: Hugging Face name -> path in `full`.

  Returns:
    The spec that `stream_safetensors` takes.

  Example:
    >>> from jlora.peft_files import LINEAR
    >>> f4 = np.dtype("f4")
    >>> part = Part("q", None, "q.weight", LINEAR, (1, 3), (1, 2), f4)
    >>> [shape for shape, _ in spec_of([part], {}, {}, {}).values()]
    [(1, 3), (2, 1)]
  """
  spec = {}
  for part in parts:
    a = np.broadcast_to(np.empty((), part.dtype), part.a)
    b = np.broadcast_to(np.empty((), part.dtype), part.b)
    for key, array in _stored(part, a, b):
      spec[key] = array.shape, part.dtype
    if carried:
      spec[f"{PREFIX}{part.stem}.{BIAS}"] = part.b[-1:], part.dtype
  leaves = getattr(full, "spec", full)
  for name, path in kept.items():
    leaf = leaves[path]
    spec[PREFIX + name] = leaf.shape, leaf.dtype
  return spec


def arrays_of(
  parts: Sequence[Part],
  loras: Mapping[str, Lora],
  biases: Mapping[str, Any],
  carried: Mapping[str, str],
  full: Mapping[str, Any],
  kept: Mapping[str, str],
) -> Iterator[tuple[str, np.ndarray]]:
  """(key, array) of every tensor of the file.

  Scales are multiplied into b, in float32, before the one rounding to the
  storage dtype.

  Args:
    parts: the Loras of the file, those of one path side by side.
    loras: path -> Lora; each is read once, and one is held at a time.
    biases: path -> change of a bias.
    carried: module -> path in `biases`.
    full: path -> whole tensor.
    kept: Hugging Face name -> path in `full`.

  Yields:
    Tensors as PEFT stores them.

  Example:
    >>> from jlora.peft_files import LINEAR
    >>> f4 = np.dtype("f4")
    >>> part = Part("q", None, "q.weight", LINEAR, (1, 3), (1, 2), f4)
    >>> lora = Lora(np.ones((1, 3), f4), np.ones((1, 2), f4), np.float32(2))
    >>> dict(arrays_of([part], {"q": lora}, {}, {}, {}, {}))[
    ...   "base_model.model.q.lora_B.weight"]
    array([[2.],
           [2.]], dtype=float32)
  """
  for path, group in itertools.groupby(parts, lambda part: part.path):
    factors = None if path is None else _folded(loras[path])
    for part in group:
      a, b = _factors(part, factors)
      yield from _stored(part, a.astype(part.dtype), b.astype(part.dtype))
      if not carried:
        continue
      bias = np.zeros(part.b[-1:])
      if part.module in carried:
        bias = np.asarray(biases[carried[part.module]])
      yield f"{PREFIX}{part.stem}.{BIAS}", bias.astype(part.dtype)
  for name, path in kept.items():
    yield PREFIX + name, np.asarray(full[path])


def _stored(part: Part, a, b) -> Iterator[tuple[str, np.ndarray]]:
  """The two tensors of a part, under their keys."""
  a, b = part.layout.store(a, b, part.kernel)
  yield f"{PREFIX}{part.stem}.{part.layout.a}", a
  yield f"{PREFIX}{part.stem}.{part.layout.b}", b


def _folded(lora: Lora) -> tuple[np.ndarray, np.ndarray]:
  """The factors, the scale multiplied into the second."""
  scale = np.asarray(lora.scale, np.float32)[..., None, None]
  b = np.asarray(lora.b)
  if (scale != 1).any():
    b = b.astype(np.float32) * scale
  return np.asarray(lora.a), b


def _factors(part: Part, factors) -> tuple[np.ndarray, np.ndarray]:
  """A part's own factors: of its index, in its order, of its rank."""
  if factors is None:
    return np.zeros(part.a, part.dtype), np.zeros(part.b, part.dtype)
  a, b = factors[::-1] if part.swapped else factors
  if part.index is not None:
    a = a.reshape(-1, *a.shape[-2:])[part.index]
    b = b.reshape(-1, *b.shape[-2:])[part.index]
  return _padded(a, part.rank), _padded(b, part.rank)


def _padded(factor: np.ndarray, rank: int) -> np.ndarray:
  """A factor (..., r, n) with zero units up to a rank."""
  missing = rank - factor.shape[-2]
  if not missing:
    return factor
  around = [(0, 0)] * (factor.ndim - 2)
  return np.pad(factor, [*around, (0, missing), (0, 0)])
