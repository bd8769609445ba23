# SPDX-License-Identifier: Apache-2.0
"""Adapters cut to other ranks and joined, one module in memory at a time.

A Lora's singular values come from the Gram matrices of its two factors and the
svd of a small matrix, in float64; no dense change is formed, and no base is
needed. What comes out
is a lazy mapping, which the writers of `jlora.formats` take.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.loras import Lora
from jlora.merging.adapters.concatenation import concat
from jlora.messages import name_some
from jlora.ranks import Ranks

#: Spectra of all modules -> rank of each.
Policy = Callable[[Mapping[str, np.ndarray]], Ranks]


class Resized(Mapping[str, Lora]):
  """An adapter at other ranks, each Lora computed when it is asked for.

  Attributes:
    loras: the adapter.
    ranks: path -> rank of each.
  """

  def __init__(self, loras: Mapping[str, Lora], ranks: Ranks):
    self.loras, self.ranks = loras, ranks

  def __getitem__(self, path: str) -> Lora:
    lora, rank = _wide(self.loras[path]), self.ranks[path]
    if rank == 0:
      return Lora(lora.a[..., :0, :], lora.b[..., :0, :], lora.scale)
    return _cut(lora, rank)

  def __iter__(self) -> Iterator[str]:
    return iter(self.loras)

  def __len__(self) -> int:
    return len(self.loras)


class Joined(Mapping[str, Lora]):
  """The weighted sum of adapters, each Lora computed when it is asked for.

  Attributes:
    adapters: path -> Lora each.
    weights: one for each adapter.
    rank: the largest, or None for the exact sum.
  """

  def __init__(
    self,
    adapters: Sequence[Mapping[str, Lora]],
    weights: Sequence[float],
    rank: int | None = None,
  ):
    if len(weights) != len(adapters):
      raise ValueError(
        f"{len(adapters)} adapters need as many weights, got {len(weights)}."
      )
    self.adapters, self.weights, self.rank = adapters, weights, rank
    self._paths = list(dict.fromkeys(path for own in adapters for path in own))

  def __getitem__(self, path: str) -> Lora:
    given = [
      (_wide(own[path]), weight)
      for own, weight in zip(self.adapters, self.weights, strict=True)
      if path in own
    ]
    if not given:
      raise KeyError(path)
    loras, weights = zip(*given, strict=True)
    whole = concat(list(loras), list(weights))
    if self.rank is None or whole.rank <= self.rank:
      return whole
    return _cut(whole, self.rank)

  def __iter__(self) -> Iterator[str]:
    return iter(self._paths)

  def __len__(self) -> int:
    return len(self._paths)


class Row(NamedTuple):
  """What became of one module.

  Attributes:
    old: its rank before.
    new: its rank now.
    kept: share of the norm that is kept, in [0, 1].
  """

  old: int
  new: int
  kept: float


def spectra_of(loras: Mapping[str, Lora]) -> dict[str, np.ndarray]:
  """Computes the singular values of every Lora of an adapter.

  Args:
    loras: path -> Lora; may be lazy, one is held at a time.

  Returns:
    path -> (..., min(r, in, out)) float64, descending. O((in + out) r²) each.

  Raises:
    ValueError: a factor that is not finite.

  Example:
    >>> eye = np.eye(2, 3, dtype=np.float32)
    >>> spectra_of({"q": Lora(eye, 2 * eye, np.float32(3))})
    {'q': array([6., 6.])}
  """
  found, broken = {}, []
  for path, lora in loras.items():
    a, b, scale = (
      np.asarray(x).astype(np.float64) for x in (lora.a, lora.b, lora.scale)
    )
    b = scale[..., None, None] * b
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      broken.append(path)
      continue
    (left, _), (right, _) = _root(a), _root(b)
    small = np.swapaxes(left, -1, -2) @ right
    values = np.linalg.svd(small, compute_uv=False)
    found[path] = values[..., : min(a.shape[-2:] + b.shape[-1:])]
  if broken:
    raise ValueError(
      f"{len(broken)} Loras have factors that are not finite: "
      f"{name_some(broken)}; the file is damaged or training diverged."
    )
  return found


def resize(
  loras: Mapping[str, Lora],
  policy: Policy,
  *,
  most: int | Mapping[str, int] | None = None,
) -> tuple[Resized, dict[str, Row], float]:
  """Cuts every Lora to the rank that a policy gives it, with the least error.

  Args:
    loras: path -> Lora; may be lazy, one is held at a time.
    policy: spectra -> ranks: a function of `jlora.ranks` with its other
      arguments given, such as `lambda spectra: norm(spectra, 0.9)`.
    most: an upper limit, for all or by path.

  Returns:
    The adapter, computed as it is read; old rank, new rank and share of the
    norm of each; and the relative error of all together,
    √(Σ_{i>rank} σ² / Σ σ²). A change that is not zero keeps rank 1 at least.

  Raises:
    ValueError: as the policy and `spectra_of`, or a limit below 1.

  Example:
    >>> from jlora.ranks import norm
    >>> b = np.diag(np.float32([3, 4])) @ np.eye(2, 5, dtype=np.float32)
    >>> lora = Lora(np.eye(2, 5, dtype=np.float32), b, np.float32(1))
    >>> small, rows, error = resize({"q": lora}, lambda s: norm(s, 0.75))
    >>> small["q"].rank, rows["q"].new, round(error, 3)
    (1, 1, 0.6)
  """
  limits = dict.fromkeys(loras, most) if not isinstance(most, Mapping) else most
  wrong = [f"{p}: {n}" for p, n in limits.items() if n is not None and n < 1]
  if wrong:
    raise ValueError(f"ranks must be at least 1, got {name_some(wrong)}.")
  spectra = spectra_of(loras)
  wanted = policy(spectra)
  ranks, rows = {}, {}
  lost = held = 0.0
  for path, values in spectra.items():
    squares = np.sum(values**2, axis=tuple(range(values.ndim - 1)))
    whole = float(np.sum(squares))
    rank = max(wanted[path], 1 if whole > 0 else 0)
    limit = limits.get(path)
    rank = min(rank, values.shape[-1], limit or values.shape[-1])
    left = float(np.sum(squares[rank:]))
    kept = math.sqrt(max(1 - left / whole, 0.0)) if whole else 1.0
    ranks[path] = rank
    rows[path] = Row(loras[path].rank, rank, kept)
    lost, held = lost + left, held + whole
  return Resized(loras, ranks), rows, math.sqrt(lost / held) if held else 0.0


def _root(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns root (k, k) and rows (k, n), orthonormal, of their product.

  By the eigenvectors of the Gram matrix: products and one small problem, where
  a QR goes column by column. What is 1e-7 of the largest is rounding in
  float64, and left out of the rows.
  """
  values, vectors = np.linalg.eigh(factor @ np.swapaxes(factor, -1, -2))
  lengths = np.sqrt(np.maximum(values, 0))
  is_held = lengths > 1e-7 * lengths[..., -1:]
  inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=is_held)
  root = vectors * lengths[..., None, :]
  rows = (inverse[..., None] * np.swapaxes(vectors, -1, -2)) @ factor
  return root, rows


def _cut(lora: Lora, rank: int) -> Lora:
  """Returns the nearest Lora of a rank, balanced, at scale 1, in float32.

  aᵀ b = V_aᵀ (R_aᵀ R_b) V_b,   a = R_a V_a, b = R_b V_b
  """
  a, b, scale = (
    np.asarray(x).astype(np.float64) for x in (lora.a, lora.b, lora.scale)
  )
  (left, rows), (right, columns) = _root(a), _root(b)
  u, s, vt = np.linalg.svd(np.swapaxes(left, -1, -2) @ right)
  rank = min(rank, *a.shape[-2:], b.shape[-1])
  s = scale[..., None] * s[..., :rank]
  half = np.sqrt(np.abs(s))[..., None]
  down: Any = half * (np.swapaxes(u, -1, -2)[..., :rank, :] @ rows)
  up: Any = np.copysign(half, s[..., None]) * (vt[..., :rank, :] @ columns)
  ones: Any = np.ones(scale.shape, np.float32)
  return Lora(down.astype(np.float32), up.astype(np.float32), ones)


def _wide(lora: Lora) -> Any:
  """Returns a Lora in float32."""
  a, b, scale = (
    np.asarray(x).astype(np.float32) for x in (lora.a, lora.b, lora.scale)
  )
  return Lora(a, b, scale)  # type: ignore[arg-type]
