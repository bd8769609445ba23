# SPDX-License-Identifier: Apache-2.0
"""One permutation matched, with those inside its units: linear assignment.

Scores are products in float32; only (n, n) of them reach the host, where
SciPy solves the assignment.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epy

from jlora.alignment.layouts import Factor, Place, UnitLayout
from jlora.alignment.permutations import Permutations
from jlora.numerics.backends import library_of

with epy.lazy_imports():  # half a second
  import scipy.optimize

# Turns that several inner permutations take at the most.
_TURNS = 20


class Tensor(NamedTuple):
  """What a permutation and those inside it act on, of two networks.

  Attributes:
    inner: the inner permutations that act on it, in the order of its axes.
    a: units of the outer one, each (inner ..., rest), float32.
    b: the same of the network that is put in order.
  """

  inner: tuple[str, ...]
  a: Sequence[Any]
  b: Sequence[Any]


class Matched(NamedTuple):
  """A step of coordinate descent.

  Attributes:
    permutations: of the family.
    gain: of the score; 0 if nothing moves.
  """

  permutations: Permutations
  gain: float


def solve(scores: Any, tol: float = 0.0) -> tuple[np.ndarray, float]:
  """The assignment of largest score, of equal ones that which moves least.

      max_p Σ_i scores[i, p(i)] + tol max |scores| [p(i) = i]

  Args:
    scores: (n, n), finite.
    tol: a unit moves for more than this share of the largest score; any do
      for more than it of Σ_i max_j |scores[i, j]|. Units that are never active
      would move at random without it.

  Returns:
    p (n,) int64 and its gain over p(i) = i. O(n³) on the host.

  Example:
    >>> solve(np.array([[1.0, 4.0], [4.0, 1.0]]))
    (array([1, 0]), 6.0)

  References:
    Crouse (2016), by `scipy.optimize.linear_sum_assignment`.
  """
  scores = np.asarray(scores, np.float64)
  here = np.arange(len(scores))
  stay = tol * np.abs(scores).max() * np.eye(len(scores))
  found = scipy.optimize.linear_sum_assignment(scores + stay, maximize=True)[1]
  gain = float(np.sum(scores[here, found] - scores[here, here]))
  if gain <= tol * float(np.abs(scores).max(axis=1).sum()):
    return here, 0.0
  return found, gain


def tensors_of(
  left: Mapping[str, Any],
  right: Mapping[str, Any],
  layout: UnitLayout,
  root: str,
  inner: Sequence[str],
  paths: Sequence[str],
) -> Iterator[Tensor]:
  """The arrays that a permutation and those inside it act on, one at a time.

  Args:
    left: path -> array.
    right: the same of the network that is put in order.
    layout: of both.
    root: the permutation.
    inner: those inside it.
    paths: the parameters that any of them acts on.

  Yields:
    Tensor; an array of several parts gives one for each.

  Example:
    >>> place = Place((((Factor("u", 2),),), ((Factor("-", 3),),)), "", 0, ())
    >>> w = {"w": np.ones((2, 3))}
    >>> layout = Layout({"w": place}, {"u": 2}, {})
    >>> [x.a[0].shape for x in tensors_of(w, w, layout, "u", (), ["w"])]
    [(3,)]
  """
  for path in paths:
    place = layout.places[path]
    if place.stack == root:
      if place.index == 0:
        yield from _stacked(left, right, place, inner)
      continue
    blocks = zip(
      _blocks(left[path], place.axes),
      _blocks(right[path], place.axes),
      strict=True,
    )
    for (x, names), (y, _) in blocks:
      if root in names:
        own = tuple(name for name in names if name in inner)
        order = (names.index(root), *(names.index(name) for name in own))
        yield Tensor(own, _units(x, order, 1), _units(y, order, 1))


def _stacked(left, right, place: Place, inner) -> Iterator[Tensor]:
  """Of arrays that are units themselves."""
  sides = []
  for flat in (left, right):
    sides.append([list(_blocks(flat[p], place.axes)) for p in place.peers])
  for block in range(len(sides[0][0])):
    names = sides[0][0][block][1]
    own = tuple(name for name in names if name in inner)
    order = tuple(names.index(name) for name in own)
    yield Tensor(
      own,
      *([_units(unit[block][0], order, 0) for unit in side] for side in sides),
    )


def _units(x: Any, order: tuple[int, ...], extra: int) -> Any:
  """The named axes first, the rest flattened, float32."""
  rest = tuple(i for i in range(x.ndim) if i not in order)
  x = x.transpose(order + rest).astype(np.float32)
  return x.reshape(*x.shape[: len(order)], -1)


def _blocks(x: Any, axes) -> Iterator[tuple[Any, list[str]]]:
  """The parts of an array, an axis for each factor, and the factors' names."""
  for i, axis in enumerate(axes):
    if len(axis) > 1:
      start = 0
      for part in axis:
        size = int(np.prod([f.size for f in part]))
        cut = x[(slice(None),) * i + (slice(start, start + size),)]
        yield from _blocks(cut, (*axes[:i], (part,), *axes[i + 1 :]))
        start += size
      return
  factors: list[Factor] = [f for axis in axes for f in axis[0]]
  yield x.reshape([f.size for f in factors]), [f.name for f in factors]


def match_family(
  tensors: Iterator[Tensor],
  root: str,
  inner: Sequence[str],
  sizes: Mapping[str, int],
  tol: float,
) -> Matched:
  """The best order of a permutation's units and of what is inside each.

  Args:
    tensors: of `tensors_of`.
    root: the permutation.
    inner: those inside it.
    sizes: of all of them.
    tol: as for `solve`.

  Returns:
    Matched. Without inner ones, the optimum. With one, too: each pair of units
    is given its best inner order. With several they take turns, from the
    order they are in, and the score can but rise.

  Example:
    >>> x = np.float32([[1, 0], [0, 1]])
    >>> match_family(iter([Tensor((), x, x[::-1])]), "u", (), {"u": 2}, 0.0)
    Matched(permutations={'u': array([1, 0])}, gain=2.0)
  """
  with jax.default_matmul_precision("highest"):
    count = sizes[root]
    scores = np.zeros((count, count))
    nested = []
    for tensor in tensors:
      if tensor.inner:
        nested.append(tensor)
      else:
        scores += np.asarray(_matrix(tensor.a) @ _matrix(tensor.b).T)
    if not nested:
      order, gain = solve(scores, tol)
      return Matched({root: order}, gain)
    return _match_nested(nested, scores, root, inner, sizes, tol)


def _match_nested(tensors, scores, root, inner, sizes, tol) -> Matched:
  """Inner orders of every pair of units, then the order of the units."""
  count = sizes[root]
  orders, before = {}, 0.0
  for i in range(count):
    for j in range(count):
      pairs = [(t.inner, t.a[i], t.b[j]) for t in tensors]
      score, own, start = _match_units(pairs, inner, sizes, tol)
      orders[i, j] = own
      if i == j:
        before += scores[i, i] + start
      scores[i, j] += score
  order, _ = solve(scores, tol)
  here = np.arange(count)
  gain = float(scores[here, order].sum() - before)
  found = {root: order}
  for name in inner:
    found[name] = np.stack([orders[i, order[i]][name] for i in here])
  moved = any((p != np.arange(p.shape[-1])).any() for p in found.values())
  return Matched(found, gain if moved else 0.0)


def _match_units(pairs, inner, sizes, tol):
  """The score of two units, their inner orders, and the score before."""
  orders = {name: np.arange(sizes[name]) for name in inner}
  acting = [
    name
    for name in inner
    if sizes[name] > 1 and any(name in names for names, _, _ in pairs)
  ]
  start = _score(pairs, orders)
  # Rounding must not keep this going where gains are as small as it is.
  for _ in range(_TURNS if len(acting) > 1 else 1):
    moved = [_turn(pairs, name, orders, sizes[name], tol) for name in acting]
    if not any(moved):
      break
  return _score(pairs, orders), orders, start


def _turn(pairs, name, orders, size: int, tol: float) -> bool:
  """Puts one inner permutation at its best, the others held; if it moved."""
  scores = np.zeros((size, size))
  for names, a, b in pairs:
    if name in names:
      at = names.index(name)
      other = _unfold(_ordered(names, b, orders, name), at)
      scores += np.asarray(_unfold(a, at) @ other.T)
  # Gains count from the order that was found so far.
  step, gain = solve(scores[:, orders[name]], tol)
  orders[name] = orders[name][step]
  return gain > 0


def _score(pairs, orders) -> float:
  return sum(
    float(_flat(a) @ _flat(_ordered(names, b, orders))) for names, a, b in pairs
  )


def _ordered(names, b, orders, but: str = ""):
  """Units with their inner axes in order, all but one."""
  for i, name in enumerate(names):
    if name != but and (orders[name] != np.arange(len(orders[name]))).any():
      b = library_of(b).take(b, orders[name], axis=i)
  return b


def _unfold(x, axis: int):
  return library_of(x).moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def _flat(x):
  return x.reshape(-1)


def _matrix(units) -> Any:
  """Units as rows."""
  if isinstance(units, list):
    return library_of(units[0]).stack([_flat(unit) for unit in units])
  return units.reshape(units.shape[0], -1)
