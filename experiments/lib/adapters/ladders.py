# SPDX-License-Identifier: Apache-2.0
"""Factors a pair of models once; all lower ranks are cuts of that."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

import jlora
from jlora import models
from jlora.numerics import norm_of

Ranks = Mapping[str, int]


class Ladder(NamedTuple):
  """Two models and the factored change between them.

  Attributes:
    model: `(params, tokens) -> logits`.
    base: its parameters, a nested dict.
    finetuned: the same structure.
    loras: path -> Lora of NumPy arrays at the highest rank, units in order.
    spectra: path -> singular values of those.
    norms: path -> Frobenius norm of the change.
    rests: path -> Frobenius norm of the residual at the highest rank.
  """

  model: Any
  base: Any
  finetuned: Any
  loras: dict[str, jlora.Lora]
  spectra: dict[str, np.ndarray]
  norms: dict[str, float]
  rests: dict[str, float]

  @property
  def shapes(self) -> dict[str, tuple[int, int]]:
    """Returns path -> (in, out) of every factored matrix."""
    return {
      path: (lora.a.shape[-1], lora.b.shape[-1])
      for path, lora in self.loras.items()
    }


def load_ladder(
  base: str | os.PathLike[str], finetuned: str | os.PathLike[str], rank: int
) -> Ladder:
  """Loads two model folders and factors their change.

  Args:
    base: a folder that `models.load` reads.
    finetuned: another of the same config.
    rank: the highest.

  Returns:
    Ladder; matrices that did not change are left out.
  """
  model, left = models.load(base)
  _, right = models.load(finetuned)
  return build_ladder(model, left, right, rank)


def build_ladder(model: Any, base: Any, finetuned: Any, rank: int) -> Ladder:
  """Factors the change between two trees of parameters.

  Args:
    model: `(params, tokens) -> logits`.
    base: its parameters.
    finetuned: the same structure.
    rank: the highest; every matrix has what its short side allows.

  Returns:
    Ladder, in float32, factored on the host.

  Example:
    >>> w = np.eye(4, dtype=np.float32)
    >>> ladder = build_ladder(None, {"w": w}, {"w": 3 * w}, 2)
    >>> ladder.spectra["w"].round(3), round(ladder.norms["w"], 3)
    (array([2., 2.], dtype=float32), 4.0)
  """
  left, right = (
    traverse_util.flatten_dict(x, sep="/") for x in (base, finetuned)
  )
  loras, spectra, norms, rests = {}, {}, {}, {}
  for path, leaf in left.items():
    delta = np.asarray(right[path], np.float32) - np.asarray(leaf, np.float32)
    if delta.ndim != 2 or not delta.any():
      continue
    factors = jlora.factoring.krylov(delta, rank)
    loras[path] = jlora.loras.from_factors(factors)
    spectra[path], norms[path] = factors.s, norm_of(delta)
    delta -= change_of(loras[path])
    rests[path] = norm_of(delta)
  return Ladder(model, base, finetuned, loras, spectra, norms, rests)


def cut(loras: Mapping[str, jlora.Lora], ranks: Ranks | int) -> jlora.Loras:
  """Takes the first units of every Lora.

  Args:
    loras: path -> Lora.
    ranks: one for all, or path -> rank; 0 leaves a module out.

  Returns:
    path -> Lora.

  Example:
    >>> lora = jlora.Lora(np.ones((4, 2)), np.ones((4, 3)), np.float32(1))
    >>> cut({"w": lora}, 3)["w"].rank
    3
  """
  wanted = ranks if isinstance(ranks, Mapping) else dict.fromkeys(loras, ranks)
  return {
    path: jlora.Lora(lora.a[: wanted[path]], lora.b[: wanted[path]], lora.scale)
    for path, lora in loras.items()
    if wanted[path]
  }


def with_loras(base: Any, loras: Mapping[str, jlora.Lora]) -> Any:
  """Adds an adapter to a model's parameters, on the host.

  Unlike `jlora.apply`, it compiles nothing for each new rank.

  Args:
    base: nested dict of kernels (in, out).
    loras: path -> Lora.

  Returns:
    The nested dict; float32 where a Lora was added.
  """
  flat = dict(traverse_util.flatten_dict(base, sep="/"))
  for path, lora in loras.items():
    flat[path] = np.asarray(flat[path]) + change_of(lora)  # pyright: ignore
  return traverse_util.unflatten_dict(flat, sep="/")


def change_of(lora: jlora.Lora) -> np.ndarray:
  """Computes what a Lora adds to its weight, on the host.

  Args:
    lora: a (r, in), b (r, out), of any dtype.

  Returns:
    (in, out) float32.

  Example:
    >>> change_of(jlora.Lora(np.ones((2, 1)), np.ones((2, 1)), np.float32(3)))
    array([[6.]], dtype=float32)
  """
  a, b = (np.asarray(x, np.float32) for x in (lora.a, lora.b))
  return np.float32(lora.scale) * (a.T @ b)


def bytes_of(
  shapes: Mapping[str, tuple[int, int]], ranks: Ranks | int, itemsize: int = 2
) -> int:
  """Counts the bytes of an adapter's factors.

  Args:
    shapes: path -> (in, out).
    ranks: one for all, or path -> rank; clipped to the short side.
    itemsize: bytes an entry; 2 is bfloat16.

  Returns:
    The bytes.

  Example:
    >>> bytes_of({"w": (10, 20)}, 4)
    240
  """
  wanted = ranks if isinstance(ranks, Mapping) else dict.fromkeys(shapes, ranks)
  return sum(
    min(wanted[path], *shape) * sum(shape) * itemsize
    for path, shape in shapes.items()
  )
