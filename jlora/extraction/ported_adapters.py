# SPDX-License-Identifier: Apache-2.0
"""Carries a whole adapter to another base, and says what weights can say of it.

kept = |Δ_t| / |Δ_s|,   drift = |w_t - w_s| / |w_s|
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.extraction.port_planning import PortPlan, plan_port
from jlora.extraction.porting import Port, add, find_spaces, port
from jlora.factoring.factorisers import Factoriser, svd
from jlora.formats.fingerprints import check_fingerprint
from jlora.loras import Lora, Loras
from jlora.messages import name_some
from jlora.numerics.backends import library_of
from jlora.views import ViewRule

_OTHER_LENGTH = 1.5  # a weight that grew by this is said
#: Leading singular vectors that figures are of, if nobody says how many.
LEADING = 16


class Ported(NamedTuple):
  """An adapter on another base.

  Attributes:
    loras: path in the target -> Lora.
    rows: path in the target -> figures: `source` (its path there), `kept`,
      `drift`, `read_alike` and `write_alike` (mean squared cosines of the
      principal angles between the leading spaces of both weights), `length`
      (|w_t| / |w_s|), `k` and `is_kept`. Where rows were matched all but `kept`
      are of those that both have, and there are `carried_rows`, `new_rows` (of
      the target, which have no change) and `lost_rows` (of the source, whose
      change has no place).
    left_out: paths in the source whose Loras are not in `loras`.
  """

  loras: Loras
  rows: dict[str, dict[str, Any]]
  left_out: list[str]


class PortedModule(NamedTuple):
  """One module of an adapter on another base.

  Attributes:
    lora: on the target.
    row: its figures, as in `Ported`, with `is_kept`.
    target: the target's parameter, as it was read.
  """

  lora: Lora
  row: dict[str, Any]
  target: Any


def port_adapter(
  loras: Mapping[str, Lora],
  source: Any,
  target: Any,
  *,
  method: Port = add,
  k: int | None = None,
  keep: float = 0.0,
  paths: Mapping[str, str | None] | None = None,
  rows: Mapping[str, Sequence[int]] | None = None,
  factor: Factoriser = svd,
  views: Iterable[ViewRule] | None = None,
  fingerprint: Mapping[str, Mapping[str, Any]] | None = None,
) -> Ported:
  """Carries an adapter from the base it was made on to another base.

      loras_t[path] = method(loras_s[path], source[path], target[path])

  No rule decides by the figures: measured on 48 pairs of a skill and an update
  of one lineage, neither drift nor the likeness of spaces told which adapters
  fail when they are added (areas under the curve 0.42 to 0.69); only a base of
  another seed stands out. Measure the result, or train it with
  `jlora.training.distil`.

  Args:
    loras: path -> Lora, with paths as in `source`.
    source: a pytree of arrays or an open checkpoint.
    target: likewise.
    method: `add`, `project`, `both_parts` or `rotate`.
    k: how many leading singular vectors a space has; None is min(in, out) for
      the method, and a quarter of it, 1 to 16, for the figures.
    keep: modules of which less is kept are left out; in [0, 1].
    paths: path in the source -> path in the target, for those that are named
      otherwise there; None leaves a module out. The layers of a model that has
      others are mapped so: `expand_map` makes it from their prefixes.
    rows: path in the source of an embedding or a head -> for each row of the
      target's the row of the source's, or -1: a grown vocabulary. The Lora and
      both weights are cut to the rows that both have, ported, and put in the
      target's order; other rows get no change. None matches the rows of two
      checkpoints by token, as `match_rows`, and takes those of trees as they
      are.
    factor: finds spaces: `svd`, or `krylov` where k is small.
    views: how parameters are read as matrices; by default by their names.
    fingerprint: what the adapter says of its base (`read_fingerprint`).

  Returns:
    Ported. Figures of stacks of layers are those of the whole stack. One module
    of both bases is in memory at a time; of the checkpoints nothing else.

  Raises:
    ValueError: a Lora that no parameter of the source or of the target belongs
      to, several for one of the target, other shapes, or as `port`. Names up to
      three and counts the rest. A weight of another shape that is no table of
      tokens (another width) has no port by weights.

  Warns:
    OtherBaseWarning: the source is not what `fingerprint` says.
    UserWarning: weights whose lengths differ by more than half: a norm's scale
      may have been folded into one of them.

  Example:
    >>> old, new = {"w": jnp.eye(2)}, {"w": 1.1 * jnp.eye(2)}
    >>> lora = Lora(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.float32(1))
    >>> found = port_adapter({"w": lora}, old, new)
    >>> round(found.rows["w"]["drift"], 4), found.rows["w"]["kept"]
    (0.1, 1.0)
  """
  check_keep(keep)
  plan = plan_port(loras, source, target, paths=paths, rows=rows, views=views)
  check_fingerprint(fingerprint, source)
  left_out = list(plan.unmapped)
  found, told = {}, {}
  for path, to in plan.places.items():
    one = port_module(
      plan, path, loras[path], method=method, k=k, keep=keep, factor=factor
    )
    told[to] = one.row
    if one.row["is_kept"]:
      found[to] = one.lora
    else:
      left_out.append(path)
  warn_of_lengths(told)
  return Ported(found, told, left_out)


def check_keep(keep: float) -> None:
  """Raises unless a share that must be kept is one.

  Args:
    keep: what is asked for.

  Raises:
    ValueError: it is not in [0, 1].

  Example:
    >>> check_keep(0.5)
  """
  if not 0 <= keep <= 1:
    raise ValueError(f"keep is {keep}; a share is in [0, 1].")


def port_module(
  plan: PortPlan,
  path: str,
  lora: Lora,
  *,
  method: Port,
  k: int | None,
  keep: float,
  factor: Factoriser,
  figures: Factoriser | None = None,
) -> PortedModule:
  """Carries one module's Lora, and says what the weights say of it.

  Args:
    plan: from `plan_port`.
    path: of the module, in the source.
    lora: its Lora.
    method: as for `port_adapter`.
    k: likewise.
    keep: likewise.
    factor: finds the method's spaces.
    figures: finds those of the figures; None is `factor`.

  Returns:
    PortedModule. Memory: the module's weights as stored and in float32.
  """
  to = plan.places[path]
  leaf = plan.new.leaves[to]
  before = _weight(plan.old.matrix(path, plan.old.leaves[path]))
  after = _weight(plan.new.matrix(to, leaf))
  part, rows, axis = lora, plan.rows.get(path), plan.axes.get(path, 0)
  if rows is not None:
    here = np.flatnonzero(rows >= 0)
    there = rows[here]
    part = _at_rows(lora, axis, there)
    before, after = (
      library_of(w).take(w, at, axis=axis)
      for w, at in ((before, there), (after, here))
    )
  once = _remembered(factor)
  ported = port(part, before, after, method=method, k=k, factor=once)
  told = once if figures is None else _remembered(figures)
  row: dict[str, Any] = {"source": path}
  row |= _figures(lora, ported, before, after, k, told)
  if rows is not None:
    row |= _count_rows(lora, axis, rows)
    ported = _in_order(ported, axis, here, len(rows))
  row["is_kept"] = not row["kept"] < keep
  return PortedModule(ported, row, leaf)


def _weight(matrix: Any) -> Any:
  """Returns a weight in float32, of NumPy if it was and JAX has only CPUs.

  Compiling a factoriser for every shape would take longer than many models.
  """
  on_host = jax.default_backend() == "cpu"
  xp = library_of(matrix) if on_host else jnp
  return xp.asarray(matrix, jnp.float32)


def _at_rows(lora: Lora, axis: int, rows: np.ndarray) -> Lora:
  """Returns the Lora of some rows (axis -2: of the input) of a matrix."""
  a, b = jnp.asarray(lora.a), jnp.asarray(lora.b)
  if axis == -2:
    return Lora(jnp.take(a, rows, axis=-1), b, lora.scale)
  return Lora(a, jnp.take(b, rows, axis=-1), lora.scale)


def _in_order(lora: Lora, axis: int, rows: np.ndarray, count: int) -> Lora:
  """Puts the rows of a Lora at their places among `count`, others zero."""

  def spread(factor):
    empty = jnp.zeros((*factor.shape[:-1], count), factor.dtype)
    return empty.at[..., rows].set(factor)

  if axis == -2:
    return Lora(spread(lora.a), lora.b, lora.scale)
  return Lora(lora.a, spread(lora.b), lora.scale)


def _count_rows(lora: Lora, axis: int, rows: np.ndarray) -> dict[str, int]:
  """Counts the rows that are carried, new, and lost with their change."""
  factor = np.asarray(lora.a if axis == -2 else lora.b)
  changed = np.any(factor != 0, axis=tuple(range(factor.ndim - 1)))
  changed[rows[rows >= 0]] = False
  return {
    "carried_rows": int(np.sum(rows >= 0)),
    "new_rows": int(np.sum(rows < 0)),
    "lost_rows": int(np.sum(changed)),
  }


def _figures(lora, ported, w_source, w_target, k, factor) -> dict[str, Any]:
  """Computes what a module's weights say of its port."""
  most = min(w_source.shape[-2:])
  k = min(max(1, most // 4), LEADING) if k is None else k
  source, target = (find_spaces(w, k, factor) for w in (w_source, w_target))
  norm = library_of(w_source).linalg.norm
  size, length = float(norm(w_source)), float(norm(w_target))
  moved = float(norm(w_target - w_source))
  before, after = _length(lora), _length(ported)
  return {
    "kept": after / before if before else float("nan"),
    "drift": moved / size if size else float("nan"),
    "read_alike": _alike(source.reads, target.reads),
    "write_alike": _alike(source.writes, target.writes),
    "length": length / size if size else float("nan"),
    "k": k,
  }


def _remembered(factor: Factoriser) -> Factoriser:
  """Returns a factoriser that factors each of two weights once for each k."""
  found: dict[tuple[int, int], Any] = {}

  def run(w, k, key=None):
    """Factors a weight, or returns what was found."""
    at = id(w), k
    if at not in found:
      found[at] = w, factor(w, k, key)  # w: so that its id stays its own
    return found[at][1]

  return run


def _length(lora: Lora) -> float:
  """Returns |scale aᵀ b|, over all layers of a stack, from the factors."""
  grams = [
    jnp.einsum("...rn,...sn->...rs", x, x, precision=jax.lax.Precision.HIGHEST)
    for x in (lora.a.astype(jnp.float32), lora.b.astype(jnp.float32))
  ]
  squares = jnp.sum(grams[0] * grams[1], axis=(-1, -2))
  return float(jnp.sqrt(jnp.maximum(jnp.sum(lora.scale**2 * squares), 0.0)))


def _alike(one: jax.Array, two: jax.Array) -> float:
  """Returns the mean squared cosine of the angles between spaces."""
  both = jnp.einsum(
    "...nk,...nl->...kl", one, two, precision=jax.lax.Precision.HIGHEST
  )
  count = jnp.sum(jnp.square(one), axis=(-1, -2))
  share = jnp.sum(jnp.square(both), axis=(-1, -2)) / jnp.maximum(count, 1.0)
  return float(jnp.mean(share))


def warn_of_lengths(rows: Mapping[str, Mapping[str, Any]]) -> None:
  """Warns of weights that are much longer or shorter than the source's.

  Args:
    rows: path in the target -> its figures.

  Warns:
    UserWarning: names up to three.

  Example:
    >>> warn_of_lengths({"w": {"length": 1.1}})
  """
  far = [
    f"{path} ({row['length']:.2f} x)"
    for path, row in rows.items()
    if not 1 / _OTHER_LENGTH < row["length"] < _OTHER_LENGTH
    and not np.isnan(row["length"])
  ]
  if far:
    warnings.warn(
      f"{len(far)} weights differ much in length from the source's: "
      f"{name_some(far)}; if a norm's scale was folded into one of the bases, "
      "their directions do not compare.",
      stacklevel=3,
    )
