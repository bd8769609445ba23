# SPDX-License-Identifier: Apache-2.0
"""Measures how much two adapters of one base conflict, before merging them.

The figures are computed from the thin factors, on the host. A change reads
input directions with a and writes output directions with b. Every overlap comes
with the value that random directions would give.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.evaluation.overlaps import compare_reads, on_host
from jlora.loras import Lora, check_loras, exchange
from jlora.messages import name_some

# Channels whose change is below this share of the largest count as unchanged.
_NOISE = 1e-6
# Entries that are formed at a time, and entries that a threshold is read from.
_BLOCK, _SAMPLE = 2**20, 2**18


def cosine(left: Lora, right: Lora) -> float:
  """Computes the cosine of two changes, read as vectors.

      <Δ, Δ'> = scale scale' Σ (a a'ᵀ) ⊙ (b b'ᵀ)

  Args:
    left: a (r, in), b (r, out).
    right: of the same parameter.

  Returns:
    Between -1 and 1, NaN if either is zero. O((in + out) r r').

  Raises:
    ValueError: parameters of different shape, or stacks.

  Example:
    >>> lora = Lora(np.ones((1, 2)), np.ones((1, 3)), np.float32(2))
    >>> round(cosine(lora, Lora(lora.a, -lora.b, lora.scale)), 6)
    -1.0
  """
  left, right = _of_one_parameter(left, right)
  norms = inner_product(left, left) * inner_product(right, right)
  return inner_product(left, right) / norms**0.5 if norms > 0 else float("nan")


def inner_product(left: Lora, right: Lora) -> float:
  """Computes the inner product of two changes, over all layers of a stack.

      <Δ, Δ'> = Σ scale scale' Σ (a a'ᵀ) ⊙ (b b'ᵀ)

  Args:
    left: a (..., r, in), b (..., r, out).
    right: of the same parameter.

  Returns:
    A number, in float64. O((in + out) r r') on the host.

  Example:
    >>> lora = Lora(np.ones((1, 2)), np.ones((1, 3)), np.float32(2))
    >>> inner_product(lora, lora)
    24.0
  """
  a, b = (
    np.einsum(
      "...ri,...si->...rs", *(np.asarray(z, np.float64) for z in (x, y))
    )
    for x, y in ((left.a, right.a), (left.b, right.b))
  )
  scale = np.asarray(left.scale, np.float64) * np.asarray(right.scale)
  return float(np.sum(scale[..., None, None] * a * b))


def _of_one_parameter(left: Lora, right: Lora) -> tuple[Lora, Lora]:
  """Returns both on the host; raises if their shapes differ."""
  left, right = on_host(left), on_host(right)
  shapes = [(x.a.shape[-1], x.b.shape[-1]) for x in (left, right)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"Changes of {shapes[0]} and {shapes[1]}, (in, out), are not of one "
      "parameter."
    )
  return left, right


def column_cosine(left: Lora, right: Lora) -> float:
  """Computes the mean cosine of two changes' rows, one for each input channel.

      mean_j cos(Δ[j], Δ'[j]),   Δ[j] = scale bᵀ a[:, j]

  Args:
    left: a (r, in), b (r, out).
    right: of the same parameter.

  Returns:
    Between -1 and 1; channels that either does not change are skipped, and NaN
    if none is left. O(in r r' + out r r').

  Raises:
    ValueError: as `cosine`.

  Example:
    >>> one = Lora(np.eye(2), np.array([[1, 0], [2, 1.]]), np.float32(1))
    >>> two = Lora(np.eye(2), np.array([[1, 1], [0, 1.]]), np.float32(1))
    >>> round(column_cosine(one, two), 4)
    0.5772

  References:
    Shah et al. (2023), ZipLoRA, figure 3b: there a weight is (out, in) and
    input channels are columns.
  """
  left, right = _of_one_parameter(left, right)

  def product(x, y):
    """Computes the inner product for each input channel."""
    middle = x.b.astype(np.float64) @ y.b.astype(np.float64).T
    return np.sum(x.a * (middle @ y.a), axis=0)

  squares = product(left, left) * product(right, right)
  used = squares > _NOISE**4 * max(squares.max(), 1e-300)
  if not used.any():
    return float("nan")
  sign = np.sign(float(left.scale) * float(right.scale))
  return float(
    np.mean(sign * product(left, right)[used] / np.sqrt(squares[used]))
  )


class Signs(NamedTuple):
  """Shares of entries that two changes move in opposite directions.

  Attributes:
    everywhere: of the entries that both change; one half at random.
    large: of the entries that are large in both.
    both_large: share of entries that are large in both; top² at random.
  """

  everywhere: float
  large: float
  both_large: float


def compare_signs(left: Lora, right: Lora, *, top: float = 0.2) -> Signs:
  """Counts how often two changes disagree in sign.

  Only this needs the dense changes, which it forms in blocks of 2^20 entries.

  Args:
    left: a (r, in), b (r, out).
    right: of the same parameter.
    top: share of each change's entries that count as large, by magnitude.

  Returns:
    Signs; NaN where no entry counts. Costs `2 in out (r + r')` operations.

  Raises:
    ValueError: as `cosine`.

  Approximation: the threshold for large entries is taken from evenly spaced
  rows, up to 2^18 entries; then all entries are counted.

  Example:
    >>> one = Lora(np.eye(2), np.array([[1, -1], [2, 1.]]), np.float32(1))
    >>> two = Lora(np.eye(2), np.array([[1, 1], [-3, 1.]]), np.float32(1))
    >>> compare_signs(one, two).everywhere
    0.5

  References:
    Yadav et al. (2023), TIES, section 3: interference.
  """
  left, right = _of_one_parameter(left, right)
  rows, columns = left.a.shape[1], left.b.shape[1]
  every = np.unique(
    np.linspace(0, rows - 1, max(1, _SAMPLE // columns)).astype(int)
  )
  edges = [
    np.quantile(np.abs(_rows(lora, every)), 1 - top) for lora in (left, right)
  ]
  counts = np.zeros(4)
  step = max(1, _BLOCK // columns)
  for start in range(0, rows, step):
    x, y = (_rows(lora, slice(start, start + step)) for lora in (left, right))
    product = x * y
    large = (np.abs(x) >= edges[0]) & (np.abs(y) >= edges[1]) & (product != 0)
    counts += [
      np.sum(product != 0), np.sum(product < 0), np.sum(large),
      np.sum(large & (product < 0)),
    ]  # fmt: skip
  share = lambda x, y: float(x / y) if y else float("nan")  # noqa: E731
  return Signs(
    share(counts[1], counts[0]),
    share(counts[3], counts[2]),
    float(counts[2] / (rows * columns)),
  )


def _rows(lora: Lora, at) -> np.ndarray:
  """Computes some rows of a change, without its scale's magnitude."""
  return np.sign(lora.scale) * (lora.a[:, at].T @ lora.b)


def compare_adapters(
  left: Mapping[str, Lora], right: Mapping[str, Lora], *, leading: int = 8
) -> dict[str, dict[str, Any]]:
  """Measures how two adapters conflict and overlap, by module.

  Args:
    left: path -> Lora.
    right: the other adapter of the same base.
    leading: number of strongest directions for the `leading` figures.

  Returns:
    {path: row} for the modules of both, in the order of the first. A row can be
    written as JSON: cosine, column_cosine, sign_conflict, sign_conflict_large,
    and for `read` (input) and `write` (output) directions the fields of Shared,
    `read_overlap`, `read_level` and so on, angles as lists. Costs
    `2 in out (r + r')` operations per module, for the signs.

  Raises:
    ValueError: no module in common, or modules that do not fit.

  Example:
    >>> loras = {"w": Lora(np.eye(2), np.eye(2), np.float32(1))}
    >>> row = compare_adapters(loras, loras)["w"]
    >>> round(row["cosine"], 4), row["read_overlap"], row["write_level"]
    (1.0, 1.0, 1.0)
  """
  check_loras(left)
  check_loras(right)
  common = [path for path in left if path in right]
  if not common:
    raise ValueError(
      f"The adapters have no module in common: {name_some(left)}; and "
      f"{name_some(right)}."
    )
  rows = {}
  for path in common:
    one, two = left[path], right[path]
    signs = compare_signs(one, two)
    row: dict[str, Any] = {
      "cosine": cosine(one, two),
      "column_cosine": column_cosine(one, two),
      "sign_conflict": signs.everywhere,
      "sign_conflict_large": signs.large,
    }
    sides = {"read": (one, two), "write": (exchange(one), exchange(two))}
    for side, pair in sides.items():
      found = compare_reads(*pair, leading=leading)._asdict()
      found["angles"] = found["angles"].tolist()
      row |= {f"{side}_{name}": value for name, value in found.items()}
    rows[path] = row
  return rows


def find_intruders(
  w: Any, lora: Lora, *, top: int = 10, threshold: float = 0.5
) -> np.ndarray:
  """Finds leading output directions of a changed weight that the base lacks.

      max_i |<v_j(w + Δ), v_i(w)>| < threshold,   j = 1, ..., top

  Args:
    w: (in, out), the base's weight.
    lora: a (r, in), b (r, out).
    top: number of leading directions to check.
    threshold: a direction is an intruder if its cosine with every direction of
      the base is below this.

  Returns:
    (count, 2) float64: the index j from 0 and the largest cosine of every
    intruder. Costs two singular value decompositions on the host,
    O(in out min(in, out)).

  Raises:
    ValueError: a Lora of another shape.

  Example:
    >>> w = np.diag(np.arange(16.0, 0, -1))
    >>> ones = np.ones((1, 16), np.float32)
    >>> lora = Lora(ones, ones, np.float32(10 / 16))
    >>> find_intruders(w, lora).round(3).tolist()
    [[0.0, 0.497]]

  References:
    Shuttleworth et al. (2024), section 3. Their weights are (out, in), whose
    left singular vectors are these.
  """
  lora = on_host(lora)
  if np.shape(w) != (lora.a.shape[-1], lora.b.shape[-1]):
    raise ValueError(
      f"w {np.shape(w)} is no base of a {lora.a.shape}, b {lora.b.shape}."
    )
  w = np.asarray(w, np.float32)
  changed = w + lora.scale * (lora.a.T @ lora.b)
  base, new = (np.linalg.svd(x, full_matrices=False)[2] for x in (w, changed))
  most = np.abs(new[:top] @ base.T).max(axis=1)
  at = np.flatnonzero(most < threshold)
  return np.stack([at, most[at]], axis=1).astype(np.float64)
