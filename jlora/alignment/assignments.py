# SPDX-License-Identifier: Apache-2.0
"""Finds the best order of one permutation's units, by linear assignment.

Permutations inside the units are matched along with it. Scores are computed in
float32; only (n, n) of them reach the host, where SciPy solves the assignment.
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

# How often each of several inner permutations is improved, at most.
_TURNS = 20


class Tensor(NamedTuple):
  """One array of two networks, split into the units of a permutation.

  Attributes:
    inner: the inner permutations that act on it, in the order of its axes.
    a: units of the outer permutation, each (inner ..., rest), float32.
    b: the same array of the network whose units are reordered.
  """

  inner: tuple[str, ...]
  a: Sequence[Any]
  b: Sequence[Any]


class Matched(NamedTuple):
  """The result of matching one permutation and those inside it.

  Attributes:
    permutations: the new orders.
    gain: by how much the score rises; 0 if nothing moves.
  """

  permutations: Permutations
  gain: float


def solve(scores: Any, tol: float = 0.0) -> tuple[np.ndarray, float]:
  """Solves the linear assignment problem, preferring units to stay in place.

      max_p Σ_i scores[i, p(i)] + tol max |scores| [p(i) = i]

  Args:
    scores: (n, n), finite.
    tol: a unit moves only if that gains more than this share of the largest
      score, and nothing moves unless all together gain more than this share of
      Σ_i max_j |scores[i, j]|. Without it, units that are never active would
      move at random.

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
  """Yields the arrays that a permutation and those inside it act on.

  Args:
    left: path -> array.
    right: the same for the network whose units are reordered.
    layout: of both networks.
    root: the permutation.
    inner: those inside it.
    paths: the parameters that any of them acts on.

  Yields:
    Tensor; an array whose axes have several parts gives one for each part.

  Example:
    >>> place = Place((((Factor("u", 2),),), ((Factor("-", 3),),)), "", 0, ())
    >>> w = {"w": np.ones((2, 3))}
    >>> layout = UnitLayout({"w": place}, {"u": 2}, {})
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
  """Yields the parts of a stack, whose arrays are the units themselves."""
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
  """Moves the named axes first and flattens the rest, as float32."""
  rest = tuple(i for i in range(x.ndim) if i not in order)
  x = x.transpose(order + rest).astype(np.float32)
  return x.reshape(*x.shape[: len(order)], -1)


def _blocks(x: Any, axes) -> Iterator[tuple[Any, list[str]]]:
  """Yields an array's parts, one axis per factor, and the factors' names."""
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
  """Finds the best order of a permutation's units and of what is inside each.

  Args:
    tensors: from `tensors_of`.
    root: the permutation.
    inner: those inside it.
    sizes: of all of them.
    tol: as for `solve`.

  Returns:
    Matched. Optimal with no inner permutation or one: each pair of units is
    scored with its best inner order. Several inner ones are improved in turn
    from their current order, so that the score never falls.

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
  """Matches the insides of every pair of units, then the units."""
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
  """Returns two units' best score, inner orders and current score."""
  orders = {name: np.arange(sizes[name]) for name in inner}
  acting = [
    name
    for name in inner
    if sizes[name] > 1 and any(name in names for names, _, _ in pairs)
  ]
  start = _score(pairs, orders)
  # A limit, because gains as small as rounding errors could go on forever.
  for _ in range(_TURNS if len(acting) > 1 else 1):
    moved = [_turn(pairs, name, orders, sizes[name], tol) for name in acting]
    if not any(moved):
      break
  return _score(pairs, orders), orders, start


def _turn(pairs, name, orders, size: int, tol: float) -> bool:
  """Improves one inner permutation in place; returns whether it moved."""
  scores = np.zeros((size, size))
  for names, a, b in pairs:
    if name in names:
      at = names.index(name)
      other = _unfold(_ordered(names, b, orders, name), at)
      scores += np.asarray(_unfold(a, at) @ other.T)
  # Columns in the order found so far, so that the gain is relative to it.
  step, gain = solve(scores[:, orders[name]], tol)
  orders[name] = orders[name][step]
  return gain > 0


def _score(pairs, orders) -> float:
  """Computes the inner product of paired units under given inner orders."""
  return sum(
    float(_flat(a) @ _flat(_ordered(names, b, orders))) for names, a, b in pairs
  )


def _ordered(names, b, orders, but: str = ""):
  """Applies the inner orders to a unit, except that of `but`."""
  for i, name in enumerate(names):
    if name != but and (orders[name] != np.arange(len(orders[name]))).any():
      b = library_of(b).take(b, orders[name], axis=i)
  return b


def _unfold(x, axis: int):
  """Moves an axis first and flattens the rest."""
  return library_of(x).moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def _flat(x):
  """Flattens an array."""
  return x.reshape(-1)


def _matrix(units) -> Any:
  """Returns units as the rows of a matrix."""
  if isinstance(units, list):
    return library_of(units[0]).stack([_flat(unit) for unit in units])
  return units.reshape(units.shape[0], -1)
