# SPDX-License-Identifier: Apache-2.0
"""Measures how much the subspaces of two adapters have in common."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.factoring.factorisers import recompress
from jlora.loras import Lora, exchange
from jlora.messages import name_some
from jlora.numerics.backends import library_of

# Units weaker than this share of the strongest count as zero.
_NOISE = 1e-6


def overlap(left: Lora, right: Lora) -> Any:
  """Computes the overlap of two adapters' leading input directions.

      φ(i, j) = ‖U_iᵀ U'_j‖² / min(i, j),   U_i the first i singular vectors

  φ is 1 where the smaller span lies within the larger, and about max(i, j) / in
  for random ones. `overlap(exchange(left), exchange(right))` compares output
  directions.

  Approximation: the paper takes singular vectors of the factor A alone, which
  depend on the factorisation. Here they are those of the change aᵀ b, which
  does not; at full rank the spans are the same.

  Args:
    left: a (..., r, in), b (..., r, out).
    right: a (..., r', in), b (..., r', out').

  Returns:
    (..., r, r') float32, entry [i-1, j-1] is φ(i, j). Costs a QR of each
    factor; nothing of the weight's size is formed. Units of zero strength have
    arbitrary directions. NumPy arrays are processed on the host.

  Raises:
    ValueError: the inputs differ in size.

  Example:
    >>> a, b = np.eye(4)[:2] * np.array([[2.0], [1.0]]), np.eye(2)
    >>> lora = Lora(a, b, np.float32(1))
    >>> overlap(lora, lora).round(3)
    array([[1., 1.],
           [1., 1.]], dtype=float32)

  References:
    Hu et al. (2021), equation 4 and figure 3.
  """
  if left.a.shape[-1] != right.a.shape[-1]:
    raise ValueError(
      f"inputs differ: a {left.a.shape} and a {right.a.shape}; give adapters "
      "of one parameter."
    )
  u, v = (recompress(lora.a, lora.b, lora.rank).u for lora in (left, right))
  xp = library_of(u)
  squares = xp.square(xp.matmul(xp.swapaxes(u, -1, -2), v))
  sums = xp.cumsum(xp.cumsum(squares, axis=-2), axis=-1)
  i, j = (np.arange(1, x.shape[-1] + 1, dtype=np.float32) for x in (u, v))
  lower = np.minimum(i[:, None], j[None, :])
  return sums / xp.broadcast_to(lower, sums.shape)


class Shared(NamedTuple):
  """The overlap and angles of two sets of directions.

  Attributes:
    overlap: `‖QᵀQ'‖² / min(k, k')`: 1 where the smaller span lies within the
      larger; NaN if either is empty.
    level: the expected overlap of random spans, max(k, k') / n.
    leading: the overlap of the few strongest directions of each alone.
    leading_level: the expected overlap of as many random ones.
    angles: (min(k, k'),) principal angles in degrees, smallest first.
  """

  overlap: float
  level: float
  leading: float
  leading_level: float
  angles: np.ndarray


def compare_reads(left: Lora, right: Lora, *, leading: int = 8) -> Shared:
  """Compares the input directions that two adapters read.

      cos(angles) = singular values of QᵀQ',   Q = orthonormal span of aᵀ b

  `compare_reads(exchange(left), exchange(right))` compares output directions.
  `compare_reads(exchange(writer), reader)` compares the outputs of one with the
  inputs of another, later in the residual stream.

  Args:
    left: a (r, in), b (r, out).
    right: a (r', in), b (r', out').
    leading: number of strongest directions for the `leading` figures.

  Returns:
    Shared; it depends on the changes alone, not on their factorisation. Costs a
    QR of each factor on the host.

  Raises:
    ValueError: the inputs differ in size, or stacks of Loras.

  Example:
    >>> one, two = (Lora(np.float32(a), np.eye(2, dtype=np.float32),
    ...                  np.float32(1))
    ...             for a in ([[1, 0, 0], [0, 1, 0]],
    ...                       [[1, 0, 0], [0, .5, .75**.5]]))
    >>> found = compare_reads(one, two)
    >>> round(found.overlap, 4), found.angles.round(1).tolist()
    (0.625, [0.0, 60.0])

  References:
    Björck and Golub (1973); overlap: Hu et al. (2021), equation 4.
  """
  if left.a.shape[-1] != right.a.shape[-1]:
    raise ValueError(
      f"Spaces differ: a {left.a.shape} and a {right.a.shape}; compare what is "
      "read from, or written to, one stream."
    )
  size = left.a.shape[-1]
  one, two = _span(left), _span(right)
  few = min(leading, one.shape[1], two.shape[1])
  nan = float("nan")
  if few == 0:
    return Shared(nan, nan, nan, nan, np.zeros(0))
  cosines = np.linalg.svd(one.T @ two, compute_uv=False)
  sines = _sines(one, two)
  # arccos is exact near 90 degrees, arcsin near 0.
  angles = np.degrees(
    np.where(
      cosines > 0.7,
      np.arcsin(np.clip(sines, 0, 1)),
      np.arccos(np.clip(cosines, 0, 1)),
    )
  )
  top = one[:, :few].T @ two[:, :few]
  return Shared(
    overlap=float(np.mean(np.clip(cosines, 0, 1) ** 2)),
    level=max(one.shape[1], two.shape[1]) / size,
    leading=float(np.sum(top**2) / few),
    leading_level=few / size,
    angles=angles,
  )


def _sines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
  """Computes the sines of the principal angles, ascending."""
  if one.shape[1] < two.shape[1]:
    one, two = two, one
  off = two - one @ (one.T @ two)
  return np.linalg.svd(off, compute_uv=False)[::-1]


def _span(lora: Lora) -> np.ndarray:
  """Returns an orthonormal basis (in, k) of a change's inputs, float64."""
  lora = on_host(lora)
  u, s, _ = recompress(lora.a, lora.b, lora.rank)
  # Leave out units of zero strength: their directions are arbitrary.
  kept = s > _NOISE * s[0] if lora.scale != 0 else np.zeros(len(s), bool)
  return np.linalg.qr(u[:, kept].astype(np.float64))[0]


def link_layers(
  paths: Iterable[str], writers: str, readers: str, *, ahead: int = 1
) -> list[tuple[str, str]]:
  r"""Pairs modules that write the residual stream with later ones that read it.

  Args:
    paths: of an adapter's modules.
    writers: regex of whole paths of modules that write to the residual stream;
      its first group is the layer's number.
    readers: the same for modules that read from it.
    ahead: how many layers after the writer the reader is.

  Returns:
    [(writer, reader)], in the order of paths.

  Raises:
    ValueError: there is no such pair.

  Example:
    >>> link_layers(["h/0/o", "h/0/q", "h/1/q"], r"h/(\d+)/o", r"h/(\d+)/q")
    [('h/0/o', 'h/1/q')]
  """
  paths = list(paths)
  writing, reading = (
    {path: int(m[1]) for path in paths if (m := re.fullmatch(pattern, path))}
    for pattern in (writers, readers)
  )
  pairs = [
    (writer, reader)
    for writer, at in writing.items()
    for reader, to in reading.items()
    if to == at + ahead
  ]
  if not pairs:
    raise ValueError(
      f"None of {len(paths)} modules ({name_some(paths)}) write and are read "
      f"{ahead} layers on by {writers!r} and {readers!r}."
    )
  return pairs


def compare_layers(
  first: Mapping[str, Lora],
  second: Mapping[str, Lora],
  links: Iterable[tuple[str, str]],
  *,
  leading: int = 8,
) -> dict[tuple[str, str], Shared]:
  """Compares one adapter's outputs with another's inputs in later layers.

  Args:
    first: the adapter that reads.
    second: the adapter that writes.
    links: (path that writes, path that reads), from `link_layers`.
    leading: number of strongest directions for the `leading` figures.

  Returns:
    {link: Shared}, comparing the span of the second's b with that of the
    first's a.

  Raises:
    ValueError: the widths differ, or a module is missing.

  Approximation: the norm between the two, which scales each channel, is left
  out, and so are the layers in between.

  Example:
    >>> w = Lora(np.eye(3)[:1], np.eye(2)[:1], np.float32(1))
    >>> r = Lora(np.eye(2)[:1], np.eye(3)[:1], np.float32(1))
    >>> compare_layers({"r": r}, {"w": w}, [("w", "r")])["w", "r"].overlap
    1.0
  """
  links = list(links)
  lost = [
    f"{path} of the {name}"
    for link in links
    for name, path, loras in (
      ("second", link[0], second), ("first", link[1], first)
    )
    if path not in loras
  ]  # fmt: skip
  if lost:
    raise ValueError(f"{len(lost)} modules are not there: {name_some(lost)}.")
  return {
    (writer, reader): compare_reads(
      exchange(second[writer]), first[reader], leading=leading
    )
    for writer, reader in links
  }


def on_host(lora: Lora) -> Lora:
  """Converts a Lora to NumPy float32; raises if it is a stack of several."""
  if lora.a.ndim != 2:
    raise ValueError(
      f"a {lora.a.shape} is a stack of Loras; compare its members one by one."
    )
  return jax.tree.map(lambda x: np.asarray(x, np.float32), lora)
